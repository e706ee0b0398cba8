"""Datasets in the archive of a tenant: `datasets/<task>.jsonl` lists a task's images, `images/<digest>` has the files.

An import checks each image as an upload does. It lists the images in staged datasets, which count in the tenant's
limits and which no client sees until `TaskRegistry.restore` creates their tasks.
"""

import asyncio
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from pydantic import ValidationError

from ...admin_schemas import TenantInfo, TenantLimits
from ...concurrency import TenantThreads, gather_or_cancel, run_blocking
from ...errors import InvalidImage, TooLarge, Unavailable
from ...registry.audit import Actor
from ...registry.datasets.entries import ArchivedImage, StagedDataset, StoredRecord
from ...registry.datasets.index import DatasetIndex
from ...registry.datasets.staging import StagedDatasets
from ...storage.store import Store
from ..datasets.features import FeatureService
from ..datasets.removal import REMOVING_ATTEMPTS, REMOVING_PAUSE_S
from ..image_decoding import ImageDecoder
from . import tar
from .tar import Member, invalid

LIST = re.compile(r"datasets/([a-z0-9][a-z0-9_-]{0,62})\.jsonl")
IMAGE = re.compile(r"images/([0-9a-f]{64})")
MAX_MEMBER_BYTES = 2**40
MAX_LINE_BYTES = 8192  # of one image in a list
STEP_IMAGES = 32  # listed in one step
READ_AT_ONCE = 4  # images in memory


@dataclass(frozen=True)
class ExportedDatasets:
    """The lists of an export by task, the number of images of each, and the sizes of all images by digest."""

    lists: Mapping[str, bytes]
    images: Mapping[str, int]
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class DatasetMembers:
    """The members of an archive that belong to datasets: lists by task, images by digest."""

    lists: dict[str, Member]
    images: dict[str, Member]

    def take(self, member: Member) -> bool:
        """Note a member of the archive. Return whether it belongs to datasets.

        Raises:
            InvalidRequest: there is one of the same name.
        """
        for pattern, found in ((LIST, self.lists), (IMAGE, self.images)):
            if match := pattern.fullmatch(member.name):
                if match[1] in found:
                    raise invalid(f"{member.name} is a duplicate")
                found[match[1]] = member
                return True
        return False


def max_dataset_bytes(limits: TenantLimits) -> int:
    """Return how many bytes the datasets of a tenant with these limits may take in an archive."""
    return limits.image_bytes + limits.images * (2 * tar.BLOCK_BYTES + MAX_LINE_BYTES)


class DatasetArchive:
    """Export and import of all datasets of a tenant."""

    def __init__(
        self,
        index: DatasetIndex,
        staging: StagedDatasets,
        images: Store,
        features: FeatureService,
        decoder: ImageDecoder,
        threads: TenantThreads,
        max_image_bytes: int,
    ) -> None:
        """
        Args:
            threads: thread pool for calls to the store and for files.
        """
        self._index = index
        self._staging = staging
        self._images = images
        self._features = features
        self._decoder = decoder
        self._threads = threads
        self._max_image_bytes = max_image_bytes

    async def dump(self, tenant: str, tasks: Sequence[str]) -> ExportedDatasets:
        """Return the lists of these tasks' datasets. A task without an image has none.

        Raises:
            Unavailable: the registry is unavailable.
        """
        lists: dict[str, bytes] = {}
        images: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for task in tasks:
            if records := await self._index.records(tenant, task):
                lists[task] = await run_blocking(self._threads.of(tenant), _list, records)
                images[task] = len(records)
                sizes |= {stored.digest: int(stored.record["size"]) for stored in records}
        return ExportedDatasets(lists, images, sizes)

    async def read(self, tenant: str, digest: str) -> bytes:
        """Return an image's bytes.

        Raises:
            Unavailable: the store lacks the file, or is unavailable.
        """
        return await run_blocking(self._threads.of(tenant), self._images.get, digest)

    @asynccontextmanager
    async def staged(
        self, by: Actor, info: TenantInfo, file: IO[bytes], members: DatasetMembers
    ) -> AsyncIterator[dict[str, StagedDataset]]:
        """Check and store the images of an archive, and stage its datasets. Drop those that no task has at the end.

        Args:
            members: as `check_lists` accepts them.

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
            for i, (task, member) in enumerate(members.lists.items()):
                entries, images = _entries(file, task, member), 0
                staged[task] = StagedDataset(f"~{import_id}-{i}", 0)
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

        left = {image.digest for image in images}
        for _ in range(REMOVING_ATTEMPTS):
            await gather_or_cancel(store(digest) for digest in left)
            left = set(await self._staging.add(by, tenant, name, [image for image in images if image.digest in left]))
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

    def check_lists(self, file: IO[bytes], members: DatasetMembers, images: Mapping[str, int]) -> None:
        """Check that lists and images of an archive agree, before anything is stored. Runs in a thread.

        Args:
            images: number of images of each task that has a dataset, by the manifest.

        Raises:
            InvalidRequest: they do not agree with each other or with the manifest, or an image is too large.
        """
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


def _list(records: Sequence[StoredRecord]) -> bytes:
    """Return the list of a dataset: an image a line, in order of their arrival."""
    ordered = sorted(records, key=lambda stored: stored.record["n"])
    return b"".join(ArchivedImage.of(stored).model_dump_json(exclude_none=True).encode() + b"\n" for stored in ordered)


def _next(entries: Iterator[ArchivedImage]) -> list[ArchivedImage]:
    return list(islice(entries, STEP_IMAGES))


def _entries(file: IO[bytes], task: str, member: Member) -> Iterator[ArchivedImage]:
    """Yield the images of a list. Other reads of the file may come between two images.

    Raises:
        InvalidRequest: a line is no image.
    """
    at, end, number = member.offset, member.offset + member.size_bytes, 0
    while at < end:
        file.seek(at)
        line = file.readline(min(MAX_LINE_BYTES, end - at))
        at, number = at + len(line), number + 1
        where = f"datasets/{task}.jsonl: line {number}"
        if not line.endswith(b"\n"):
            raise invalid(f"{where} has no end, or more than {MAX_LINE_BYTES} bytes")
        try:
            yield ArchivedImage.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the line"
            raise invalid(f"{where}: {field}: {first['msg']}") from error
