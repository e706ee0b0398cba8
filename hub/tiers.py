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
    leases: int = 0


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
        self._loading: dict[str, asyncio.Task[None]] = {}
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
        while resident is None:  # evicted again before we could take it: load it once more
            await self._load_once(digest)
            resident = self._residents.get(digest)
        resident.leases += 1
        self._residents.move_to_end(digest)
        try:
            yield resident
        finally:
            resident.leases -= 1
            if not resident.leases and self._loading:
                async with self._released:
                    self._released.notify_all()

    async def _load_once(self, digest: str) -> None:
        task = self._loading.get(digest)
        if task is None:
            task = self._loading[digest] = asyncio.create_task(self._load(digest))
            task.add_done_callback(lambda _: self._loading.pop(digest))
        # Shielded: one caller that goes away must not take the load from the others.
        await asyncio.shield(task)

    async def _load(self, digest: str) -> None:
        loop = asyncio.get_running_loop()
        adapter = self._host.get(digest)
        if adapter is None:
            adapter = await loop.run_in_executor(self._executor, self._read, digest)
            self._host.put(adapter)
        await self._reserve()
        try:
            slot = await loop.run_in_executor(self._executor, self._put, adapter)
            mean, std = (torch.tensor(adapter.preprocess[name], dtype=torch.float32) for name in ("mean", "std"))
            self._residents[digest] = Resident(digest, slot, mean, std)
        finally:
            self._writing -= 1

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
        try:
            return Adapter.read(self._store.get(digest))
        except AdapterError as error:
            raise invalid_adapter(error) from error

    def _put(self, adapter: Adapter) -> int:
        try:
            return self._bank.put(adapter)
        except AdapterError as error:
            raise invalid_adapter(error) from error


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
