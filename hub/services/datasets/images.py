"""Images of a task's dataset: add, list, change, remove. No HTTP, no Ray.

An added image passes the checks of classification: the same decoder with the same limits, in its tenant's turn. Its
bytes are in the store before the registry lists it, so a listed image always has a file.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.data.labels import near_duplicates

from ...admission.authentication import Caller
from ...admission.quotas import IMAGE_UPLOADS, IMAGE_UPLOADS_QUEUED
from ...admission.rate_limits import RateLimiter
from ...concurrency import TenantConcurrencyLimit, TenantThreads, run_blocking
from ...coroutines import gather_or_cancel
from ...dataset_schemas import (
    MAX_NAME_CHARACTERS,
    DatasetImage,
    DatasetInfo,
    ImageChange,
    ImagePage,
    ImagesAdded,
    ImagesChange,
    ImagesChanged,
    LabelCount,
    LabelRename,
    LabelRenamed,
    Split,
    Use,
)
from ...errors import InvalidImage, InvalidRequest, LimitReached, TooLarge, Unavailable
from ...registry.datasets.entries import NewImage
from ...registry.datasets.files import StoredName
from ...registry.datasets.index import DatasetIndex
from ...registry.tasks import TaskRegistry
from ...storage.store import Store
from ..decoding.decoder import ImageDecoder
from ..spool import spooled
from .features import PATIENCE_S, FeatureService
from .removal import REMOVING_ATTEMPTS, REMOVING_PAUSE_S, FileRemoval
from .upload_report import UploadReport
from .zip_folders import ZipEntry, ZipFolders

STEP_IMAGES = 32  # of a zip, added in one atomic step
STEP_BYTES = 16 * 1024**2  # of unpacked images in memory; a larger image is a step of its own
MAX_WAITS = 120  # for the tenant's rate of images, in one upload of a zip
MAX_ZIP_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class SentImage:
    """An image of a request; `problem` is the reason why its bytes could not be read."""

    name: str
    data: bytes
    label: str | None = None
    split: Split | None = None
    problem: str = ""


class DatasetService:
    """Datasets of the tasks of a caller's own tenant. Every method raises `NotFound` for another tenant's task."""

    def __init__(
        self,
        *,
        index: DatasetIndex,
        tasks: TaskRegistry,
        images: Store,
        features: FeatureService,
        removal: FileRemoval,
        decoder: ImageDecoder,
        limiter: RateLimiter,
        threads: TenantThreads,
        parse_threads: TenantThreads,
        unpack_threads: TenantThreads,
        max_image_bytes: int,
        min_free_bytes: int,
    ) -> None:
        """
        Args:
            threads: thread pool for calls to the store and for files.
            parse_threads: thread pool for the directories of zips.
            unpack_threads: thread pool of low priority for their entries.
            min_free_bytes: bytes that a zip leaves free on the disk of temporary files.
        """
        self._index = index
        self._tasks = tasks
        self._images = images
        self._features = features
        self._removal = removal
        self._decoder = decoder
        self._limiter = limiter
        self._threads = threads
        self._parse_threads = parse_threads
        self._unpack_threads = unpack_threads
        self._max_image_bytes = max_image_bytes
        self._min_free_bytes = min_free_bytes
        self._uploads = TenantConcurrencyLimit(IMAGE_UPLOADS, IMAGE_UPLOADS + IMAGE_UPLOADS_QUEUED)

    @asynccontextmanager
    async def upload(self, caller: Caller, name: str) -> AsyncIterator[None]:
        """Hold one of the tenant's uploads. The request's body is unread until then.

        Raises:
            NotFound: the task does not exist.
            LimitReached: the tenant has too many images or too many uploads.
        """
        task = caller.own_task(name)
        async with self._uploads.acquire(caller.tenant):
            await self._index.check_room(caller, caller.tenant, task)
            yield

    async def add(self, caller: Caller, name: str, images: Sequence[SentImage]) -> ImagesAdded:
        """Add the images of one request. Unusable ones are listed with their reasons; the others are kept.

        Raises:
            LimitReached: the tenant's rate of images.
            Unavailable: the store, the registry or the workers are unavailable.
        """
        report = UploadReport()
        await self._add(caller, caller.own_task(name), images, report, files=len(images), waits=False)
        return report.reply()

    async def add_zip(
        self, caller: Caller, name: str, chunks: AsyncIterable[bytes], label: str | None, split: Split | None
    ) -> ImagesAdded:
        """Add the images of a zip of class folders, entry by entry.

        Args:
            label: of all images, in place of the names of their folders.
            split: of all images, in place of folders named `train` and `test`.

        Raises:
            InvalidRequest, TooLarge: the zip is damaged, without a file, or too large, as a whole.
            InsufficientStorage: the disk of temporary files or of the store is nearly full.
            HubError: any error of `add`. Images of earlier steps stay; the same upload again continues.
        """
        task, report = caller.own_task(name), UploadReport()
        pool = self._threads.of(caller.tenant)
        too_large = f"the zip has more than {MAX_ZIP_BYTES} bytes; send it in parts"
        async with spooled(
            pool, chunks, max_bytes=MAX_ZIP_BYTES, too_large=too_large, min_free_bytes=self._min_free_bytes
        ) as file:
            zipped = ZipFolders(file, max_image_bytes=self._max_image_bytes)
            entries = await self._entries(caller.tenant, zipped)
            for step in steps_of(entries):
                images = await run_blocking(self._unpack_threads.of(caller.tenant), _read, zipped, step, label, split)
                await self._add(caller, task, images, report, files=len(entries), waits=True)
        return report.reply()

    async def page(
        self,
        caller: Caller,
        name: str,
        *,
        label: str | None,
        unlabelled: bool,
        use: Use | None,
        before: int,
        count: int,
    ) -> ImagePage:
        """Return images, newest first; see `DatasetIndex.page`."""
        task = caller.own_task(name)
        return await self._index.page(
            caller.tenant, task, label=label, unlabelled=unlabelled, use=use, before=before, count=count
        )

    async def describe(self, caller: Caller, name: str) -> DatasetInfo:
        """Return the dataset's labels with their numbers of images."""
        task = caller.own_task(name)
        found = await self._index.describe(caller.tenant, task)
        declared = (await self._tasks.task(caller.tenant, task)).settings.labels
        counts = {str(count.label): count for count in found.labels}
        counts |= {label: LabelCount(label=label, train=0, test=0) for label in declared if label not in counts}
        return DatasetInfo(
            task=name,
            images=found.images,
            image_bytes=found.image_bytes,
            labels=[counts[label] for label in sorted(counts)],
            unlabelled=found.unlabelled,
            similar_labels=[list(group) for group in near_duplicates(sorted(counts))],
        )

    async def find(self, caller: Caller, name: str, digest: str) -> DatasetImage:
        """Return one image's record. Raises `NotFound` also for an image of another tenant."""
        return await self._index.find(caller.tenant, caller.own_task(name), digest)

    async def file(self, caller: Caller, name: str, digest: str) -> bytes:
        """Return an image's bytes as they were sent."""
        await self.find(caller, name, digest)
        return await run_blocking(self._threads.of(caller.tenant), self._images.get, digest)

    async def thumbnail(self, caller: Caller, name: str, digest: str) -> bytes:
        """Return a small JPEG of an image, without its metadata, such as the place of a photo."""
        data = await self.file(caller, name, digest)
        return await self._decoder.thumbnail(caller.tenant, digest, data)

    async def change(self, caller: Caller, name: str, digest: str, change: ImageChange) -> DatasetImage:
        """Set label or split of an image and return it."""
        task = caller.own_task(name)
        relabel = "label" in change.model_fields_set
        await self._index.change(
            caller, caller.tenant, task, [digest], label=change.label, relabel=relabel, split=change.split
        )
        return await self._index.find(caller.tenant, task, digest)

    async def change_many(self, caller: Caller, name: str, change: ImagesChange) -> ImagesChanged:
        """Set label or split of several images, all in one step."""
        changed, absent = await self._index.change(
            caller,
            caller.tenant,
            caller.own_task(name),
            list(dict.fromkeys(change.images)),
            label=change.label,
            relabel="label" in change.model_fields_set,
            split=change.split,
        )
        return ImagesChanged(changed=changed, absent=absent)

    async def remove(self, caller: Caller, name: str, digest: str) -> None:
        """Remove an image. Its file goes too, unless another dataset holds it."""
        if await self._index.remove(caller, caller.tenant, caller.own_task(name), digest):
            await self._removal.remove([StoredName("", digest)])

    async def rename_label(self, caller: Caller, name: str, rename: LabelRename) -> LabelRenamed:
        """Rename a label, or merge it into another one."""
        task = caller.own_task(name)
        merged = await self._index.rename_label(caller, caller.tenant, task, rename.label, rename.to)
        counts = await self._index.count(caller.tenant, task, rename.to)
        return LabelRenamed(label=rename.to, merged=merged, counts=counts)

    async def _entries(self, tenant: str, zipped: ZipFolders) -> list[ZipEntry]:
        steps, entries = zipped.entries(), list[ZipEntry]()
        while (step := await run_blocking(self._parse_threads.of(tenant), next, steps, None)) is not None:
            entries += step
        if not entries:
            raise InvalidRequest.at("body", "the zip has no image; put images into folders of the zip")
        return entries

    async def _add(
        self, caller: Caller, task: str, sent: Sequence[SentImage], report: UploadReport, *, files: int, waits: bool
    ) -> None:
        """Check, store and list some images of a request. Refused ones count against the tenant's rate of images too.

        Args:
            files: images of the whole request, for the audit.
            waits: wait where the tenant's rate of images is reached, instead of raising.
        """
        for image in sent:
            if image.problem:
                report.refuse(image.name, image.problem)
        usable = [image for image in sent if not image.problem]
        spec = await self._features.spec()
        sizes = await self._decoder.sizes(caller.tenant, [image.data for image in usable])
        counted = sum(sizes) + len(sent) - len(usable)
        async with self._turn(caller.tenant, len(sent), counted, waits=waits):
            decoded = await asyncio.gather(
                *(
                    self._decoded(caller.tenant, image, spec.preprocess, size)
                    for image, size in zip(usable, sizes, strict=True)
                ),
                return_exceptions=True,
            )
        read, arrays = [], []
        for image, result in zip(usable, decoded, strict=True):
            if isinstance(result, InvalidImage | TooLarge):
                report.refuse(image.name, result.reason)
            elif isinstance(result, BaseException):
                raise result
            else:
                read.append(image)
                arrays.append(result)
        # In one call: each of many would wait for Python's interpreter lock.
        digests = await run_blocking(self._threads.of(caller.tenant), _digests, read) if read else []
        pixels = dict(zip(digests, arrays, strict=True))
        images = [
            (NewImage(digest, x.name[-MAX_NAME_CHARACTERS:], len(x.data), x.label, x.split), x.data)
            for digest, x in zip(digests, read, strict=True)
        ]
        if images:
            added = await self._store(caller, task, images, report, files)
            self._features.compute_later(caller.tenant, spec, {digest: pixels[digest] for digest in added})

    @asynccontextmanager
    async def _turn(self, tenant: str, count: int, counted: int, *, waits: bool) -> AsyncIterator[None]:
        """Count images in flight within the tenant's limits."""
        async with AsyncExitStack() as held:
            for attempt in range(MAX_WAITS):
                try:
                    await held.enter_async_context(self._limiter.images(tenant, count, counted))
                    break
                except LimitReached as error:
                    if not waits or attempt == MAX_WAITS - 1:
                        raise
                    await asyncio.sleep(error.retry_after_s or 1)
            yield

    async def _decoded(
        self, tenant: str, image: SentImage, preprocess: Mapping[str, Any], size: int
    ) -> NDArray[np.uint8]:
        (pixels,) = await self._decoder.decode(tenant, [(image.name, image.data, preprocess)], [size], of_dataset=True)
        return pixels

    async def _store(
        self,
        caller: Caller,
        task: str,
        images: Sequence[tuple[NewImage, bytes]],
        report: UploadReport,
        files: int,
    ) -> list[str]:
        """Store and list images. Return the digests of the new ones."""
        left, added = list(images), []
        for _ in range(REMOVING_ATTEMPTS):
            await gather_or_cancel(
                run_blocking(self._threads.of(caller.tenant), self._images.put, new.digest, data) for new, data in left
            )
            statuses, changed = await self._index.add(
                caller,
                caller.tenant,
                task,
                [new for new, _ in left],
                {"files": files},
                audited=report.audited,
                patience_s=PATIENCE_S,
            )
            report.audited = report.audited or changed
            waiting, unlisted = [], []
            for (new, data), status in zip(left, statuses, strict=True):
                if status.status == "removing":
                    waiting.append((new, data))
                    continue
                report.record(new, status)
                if status.status == "added":
                    added.append(new.digest)
                elif status.error:
                    unlisted.append(StoredName("", new.digest))
            # Another dataset may have given up the same file between the first write and the listing.
            listed = set(added)
            await gather_or_cancel(
                run_blocking(self._threads.of(caller.tenant), self._images.put_missing, new.digest, data)
                for new, data in left
                if new.digest in listed
            )
            await self._removal.remove(unlisted)  # otherwise refused images would fill the store
            left = waiting
            if not left:
                return added
            await asyncio.sleep(REMOVING_PAUSE_S)
        raise Unavailable("The store is removing an old copy of an image. Send the images again.", retry_after_s=2)


def steps_of(entries: Iterable[ZipEntry]) -> Iterator[list[ZipEntry]]:
    """Yield the entries in steps, whose images are in memory at the same time."""
    step, size = list[ZipEntry](), 0
    for entry in entries:
        if step and (len(step) == STEP_IMAGES or size + entry.size_bytes > STEP_BYTES):
            yield step
            step, size = [], 0
        step.append(entry)
        size += entry.size_bytes
    if step:
        yield step


def _read(zipped: ZipFolders, entries: Sequence[ZipEntry], label: str | None, split: Split | None) -> list[SentImage]:
    images = []
    for entry in entries:
        try:
            data, problem = zipped.read(entry), ""
        except InvalidImage as error:
            data, problem = b"", error.reason
        images.append(SentImage(entry.name, data, label or entry.label, split or entry.split, problem))
    return images


def _digests(images: Sequence[SentImage]) -> list[str]:
    return [hashlib.sha256(image.data).hexdigest() for image in images]
