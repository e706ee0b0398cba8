"""Datasets in the archive of a tenant: `datasets/<task>.jsonl` lists a task's images, `images/<digest>` has the files.

An import checks each image as an upload does. It lists the images in staged datasets, which count in the tenant's
limits and which no client sees until `TaskRegistry.restore` creates their tasks.
"""

import asyncio
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Annotated, Any

from pydantic import Field, model_validator

from ...admin_schemas import TenantInfo, TenantLimits
from ...concurrency import TenantThreads, run_blocking
from ...coroutines import gather_or_cancel
from ...errors import InvalidImage, TooLarge, Unavailable
from ...field_types import Body
from ...registry.audit import Actor
from ...registry.datasets.entries import ArchivedImage, StagedDataset, StoredRecord
from ...registry.datasets.index import DatasetIndex
from ...registry.datasets.staging import StagedDatasets
from ...storage.store import Store
from ..datasets.features import FeatureService
from ..datasets.removal import REMOVING_ATTEMPTS, REMOVING_PAUSE_S
from ..decoding.decoder import ImageDecoder
from . import tar, training_archive
from .tar import Member, invalid
from .training_archive import ExportedTrainings, TrainingArchive, TrainingMembers, check_lists

LIST = re.compile(r"datasets/([a-z0-9][a-z0-9_-]{0,62})\.jsonl")
IMAGE = re.compile(r"images/([0-9a-f]{64})")
MAX_MEMBER_BYTES = 2**40
MAX_LINE_BYTES = 8192  # of one image in a list
STEP_IMAGES = 32  # listed in one step
READ_AT_ONCE = 4  # images in memory
STEP_LINES = 2000  # written in one step, some 20 ms of Python


class DatasetSize(Body):
    """The dataset of a task in `tenant.json`."""

    images: Annotated[int, Field(ge=0)]
    trainings: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _not_empty(self) -> "DatasetSize":
        if not self.images and not self.trainings:
            raise ValueError("the dataset has neither images nor trainings")
        return self


@dataclass(frozen=True)
class ExportedDatasets:
    """The lists of an export by task, the number of images of each, and the sizes of all images by digest."""

    lists: Mapping[str, bytes] = field(default_factory=dict)
    images: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    trainings: ExportedTrainings = field(default_factory=ExportedTrainings)

    def lengths(self) -> Iterator[int]:
        """Yield the size of each member of the tar, in bytes."""
        yield from map(len, self.lists.values())
        yield from map(len, self.trainings.lists.values())
        yield from self.trainings.sizes.values()
        yield from self.sizes.values()


@dataclass(frozen=True)
class DatasetMembers:
    """The members of an archive that belong to datasets: lists by task, images by digest, trainings."""

    lists: dict[str, Member] = field(default_factory=dict)
    images: dict[str, Member] = field(default_factory=dict)
    trainings: TrainingMembers = field(default_factory=TrainingMembers)

    def take(self, member: Member) -> bool:
        """Note a member of the archive. Return whether it belongs to datasets.

        Raises:
            InvalidRequest: there is one of the same name.
        """
        trainings = (
            (training_archive.LIST, self.trainings.lists),
            (training_archive.SNAPSHOT, self.trainings.snapshots),
        )
        for pattern, found in ((LIST, self.lists), (IMAGE, self.images), *trainings):
            if match := pattern.fullmatch(member.name):
                if match[1] in found:
                    raise invalid(f"{member.name} is a duplicate")
                found[match[1]] = member
                return True
        return False


def max_dataset_bytes(limits: TenantLimits) -> int:
    """Return how many bytes the datasets of a tenant with these limits may take in an archive."""
    images = limits.image_bytes + limits.images * (2 * tar.BLOCK_BYTES + MAX_LINE_BYTES)
    return images + 2 * training_archive.MAX_BYTES  # small snapshots have headers that are larger than they are


class DatasetArchive:
    """Export and import of all datasets of a tenant."""

    def __init__(
        self,
        index: DatasetIndex,
        staging: StagedDatasets,
        trainings: TrainingArchive,
        images: Store,
        features: FeatureService,
        decoder: ImageDecoder,
        threads: TenantThreads,
        parse_threads: TenantThreads,
        max_image_bytes: int,
    ) -> None:
        """
        Args:
            threads: thread pool for calls to the store and for files.
            parse_threads: thread pool for lists of images.
        """
        self._index = index
        self._staging = staging
        self._trainings = trainings
        self._images = images
        self._features = features
        self._decoder = decoder
        self._threads = threads
        self._parse_threads = parse_threads
        self._max_image_bytes = max_image_bytes

    async def dump(self, tenant: str, versions: Mapping[str, AbstractSet[int]]) -> ExportedDatasets:
        """Return the lists of tasks' images and trainings. A task without any has none.

        Args:
            versions: numbers by task.

        Raises:
            TooLarge: the trainings have more bytes than an import accepts.
            Unavailable: the registry or the store is unavailable.
        """
        lists: dict[str, bytes] = {}
        images: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for task in versions:
            if records := await self._index.records(tenant, task):
                lists[task] = await self._list(tenant, records)
                images[task] = len(records)
                sizes |= {stored.digest: int(stored.record["size"]) for stored in records}
        return ExportedDatasets(lists, images, sizes, await self._trainings.dump(tenant, versions))

    async def _list(self, tenant: str, records: Sequence[StoredRecord]) -> bytes:
        """Return the list of a dataset: an image a line, in order of their arrival."""
        pool = self._parse_threads.of(tenant)
        ordered = await run_blocking(pool, sorted, records, key=lambda stored: stored.record["n"])
        starts = range(0, len(ordered), STEP_LINES)
        return b"".join([await run_blocking(pool, _lines, ordered[start : start + STEP_LINES]) for start in starts])

    async def members(self, tenant: str, datasets: ExportedDatasets) -> AsyncIterator[tuple[str, bytes]]:
        """Yield the members of the tar with their names: lists, snapshots, images.

        Raises:
            Unavailable: the store lacks a file, or is unavailable.
        """
        trainings = datasets.trainings
        for task, listed in sorted(datasets.lists.items()):
            yield f"datasets/{task}.jsonl", listed
        for task, listed in sorted(trainings.lists.items()):
            yield f"trainings/{task}.jsonl", listed
        for digest in sorted(trainings.sizes):
            yield f"snapshots/{digest}.json", await self._trainings.read(tenant, digest)
        for digest in sorted(datasets.sizes):
            yield f"images/{digest}", await self._read(tenant, digest)

    async def _read(self, tenant: str, digest: str) -> bytes:
        return await run_blocking(self._threads.of(tenant), self._images.get, digest)

    @asynccontextmanager
    async def staged(
        self, by: Actor, info: TenantInfo, file: IO[bytes], members: DatasetMembers
    ) -> AsyncIterator[dict[str, StagedDataset]]:
        """Check and store the images of an archive, and stage its datasets. Drop those that no task has at the end.

        Args:
            members: as `check` accepts them.

        Yields:
            The staged datasets by task.

        Raises:
            InvalidRequest: an image has another sha256 than its name says, or this hub would refuse its upload.
            NotFound: the tenant does not exist.
            LimitReached: the tenant's limit of images or of their bytes, or a dataset has too many labels.
            InsufficientStorage: the disk of the store is nearly full.
            Unavailable: the registry, the store or the workers are unavailable.
        """
        import_id, checked = secrets.token_hex(8), set[str]()
        staged: dict[str, StagedDataset] = {}
        try:
            for i, task in enumerate(sorted(members.lists.keys() | members.trainings.lists.keys())):
                staged[task] = StagedDataset(f"~{import_id}-{i}", 0)
                if task in members.trainings.lists:
                    await self._trainings.stage(by, info.tenant, task, staged[task].name, file, members.trainings)
                entries = _entries(file, task, members.lists[task]) if task in members.lists else iter(())
                images = 0
                while part := await run_blocking(self._threads.of(info.tenant), _next, entries):
                    await self._stage(by, info.tenant, staged[task].name, file, members, part, checked)
                    images += len(part)
                    staged[task] = StagedDataset(staged[task].name, images)
            yield staged
        finally:
            for dataset in staged.values():
                await self._staging.drop(info.tenant, dataset)

    async def _stage(
        self,
        by: Actor,
        tenant: str,
        name: str,
        file: IO[bytes],
        members: DatasetMembers,
        images: Sequence[ArchivedImage],
        checked: set[str],
    ) -> None:
        """Check, store and list some images. `checked` has the images of other datasets of the archive."""
        pool, slots = self._threads.of(tenant), asyncio.Semaphore(READ_AT_ONCE)
        preprocess = (await self._features.spec()).preprocess

        async def store(digest: str) -> None:
            async with slots:
                data = await run_blocking(pool, tar.read, file, members.images[digest])
                if digest not in checked:
                    await self._check(tenant, digest, data, preprocess)
                    checked.add(digest)
                await run_blocking(pool, self._images.put, digest, data)

        async def restore(digest: str) -> None:
            async with slots:
                data = await run_blocking(pool, tar.read, file, members.images[digest])
                await run_blocking(pool, self._images.put_missing, digest, data)

        left = {image.digest for image in images}
        for _ in range(REMOVING_ATTEMPTS):
            await gather_or_cancel(store(digest) for digest in left)
            part = [image for image in images if image.digest in left]
            left = set(await self._staging.add(by, tenant, name, part))
            # Another dataset may have given up the same file between the write and the listing.
            await gather_or_cancel(restore(image.digest) for image in part if image.digest not in left)
            if not left:
                return
            await asyncio.sleep(REMOVING_PAUSE_S)
        raise Unavailable("The store is removing an old copy of an image. Send the import again.", retry_after_s=2)

    async def _check(self, tenant: str, digest: str, data: bytes, preprocess: Mapping[str, Any]) -> None:
        """Check an image's sha256, and everything that an upload checks."""
        if await run_blocking(self._threads.of(tenant), lambda: hashlib.sha256(data).hexdigest()) != digest:
            raise invalid(f"image {digest} is damaged: its sha256 differs")
        sizes = await self._decoder.sizes(tenant, [data])
        try:
            await self._decoder.decode(tenant, [(f"image {digest}", data, preprocess)], sizes, of_dataset=True)
        except (InvalidImage, TooLarge) as error:
            raise invalid(f"image {digest} does not fit this hub: {error.reason}") from error

    def check(
        self,
        file: IO[bytes],
        members: DatasetMembers,
        sizes: Mapping[str, DatasetSize],
        versions: Mapping[str, AbstractSet[int]],
    ) -> None:
        """Check that the lists and files of an archive agree, before anything is stored. Runs in a thread.

        Args:
            sizes: of each task that has a dataset, by the manifest.
            versions: numbers of the versions of each task, by the manifest.

        Raises:
            InvalidRequest: they do not agree with each other or with the manifest, or an image is too large.
        """
        self._check_images(file, members, {task: size.images for task, size in sizes.items() if size.images})
        counts = {task: size.trainings for task, size in sizes.items() if size.trainings}
        check_lists(file, members.trainings, counts, versions)

    def _check_images(self, file: IO[bytes], members: DatasetMembers, images: Mapping[str, int]) -> None:
        if images.keys() != members.lists.keys():
            task = min(images.keys() ^ members.lists.keys())
            raise invalid(f"the dataset of task {task!r} is only in the manifest or only in the tar")
        unlisted = set(members.images)
        for task, member in members.lists.items():
            seen = set[str]()
            for entry in _entries(file, task, member):
                found = members.images.get(entry.digest)
                if found is None or entry.digest in seen:
                    problem = "missing" if found is None else "listed twice"
                    raise invalid(f"image {entry.digest} of task {task!r} is {problem}")
                if not found.size_bytes == entry.size_bytes <= self._max_image_bytes:
                    raise invalid(
                        f"image {entry.digest} of task {task!r} has {found.size_bytes} bytes; the list says "
                        f"{entry.size_bytes}, and the limit is {self._max_image_bytes}"
                    )
                seen.add(entry.digest)
            if len(seen) != images[task]:
                raise invalid(f"task {task!r} has {len(seen)} images; the manifest says {images[task]}")
            unlisted -= seen
        if unlisted:
            raise invalid(f"image {min(unlisted)} is in no dataset")


def _lines(records: Sequence[StoredRecord]) -> bytes:
    return b"".join(ArchivedImage.of(stored).model_dump_json(exclude_none=True).encode() + b"\n" for stored in records)


def _next(entries: Iterator[ArchivedImage]) -> list[ArchivedImage]:
    return list(islice(entries, STEP_IMAGES))


def _entries(file: IO[bytes], task: str, member: Member) -> Iterator[ArchivedImage]:
    yield from tar.json_lines(file, f"datasets/{task}.jsonl", member, ArchivedImage, MAX_LINE_BYTES)
