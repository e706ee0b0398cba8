"""Groups of coroutines that fail together, and long loops in steps."""

import asyncio
import itertools

import pytest

from hub.coroutines import STEP_ITEMS, gather_or_cancel, in_steps


def test_gather_returns_results_in_order() -> None:
    async def value(number: int) -> int:
        for _ in range(3 - number):
            await asyncio.sleep(0)
        return number

    async def use() -> None:
        assert await gather_or_cancel(value(i) for i in range(3)) == [0, 1, 2]

    asyncio.run(use())


def test_gather_of_one_coroutine_returns_and_raises_as_of_several() -> None:
    async def value() -> int:
        await asyncio.sleep(0)
        return 7

    async def fails() -> int:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    async def use() -> None:
        assert await gather_or_cancel([value()]) == [7]
        with pytest.raises(ZeroDivisionError):
            await gather_or_cancel(iter([fails()]))

    asyncio.run(use())


def test_gather_cancels_the_others_when_one_fails() -> None:
    async def use() -> None:
        ended = []

        async def waits() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("waits")

        async def fails() -> None:
            await asyncio.sleep(0)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await gather_or_cancel([waits(), fails(), waits()])
        assert ended == ["waits", "waits"]

    asyncio.run(use())


@pytest.mark.parametrize("count", [1, 2])
def test_gather_cancels_all_when_its_caller_is_cancelled(count: int) -> None:
    async def use() -> None:
        started, ended = asyncio.Event(), []

        async def waits() -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("waits")

        group = [waits() for _ in range(count)]
        caller = asyncio.create_task(gather_or_cancel(group))
        await started.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert ended == ["waits"] * count

    asyncio.run(use())


def test_other_coroutines_run_while_one_goes_through_200_000_items() -> None:
    async def use() -> None:
        made: list[int] = []
        seen = [0]

        def make(item: int) -> int:
            made.append(item)
            return -item

        async def watch() -> None:
            while True:
                seen.append(len(made))
                await asyncio.sleep(0)

        watcher = asyncio.create_task(watch())
        found = await in_steps(make, range(200_000))
        watcher.cancel()
        assert found == [-i for i in range(200_000)]
        assert max(b - a for a, b in itertools.pairwise(seen)) <= STEP_ITEMS
        assert len(seen) >= 200_000 // STEP_ITEMS

    asyncio.run(use())
