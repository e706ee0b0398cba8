"""Turns by tenant: so many at once, in order, a bound on who waits, and nobody before another tenant."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.concurrency import Turns
from hub.errors import LimitReached


def test_turns_are_bounded_in_order_and_apart() -> None:
    async def use():
        turns, had, go = Turns(2, 5), [], asyncio.Event()

        async def call(tenant: str, number: int) -> None:
            async with turns.turn(tenant):
                had.append((tenant, number))
                await go.wait()

        crowd = [asyncio.create_task(call("crowd", i)) for i in range(5)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(LimitReached, match="5 calls of this tenant are under way"):
            await call("crowd", 5)
        other = asyncio.create_task(call("other", 0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert had == [("crowd", 0), ("crowd", 1), ("other", 0)]
        crowd[3].cancel()  # it was waiting
        go.set()
        await asyncio.gather(*crowd, other, return_exceptions=True)
        assert had[3:] == [("crowd", 2), ("crowd", 4)]
        assert not turns._lines

    asyncio.run(use())


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    cancelled=st.sets(st.integers(0, 11)),
    pauses=st.lists(st.integers(0, 5), min_size=13, max_size=13),
)
def test_never_more_than_fits_and_nobody_is_forgotten(sizes, cancelled, pauses) -> None:
    async def use():
        turns, used, order = Turns(8), 0, []

        async def call(number: int, size: int) -> None:
            nonlocal used
            async with turns.turn("t", size):
                order.append(number)
                used += min(size, 8)
                try:
                    assert used <= 8
                    for _ in range(pauses[number]):
                        await asyncio.sleep(0)
                finally:
                    used -= min(size, 8)

        tasks = [asyncio.create_task(call(i, size)) for i, size in enumerate(sizes)]
        for _ in range(pauses[12]):
            await asyncio.sleep(0)
        for i in cancelled & set(range(len(tasks))):
            tasks[i].cancel()
        async with asyncio.timeout(5):
            done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in done)
        assert order == sorted(order)
        assert not turns._lines

    asyncio.run(use())
