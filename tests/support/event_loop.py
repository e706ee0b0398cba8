"""Tests on an event loop, with a time limit."""

import asyncio
from collections.abc import Awaitable, Callable

LIMIT_S = 8


def run(use: Callable[[], Awaitable[None]]) -> None:
    """Run a test on an event loop, and fail it when it hangs."""

    async def within() -> None:
        async with asyncio.timeout(LIMIT_S):
            await use()

    asyncio.run(within())


async def until(condition: Callable[[], bool]) -> None:
    """Return when a condition holds, which a thread may change."""
    while not condition():
        await asyncio.sleep(0.005)
