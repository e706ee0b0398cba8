"""Garbage collection of the store: removes files that no version of any tenant holds.

A failed registration and a deleted version each leave such a file. To a registry that lost its keys every file would
look like garbage. So the store keeps the id of its registry, and a collection removes nothing unless both ids agree and
the registry is complete.
"""

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Protocol

from ..admin_schemas import Collected
from ..concurrency import Pool, run_blocking
from ..errors import Conflict, HubError
from ..registry.redis.connection import is_cancelled
from ..storage.store import OWNER, Store

logger = logging.getLogger(__name__)

FILES_PER_LISTING = 1000
BIND_INTERVAL_S = 10.0
CLAIM_USE_S = 30.0  # half of a claim's lifetime; a removal that has not started by then waits for the next collection


class OrphanRegistry(Protocol):
    """The part of the registry that garbage collection needs."""

    async def claim_orphan(self, digest: str) -> bool:
        """Return whether no version holds the digest. If so, no version can start to hold it for one minute."""


class Integrity(Protocol):
    """The part of the registry that recognises its loss."""

    async def identity(self) -> str | None:
        """Return the random id of the registry, or None."""

    async def make_identity(self) -> str:
        """Return the random id of the registry; make one if there is none."""

    async def has_versions(self) -> bool:
        """Return whether a version of any tenant exists."""

    async def check_complete(self) -> None:
        """Raise `Conflict` if keys may be missing."""


async def bind_store(integrity: Integrity, store: Store, pool: Pool) -> None:
    """Check that registry and store belong together. The first call for a new store binds it to the registry.

    Raises:
        Conflict: the store belongs to another registry, or this registry lost its keys.
        Unavailable: the registry or the store is unavailable.
    """
    owner, identity = await run_blocking(pool, store.owner), await integrity.identity()
    if owner is None:
        has_files = bool(await run_blocking(pool, lambda: list(islice(store.files(), 1))))
        if has_files and not await integrity.has_versions():
            raise Conflict(
                "The adapter store has files, but the registry has no version. It may have lost its keys. Restore the "
                "registry from a backup, or register a version first if the files are not needed."
            )
        await run_blocking(pool, store.set_owner, await integrity.make_identity())
    elif identity is None:
        raise Conflict(
            "The registry has lost its keys, or it is a new one beside the store of an old one. Restore the registry "
            f"from a backup. If the files are not needed, remove {OWNER} from the store, register a version, and "
            "collect again."
        )
    elif owner != identity:
        raise Conflict(
            "The adapter store belongs to another registry. Use a store of its own for each registry. If the other "
            f"registry is gone and its files are not needed, remove {OWNER} from the store, register a version, and "
            "collect again."
        )


async def keep_bound(integrity: Integrity, store: Store, pool: Pool) -> None:
    """Bind the store at the start of a gateway. Repeat until registry and store answer; log a conflict."""
    while not is_cancelled():
        try:
            await bind_store(integrity, store, pool)
            return
        except Conflict as error:
            logger.error("garbage collection removes nothing: %s", error.detail)
            return
        except HubError:
            await asyncio.sleep(BIND_INTERVAL_S)


async def collect_garbage(
    registry: OrphanRegistry,
    integrity: Integrity,
    store: Store,
    pool: Pool,
    older_than_s: float,
    now: datetime | None = None,
) -> Collected:
    """Remove every file that no version holds and that no registration put within the last `older_than_s` seconds.

    A registration puts its file first and adds its version afterwards. The put refreshes the file's modification time,
    which protects the file. A put that comes too late for that meets the claim: the claim lasts one minute and outlives
    the removal, so the registry refuses the version (`Unavailable`). The client's retry puts the file again. The
    collector never ends a claim early, because another collection may rely on it.

    Args:
        pool: thread pool for calls to the store; None for the event loop's default pool.
        now: reference time for ages; None for the clock.

    Raises:
        Conflict: the registry may have lost keys; nothing was removed.
        Unavailable: the registry or the store is unavailable; files removed before that stay removed.
    """
    await bind_store(integrity, store, pool)
    await integrity.check_complete()
    before = (now or datetime.now(UTC)) - timedelta(seconds=older_than_s)
    unfinished = await run_blocking(pool, store.delete_unfinished, before)
    removed, size_bytes, kept = len(unfinished), sum(unfinished), 0
    files = store.files()
    while listed := await run_blocking(pool, lambda: list(islice(files, FILES_PER_LISTING))):
        for file in listed:
            if file.modified < before and await _remove(registry, store, pool, file.digest, before):
                removed += 1
                size_bytes += file.size_bytes
            else:
                kept += 1
    return Collected(removed=removed, bytes=size_bytes, kept=kept)


async def _remove(registry: OrphanRegistry, store: Store, pool: Pool, digest: str, before: datetime) -> bool:
    deadline = time.monotonic() + CLAIM_USE_S
    if not await registry.claim_orphan(digest):
        return False
    return await run_blocking(pool, _remove_if_old, store, digest, before, deadline)


def _remove_if_old(store: Store, digest: str, before: datetime, deadline: float) -> bool:
    """Check the age again, because a registration may have put the file between listing and claim."""
    file = store.find(digest)
    return file is not None and file.modified < before and time.monotonic() < deadline and store.delete(digest)
