"""The adapter cache: least recently used out, one load for all callers, failures paused, leases respected."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapters import Adapter, Backbone, Bank, Packed, Slot
from hub.errors import Unavailable
from hub.storage.store import Store
from hub.worker.adapter_cache import AdapterCache, State
from hub.worker.host_cache import HostCache
from tests.support.models import random_adapter

NEVER_S, SOON_S = 30.0, 0.02  # waits that a test does not reach, and that it waits out


class RecordingStore(Store):
    """A store that lists its reads. A read of a blocked digest waits for `answer`."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads: list[str] = []
        self.blocked: set[str] = set()
        self.answer = threading.Event()

    def get(self, digest: str) -> bytes:
        if digest in self.blocked:
            self.answer.wait(30)
        self.reads.append(digest)
        return super().get(digest)


class Clock:
    """A clock that moves only when a test sets it."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Site:
    """Makes adapter caches over one store, and runs tests on them."""

    backbone: Backbone
    store: RecordingStore
    digests: list[str]

    def bank(self, slots: int) -> Bank:
        return Bank(self.backbone, slots=slots, max_rank=8, max_kernels=2)

    def run(
        self,
        use: Callable[[AdapterCache], Awaitable[None]],
        *,
        slots: int = 2,
        host_cache_bytes: int = 0,
        wait_s: float = NEVER_S,
        clock: Callable[[], float] | None = None,
        bank: Bank | None = None,
    ) -> None:
        bank = bank or self.bank(slots)
        with ThreadPoolExecutor(2) as threads:
            host = HostCache(bank, self.store, readers=threads, limit_bytes=host_cache_bytes)
            cache = AdapterCache(bank, host, writer=threads, wait_s=wait_s, clock=clock or Clock())

            async def used() -> None:
                async with asyncio.timeout(60):
                    await use(cache)

            asyncio.run(used())


@pytest.fixture
def site(tmp_path: Path, backbone: Backbone, adapters: list[Adapter]) -> Site:
    store = RecordingStore(str(tmp_path))
    for adapter in adapters:
        store.put(adapter.digest, adapter.data)
    return Site(backbone, store, [adapter.digest for adapter in adapters])


async def touch(cache: AdapterCache, digest: str) -> int:
    """Hold a lease for one step of the event loop; return the number of the slot."""
    async with cache.lease(digest) as resident:
        await asyncio.sleep(0)
        return resident.slot.number


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def assert_no_lease_is_left(cache: AdapterCache, slots: int, digests: list[str]) -> None:
    """Lease as many adapters as there are slots, twice: each lease needs every other adapter to be evictable."""
    for chosen in (digests[:slots], digests[slots : 2 * slots]):
        async with AsyncExitStack() as stack:
            for digest in chosen:
                await stack.enter_async_context(cache.lease(digest))
        assert cache.resident_digests() == chosen
    assert cache.loads_without_slot == 0


def test_the_least_recently_used_adapter_is_evicted_when_a_cold_one_needs_a_slot(site: Site) -> None:
    a, b, c, _ = site.digests

    async def use(cache: AdapterCache) -> None:
        for digest in (a, b, a, c, a):
            await touch(cache, digest)
        assert site.store.reads == [a, b, c]
        assert (cache.state(a), cache.state(b), cache.state(c)) == (State.RESIDENT, State.ABSENT, State.RESIDENT)
        await touch(cache, b)
        assert site.store.reads == [a, b, c, b]
        assert cache.resident_digests() == [a, b]
        assert (cache.counts.hits, cache.counts.loads, cache.counts.evictions) == (2, 4, 2)

    site.run(use)


def test_one_load_serves_all_callers_when_they_ask_at_once(site: Site) -> None:
    digest = site.digests[0]
    bank = site.bank(2)

    async def use(cache: AdapterCache) -> None:
        assert len(set(await asyncio.gather(*(touch(cache, digest) for _ in range(20))))) == 1
        assert site.store.reads == [digest]
        assert bank.free == 1

    site.run(use, bank=bank)


def test_a_leased_adapter_keeps_its_slot_when_others_need_one(site: Site) -> None:
    a, b, c, _ = site.digests

    async def use(cache: AdapterCache) -> None:
        cache.preload(a)
        cache.preload(b)
        async with cache.lease(a) as first:
            async with cache.lease(b):
                with pytest.raises(Unavailable, match=r"The adapter is not loaded yet: it waits for .*Retry later"):
                    await touch(cache, c)
                await until(lambda: cache.state(a) is State.DRAINING)
            await until(lambda: cache.state(c) is State.RESIDENT)  # the load goes on without its caller
            async with cache.lease(c) as third:
                assert third.slot.number != first.slot.number
        assert cache.state(a) is State.ABSENT

    site.run(use, wait_s=SOON_S)


def test_a_retained_adapter_keeps_its_slot_when_its_call_ends(site: Site) -> None:
    a, b, _, _ = site.digests

    async def use(cache: AdapterCache) -> None:
        async with cache.lease(a) as resident:
            cache.retain([resident])
        waiting = asyncio.create_task(touch(cache, b))
        await until(lambda: cache.loads_without_slot == 1)
        assert cache.state(a) is State.DRAINING
        cache.release([resident])
        assert await waiting == resident.slot.number

    site.run(use, slots=1)


def test_a_waiting_load_takes_the_slot_when_a_lease_ends(site: Site) -> None:
    a, b, c, _ = site.digests

    async def use(cache: AdapterCache) -> None:
        async with cache.lease(a):
            async with cache.lease(b) as second:
                waiting = asyncio.create_task(touch(cache, c))
                await until(lambda: cache.loads_without_slot == 1)
            assert await waiting == second.slot.number

    site.run(use)


def test_the_store_is_read_once_when_host_memory_has_room(site: Site) -> None:
    a, b, c, _ = site.digests

    async def use(cache: AdapterCache) -> None:
        for digest in (a, b, c, a, b, c):
            await touch(cache, digest)

    site.run(use, slots=1, host_cache_bytes=10**8)
    assert site.store.reads == [a, b, c]


def test_host_memory_is_bounded_by_bytes(site: Site, adapters: list[Adapter]) -> None:
    a, b, c, _ = site.digests
    packed_bytes = site.bank(1).pack(adapters[0]).size_bytes

    async def use(cache: AdapterCache) -> None:
        for digest in (a, b, c, a, b, c):
            await touch(cache, digest)

    for limit_bytes in (packed_bytes * 3 // 2, packed_bytes // 2):  # room for one adapter, and for none
        site.store.reads.clear()
        site.run(use, slots=1, host_cache_bytes=limit_bytes)
        assert site.store.reads == [a, b, c, a, b, c]


def test_a_failed_load_fails_only_its_own_callers_and_is_retried_after_a_pause(
    site: Site, adapters: list[Adapter], tmp_path: Path
) -> None:
    bad, good = adapters[0], adapters[1]
    (path,) = tmp_path.rglob(f"{bad.digest}.safetensors")
    path.write_bytes(b"damaged")
    clock = Clock()

    async def use(cache: AdapterCache) -> None:
        results = await asyncio.gather(
            touch(cache, bad.digest), touch(cache, good.digest), touch(cache, bad.digest), return_exceptions=True
        )
        assert [type(result).__name__ for result in results] == ["Unavailable", "int", "Unavailable"]
        assert results[0] is not results[2]  # each caller adds its own traceback
        assert site.store.reads.count(bad.digest) == 1
        path.write_bytes(bad.data)
        with pytest.raises(Unavailable, match="is damaged"):
            await touch(cache, bad.digest)
        assert cache.state(bad.digest) is State.FAILED
        assert site.store.reads.count(bad.digest) == 1
        clock.now_s += 1.01
        await touch(cache, bad.digest)
        assert cache.resident_count == 2

    site.run(use, clock=clock)


def test_pauses_grow_when_a_file_stays_absent(site: Site, tmp_path: Path) -> None:
    digest = site.digests[0]
    for path in tmp_path.rglob(f"{digest}.safetensors"):
        path.unlink()
    clock = Clock()

    async def use(cache: AdapterCache) -> None:
        for second in range(1000):
            clock.now_s = float(second)
            with pytest.raises(Unavailable, match="has no file"):
                await touch(cache, digest)

    site.run(use, clock=clock)
    assert 15 < len(site.store.reads) < 25  # after 1, 2, 4, ... 60, 60, ... seconds


def test_a_failure_is_forgotten_when_no_call_retries_for_a_long_time(site: Site) -> None:
    clock = Clock()

    async def use(cache: AdapterCache) -> None:
        for digest, second in (("0" * 64, 0.0), ("1" * 64, 30.0), ("2" * 64, 70.0)):
            clock.now_s = second
            with pytest.raises(Unavailable):
                await touch(cache, digest)
        states = [cache.state(digit * 64) for digit in "012"]
        assert states == [State.ABSENT, State.FAILED, State.FAILED]

    site.run(use, clock=clock)


def test_a_call_times_out_when_the_store_is_slow_and_others_do_not_wait(site: Site) -> None:
    slow, quick = site.digests[:2]
    site.store.blocked.add(slow)

    async def use(cache: AdapterCache) -> None:
        with pytest.raises(Unavailable, match=r"waits for its file\. Retry later"):
            await touch(cache, slow)
        await cache.prefetch(quick)
        await until(lambda: cache.state(quick) is State.RESIDENT)
        assert cache.state(slow) is State.LOADING
        site.store.answer.set()
        await until(lambda: cache.state(slow) is State.RESIDENT)  # the load goes on without its caller
        await touch(cache, slow)
        assert site.store.reads == [quick, slow]

    site.run(use, wait_s=SOON_S)


def test_a_pinned_adapter_is_not_evicted(site: Site) -> None:
    a, b, c, d = site.digests

    async def use(cache: AdapterCache) -> None:
        cache.pin([a])
        for digest in (a, b, c, d, a):
            await touch(cache, digest)
        assert site.store.reads == [a, b, c, d]
        cache.pin([d, a])  # one slot stays evictable, so only the first adapter is pinned
        for digest in (b, c, d):
            await touch(cache, digest)
        assert site.store.reads == [a, b, c, d, b, c]

    site.run(use)


def test_preloaded_and_prefetched_adapters_are_resident_when_their_first_call_comes(site: Site) -> None:
    a, b, _, _ = site.digests

    async def use(cache: AdapterCache) -> None:
        cache.preload(a)
        await cache.prefetch(b)
        await cache.prefetch("0" * 64)  # not in the store; the failure is left to a call
        site.store.reads.clear()
        await touch(cache, a)
        await touch(cache, b)
        assert site.store.reads == []
        assert (cache.counts.hits, cache.counts.loads, cache.counts.failures, cache.resident_count) == (2, 1, 1, 2)

    site.run(use)


def test_a_load_continues_when_one_of_its_callers_is_cancelled(site: Site) -> None:
    digest = site.digests[0]

    async def use(cache: AdapterCache) -> None:
        gone, stays = (asyncio.create_task(touch(cache, digest)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        await stays
        assert site.store.reads == [digest]

    site.run(use)


def test_a_slot_goes_to_the_next_load_when_a_load_fails(site: Site) -> None:
    bad = random_adapter(site.backbone, seed=9, rank=9)  # the bank's largest rank is 8
    site.store.put(bad.digest, bad.data)

    async def use(cache: AdapterCache) -> None:
        results = await asyncio.gather(
            *(touch(cache, digest) for digest in (bad.digest, site.digests[0])), return_exceptions=True
        )
        assert [type(result).__name__ for result in results] == ["InvalidAdapter", "int"]

    site.run(use, slots=1)


def test_a_load_without_callers_holds_no_slot(site: Site) -> None:
    a, b, _, _ = site.digests

    async def use(cache: AdapterCache) -> None:
        gone = asyncio.create_task(touch(cache, a))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(touch(cache, b))
        await asyncio.sleep(0)
        gone.cancel()
        await waiting

    site.run(use, slots=1)


def test_all_calls_are_served_when_many_adapters_share_one_slot(site: Site) -> None:
    async def use(cache: AdapterCache) -> None:
        digests = site.digests * 10
        assert len(await asyncio.gather(*(touch(cache, digest) for digest in digests))) == 40

    site.run(use, slots=1, host_cache_bytes=10**8)


def test_a_cold_adapter_gets_a_slot_when_all_others_are_in_constant_use(site: Site) -> None:
    """The least recently used adapter drains: it takes no new leases, and its waiting calls reload it afterwards."""
    a, b, c, _ = site.digests

    async def use(cache: AdapterCache) -> None:
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            slot = (await first.enter_async_context(cache.lease(a))).slot.number
            await second.enter_async_context(cache.lease(b))
            cold = asyncio.create_task(touch(cache, c))
            await until(lambda: cache.state(a) is State.DRAINING)
            again = asyncio.create_task(touch(cache, a))
            assert cache.state(b) is State.RESIDENT
            await touch(cache, b)
            assert not cold.done()
            assert not again.done()
            await first.aclose()
            assert await cold == slot
            await again
        await assert_no_lease_is_left(cache, 2, site.digests)

    site.run(use, host_cache_bytes=10**8)


def test_a_call_for_a_draining_adapter_times_out_when_its_batches_do_not_end(site: Site) -> None:
    a, b, _, _ = site.digests

    async def use(cache: AdapterCache) -> None:
        cache.preload(a)
        async with cache.lease(a):
            with pytest.raises(Unavailable):
                await touch(cache, b)
            await until(lambda: cache.state(a) is State.DRAINING)
            with pytest.raises(Unavailable, match="running batches that still use its slot"):
                await touch(cache, a)
            with pytest.raises(Unavailable, match=r"waits for a slot \(all 1 slots of this worker are in use\)"):
                await touch(cache, b)

    site.run(use, slots=1, wait_s=SOON_S)


@pytest.mark.parametrize("seed", range(5))
def test_no_lease_or_slot_is_lost_when_calls_are_cancelled_at_random(site: Site, seed: int) -> None:
    rng = random.Random(seed)

    async def call(cache: AdapterCache) -> None:
        async with cache.lease(rng.choice(site.digests)) as resident:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            assert cache.state(resident.digest) in (State.RESIDENT, State.DRAINING)

    async def use(cache: AdapterCache) -> None:
        calls = [asyncio.create_task(call(cache)) for _ in range(60)]
        while not all(task.done() for task in calls):
            rng.choice(calls).cancel()
            for _ in range(rng.randrange(20)):
                await asyncio.sleep(0)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}
        await until(lambda: all(cache.state(digest) is not State.LOADING for digest in site.digests))
        await assert_no_lease_is_left(cache, 2, site.digests)

    site.run(use, host_cache_bytes=10**8)


class FullDevice(Bank):
    """A bank whose device has no free memory."""

    def put(self, adapter: Adapter | Packed) -> Slot:
        raise MemoryError


def test_a_load_is_unavailable_and_paused_when_its_error_is_not_of_the_hub(site: Site) -> None:
    digest = site.digests[0]

    async def use(cache: AdapterCache) -> None:
        for _ in range(2):
            with pytest.raises(Unavailable, match="cannot be loaded"):
                await touch(cache, digest)
        assert site.store.reads == [digest]

    site.run(use, bank=FullDevice(site.backbone, slots=1, max_rank=8, max_kernels=2))
