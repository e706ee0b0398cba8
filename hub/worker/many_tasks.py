"""Many tasks on one image: heads share one row of a pass, and adapters the row up to their first adapted block.

An adapter that is only a head needs no slot. It stays in host memory, and its head is stacked with those of the other
tasks of the call; a thousand of them neither evict other adapters nor cost a second pass.

An item of the queue is one image with some of its adapters, and counts as the passes that it costs, at most
`MAX_ITEM_PASSES`. Adapters of an item are leased together, only once all of them are in slots: a call that held some
slots while it waits for others could wait for a call that does the same.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from itertools import chain
from math import ceil

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from adapters import Bank, Heads

from ..coroutines import gather_or_cancel
from ..errors import InvalidAdapter
from ..worker_api import PassStats, TaskAnswers
from .adapter_cache import AdapterCache, Resident
from .host_cache import HostAdapter, HostCache
from .passes import Item, ItemScores

MAX_ITEM_PASSES = 4  # an item never waits for a larger batch than others, and makes one at most this much larger
LEASE_ATTEMPTS = 3  # then the adapters of an item are leased one by one, and share nothing

Submit = Callable[[Sequence[Item]], Awaitable[Sequence[tuple[ItemScores, PassStats]]]]
Answer = tuple[str, NDArray[np.float32], float, PassStats]  # digest, probabilities, typicality, pass


class ManyTasks:
    """Calls for many tasks on one image, at one worker. Runs on one event loop."""

    def __init__(
        self, bank: Bank, host: HostCache, cache: AdapterCache, *, threads: Executor, heads_limit_bytes: int
    ) -> None:
        """
        Args:
            threads: stack heads.
            heads_limit_bytes: memory for stacked heads of former calls. Larger ones are stacked for each call.
        """
        self._bank = bank
        self._host = host
        self._cache = cache
        self._threads = threads
        self._heads: LRUCache[tuple[str, ...], Heads] = LRUCache(heads_limit_bytes, getsizeof=lambda h: h.size_bytes)

    async def answer(
        self, tenant: str, digests: Sequence[str], pixels: NDArray[np.uint8], traceparent: str, submit: Submit
    ) -> TaskAnswers:
        """Return the answers of several adapters to one image.

        Args:
            digests: different adapters whose normalisation is the same.
            pixels: uint8 (3, H, W).
            submit: queues items.

        Raises:
            Unavailable: the store cannot return a file, or an adapter is not in a slot in time.
            LimitReached: too many images of the tenant are queued.
        """
        started_s = time.perf_counter()
        invalid: dict[str, InvalidAdapter] = {}
        found = await gather_or_cancel(self._find(digest, tenant, invalid) for digest in digests)
        usable = {digest: adapter for digest, adapter in zip(digests, found, strict=True) if adapter is not None}
        if not usable:
            return TaskAnswers.of([], invalid)
        heads = {
            d: adapter for d, adapter in usable.items() if isinstance(adapter, HostAdapter) and self._is_head(adapter)
        }
        stacked = await self._stack(heads) if heads else None
        first_blocks = {d: adapter.first_block for d, adapter in usable.items() if d not in heads}
        mean, std = next((adapter.mean, adapter.std) for adapter in usable.values())

        def item(adapters: Sequence[Resident], with_heads: bool) -> Item:
            queued_at_s = time.perf_counter()
            passes = self._bank.passes([a.first_block for a in adapters], heads=with_heads)
            load_ms = (queued_at_s - started_s) * 1000
            own = stacked if with_heads else None
            return Item(pixels, mean, std, adapters, load_ms, queued_at_s, traceparent, own, ceil(passes))

        async def send(adapters: Sequence[Resident], with_heads: bool) -> list[Answer]:
            ((scores, stats),) = await submit([item(adapters, with_heads)])
            names = [*(adapter.digest for adapter in adapters), *(heads if with_heads else ())]
            parts = np.split(scores.probabilities, np.cumsum(scores.sizes)[:-1])
            return [(*one, stats) for one in zip(names, parts, scores.typicality.tolist(), strict=True)]

        async def alone(digest: str) -> list[Answer]:
            try:
                async with self._cache.lease(digest, tenant) as adapter:
                    return await send([adapter], False)
            except InvalidAdapter as error:
                invalid[digest] = error
                return []

        async def group(members: Sequence[str], with_heads: bool) -> list[Answer]:
            if len(members) > 1 or (members and with_heads):
                for _ in range(LEASE_ATTEMPTS):
                    with self._cache.lease_resident(members) as adapters:
                        if adapters is not None:
                            return await send(adapters, with_heads)
                    await gather_or_cancel(self._load(digest, tenant) for digest in members)
            calls = [alone(digest) for digest in members]
            return [*chain(*await gather_or_cancel([*calls, send([], True)] if with_heads else calls))]

        groups = self._groups(first_blocks, with_heads=bool(heads))
        answers = await gather_or_cancel(
            group(members, with_heads=bool(heads) and i == 0) for i, members in enumerate(groups)
        )
        return TaskAnswers.of([*chain(*answers)], invalid)

    async def _find(
        self, digest: str, tenant: str, invalid: dict[str, InvalidAdapter]
    ) -> HostAdapter | Resident | None:
        """Return an adapter, in its slot if it needs one and has it; None if it is invalid, which is noted."""
        resident = self._cache.resident(digest)
        if resident is not None and not self._is_head(resident):
            return resident
        adapter = self._host.cached(digest)
        try:
            if adapter is None:
                async with self._cache.tenant_loads.acquire(tenant):
                    adapter = await self._host.load(digest)
        except InvalidAdapter as error:
            invalid[digest] = error
        return adapter

    async def _load(self, digest: str, tenant: str) -> None:
        """Load an adapter into a slot. Its own call meets an error again."""
        try:
            async with self._cache.lease(digest, tenant):
                pass
        except InvalidAdapter:
            pass

    def _is_head(self, adapter: HostAdapter | Resident) -> bool:
        return adapter.first_block == self._bank.blocks

    async def _stack(self, heads: dict[str, HostAdapter]) -> Heads:
        key = tuple(heads)
        stacked = self._heads.get(key)
        if stacked is None:
            adapters = [adapter.packed for adapter in heads.values()]
            loop = asyncio.get_running_loop()
            stacked = await loop.run_in_executor(self._threads, self._bank.heads, adapters)
            if stacked.size_bytes <= self._heads.maxsize:  # LRUCache raises ValueError for a larger one
                self._heads[key] = stacked
        return stacked

    def _groups(self, first_blocks: dict[str, int], *, with_heads: bool) -> list[list[str]]:
        """Return the adapters of each item. The first item has the heads, if there are any.

        Adapters from block 0 on share nothing, so each has an item of its own.
        """
        late = sorted((d for d, first in first_blocks.items() if first > 0), key=lambda d: -first_blocks[d])
        groups: list[list[str]] = [[]] if with_heads else []
        most = max(1, self._bank.slots // 4)
        for digest in late:
            together = [*groups[-1], digest] if groups else [digest]
            firsts = [first_blocks[d] for d in together]
            passes = self._bank.passes(firsts, heads=with_heads and len(groups) == 1)
            if groups and len(together) <= most and passes <= MAX_ITEM_PASSES:
                groups[-1] = together
            else:
                groups.append([digest])
        return groups + [[digest] for digest, first in first_blocks.items() if first <= 0]
