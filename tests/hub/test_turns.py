"""Turns by tenant: so many at once, in order, a bound on who waits, and nobody before another tenant."""

import asyncio

import pytest

from hub.errors import LimitReached
from hub.turns import Turns


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
