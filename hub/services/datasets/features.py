"""Pooled frozen features of the datasets' images: computed by the workers, kept in the store.

The gateway that received an image sends its pixels to a worker after the reply. Images that were left, because their
gateway stopped or the backbone changed, wait in the registry; any gateway takes them in small parts.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters import BankLimits
from adapters.data.images import preprocess_of

from ...concurrency import TenantThreads, run_blocking
from ...coroutines import gather_or_cancel
from ...errors import HubError, InvalidImage, TooLarge, Unavailable
from ...registry.datasets.files import DatasetFiles
from ...storage.features import FeatureStore, feature_key
from ...storage.store import Store
from ...worker_api import Workers
from ..decoding.decoder import ImageDecoder

logger = logging.getLogger(__name__)

CALL_BYTES = 2 * 1024**2  # of pixels in one call to a worker
QUEUED_BYTES = 256 * 1024**2  # of pixels that wait in this gateway; images beyond them wait in the registry
PATIENCE_S = 120  # after an upload, before another gateway computes its features
LEASED_IMAGES, LEASE_S = 16, 120
INTERVAL_S = 2.0
READ_IMAGES = 256  # features read from the store at once
STORED_IMAGES = 16  # features written to the store at once
COMPUTED_IMAGES = 32  # images read, decoded and computed at once for a training


@dataclass(frozen=True)
class FeatureSpec:
    """The current features: their key in the store, their width, and the preprocessing of the images."""

    key: str
    width: int
    preprocess: Mapping[str, Any]

    @classmethod
    def of(cls, limits: BankLimits) -> "FeatureSpec":
        """Return the features of a bank's backbone."""
        preprocess = preprocess_of(limits.backbone)
        return cls(feature_key(limits.backbone.fingerprint, preprocess), limits.backbone.width, preprocess)


class FeatureService:
    """Features of images by digest. `run` must run beside it."""

    def __init__(
        self,
        *,
        files: DatasetFiles,
        images: Store,
        features: FeatureStore,
        decoder: ImageDecoder,
        workers: Workers,
        limits: Callable[[], Awaitable[BankLimits]],
        threads: TenantThreads,
    ) -> None:
        """
        Args:
            limits: returns the limits of the workers' banks.
            threads: thread pool for calls to the store.
        """
        self._files = files
        self._images = images
        self._features = features
        self._decoder = decoder
        self._workers = workers
        self._limits = limits
        self._threads = threads
        self._queued_bytes = 0
        self._running: dict[str, asyncio.Task[None]] = {}  # by digest
        self._tasks: set[asyncio.Task[None]] = set()

    async def spec(self) -> FeatureSpec:
        """Return the key, the width and the preprocessing of the current features.

        Raises:
            Unavailable: no worker has loaded its backbone yet.
        """
        return FeatureSpec.of(await self._limits())

    def compute_later(self, tenant: str, spec: FeatureSpec, pixels: Mapping[str, NDArray[np.uint8]]) -> None:
        """Compute features of new images in the background. With many waiting images, leave them to the registry."""
        size = sum(image.nbytes for image in pixels.values())
        if not pixels or self._queued_bytes + size > QUEUED_BYTES:
            return
        self._queued_bytes += size
        task = asyncio.create_task(self._compute_and_forget(tenant, spec, pixels, size))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._running |= dict.fromkeys(pixels, task)

    async def of(self, tenant: str, digests: Sequence[str]) -> dict[str, NDArray[np.float16]]:
        """Return the features of images; compute those that the store lacks. An unreadable image has none.

        Args:
            tenant: whose share of the decoders the missing images use.

        Raises:
            Unavailable: the store, the registry or the workers are unavailable.
        """
        spec = await self.spec()
        found = await self.stored(tenant, digests, settled=True)
        missing = [digest for digest in digests if digest not in found]
        for start in range(0, len(missing), COMPUTED_IMAGES):
            found |= await self._computed(tenant, spec, missing[start : start + COMPUTED_IMAGES])
        return found

    async def stored(
        self, tenant: str, digests: Sequence[str], *, settled: bool = False
    ) -> dict[str, NDArray[np.float16]]:
        """Return the features of those images for which the store has them.

        Args:
            settled: wait for the features that this gateway computes at the moment.

        Raises:
            Unavailable: the store is unavailable, or no worker has loaded its backbone yet.
        """
        spec = await self.spec()
        running = {self._running[digest] for digest in digests if digest in self._running}
        if settled and running:
            await asyncio.wait(running)
        found: dict[str, NDArray[np.float16]] = {}
        for start in range(0, len(digests), READ_IMAGES):
            part = list(digests[start : start + READ_IMAGES])
            found |= await run_blocking(self._threads.of(tenant), self._features.get, spec.key, part, spec.width)
        return found

    async def run(self) -> None:
        """Compute features that no gateway has computed, until cancelled."""
        known = ""
        while True:
            try:
                if not await self._files.any_images():  # the next line would start a worker of a hub without any
                    await asyncio.sleep(INTERVAL_S)
                    continue
                key = (await self.spec()).key
                if key != known:
                    if await self._files.use_feature_key(key):
                        logger.info("the backbone's features have the key %s; images get new ones", key)
                    known = key
                while digests := await self._files.lease_pending(LEASED_IMAGES, LEASE_S):
                    await self.of("", digests)
                    await self._files.note_features(digests)
            except HubError:
                pass  # the registry, the store or a worker is unavailable; the next round repeats
            except Exception:
                logger.exception("the features of images cannot be computed")
            await asyncio.sleep(INTERVAL_S)

    async def close(self) -> None:
        """Cancel the computations of new images; the registry has them for other gateways."""
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1)

    async def _compute_and_forget(
        self, tenant: str, spec: FeatureSpec, pixels: Mapping[str, NDArray[np.uint8]], size: int
    ) -> None:
        try:
            await self._compute(tenant, spec, pixels)
            await self._files.note_features(list(pixels))
        except HubError as error:
            logger.info("features of %d images are computed later: %s", len(pixels), error.detail)
        finally:
            self._queued_bytes -= size
            for digest in pixels:
                self._running.pop(digest, None)

    async def _computed(self, tenant: str, spec: FeatureSpec, digests: Sequence[str]) -> dict[str, NDArray[np.float16]]:
        pixels: dict[str, NDArray[np.uint8]] = {}

        async def read(digest: str) -> None:
            try:
                data = await run_blocking(self._threads.of(tenant), self._images.get, digest)
                sizes = await self._decoder.sizes(tenant, [data])
                named = [(digest, data, spec.preprocess)]
                (pixels[digest],) = await self._decoder.decode(tenant, named, sizes, of_dataset=True)
            except (InvalidImage, TooLarge, Unavailable) as error:
                logger.warning("image %s has no features: %s", digest, error.detail)

        await gather_or_cancel(read(digest) for digest in digests)
        return await self._compute(tenant, spec, pixels)

    async def _compute(
        self, tenant: str, spec: FeatureSpec, pixels: Mapping[str, NDArray[np.uint8]]
    ) -> dict[str, NDArray[np.float16]]:
        """Compute and store features, a few images per call to a worker."""
        digests = list(pixels)
        found: dict[str, NDArray[np.float16]] = {}
        size = max(1, CALL_BYTES // max((image.nbytes for image in pixels.values()), default=1))
        for start in range(0, len(digests), size):
            part = digests[start : start + size]
            rows = await self._workers.features([pixels[digest] for digest in part])
            computed = list(zip(part, rows, strict=True))
            for at in range(0, len(computed), STORED_IMAGES):
                some = dict(computed[at : at + STORED_IMAGES])
                await run_blocking(self._threads.of(tenant), self._features.put, spec.key, some)
                found |= some
        return found
