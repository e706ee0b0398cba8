"""Groups of coroutines that fail together or yield their results as they come, and long loops in steps."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from typing import Any, Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")
STEP_ITEMS = 2000  # a few milliseconds of the event loop


class Together(Generic[T]):
    """Coroutines in groups. Each group yields its results as they come; single coroutines can be dropped by id."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[T]] = {}

    def __len__(self) -> int:
        """Return the number of running coroutines of all groups."""
        return len(self._tasks)

    async def results(
        self, group: Mapping[str, Coroutine[Any, Any, T]]
    ) -> "AsyncGenerator[dict[str, asyncio.Task[T]]]":
        """Run a group, and yield its tasks by id when they have ended, all that have ended since at once.

        A dropped task is left out. The end of this generator cancels the others.
        """
        running = {id: asyncio.create_task(coroutine) for id, coroutine in group.items()}
        self._tasks |= running
        try:
            while running:
                await asyncio.wait(running.values(), return_when=asyncio.FIRST_COMPLETED)
                ended = {id: task for id, task in running.items() if task.done()}
                for id in ended:
                    del running[id], self._tasks[id]
                yield {id: task for id, task in ended.items() if not task.cancelled()}
        finally:
            for id, task in running.items():
                del self._tasks[id]
                task.cancel()

    def drop(self, ids: Iterable[str]) -> None:
        """Cancel coroutines. Those that have ended are ignored."""
        for id in ids:
            if id in self._tasks:
                self._tasks[id].cancel()


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results in order. The first failure cancels the other coroutines and is raised."""
    coroutines = [*coroutines]
    if len(coroutines) == 1:  # the usual call needs no task
        return [await coroutines[0]]
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def in_steps(make: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """Return what `make` makes of each item. The event loop serves others after every `STEP_ITEMS`."""
    made = []
    for number, item in enumerate(items, 1):
        made.append(make(item))
        if number % STEP_ITEMS == 0:
            await asyncio.sleep(0)
    return made
