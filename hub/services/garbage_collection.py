"""Garbage collection of the store: removes files that no version of any tenant holds.

A failed registration and a deleted version each leave such a file.
"""

import time
from concurrent.futures import Executor
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Protocol

from ..concurrency import run_blocking
from ..schemas import Collected
from ..storage.store import Store

FILES_PER_LISTING = 1000
CLAIM_USE_S = 30.0  # half of a claim's lifetime; a removal that has not started by then waits for the next collection


class OrphanRegistry(Protocol):
    """The part of the registry that garbage collection needs."""

    async def claim_orphan(self, digest: str) -> bool:
        """Return whether no version holds the digest. If so, no version can start to hold it for one minute."""


async def collect_garbage(
    registry: OrphanRegistry,
    store: Store,
    executor: Executor | None,
    older_than_s: float,
    now: datetime | None = None,
) -> Collected:
    """Remove every file that no version holds and that no registration put within the last `older_than_s` seconds.

    A registration puts its file first and adds its version afterwards. The put refreshes the file's modification time,
    which protects the file. A put that comes too late for that meets the claim: the claim lasts one minute and outlives
    the removal, so the registry refuses the version (`Unavailable`). The client's retry puts the file again. The
    collector never ends a claim early, because another collection may rely on it.

    Args:
        executor: thread pool for calls to the store; None for the event loop's default pool.
        now: reference time for ages; None for the clock.

    Raises:
        Unavailable: the registry or the store is unavailable; files removed before that stay removed.
    """
    before = (now or datetime.now(UTC)) - timedelta(seconds=older_than_s)
    unfinished = await run_blocking(executor, store.delete_unfinished, before)
    removed, size_bytes, kept = len(unfinished), sum(unfinished), 0
    files = store.files()
    while listed := await run_blocking(executor, lambda: list(islice(files, FILES_PER_LISTING))):
        for file in listed:
            if file.modified < before and await _remove(registry, store, executor, file.digest, before):
                removed += 1
                size_bytes += file.size_bytes
            else:
                kept += 1
    return Collected(removed=removed, bytes=size_bytes, kept=kept)


async def _remove(
    registry: OrphanRegistry, store: Store, executor: Executor | None, digest: str, before: datetime
) -> bool:
    deadline = time.monotonic() + CLAIM_USE_S
    if not await registry.claim_orphan(digest):
        return False
    return await run_blocking(executor, _remove_if_old, store, digest, before, deadline)


def _remove_if_old(store: Store, digest: str, before: datetime, deadline: float) -> bool:
    """Check the age again, because a registration may have put the file between listing and claim."""
    file = store.find(digest)
    return file is not None and file.modified < before and time.monotonic() < deadline and store.delete(digest)
