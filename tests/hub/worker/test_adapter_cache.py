"""Slots under leases: least recently used out, one load however many wait, a failure alone with its callers."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapters import Bank
from hub.errors import Unavailable
from hub.storage.store import Store
from hub.worker.adapter_cache import Tiers
from tests.support.models import random_adapter


class CountingStore(Store):
    """A real store that notes what was read."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads: list[str] = []

    def get(self, digest: str) -> bytes:
        self.reads.append(digest)
        return super().get(digest)


@pytest.fixture
def store(tmp_path, adapters) -> CountingStore:
    store = CountingStore(str(tmp_path))
    for adapter in adapters:
        store.put(adapter.digest, adapter.data)
    return store


class Clock:
    """Stands until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(backbone, store, use, slots=2, host_cache_bytes=0, wait_s=0.2, clock=time.monotonic):
    bank = Bank(backbone, slots=slots, max_rank=8, max_kernels=2)
    with ThreadPoolExecutor(2) as executor:
        tiers = Tiers(
            bank, store, reads=executor, puts=executor, host_cache_bytes=host_cache_bytes, wait_s=wait_s, clock=clock
        )
        return asyncio.run(use(tiers, bank))


async def touch(tiers: Tiers, digest: str) -> int:
    async with tiers.lease(digest) as resident:
        await asyncio.sleep(0)
        return resident.slot.number


def test_the_least_recently_used_gives_up_its_slot(backbone, store, adapters) -> None:
    a, b, c, _ = (adapter.digest for adapter in adapters)

    async def use(tiers, bank):
        for digest in (a, b, a, c, a):
            await touch(tiers, digest)
        assert store.reads == [a, b, c]
        await touch(tiers, b)
        assert store.reads == [a, b, c, b]
        assert bank.free == 0

    run(backbone, store, use)


def test_many_waiters_one_load(backbone, store, adapters) -> None:
    digest = adapters[0].digest

    async def use(tiers, bank):
        assert len(set(await asyncio.gather(*(touch(tiers, digest) for _ in range(20))))) == 1
        assert store.reads == [digest]
        assert bank.free == 1

    run(backbone, store, use)


def test_a_leased_slot_is_never_taken(backbone, store, adapters) -> None:
    a, b, c, _ = (adapter.digest for adapter in adapters)

    async def use(tiers, _bank):
        async with tiers.lease(a) as first:
            async with tiers.lease(b):
                with pytest.raises(Unavailable, match="waits for a slot: all 2 of this worker are in use"):
                    await touch(tiers, c)
            assert await touch(tiers, c) != first.slot.number
            await touch(tiers, a)

    run(backbone, store, use)


def test_a_waiting_load_takes_the_slot_that_comes_free(backbone, store, adapters) -> None:
    a, b, c, _ = (adapter.digest for adapter in adapters)

    async def use(tiers, _bank):
        async with tiers.lease(a):
            async with tiers.lease(b) as second:
                waiting = asyncio.create_task(touch(tiers, c))
                while c not in store.reads:
                    await asyncio.sleep(0.005)
            assert await waiting == second.slot.number

    run(backbone, store, use, wait_s=30)


def test_host_memory_saves_the_store_a_read(backbone, store, adapters) -> None:
    a, b, c, _ = (adapter.digest for adapter in adapters)

    async def use(tiers, _bank):
        for digest in (a, b, c, a, b, c):
            await touch(tiers, digest)

    run(backbone, store, use, slots=1, host_cache_bytes=10**8)
    assert store.reads == [a, b, c]
    store.reads.clear()
    one = Bank(backbone, slots=1, max_rank=8, max_kernels=2).pack(adapters[0]).size_bytes
    run(backbone, store, use, slots=1, host_cache_bytes=one * 3 // 2)
    assert store.reads == [a, b, c, a, b, c]


def test_a_failed_load_is_its_callers_alone_and_is_tried_again(backbone, store, adapters, tmp_path) -> None:
    bad, good = adapters[0], adapters[1]
    (path,) = tmp_path.rglob(f"{bad.digest}.safetensors")
    path.write_bytes(b"damaged")
    clock = Clock()

    async def use(tiers, bank):
        results = await asyncio.gather(
            touch(tiers, bad.digest), touch(tiers, good.digest), touch(tiers, bad.digest), return_exceptions=True
        )
        assert [type(r).__name__ for r in results] == ["Unavailable", "int", "Unavailable"]
        assert store.reads.count(bad.digest) == 1
        path.write_bytes(bad.data)
        with pytest.raises(Unavailable, match="is damaged"):  # remembered for a while
            await touch(tiers, bad.digest)
        assert store.reads.count(bad.digest) == 1
        clock.now += 1.01
        await touch(tiers, bad.digest)
        assert bank.free == 0

    run(backbone, store, use, clock=clock)


def test_a_file_that_stays_away_is_asked_for_less_and_less(backbone, store, adapters, tmp_path) -> None:
    digest = adapters[0].digest
    for path in tmp_path.rglob(f"{digest}.safetensors"):
        path.unlink()
    clock = Clock()

    async def use(tiers, _bank):
        for second in range(1000):
            clock.now = float(second)
            with pytest.raises(Unavailable, match="has no file"):
                await touch(tiers, digest)

    run(backbone, store, use, clock=clock)
    assert 15 < len(store.reads) < 25  # after 1, 2, 4, ... 60, 60, ... seconds


def test_who_waits_too_long_is_told_to_come_back_and_meets_the_adapter_then(backbone, store, adapters) -> None:
    """A store that answers late holds up nobody else."""
    slow, quick = adapters[0].digest, adapters[1].digest
    answer = threading.Event()
    read = store.get

    def get(digest):
        if digest == slow:
            answer.wait(30)
        return read(digest)

    store.get = get

    async def use(tiers, _bank):
        waiting = asyncio.create_task(touch(tiers, slow))
        await asyncio.sleep(0)
        await touch(tiers, quick)
        assert not waiting.done()
        with pytest.raises(Unavailable, match="waits for its file; try again"):
            await waiting
        answer.set()
        await touch(tiers, slow)
        assert store.reads == [quick, slow]

    run(backbone, store, use, wait_s=0.3)


def test_a_pinned_adapter_keeps_its_slot(backbone, store, adapters) -> None:
    a, b, c, d = (adapter.digest for adapter in adapters)

    async def use(tiers, _bank):
        tiers.pin([a])
        for digest in (a, b, c, d, a):
            await touch(tiers, digest)
        assert store.reads == [a, b, c, d]
        tiers.pin([d, a])  # one slot is always left: only the first is
        for digest in (b, c, d):
            await touch(tiers, digest)
        assert store.reads == [a, b, c, d, b, c]

    run(backbone, store, use)


def test_preloaded_and_prefetched_adapters_are_there_when_asked_for(backbone, store, adapters) -> None:
    a, b, _, _ = (adapter.digest for adapter in adapters)

    async def use(tiers, _bank):
        tiers.preload(a)
        await tiers.prefetch(b)
        await tiers.prefetch("0" * 64)  # no such file: nobody is told
        store.reads.clear()
        await touch(tiers, a)
        await touch(tiers, b)
        assert store.reads == []
        assert (tiers.counts.hits, tiers.counts.loads, tiers.resident) == (2, 1, 2)

    run(backbone, store, use)


def test_a_caller_that_goes_away_does_not_take_the_load_with_it(backbone, store, adapters) -> None:
    digest = adapters[0].digest

    async def use(tiers, _bank):
        gone, stays = (asyncio.create_task(touch(tiers, digest)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        await stays
        assert store.reads == [digest]

    run(backbone, store, use)


def test_a_slot_that_a_failed_load_gives_back_goes_to_the_next(backbone, store, adapters, tmp_path) -> None:
    bad = random_adapter(backbone, seed=9, rank=9)  # does not fit the bank
    store.put(bad.digest, bad.data)

    async def use(tiers, _bank):
        done = await asyncio.gather(
            *(touch(tiers, d) for d in (bad.digest, adapters[0].digest)), return_exceptions=True
        )
        assert [type(r).__name__ for r in done] == ["InvalidAdapter", "int"]

    run(backbone, store, use, slots=1, wait_s=30)


def test_a_load_that_nobody_waits_for_any_more_holds_no_slot(backbone, store, adapters) -> None:
    async def use(tiers, _bank):
        gone = asyncio.create_task(touch(tiers, adapters[0].digest))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(touch(tiers, adapters[1].digest))
        await asyncio.sleep(0)
        gone.cancel()
        await waiting

    run(backbone, store, use, slots=1, wait_s=30)


def test_a_few_slots_and_many_adapters_at_once_all_get_their_turn(backbone, store, adapters) -> None:
    async def use(tiers, _bank):
        digests = [adapter.digest for adapter in adapters] * 10
        assert len(await asyncio.gather(*(touch(tiers, digest) for digest in digests))) == 40

    run(backbone, store, use, slots=1, host_cache_bytes=10**8, wait_s=30)


def test_adapters_that_are_always_in_use_do_not_keep_a_cold_one_out(backbone, store, adapters) -> None:
    """The least recently used of them takes no more leases, gives up its slot with its last one, and comes back."""
    a, b, c, _ = (adapter.digest for adapter in adapters)

    async def use(tiers, bank):
        done = asyncio.Event()

        async def busy(digest: str) -> None:
            async with tiers.lease(digest):  # the next lease begins before the last one ends
                if not done.is_set():
                    await asyncio.sleep(0.02)
                    following = asyncio.create_task(busy(digest))
                    await asyncio.sleep(0.01)
            if not done.is_set() or "following" in locals():
                await following

        crowd = [asyncio.create_task(busy(digest)) for digest in (a, b)]
        await asyncio.sleep(0.3)
        await touch(tiers, c)
        done.set()
        await asyncio.gather(*crowd)
        assert bank.free + tiers.resident == 2
        assert tiers._draining == tiers.reserving == tiers._writing == 0
        assert all(resident.leases == 0 for resident in tiers._residents.values())

    run(backbone, store, use, wait_s=30, host_cache_bytes=10**8)


def test_a_load_that_fails_in_an_unforeseen_way_is_unavailable_and_paused(backbone, store, adapters) -> None:
    async def use(tiers, bank):
        def put(_packed):
            raise MemoryError

        bank.put = put
        for _ in range(2):
            with pytest.raises(Unavailable, match="could not be loaded"):
                await touch(tiers, adapters[0].digest)
        assert store.reads == [adapters[0].digest]

    run(backbone, store, use)
