"""Concurrency: per-tenant limits, and blocking calls in thread pools."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.concurrency import (
    ACTIVE_S,
    ActiveTenants,
    TenantConcurrencyLimit,
    TenantReads,
    TenantThreads,
    TenantTurns,
    run_blocking,
)
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


def test_free_slot_goes_to_the_tenant_that_was_charged_least_when_tenants_wait() -> None:
    async def use() -> None:
        turns, order = TenantTurns(1, 1), list[str]()

        async def call(tenant: str, cost: float) -> None:
            await turns.acquire(tenant, cost)
            order.append(tenant)
            await asyncio.sleep(0)
            turns.release(tenant)

        await asyncio.gather(*(call("large", 3) for _ in range(4)), *(call("small", 1) for _ in range(6)))
        assert order == ["large", "small", "small", "small", "large", "small", "small", "small", "large", "large"]
        assert turns.active_tenants == 0

    asyncio.run(use())


def test_tenant_uses_no_more_than_its_slots_when_others_are_idle() -> None:
    async def use() -> None:
        turns = TenantTurns(3, 2)
        await turns.acquire("a")
        await turns.acquire("a")
        third = asyncio.create_task(turns.acquire("a"))
        await asyncio.sleep(0)
        await turns.acquire("b")
        assert not third.done()
        turns.release("b")
        await asyncio.sleep(0)
        assert not third.done()
        turns.release("a")
        await third
        turns.release("a")
        turns.release("a")
        assert turns.active_tenants == 0

    asyncio.run(use())


@settings(max_examples=200, deadline=None)
@given(
    calls=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=15),
    cancelled=st.sets(st.integers(0, 14)),
    pause=st.integers(0, 6),
)
def test_every_slot_is_free_again_when_waiting_calls_are_cancelled(
    calls: list[tuple[str, int, int]], cancelled: set[int], pause: int
) -> None:
    async def use() -> None:
        turns, running = TenantTurns(2, 1), list[str]()

        async def call(tenant: str, cost: float, pauses: int) -> None:
            await turns.acquire(tenant, cost)
            running.append(tenant)
            try:
                assert len(running) <= 2
                assert running.count(tenant) == 1
                for _ in range(pauses):
                    await asyncio.sleep(0)
            finally:
                running.remove(tenant)
                turns.release(tenant)

        tasks = [asyncio.create_task(call(*arguments)) for arguments in calls]
        for _ in range(pause):
            await asyncio.sleep(0)
        for i in cancelled & set(range(len(tasks))):
            tasks[i].cancel()
        async with asyncio.timeout(5):
            done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in done)
        assert turns.active_tenants == 0
        async with asyncio.timeout(5):
            await turns.acquire("a")
            await turns.acquire("b")

    asyncio.run(use())


def test_tenant_is_active_until_it_made_no_call_for_a_while() -> None:
    now = [0.0]
    active = ActiveTenants(lambda: now[0])
    active.note("a")
    now[0] = 1.0
    active.note("b")
    assert active.others("a") == active.others("b") == 1
    assert active.others("c") == 2
    now[0] = ACTIVE_S + 0.5
    assert active.others("a") == 1
    assert active.others("b") == 0


def test_tenant_s_limit_falls_when_another_tenant_is_active() -> None:
    active = ActiveTenants()
    limit, low = active.limit(64, 8), active.limit(4, 8)
    active.note("a")
    assert (limit("a"), low("a")) == (64, 4)
    active.note("b")
    assert (limit("a"), limit("b"), low("a")) == (8, 8, 4)


def test_tenant_s_calls_take_turns_and_other_tenants_do_not_wait_when_one_sends_many() -> None:
    async def use() -> None:
        with ThreadPoolExecutor(2) as executor:
            threads, go = TenantThreads(executor, 2, 1), threading.Event()
            crowd = [asyncio.create_task(threads.run("crowd", lambda: go.wait(10))) for _ in range(20)]
            for number in range(20):
                assert await run_blocking(threads.of("other"), lambda x: x, number) == number
            crowd[0].cancel()  # its thread runs on, and keeps the tenant's share
            await asyncio.sleep(0)
            second = asyncio.create_task(threads.run("crowd", lambda: "second"))
            assert await threads.run("other", lambda: "other") == "other"
            assert not second.done()
            go.set()
            assert await second == "second"
            await asyncio.gather(*crowd, return_exceptions=True)

    asyncio.run(use())


def test_tenant_rests_between_calls_when_another_tenant_is_active() -> None:
    async def use() -> None:
        active = ActiveTenants()
        with ThreadPoolExecutor(1) as executor:
            threads, loop = TenantThreads(executor, 1, 1, active), asyncio.get_running_loop()

            async def gap_s(tenant: str) -> float:
                """Return the time between the end of a call of 30 ms and the start of the tenant's next one."""
                await threads.run(tenant, lambda: time.sleep(0.03))
                ended_s = loop.time()
                return await threads.run(tenant, loop.time) - ended_s

            await gap_s("a")
            active.note("b")
            assert await gap_s("a") > 0.03  # a rest of 90 ms; without one the gap is about 1 ms

    asyncio.run(use())


def test_tenant_s_reads_rest_when_another_tenant_is_active_and_wait_for_no_other_tenant() -> None:
    async def use() -> None:
        active = ActiveTenants()
        reads, loop = TenantReads(1, active), asyncio.get_running_loop()

        async def read(tenant: str) -> tuple[float, float]:
            """Return when a read of 30 ms began and ended."""
            async with reads.turn(tenant):
                began_s = loop.time()
                await asyncio.sleep(0.03)
                return began_s, loop.time()

        active.note("b")
        (_, ended_s), (began_s, _), (others_s, _) = await asyncio.gather(read("a"), read("a"), read("b"))
        assert began_s - ended_s > 0.03  # a rest of 90 ms; without one the gap is about 1 ms
        assert others_s < ended_s

    asyncio.run(use())
