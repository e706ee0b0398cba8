"""Export and import of a whole tenant as one file: an uncompressed tar, format `karst-tenant/1`.

`tenant.json` comes first: every task with its versions, aliases, their history, sharing, last version number and the
settings that were set. Then comes each adapter file once, as `files/<digest>.safetensors`, and then the datasets
(`dataset_archive`). The tar has no keys, no counts and no audit.
"""

import hashlib
import json
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import IO, Any

from pydantic import ValidationError

from adapters import Adapter

from ...admin_schemas import TenantInfo, TenantLimits
from ...concurrency import Pool, TenantReads, run_blocking
from ...errors import InvalidAdapter, TooLarge, Unavailable
from ...registry.audit import Actor
from ...registry.models import WholeTask
from ...registry.tasks import TaskRegistry
from ...schemas import VersionInfo
from ...storage.store import FILE, Store
from ..spool import spooled
from . import tar
from .dataset_archive import (
    MAX_MEMBER_BYTES,
    DatasetArchive,
    DatasetMembers,
    ExportedDatasets,
    max_dataset_bytes,
)
from .manifest import Manifest, TaskEntry, manifest_parts, task_text
from .tar import Member, invalid

MANIFEST = "tenant.json"
FOLDER = "files/"
MAX_MANIFEST_BYTES = 128 * 1024**2
MAX_FILES = 200_000
NO_DATASETS = ExportedDatasets()

Check = Callable[[bytes], Awaitable[Adapter]]


@dataclass(frozen=True)
class Export:
    """A tenant's tar as a stream. A stream shorter than `size_bytes` is incomplete."""

    size_bytes: int
    chunks: AsyncIterator[bytes]


async def export_tenant(
    registry: TaskRegistry,
    reads: TenantReads,
    store: Store,
    pool: Pool,
    info: TenantInfo,
    archive: DatasetArchive | None = None,
) -> Export:
    """Return a tenant as a tar stream, without its keys. Equal tenants give equal bytes.

    The export looks up every adapter file before the first byte. If it cannot read one or an image later, `chunks`
    raises the error. Send `size_bytes` as `content-length`: then the client notices, and the tar has no end, so no hub
    imports it.

    Args:
        reads: turns of reads of the registry.
        pool: thread pool for calls to the store; None for the event loop's default pool.
        archive: of the hub's datasets; None: the export has none.

    Raises:
        Unavailable: the registry or the store is unavailable, or the store lacks a file.
        TooLarge: the tenant has more versions than one import accepts.
    """
    entries: dict[str, bytes] = {}
    numbers: dict[str, AbstractSet[int]] = {}
    sizes: dict[str, int] = {}
    tasks = registry.dumped(info.tenant)
    while True:
        async with reads.turn(info.tenant):
            task = await anext(tasks, None)
        if task is None:
            break
        # Only the bytes stay in memory: as text, each task may take four times as much.
        entries[task.name], found = await run_blocking(pool, task_text, task)
        numbers[task.name] = {*task.versions}
        sizes |= found
    for digest, size_bytes in sizes.items():
        file = await run_blocking(pool, store.find, digest)
        if file is None or file.size_bytes != size_bytes:
            raise Unavailable(f"The adapter store has no intact file {digest}. Register the adapter again.")
    datasets = NO_DATASETS if archive is None else await archive.dump(info.tenant, numbers)
    manifest = manifest_parts(info, entries, datasets)
    manifest_bytes = sum(map(len, manifest))
    if manifest_bytes > MAX_MANIFEST_BYTES or len(sizes) > MAX_FILES:
        limits = f"{MAX_FILES} files and {MAX_MANIFEST_BYTES} bytes of {MANIFEST}"
        raise TooLarge(f"The export exceeds the limits of {limits}. Delete versions.")
    lengths = [manifest_bytes, *sizes.values(), *datasets.lengths()]
    return Export(
        sum(map(tar.member_bytes, lengths)) + len(tar.END),
        _tar(store, pool, info.tenant, manifest, sorted(sizes), archive, datasets),
    )


async def import_tenant(
    registry: TaskRegistry,
    store: Store,
    pool: Pool,
    check: Check,
    by: Actor,
    info: TenantInfo,
    chunks: AsyncIterable[bytes],
    max_adapter_bytes: int,
    min_free_bytes: int = 0,
    archive: DatasetArchive | None = None,
) -> list[WholeTask]:
    """Create the tasks of an export with their datasets, all or none, in one atomic step at the end. Return them.

    Args:
        pool: thread pool for calls to the store and for files; None for the event loop's default pool.
        check: function that parses an adapter file and checks that this hub can serve it; raises InvalidAdapter.
        info: the tenant that gets the tasks; its name may differ from the exported one.
        chunks: the tar.
        max_adapter_bytes: size limit of one adapter file.
        min_free_bytes: bytes that stay free on the disk of temporary files.
        archive: of the hub's datasets; None: the import leaves out the datasets of the export.

    Raises:
        InvalidRequest, InvalidAdapter: the tar is not an export, or a file does not fit this hub.
        TooLarge: the tar has more bytes than the tenant may store.
        Conflict: some of the tasks exist already.
        LimitReached: the tenant's limit of tasks, of versions per task, of stored bytes, of images or of their bytes.
        InsufficientStorage: the disk of the store or of temporary files is nearly full.
        Unavailable: the registry, the store or the disk for temporary files is unavailable.
    """
    max_bytes = max_archive_bytes(info.limits)
    too_large = f"the tar has more than {max_bytes} bytes, the tenant's limit for an import"
    async with spooled(pool, chunks, max_bytes=max_bytes, too_large=too_large, min_free_bytes=min_free_bytes) as file:
        members, images = await run_blocking(pool, _index, file, max_adapter_bytes, info.limits.images)
        tasks = await run_blocking(pool, _read_manifest, file, members)
        if archive is not None:
            sizes = {task.name: task.dataset for task in tasks if task.dataset is not None}
            versions = {task.name: {version.version for version in task.versions} for task in tasks}
            await run_blocking(pool, archive.check, file, images, sizes, versions)
        fields_by_digest = {}
        for digest in members:
            data = await run_blocking(pool, _read_file, file, members, digest)
            fields_by_digest[digest] = await _checked(check, digest, data)
        restored = [_restored(task, fields_by_digest) for task in tasks]
        async with AsyncExitStack() as held:
            staged = await held.enter_async_context(archive.staged(by, info, file, images)) if archive else {}
            for digest in members:
                await run_blocking(pool, _put, store, file, members, digest)
            await registry.restore(by, info.tenant, restored, staged)
        # From now on garbage collection keeps these files. One that ran before may have removed some.
        for digest in members:
            if await run_blocking(pool, store.find, digest) is None:
                await run_blocking(pool, _put, store, file, members, digest)
    return restored


def max_archive_bytes(limits: TenantLimits) -> int:
    """Return the size limit of a tar that a tenant with these limits can import."""
    adapters = limits.stored_bytes + MAX_MANIFEST_BYTES + MAX_FILES * 2 * tar.BLOCK_BYTES
    return adapters + max_dataset_bytes(limits)


def version_fields(adapter: Adapter) -> dict[str, Any]:
    """Return the fields of `VersionInfo` that follow from the adapter file: all but `version` and `registered`."""
    return {
        "digest": adapter.digest,
        "labels": list(adapter.labels),
        "backbone": adapter.backbone,
        "fingerprint": adapter.fingerprint,
        "config": adapter.config.model_dump(),
        "preprocess": adapter.preprocess,
        "metrics": adapter.metrics,
        "size_bytes": len(adapter.data),
        "coverage": adapter.coverage,
        "typicality": True if adapter.has_typicality else None,
    }


async def _tar(
    store: Store,
    pool: Pool,
    tenant: str,
    manifest: Sequence[bytes],
    digests: Sequence[str],
    archive: DatasetArchive | None,
    datasets: ExportedDatasets,
) -> AsyncIterator[bytes]:
    for chunk in tar.member(MANIFEST, *manifest):
        yield chunk
    for digest in digests:
        for chunk in tar.member(f"{FOLDER}{digest}.safetensors", await run_blocking(pool, store.get, digest)):
            yield chunk
    if archive is not None:
        async for name, data in archive.members(tenant, datasets):
            for chunk in tar.member(name, data):
                yield chunk
    yield tar.END


def _index(file: IO[bytes], max_adapter_bytes: int, max_images: int) -> tuple[dict[str, Member], DatasetMembers]:
    """Return the members: manifest and adapter files by digest, the manifest first, under `MANIFEST`; and datasets.

    Raises:
        InvalidRequest: not exactly the members of an export, each complete and only once.
    """
    members: dict[str, Member] = {}
    datasets = DatasetMembers()
    for member in tar.members(file):
        if member.is_file and datasets.take(member):
            max_bytes = MAX_MEMBER_BYTES
            if not members:
                raise invalid(f"{MANIFEST} is not first")
            if len(datasets.images) > max_images:
                raise invalid(f"the tar has more than {max_images} images, the tenant's limit; export without datasets")
            if len(datasets.trainings.snapshots) > MAX_FILES:
                raise invalid(f"the tar has more than {MAX_FILES} snapshots; export without datasets")
        else:
            match = FILE.fullmatch(member.name.removeprefix(FOLDER)) if member.name.startswith(FOLDER) else None
            digest = match[1] if match else member.name
            if (digest != MANIFEST and match is None) or not member.is_file:
                raise invalid(
                    f"the member at byte {member.at} is neither {MANIFEST}, {FOLDER}<digest>.safetensors, "
                    "datasets/<task>.jsonl, trainings/<task>.jsonl, snapshots/<digest>.json nor images/<digest>"
                )
            if digest in members or len(members) > MAX_FILES or (digest == MANIFEST) != (not members):
                raise invalid(f"{member.name} is a duplicate, {MANIFEST} is not first, or over {MAX_FILES} files")
            members[digest] = member
            max_bytes = MAX_MANIFEST_BYTES if digest == MANIFEST else max_adapter_bytes
        if not 0 <= member.size_bytes <= max_bytes:
            raise invalid(f"{member.name} has {member.size_bytes} bytes; the limit is {max_bytes}")
    return members, datasets


def _read_manifest(file: IO[bytes], members: dict[str, Member]) -> list[TaskEntry]:
    """Return the tasks and remove the manifest from `members`, so that only adapter files remain.

    Raises:
        InvalidRequest: the manifest is invalid, or it names other files than the tar has.
    """
    try:
        tenant = Manifest.model_validate_json(tar.read(file, members.pop(MANIFEST)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise invalid(f"{MANIFEST}: {where or 'the document'}: {first['msg']}") from error
    named = {v.digest for task in tenant.tasks for v in task.versions}
    if named != members.keys():
        digest = min(named ^ members.keys())
        raise invalid(f"file {digest!r} is only in {MANIFEST} or only in {FOLDER}")
    return tenant.tasks


def _read_file(file: IO[bytes], members: Mapping[str, Member], digest: str) -> bytes:
    data = tar.read(file, members[digest])
    if hashlib.sha256(data).hexdigest() != digest:
        raise invalid(f"file {digest} is damaged: its sha256 differs")
    return data


def _put(store: Store, file: IO[bytes], members: Mapping[str, Member], digest: str) -> None:
    store.put(digest, tar.read(file, members[digest]))


async def _checked(check: Check, digest: str, data: bytes) -> dict[str, Any]:
    try:
        return version_fields(await check(data))
    except InvalidAdapter as error:
        raise InvalidAdapter(f"file {digest}: {error.detail}", error.errors) from error


def _restored(task: TaskEntry, fields_by_digest: Mapping[str, dict[str, Any]]) -> WholeTask:
    """Return the task for the registry, with each version's fields from its file.

    Raises:
        InvalidRequest: the manifest contradicts a file.
    """
    versions = {}
    for stated in sorted(task.versions, key=lambda v: v.version):
        kept = VersionInfo(version=stated.version, registered=stated.registered, **fields_by_digest[stated.digest])
        known, claimed = json.loads(kept.model_dump_json()), json.loads(stated.model_dump_json())
        if known | claimed != known:  # an older hub's manifest has no coverage and no typicality
            raise invalid(f"{MANIFEST}: version {stated.version} of task {task.name!r} contradicts its file")
        versions[stated.version] = kept
    return WholeTask(
        task.name,
        {number: version.digest for number, version in versions.items()},
        task.aliases,
        task.sharing,
        task.settings,
        versions=versions,
        history=task.history,
        last_number=task.last_number,
    )
