"""Passes that wait until no image waits for classification."""

import asyncio

import pytest

from hub.errors import Unavailable
from hub.worker.idle_passes import IdlePasses


def test_passes_are_small_and_wait_until_the_worker_is_idle() -> None:
    async def use() -> None:
        sizes: list[int] = []
        idle = False

        async def run(items: list[int]) -> list[int]:
            sizes.append(len(items))
            return [2 * item for item in items]

        passes = IdlePasses(run, lambda: idle, size=4, limit=100, longest_wait_s=60)
        call = asyncio.create_task(passes.submit(range(10)))
        await asyncio.sleep(0.05)
        assert sizes == []
        idle = True
        assert await call == [2 * i for i in range(10)]
        assert sizes == [4, 4, 2]

    asyncio.run(use())


def test_a_worker_that_is_never_idle_runs_a_pass_now_and_then() -> None:
    async def use() -> None:
        async def run(items: list[int]) -> list[int]:
            return items

        passes = IdlePasses(run, lambda: False, size=4, limit=100, longest_wait_s=0.01)
        assert await passes.submit(range(6)) == [*range(6)]

    asyncio.run(use())


def test_an_error_belongs_to_its_pass_and_a_full_queue_refuses() -> None:
    async def use() -> None:
        async def run(items: list[int]) -> list[int]:
            if 0 in items:
                raise ValueError("no")
            return items

        passes = IdlePasses(run, lambda: True, size=1, limit=3, longest_wait_s=1)
        failed, done = await asyncio.gather(passes.submit([0]), passes.submit([1]), return_exceptions=True)
        assert isinstance(failed, ValueError)
        assert done == [1]
        with pytest.raises(Unavailable, match="limit 3"):
            await passes.submit(range(4))

    asyncio.run(use())


def test_a_cancelled_call_is_not_computed() -> None:
    async def use() -> None:
        computed: list[int] = []
        idle = False

        async def run(items: list[int]) -> list[int]:
            computed.extend(items)
            return items

        passes = IdlePasses(run, lambda: idle, size=4, limit=10, longest_wait_s=60)
        call = asyncio.create_task(passes.submit([1]))
        await asyncio.sleep(0.02)
        call.cancel()
        await asyncio.sleep(0)
        idle = True
        assert await passes.submit([2]) == [2]
        assert computed == [2]

    asyncio.run(use())
