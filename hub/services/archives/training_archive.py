"""Trainings in the archive of a tenant: `trainings/<task>.jsonl` and `snapshots/<digest>.json`.

A list has the last training of each version that the hub made, a line for each. So a version can say on the new hub,
too, on which images it was trained. Reports stay behind: their figures are part of the training.
"""

import asyncio
import hashlib
import re
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import IO, Annotated, Literal

from pydantic import Field, ValidationError

from ...concurrency import TenantThreads, run_blocking
from ...dataset_schemas import TrainingInfo, Use
from ...errors import TooLarge, Unavailable
from ...field_types import DIGEST_PATTERN, Body
from ...registry.audit import Actor
from ...registry.datasets.staging import StagedDatasets
from ...registry.datasets.trainings import Training, TrainingRegistry
from ...storage.store import Store
from ..datasets.removal import REMOVING_ATTEMPTS, REMOVING_PAUSE_S
from ..datasets.snapshots import FORMAT
from . import tar
from .tar import Member, invalid

LIST = re.compile(r"trainings/([a-z0-9][a-z0-9_-]{0,62})\.jsonl")
SNAPSHOT = re.compile(r"snapshots/([0-9a-f]{64})\.json")
ID = re.compile(r"[0-9a-f]{16}")
MAX_LINE_BYTES = 4 * 1024**2  # of one training
MAX_BYTES = 1024**3  # of the trainings and snapshots of one archive


@dataclass(frozen=True)
class ExportedTrainings:
    """The lists of an export by task, the number of trainings of each, and the sizes of the snapshots by digest."""

    lists: dict[str, bytes] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingMembers:
    """The members of an archive that belong to trainings: lists by task, snapshots by digest."""

    lists: dict[str, Member] = field(default_factory=dict)
    snapshots: dict[str, Member] = field(default_factory=dict)


class _Snapshot(Body):
    """The text of a snapshot, as `Snapshot.text` writes it."""

    format: Literal["karst-snapshot/1"]
    task: str
    images: list[tuple[Annotated[str, Field(pattern=DIGEST_PATTERN)], str, Use]]


class TrainingArchive:
    """Export and import of the trainings that made a tenant's versions."""

    def __init__(
        self, trainings: TrainingRegistry, staging: StagedDatasets, snapshots: Store, threads: TenantThreads
    ) -> None:
        """
        Args:
            threads: thread pool for calls to the store and for files.
        """
        self._trainings = trainings
        self._staging = staging
        self._snapshots = snapshots
        self._threads = threads

    async def dump(self, tenant: str, versions: Mapping[str, AbstractSet[int]]) -> ExportedTrainings:
        """Return the trainings of these versions. A training whose snapshot is lost is left out.

        Args:
            versions: numbers by task.

        Raises:
            TooLarge: they have more bytes than an import accepts.
            Unavailable: the registry or the store is unavailable.
        """
        found = ExportedTrainings()
        for task, numbers in versions.items():
            made: dict[int, Training] = {}
            for training in reversed(await self._trainings.all(tenant, task)):  # oldest first
                if training.state == "done" and training.version is not None and training.version in numbers:
                    made[training.version] = training
            lines = []
            for training in made.values():
                digest = training.snapshot.digest
                file = await run_blocking(self._threads.of(tenant), self._snapshots.find, digest)
                if file is not None:
                    found.sizes[digest] = file.size_bytes
                    public = training.public().model_copy(update={"report_files": []})
                    lines.append(public.model_dump_json().encode() + b"\n")
            if lines:
                found.lists[task], found.counts[task] = b"".join(lines), len(lines)
        if sum(map(len, found.lists.values())) + sum(found.sizes.values()) > MAX_BYTES:
            raise TooLarge(
                f"The trainings and their snapshots have more than {MAX_BYTES} bytes, the limit of an import. "
                "Delete versions, or export without datasets."
            )
        return found

    async def read(self, tenant: str, digest: str) -> bytes:
        """Return a snapshot's bytes.

        Raises:
            Unavailable: the store lacks the file, or is unavailable.
        """
        return await run_blocking(self._threads.of(tenant), self._snapshots.get, digest)

    async def stage(
        self, by: Actor, tenant: str, task: str, name: str, file: IO[bytes], members: TrainingMembers
    ) -> None:
        """Store the snapshots of a task's trainings, and list the trainings in its staged dataset.

        Args:
            name: of the staged dataset.
            members: as `check_lists` accepts them.

        Raises:
            NotFound: the tenant does not exist.
            InsufficientStorage: the disk of the store is nearly full.
            Unavailable: the registry or the store is unavailable.
        """
        pool = self._threads.of(tenant)
        lines = _lines(file, task, members.lists[task])
        while (info := await run_blocking(pool, next, lines, None)) is not None:
            digest = info.snapshot.digest
            data = await run_blocking(pool, tar.read, file, members.snapshots[digest])
            training = Training(**info.model_dump(), file_bytes=len(data))
            for _ in range(REMOVING_ATTEMPTS):
                await run_blocking(pool, self._snapshots.put, digest, data)
                if await self._staging.add_training(by, tenant, name, training):
                    break
                await asyncio.sleep(REMOVING_PAUSE_S)
            else:
                raise Unavailable(
                    "The store is removing an old copy of a snapshot. Send the import again.", retry_after_s=2
                )
            # The last training elsewhere with this snapshot may have gone between the write and the listing.
            await run_blocking(pool, self._snapshots.put_missing, digest, data)


def check_lists(
    file: IO[bytes], members: TrainingMembers, counts: Mapping[str, int], versions: Mapping[str, AbstractSet[int]]
) -> None:
    """Check that lists and snapshots agree, before anything is stored. Runs in a thread.

    Args:
        counts: number of trainings of each task that has some, by the manifest.
        versions: numbers of the versions of each task, by the manifest.

    Raises:
        InvalidRequest: they do not agree with each other or with the manifest, or a snapshot is damaged or none.
    """
    found = [*members.lists.values(), *members.snapshots.values()]
    if sum(member.size_bytes for member in found) > MAX_BYTES:
        raise invalid(f"trainings and snapshots have more than {MAX_BYTES} bytes; export without datasets")
    if counts.keys() != members.lists.keys():
        task = min(counts.keys() ^ members.lists.keys())
        raise invalid(f"the trainings of task {task!r} are only in the manifest or only in the tar")
    unlisted = set(members.snapshots)
    for task, member in members.lists.items():
        made, ids = set[int](), set[str]()
        for info in _lines(file, task, member):
            known = info.task == task and info.state == "done" and info.version in versions[task]
            if not known or info.version in made or info.id in ids or not ID.fullmatch(info.id):
                raise invalid(f"training {info.id[:40]!r} made no version of task {task!r}, or is listed twice")
            if info.report_files or info.progress is not None:
                raise invalid(f"training {info.id!r} of task {task!r} has a report, or has not ended")
            if info.snapshot.digest not in members.snapshots:
                raise invalid(f"snapshot {info.snapshot.digest} of task {task!r} is missing")
            made.add(info.version or 0)
            ids.add(info.id)
            unlisted.discard(info.snapshot.digest)
        if len(ids) != counts[task]:
            raise invalid(f"task {task!r} has {len(ids)} trainings; the manifest says {counts[task]}")
    if unlisted:
        raise invalid(f"snapshot {min(unlisted)} is of no training")
    for digest, member in members.snapshots.items():
        data = tar.read(file, member)
        if hashlib.sha256(data).hexdigest() != digest:
            raise invalid(f"snapshot {digest} is damaged: its sha256 differs")
        try:
            _Snapshot.model_validate_json(data)
        except ValidationError as error:
            raise invalid(f"snapshot {digest} is no {FORMAT}: {error.errors()[0]['msg']}") from error


def _lines(file: IO[bytes], task: str, member: Member) -> Iterator[TrainingInfo]:
    yield from tar.json_lines(file, f"trainings/{task}.jsonl", member, TrainingInfo, MAX_LINE_BYTES)
