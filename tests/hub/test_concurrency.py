"""Concurrency: per-tenant limits, groups of coroutines that fail together, and blocking calls in thread pools."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.concurrency import TenantConcurrencyLimit, gather_or_cancel, run_blocking
from hub.errors import LimitReached


def test_limit_queues_and_refuses_calls_of_one_tenant_only() -> None:
    async def use() -> None:
        limit, started, release = TenantConcurrencyLimit(2, 5), list[tuple[str, int]](), asyncio.Event()

        async def call(tenant: str, number: int) -> None:
            async with limit.acquire(tenant):
                started.append((tenant, number))
                await release.wait()

        crowd = [asyncio.create_task(call("crowd", i)) for i in range(5)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(LimitReached, match=r"^Too many concurrent requests for this tenant \(limit 5\)\.$"):
            await call("crowd", 5)
        other = asyncio.create_task(call("other", 0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert started == [("crowd", 0), ("crowd", 1), ("other", 0)]
        crowd[3].cancel()  # queued
        release.set()
        await asyncio.gather(*crowd, other, return_exceptions=True)
        assert started[3:] == [("crowd", 2), ("crowd", 4)]
        assert limit.active_tenants == 0

    asyncio.run(use())


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    cancelled=st.sets(st.integers(0, 11)),
    pauses=st.lists(st.integers(0, 5), min_size=13, max_size=13),
)
def test_limit_is_never_exceeded_and_every_call_runs_when_calls_are_cancelled(
    sizes: list[int], cancelled: set[int], pauses: list[int]
) -> None:
    async def use() -> None:
        limit, used, order = TenantConcurrencyLimit(8), 0, list[int]()

        async def call(number: int, size: int) -> None:
            nonlocal used
            async with limit.acquire("t", size):
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
        assert limit.active_tenants == 0

    asyncio.run(use())


def test_gather_returns_results_in_order() -> None:
    async def value(number: int) -> int:
        for _ in range(3 - number):
            await asyncio.sleep(0)
        return number

    async def use() -> None:
        assert await gather_or_cancel(value(i) for i in range(3)) == [0, 1, 2]

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


def test_gather_cancels_all_when_its_caller_is_cancelled() -> None:
    async def use() -> None:
        started, ended = asyncio.Event(), []

        async def waits() -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("waits")

        caller = asyncio.create_task(gather_or_cancel([waits(), waits()]))
        await started.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert ended == ["waits", "waits"]

    asyncio.run(use())


def test_blocking_function_runs_in_the_given_pool() -> None:
    def where(prefix: str, *, suffix: str) -> str:
        return prefix + threading.current_thread().name + suffix

    async def use(executor: ThreadPoolExecutor) -> None:
        assert await run_blocking(executor, where, "<", suffix=">") == "<pool_0>"
        assert await run_blocking(None, where, "", suffix="") not in ("pool_0", threading.current_thread().name)

    with ThreadPoolExecutor(1, "pool") as executor:
        asyncio.run(use(executor))


def test_blocking_function_s_error_reaches_the_caller() -> None:
    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run_blocking(None, fails))
