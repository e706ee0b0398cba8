"""Removal of files that no dataset uses: images with their features, snapshots and reports of trainings."""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import islice

from ...admin_schemas import Collected
from ...concurrency import Pool, run_blocking
from ...errors import HubError
from ...registry.datasets.files import DatasetFiles, StoredName
from ...registry.datasets.kept import KeptImages
from ...registry.health import RegistryIntegrity
from ...storage.features import FeatureStore
from ...storage.store import Store, StoredFile

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
EXPIRY_S = 600.0  # between two removals of kept images whose time is over
DRAINED_IMAGES = 200  # of a deleted dataset, in one step of the registry
FILES_PER_LISTING = 1000
REMOVING_PAUSE_S, REMOVING_ATTEMPTS = 0.3, 10  # of a new file, while the store removes an old copy of it


class FileRemoval:
    """Removes files of datasets from the store. `run` must run beside it."""

    def __init__(
        self,
        *,
        files: DatasetFiles,
        kept: KeptImages,
        integrity: RegistryIntegrity,
        images: Store,
        snapshots: Store,
        reports: Store,
        features: FeatureStore,
        pool: Pool,
    ) -> None:
        """
        Args:
            pool: thread pool for calls to the store.
        """
        self._files = files
        self._kept = kept
        self._integrity = integrity
        self._stores = {"": images, "s:": snapshots, "r:": reports}
        self._features = features
        self._pool = pool

    async def remove(self, names: Sequence[StoredName]) -> None:
        """Remove files, unless a dataset has begun to use one. Never raises: garbage collection finds what is left."""
        for name in names:
            try:
                await self._remove(name)
            except HubError as error:
                logger.warning("file %s is not removed yet: %s", name.digest, error.detail)

    async def run(self) -> None:
        """Remove the files of deleted tasks and tenants and expired images, until cancelled."""
        expired_s = -EXPIRY_S
        while True:
            try:
                more = True
                while more:
                    names, more = await self._files.drain(DRAINED_IMAGES)
                    await self.remove(names)
                if time.monotonic() - expired_s >= EXPIRY_S:
                    await self.expire()
                    expired_s = time.monotonic()
            except HubError:
                pass  # the registry is unavailable; the next round repeats
            except Exception:
                logger.exception("the files of deleted datasets cannot be removed")
            await asyncio.sleep(INTERVAL_S)

    async def expire(self) -> int:
        """Remove classified images whose time is over, unless they have a label. Return their number.

        Raises:
            Unavailable: the registry is unavailable.
        """
        total = 0
        for tenant, task in await self._kept.datasets():
            removed = DRAINED_IMAGES
            while removed == DRAINED_IMAGES:
                removed, names = await self._kept.expire(tenant, task, DRAINED_IMAGES)
                await self.remove(names)
                total += removed
        return total

    async def collect(self, before: datetime) -> Collected:
        """Remove expired images, and every file that no dataset uses and that was written before a time.

        Raises:
            Conflict: the registry may have lost keys; nothing was removed.
            Unavailable: the registry or the store is unavailable; files removed before that stay removed.
        """
        await self._integrity.check_images()
        await self.expire()
        removed = size_bytes = kept = 0
        for kind, store in self._stores.items():
            unfinished = await run_blocking(self._pool, store.delete_unfinished, before)
            removed, size_bytes = removed + len(unfinished), size_bytes + sum(unfinished)
            stored = store.files()
            while listed := await run_blocking(self._pool, _next_files, stored):
                for file in listed:
                    if file.modified < before and await self._remove(StoredName(kind, file.digest), before):
                        removed, size_bytes = removed + 1, size_bytes + file.size_bytes
                    else:
                        kept += 1
        return Collected(removed=removed, bytes=size_bytes, kept=kept)

    async def _remove(self, name: StoredName, before: datetime | None = None) -> bool:
        async with self._files.claimed(name) as claimed:
            if not claimed:
                return False
            store = self._stores[name.kind]
            if before is not None:  # an upload may have written the file since the listing
                file = await run_blocking(self._pool, store.find, name.digest)
                if file is None or file.modified >= before:
                    return False
            deleted = await run_blocking(self._pool, store.delete, name.digest)
            if name.kind == "":
                await run_blocking(self._pool, self._features.delete, name.digest)
            return deleted


def _next_files(files: Iterator[StoredFile]) -> list[StoredFile]:
    return list(islice(files, FILES_PER_LISTING))
