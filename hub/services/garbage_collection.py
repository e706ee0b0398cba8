"""Garbage collection of the store: removes files that no version of any tenant holds.

A failed registration and a deleted version each leave such a file, and its bytes count against the tenant until then.
One gateway at a time collects by itself, and a registration that meets the tenant's limit of bytes first removes that
tenant's own files. To a registry that lost its keys every file would
look like garbage. So the store keeps the id of its registry, and a collection removes nothing unless both ids agree and
the registry is complete.
"""

import asyncio
import logging
import random
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Protocol

from ..admin_schemas import Collected
from ..concurrency import Pool, run_blocking
from ..errors import Conflict, HubError
from ..registry.audit import Actor, AuditLog
from ..storage.accounts import FileRegistry
from ..storage.store import OWNER, Store

logger = logging.getLogger(__name__)

FILES_PER_LISTING = 1000
BIND_INTERVAL_S = 10.0
TURN_S = 60  # of one gateway; renewed while it collects, so the turn of a gateway that died is free soon
LONGEST_WAIT_S = 30.0  # between two looks whether it is time to collect
FILES_PER_ROOM = 100  # files that one registration removes at most
CHECKED_S = 60.0  # the registry counts as complete for so long after a check, for the removal of a tenant's own files
NO_FILE_IS_YOUNGER = datetime.max.replace(tzinfo=UTC)
HUB = Actor("", "garbage collection", "hub", "the hub itself")
CLAIM_USE_S = 30.0  # half of a claim's lifetime; a removal that has not started by then waits for the next collection


class OrphanRegistry(Protocol):
    """The part of the registry that garbage collection needs."""

    async def claim_orphan(self, digest: str) -> bool:
        """Return whether no version holds the digest. If so, no version can start to hold it for one minute."""


class DatasetFileRemoval(Protocol):
    """The removal of files that no dataset uses."""

    async def collect(self, before: datetime) -> Collected:
        """Remove every file that no dataset uses and that was written before a time."""


class Accounts(Protocol):
    """The part of the registry that counts the bytes of files without a version."""

    async def release(self, digest: str) -> None:
        """Stop to count a file that the store has no more."""


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
    while True:
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
    accounts: Accounts | None = None,
) -> Collected:
    """Remove every file that no version holds and that no registration put within the last `older_than_s` seconds.

    A registration puts its file first and adds its version afterwards. The put refreshes the file's modification time,
    which protects the file. A put that comes too late for that meets the claim: the claim lasts one minute and outlives
    the removal, so the registry refuses the version (`Unavailable`). The client's retry puts the file again. The
    collector never ends a claim early, because another collection may rely on it.

    Args:
        pool: thread pool for calls to the store; None for the event loop's default pool.
        now: reference time for ages; None for the clock.
        accounts: accounts of the removed files; None for a registry without any.

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
                if accounts is not None:
                    await accounts.release(file.digest)
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


class Collector:
    """A gateway's garbage collection: by command, by itself, and for a tenant that needs room."""

    def __init__(
        self,
        *,
        registry: OrphanRegistry,
        files: FileRegistry,
        integrity: Integrity,
        audit: AuditLog,
        store: Store,
        datasets: DatasetFileRemoval,
        pool: Pool,
        interval_s: int,
        age_s: float,
    ) -> None:
        """
        Args:
            store: the adapter files.
            datasets: removes files of the other kinds.
            pool: thread pool for calls to the store.
            interval_s: seconds between two collections of the whole hub by itself; 0: none.
            age_s: seconds since its last write before such a collection removes a file.
        """
        self._registry = registry
        self._files = files
        self._integrity = integrity
        self._audit = audit
        self._store = store
        self._datasets = datasets
        self._pool = pool
        self._interval_s = interval_s
        self._age_s = age_s
        self._gateway = uuid.uuid4().hex
        self._checked_at_s: float | None = None

    async def collect(self, older_than_s: float) -> Collected:
        """Collect the garbage of all tenants and of their datasets. Raise the errors of `collect_garbage`."""
        registry, store, pool = self._registry, self._store, self._pool
        before = datetime.now(UTC) - timedelta(seconds=older_than_s)
        adapters = await collect_garbage(registry, self._integrity, store, pool, older_than_s, accounts=self._files)
        # A gateway that died may have removed a file without its account.
        async for digest in self._files.orphans():
            if await run_blocking(pool, store.find, digest) is None and await registry.claim_orphan(digest):
                await self._files.release(digest)
        images = await self._datasets.collect(before)
        return Collected(
            removed=adapters.removed + images.removed,
            bytes=adapters.bytes + images.bytes,
            kept=adapters.kept + images.kept,
        )

    async def make_room(self, tenant: str, needed_bytes: int) -> bool:
        """Remove files of deleted versions of one tenant until enough bytes are free. Return whether some are.

        Age protects none of them: the registry knows which ones a registration is about to use.

        Raises:
            Unavailable: the registry or the store is unavailable.
        """
        orphans = await self._files.due(tenant, FILES_PER_ROOM)
        if not orphans:
            return False
        try:
            await self._check()
        except Conflict as error:  # not the tenant's fault, so the log alone has it
            logger.error("no room is made for a tenant: %s", error.detail)
            return False
        freed_bytes = 0
        for orphan in orphans:
            if freed_bytes >= needed_bytes:
                break
            digest, before = orphan.digest, NO_FILE_IS_YOUNGER
            await _remove(self._registry, self._store, self._pool, digest, before)
            if await run_blocking(self._pool, self._store.find, digest) is None:
                await self._files.release(digest)
                freed_bytes += orphan.size_bytes
        return freed_bytes > 0

    async def run(self) -> None:
        """Collect at each interval until cancelled, in one gateway of the cluster at a time."""
        while self._interval_s:
            # At random, so that gateways of one age do not all ask at once.
            await asyncio.sleep(min(LONGEST_WAIT_S, self._interval_s) * random.uniform(0.5, 1))  # noqa: S311
            try:
                if await self._files.begin(self._gateway, TURN_S):
                    await self._collect_in_turn()
            except Conflict as error:
                logger.error("garbage collection removes nothing: %s", error.detail)
            except HubError as error:
                logger.warning("garbage collection waits: %s", error.detail)
            except Exception:
                logger.exception("garbage collection failed")

    async def _collect_in_turn(self) -> None:
        renewing = asyncio.create_task(self._renew())
        try:
            done = await self.collect(self._age_s)
        finally:
            renewing.cancel()
            await asyncio.wait((renewing,))
            await self._files.extend(self._gateway, self._interval_s)
        if done.removed:
            logger.info("garbage collection removed %d files of %d bytes", done.removed, done.bytes)
            await self._audit.append(HUB.entry("", "store.collect", removed=done.removed, bytes=done.bytes))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(TURN_S / 3)
            with suppress(HubError):  # two collections at once remove nothing that one would not
                await self._files.extend(self._gateway, TURN_S)

    async def _check(self) -> None:
        now_s = time.monotonic()
        if self._checked_at_s is None or now_s - self._checked_at_s > CHECKED_S:
            await bind_store(self._integrity, self._store, self._pool)
            await self._integrity.check_complete()
            self._checked_at_s = now_s
