"""Where an adapter's numbers are on a worker: store -> host memory -> bank slot.

Whoever classifies takes a lease on an adapter: it is in a slot for as long as the lease lasts. A cold adapter is
loaded in a thread, once however many wait for it; they are parked, for a bounded time, and nobody else waits. The
least recently used adapter without a lease gives up its slot; it stays in host memory while there is room.

An adapter is absent, loading (`_loads`), resident (`_residents`), or its last load failed and it is left alone for a
while (`_failures`).
"""

import asyncio
import copy
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters import Adapter, AdapterError, Bank, Packed, Slot

from ..concurrency import Turns
from ..errors import HubError, Unavailable
from ..storage.store import Store
from ..worker_api import invalid_adapter

logger = logging.getLogger(__name__)

TENANT_LOADS = 4  # of one tenant at once; so no crowd of cold adapters stands before another tenant's
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(frozen=True)
class _Host:
    """An adapter in host memory, ready for a slot."""

    packed: Packed
    mean: Tensor  # (3,) float32
    std: Tensor  # (3,)


@dataclass
class Resident:
    """An adapter in a slot, with what its images need."""

    digest: str
    slot: Slot
    mean: Tensor
    std: Tensor
    leases: int
    draining: bool = False  # it takes no more leases, and gives up its slot with its last one


@dataclass
class _Load:
    """A load under way: how many callers wait for it, for what it waits itself, and what came of it."""

    waiters: int = 0
    waits_for: str = "its file"
    task: "asyncio.Task[Resident] | None" = None
    resident: Resident | None = None


@dataclass
class _Failure:
    """Why a load failed, and until when nobody tries again."""

    error: HubError
    pause_s: float
    until: float


@dataclass
class Counts:
    """What has happened since the worker started."""

    hits: int = 0
    loads: int = 0
    load_s: float = 0.0
    store_reads: int = 0
    evictions: int = 0
    failures: int = 0


class Tiers:
    """The adapters of one worker. Its methods run on one event loop."""

    def __init__(
        self,
        bank: Bank,
        store: Store,
        *,
        reads: Executor,
        puts: Executor,
        host_cache_bytes: int,
        wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            reads: where files are read; those that wait for the store must not hold up `puts`.
            puts: where slots are written.
            wait_s: how long a caller is parked, while its adapter loads, before it is told to come back.
        """
        self._bank = bank
        self._store = store
        self._reads, self._puts = reads, puts
        self._wait_s = wait_s
        self._clock = clock
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._loads: dict[str, _Load] = {}
        self._failures: dict[str, _Failure] = {}
        self._pinned: frozenset[str] = frozenset()
        self._turns = Turns(TENANT_LOADS)
        self._host = _HostCache(host_cache_bytes)
        self._released = asyncio.Event()
        self._writing = 0  # slots promised to loads that have not finished
        self._draining = 0  # slots of adapters that take no more leases
        self.reserving = 0  # loads that wait for a slot
        self.counts = Counts()

    @property
    def resident(self) -> int:
        """How many slots hold an adapter."""
        return len(self._residents)

    def resident_digests(self) -> list[str]:
        """The adapters in slots, the one used last at the end."""
        return list(self._residents)

    @property
    def host_bytes(self) -> int:
        return self._host.size_bytes

    @asynccontextmanager
    async def lease(self, digest: str, tenant: str = "") -> AsyncIterator[Resident]:
        """Hold an adapter in its slot.

        Args:
            tenant: who asks; only so many loads of a tenant run at once.

        Raises:
            Unavailable: the store does not give the file, or the adapter was not in a slot in time.
            InvalidAdapter: the file does not fit this worker's backbone.
        """
        resident = self._residents.get(digest)
        if resident is not None:
            self.counts.hits += 1
            resident.leases += 1
        else:
            resident = await self._parked(digest, tenant)
        try:
            if not resident.draining:
                self._residents.move_to_end(digest)
            yield resident
        finally:
            self.release([resident])

    def keep(self, residents: Iterable[Resident]) -> None:
        """One more lease on each, for whoever already has one."""
        for resident in residents:
            resident.leases += 1

    def release(self, residents: Iterable[Resident]) -> None:
        """Give back a lease on each."""
        for resident in residents:
            resident.leases -= 1
            if resident.draining and not resident.leases:
                self._draining -= 1
                self._evict(resident)
        self._released.set()

    def pin(self, digests: Sequence[str]) -> None:
        """Never take the slots of these adapters, once they have one, and of no others; one slot is always left."""
        fit = self._bank.slots - 1
        if len(set(digests)) > fit:
            logger.warning("%d adapters are pinned, but only the first %d can be", len(set(digests)), fit)
        self._pinned = frozenset(list(dict.fromkeys(digests))[:fit])

    def preload(self, digest: str) -> None:
        """Load an adapter before anything else happens here; blocks.

        Raises:
            Unavailable, InvalidAdapter: as `lease`.
        """
        host = self._read(digest)
        self._host.put(digest, host)
        self._residents[digest] = Resident(digest, self._bank.put(host.packed), host.mean, host.std, leases=0)

    async def prefetch(self, digest: str) -> None:
        """Load an adapter that will be asked for soon; a failure is left for whoever asks."""
        try:
            async with self.lease(digest):
                pass
        except HubError:
            pass

    async def _parked(self, digest: str, tenant: str) -> Resident:
        """Wait for the one load of an adapter; the resident comes with this caller's lease already counted."""
        failure = self._failures.get(digest)
        if failure is not None and self._clock() < failure.until:
            raise copy.copy(failure.error)
        load = self._loads.get(digest)
        if load is None:
            load = self._loads[digest] = _Load()
            load.task = asyncio.create_task(self._load(digest, load, tenant))
            # Whoever waits gets its error; where nobody waits any more, it is no news.
            load.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        assert load.task is not None  # noqa: S101 (for the type checker)
        load.waiters += 1
        try:
            async with asyncio.timeout(self._wait_s):
                # Shielded: a caller that goes away must not take the load from the others.
                return await asyncio.shield(load.task)
        except (asyncio.CancelledError, TimeoutError) as error:
            load.waiters -= 1
            if load.resident is not None:
                self.release([load.resident])
            if isinstance(error, asyncio.CancelledError):
                raise
            raise Unavailable(f"the adapter is not loaded yet, it waits for {load.waits_for}; try again") from error

    async def _load(self, digest: str, load: _Load, tenant: str) -> Resident:
        loop = asyncio.get_running_loop()
        began = self._clock()
        try:
            async with self._turns.turn(tenant):
                host = self._host.get(digest)
                if host is None:
                    self.counts.store_reads += 1
                    host = await loop.run_in_executor(self._reads, self._read, digest)
                    self._host.put(digest, host)
                load.waits_for = f"a slot: all {self._bank.slots} of this worker are in use"
                await self._reserve()
                try:
                    slot = await loop.run_in_executor(self._puts, self._bank.put, host.packed)
                finally:
                    self._writing -= 1
            # In one step with the leases of all who wait: nobody can take the slot before they use it.
            load.resident = self._residents[digest] = Resident(digest, slot, host.mean, host.std, load.waiters)
            self._failures.pop(digest, None)
            self.counts.loads += 1
            took_s = self._clock() - began
            self.counts.load_s += took_s
            logger.debug("adapter %s loaded in %.1f ms", digest, took_s * 1000)
            return load.resident
        except HubError as error:
            logger.warning("adapter %s could not be loaded: %s", digest, error)
            self._note_failure(digest, error)
            raise
        except Exception as error:  # a device without memory, ...
            logger.exception("adapter %s could not be loaded", digest)
            failure = Unavailable("the adapter could not be loaded; the hub's log says why")
            self._note_failure(digest, failure)
            raise failure from error
        finally:
            del self._loads[digest]
            self._released.set()  # it failed, or nobody waits for it any more: either way a slot may be free

    async def _reserve(self) -> None:
        """Promise a slot to a load, taking it from the least recently used adapter where none is free.

        Where all are in use, and would stay so while requests for them come, the least recently used one drains.
        """
        self.reserving += 1
        try:
            while len(self._residents) + self._draining + self._writing >= self._bank.slots:
                unpinned = [r for r in self._residents.values() if r.digest not in self._pinned]
                idle = next((r for r in unpinned if not r.leases), None)
                if idle is not None:
                    del self._residents[idle.digest]
                    self._evict(idle)
                    continue
                if unpinned and self._draining < self.reserving:
                    unpinned[0].draining = True
                    del self._residents[unpinned[0].digest]
                    self._draining += 1
                self._released.clear()
                await self._released.wait()
            self._writing += 1
        finally:
            self.reserving -= 1

    def _evict(self, resident: Resident) -> None:
        self._bank.evict(resident.slot)
        self.counts.evictions += 1
        self._host.get(resident.digest)  # it was of use until now

    def _note_failure(self, digest: str, error: HubError) -> None:
        """Longer and longer pauses, so that a file that is gone or damaged costs the store little."""
        self.counts.failures += 1
        now = self._clock()
        for stale in [d for d, failure in self._failures.items() if now > failure.until + LONGEST_PAUSE_S]:
            del self._failures[stale]
        before = self._failures.get(digest)
        pause_s = FIRST_PAUSE_S if before is None else min(2 * before.pause_s, LONGEST_PAUSE_S)
        self._failures[digest] = _Failure(error, pause_s, now + pause_s)
        logger.error("adapter %s could not be loaded, nor is it tried for %g s: %s", digest, pause_s, error)

    def _read(self, digest: str) -> _Host:
        """Store -> host memory, in a thread.

        Raises:
            Unavailable, InvalidAdapter: as `lease`.
        """
        try:
            adapter = Adapter.read(self._store.get(digest), layouts=self._bank.layouts)
            packed = self._bank.pack(adapter)
        except AdapterError as error:
            raise invalid_adapter(error) from error
        mean, std = (torch.tensor(adapter.preprocess[name], dtype=torch.float32) for name in ("mean", "std"))
        return _Host(packed, mean, std)


class _HostCache:
    """Adapters in host memory, at most so many bytes; least recently used out."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.size_bytes = 0
        self._adapters: OrderedDict[str, _Host] = OrderedDict()

    def get(self, digest: str) -> _Host | None:
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

    def put(self, digest: str, adapter: _Host) -> None:
        self._adapters[digest] = adapter
        self.size_bytes += adapter.packed.size_bytes
        while self.size_bytes > self._limit_bytes:
            _, oldest = self._adapters.popitem(last=False)
            self.size_bytes -= oldest.packed.size_bytes
