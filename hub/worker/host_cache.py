"""Adapters in host memory, packed for the bank; read from the store if absent."""

import asyncio
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from cachetools import LRUCache
from torch import Tensor

from adapters import Adapter, AdapterError, Bank, Packed

from ..storage.store import Store
from ..worker_api import invalid_adapter


@dataclass(frozen=True, eq=False)
class HostAdapter:
    """An adapter ready for a slot, with the normalisation of its images."""

    packed: Packed
    mean: Tensor  # (3,) float32
    std: Tensor  # (3,) float32
    first_block: int  # see `Bank.first_block`


class HostCache:
    """Packed adapters up to a number of bytes; evicts the least recently used one. Runs on one event loop."""

    def __init__(self, bank: Bank, store: Store, *, readers: Executor, limit_bytes: int) -> None:
        """
        Args:
            bank: packs the adapters.
            readers: threads that read from the store.
        """
        self._bank = bank
        self._store = store
        self._readers = readers
        self._adapters: LRUCache[str, HostAdapter] = LRUCache(limit_bytes, getsizeof=lambda a: a.packed.size_bytes)
        self.store_reads = 0

    @property
    def size_bytes(self) -> int:
        """Memory in use by packed adapters."""
        return int(self._adapters.currsize)

    async def load(self, digest: str) -> HostAdapter:
        """Return an adapter, from the store if it is not in host memory.

        Raises:
            Unavailable: the store cannot return the file.
            InvalidAdapter: the file does not fit the bank.
        """
        adapter = self._adapters.get(digest)
        if adapter is None:
            self.store_reads += 1
            adapter = await asyncio.get_running_loop().run_in_executor(self._readers, self._read, digest)
            self._keep(digest, adapter)
        return adapter

    def load_now(self, digest: str) -> HostAdapter:
        """Read an adapter from the store before an event loop runs; blocks the thread.

        Raises:
            Unavailable, InvalidAdapter: as `load`.
        """
        adapter = self._read(digest)
        self._keep(digest, adapter)
        return adapter

    def cached(self, digest: str) -> HostAdapter | None:
        """Return an adapter that is in host memory, as the most recently used one."""
        return self._adapters.get(digest)

    def _keep(self, digest: str, adapter: HostAdapter) -> None:
        if adapter.packed.size_bytes <= self._adapters.maxsize:  # LRUCache raises ValueError for a larger one
            self._adapters[digest] = adapter

    def _read(self, digest: str) -> HostAdapter:
        try:
            adapter = Adapter.read(self._store.get(digest), layouts=self._bank.layouts)
            packed = self._bank.pack(adapter)
        except AdapterError as error:
            raise invalid_adapter(error) from error
        mean, std = (torch.tensor(adapter.preprocess[name], dtype=torch.float32) for name in ("mean", "std"))
        return HostAdapter(packed, mean, std, self._bank.first_block(packed))
