"""Event loops with a virtual clock: a test of timeouts takes no real time and has exact results."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _NoWaitSelector(selectors.SelectSelector):
    """Selector that moves the clock to the next timer instead of waiting for it."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "the test waits for an event that never comes"
        ready = super().select(0)
        if not ready:
            self.now_s += max(0.0, timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Event loop whose `time()` starts at 0 s and jumps from timer to timer."""

    def __init__(self) -> None:
        self._clock = _NoWaitSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in virtual time. It must not wait for threads, sockets or processes."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(coroutine)
