"""Where an adapter's numbers are on a worker: store -> host memory -> bank slot.

Whoever classifies takes a lease on an adapter: it is in a slot for as long as the lease lasts. A cold adapter is
loaded in a thread, once however many wait for it, and nobody else waits. The least recently used adapter without
a lease gives up its slot; it stays in host memory while there is room.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters import Adapter, AdapterError, Bank

from .errors import FieldProblem, InvalidAdapter, Unavailable
from .store import Store


@dataclass
class Resident:
    """An adapter in a slot, with what its images need."""

    digest: str
    slot: int
    mean: Tensor  # (3,) float32
    std: Tensor  # (3,)
    leases: int


@dataclass
class _Load:
    """A load under way, how many callers wait for it, and what came of it."""

    waiters: int = 0
    task: "asyncio.Task[Resident] | None" = None
    resident: Resident | None = None


class Tiers:
    """The adapters of one worker. Its methods run on one event loop; loads run in `executor`."""

    def __init__(self, bank: Bank, store: Store, executor: Executor, *, host_cache_bytes: int, wait_s: float) -> None:
        """
        Args:
            wait_s: how long a lease waits for a slot, where every slot is in use, before it is refused.
        """
        self._bank = bank
        self._store = store
        self._executor = executor
        self._wait_s = wait_s
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._loads: dict[str, _Load] = {}
        self._host = _HostCache(host_cache_bytes)
        self._released = asyncio.Condition()
        self._writing = 0  # slots promised to loads that have not finished

    @asynccontextmanager
    async def lease(self, digest: str) -> AsyncIterator[Resident]:
        """Hold an adapter in its slot.

        Raises:
            Unavailable: the store does not give the file, or no slot came free in time.
            InvalidAdapter: the file does not fit this worker's backbone.
        """
        resident = self._residents.get(digest)
        if resident is not None:
            resident.leases += 1
        else:
            resident = await self._loaded(digest)
        try:
            self._residents.move_to_end(digest)
            yield resident
        finally:
            await self._release(resident)

    async def _loaded(self, digest: str) -> Resident:
        """Wait for the one load of an adapter; the resident comes with this caller's lease already counted."""
        load = self._loads.get(digest)
        if load is None:
            load = self._loads[digest] = _Load()
            load.task = asyncio.create_task(self._load(digest, load))
        assert load.task is not None  # noqa: S101 (for the type checker)
        load.waiters += 1
        try:
            # Shielded: a caller that goes away must not take the load from the others.
            return await asyncio.shield(load.task)
        except asyncio.CancelledError:
            load.waiters -= 1
            if load.resident is not None:
                await self._release(load.resident)
            raise

    async def _release(self, resident: Resident) -> None:
        resident.leases -= 1
        if not resident.leases:
            await self._notify()

    async def _notify(self) -> None:
        """Wake the loads that wait for a slot: one may be had now."""
        async with self._released:
            self._released.notify_all()

    async def _load(self, digest: str, load: "_Load") -> Resident:
        loop = asyncio.get_running_loop()
        try:
            adapter = self._host.get(digest)
            if adapter is None:
                adapter = await loop.run_in_executor(self._executor, self._read, digest)
                self._host.put(adapter)
            await self._reserve()
            try:
                slot = await loop.run_in_executor(self._executor, self._bank.put, adapter)
            finally:
                self._writing -= 1
            mean, std = (torch.tensor(adapter.preprocess[name], dtype=torch.float32) for name in ("mean", "std"))
            # In one step with the leases of all who wait: nobody can take the slot before they use it.
            load.resident = self._residents[digest] = Resident(digest, slot, mean, std, load.waiters)
            return load.resident
        except AdapterError as error:
            raise invalid_adapter(error) from error
        finally:
            del self._loads[digest]
            await self._notify()  # it failed, or nobody waits for it any more: either way a slot may be free

    async def _reserve(self) -> None:
        """Promise a slot to a load, taking it from the least recently used adapter where none is free."""
        try:
            async with asyncio.timeout(self._wait_s), self._released:
                while len(self._residents) + self._writing >= self._bank.slots:
                    idle = next((r for r in self._residents.values() if not r.leases), None)
                    if idle is None:
                        await self._released.wait()
                    else:
                        del self._residents[idle.digest]
                        self._bank.evict(idle.slot)
                self._writing += 1
        except TimeoutError as error:
            raise Unavailable(f"all {self._bank.slots} adapter slots of this worker are in use; try again") from error

    def _read(self, digest: str) -> Adapter:
        return Adapter.read(self._store.get(digest))


class _HostCache:
    """Adapters in host memory, at most so many bytes of files; least recently used out."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()

    def get(self, digest: str) -> Adapter | None:
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

    def put(self, adapter: Adapter) -> None:
        self._adapters[adapter.digest] = adapter
        self._bytes += len(adapter.data)
        while self._bytes > self._limit_bytes:
            _, oldest = self._adapters.popitem(last=False)
            self._bytes -= len(oldest.data)


def invalid_adapter(error: AdapterError) -> InvalidAdapter:
    """What a client is told of an adapter that cannot be used: every tensor and field that is wrong."""
    return InvalidAdapter(str(error), [FieldProblem(p.where, p.message) for p in error.problems])
