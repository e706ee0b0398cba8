"""Export and import of a whole tenant as one file: an uncompressed tar, format `karst-tenant/1`.

`tenant.json` comes first: every task with its versions, aliases, their history, sharing, last version number and the
settings that were set. Then comes each adapter file once, as `files/<digest>.safetensors`. The tar has no keys, no
counts and no audit.
"""

import hashlib
import json
import tarfile
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from adapters import Adapter
from adapters.method.typicality import Typicality

from ..admin_schemas import TenantInfo, TenantLimits
from ..concurrency import Pool, run_blocking
from ..errors import InvalidAdapter, InvalidRequest, TooLarge, Unavailable
from ..field_types import Name, VersionNumber, Weight
from ..registry.audit import Actor
from ..registry.models import DEFAULT_SETTINGS, WholeTask
from ..registry.tasks import MAX_ALIAS_HISTORY, TaskRegistry
from ..registry.versions import StoredVersion, StoredVersions
from ..schemas import LATEST, Sharing, TaskSettings, VersionInfo
from ..storage.store import FILE, Store
from .spool import spooled

FORMAT = "karst-tenant/1"
MANIFEST = "tenant.json"
FOLDER = "files/"
BLOCK_BYTES = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK_BYTES)
CHUNK_BYTES = 1024**2
MAX_MANIFEST_BYTES = 128 * 1024**2
MAX_FILES = 200_000
MAX_PADDING_BYTES = 64 * 1024  # some tools add zeros after the end

Targets = Annotated[dict[VersionNumber, Weight], Field(min_length=1)]
Check = Callable[[bytes], Awaitable[Adapter]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _TaskEntry(_Strict):
    """A task in `tenant.json`."""

    name: Name
    last_number: Annotated[int, Field(ge=0, le=10**12)]
    versions: list[VersionInfo]
    aliases: dict[Name, Targets]
    history: dict[Name, Annotated[list[Targets], Field(max_length=MAX_ALIAS_HISTORY)]]
    sharing: Sharing
    settings: TaskSettings = DEFAULT_SETTINGS

    @model_validator(mode="after")
    def _consistent(self) -> "_TaskEntry":
        numbers = [v.version for v in self.versions]
        for which, values in (("number", numbers), ("digest", [v.digest for v in self.versions])):
            if len(set(values)) < len(values):
                raise ValueError(f"two versions have the same {which}")
        if numbers and (min(numbers) < 1 or max(numbers) > self.last_number):
            raise ValueError(f"a version number is outside 1 to {self.last_number}, the last number")
        if numbers and LATEST not in self.aliases:
            raise ValueError(f"the alias {LATEST!r} is missing")
        for alias, targets in self.aliases.items():
            if alias.isdecimal() or not targets.keys() <= set(numbers):
                raise ValueError(f"alias {alias!r} is a number, or points at a missing version")
        if not self.history.keys() <= self.aliases.keys():
            raise ValueError("the history names a missing alias")
        for version in self.versions:
            if datetime.fromisoformat(version.registered).tzinfo is None:
                raise ValueError(f"the registration time of version {version.version} has no time zone")
        return self


class _Manifest(_Strict):
    """The content of `tenant.json`."""

    format: Literal["karst-tenant/1"]
    tenant: Name
    limits: dict[str, Any]
    tasks: list[_TaskEntry]

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: list[_TaskEntry]) -> list[_TaskEntry]:
        if len({t.name for t in tasks}) < len(tasks):
            raise ValueError("two tasks have the same name")
        return tasks


@dataclass(frozen=True)
class Export:
    """A tenant's tar as a stream. A stream shorter than `size_bytes` is incomplete."""

    size_bytes: int
    chunks: AsyncIterator[bytes]


async def export_tenant(registry: TaskRegistry, store: Store, pool: Pool, info: TenantInfo) -> Export:
    """Return a tenant as a tar stream, without its keys. Equal tenants give equal bytes.

    The export looks up every file before the first byte. If it cannot read one later, `chunks` raises the error. Send
    `size_bytes` as `content-length`: then the client notices, and the tar has no end, so no hub imports it.

    Args:
        pool: thread pool for calls to the store; None for the event loop's default pool.

    Raises:
        Unavailable: the registry or the store is unavailable, or the store lacks a file.
        TooLarge: the tenant has more versions than one import accepts.
    """
    tasks = await registry.dump(info.tenant)
    sizes = {v.digest: v.size_bytes for task in tasks for v in map(StoredVersion.served, _stored(task))}
    for digest, size_bytes in sizes.items():
        file = await run_blocking(pool, store.find, digest)
        if file is None or file.size_bytes != size_bytes:
            raise Unavailable(f"The adapter store has no intact file {digest}. Register the adapter again.")
    manifest = await run_blocking(pool, _manifest, info, tasks)
    if len(manifest) > MAX_MANIFEST_BYTES or len(sizes) > MAX_FILES:
        limits = f"{MAX_FILES} files and {MAX_MANIFEST_BYTES} bytes of {MANIFEST}"
        raise TooLarge(f"The export exceeds the limits of {limits}. Delete versions.")
    lengths = [len(manifest), *sizes.values()]
    size_bytes = sum(BLOCK_BYTES + length + len(_padding(length)) for length in lengths) + len(END)
    return Export(size_bytes, _tar(store, pool, manifest, sorted(sizes)))


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
) -> list[WholeTask]:
    """Create the tasks of an export, all or none, in one atomic step at the end. Return them.

    Args:
        pool: thread pool for calls to the store and for files; None for the event loop's default pool.
        check: function that parses an adapter file and checks that this hub can serve it; raises InvalidAdapter.
        info: the tenant that gets the tasks; its name may differ from the exported one.
        chunks: the tar.
        max_adapter_bytes: size limit of one adapter file.
        min_free_bytes: bytes that stay free on the disk of temporary files.

    Raises:
        InvalidRequest, InvalidAdapter: the tar is not an export, or a file does not fit this hub.
        TooLarge: the tar has more bytes than the tenant may store.
        Conflict: some of the tasks exist already.
        LimitReached: the tenant's limit of tasks, of versions per task or of stored bytes.
        InsufficientStorage: the disk of the store or of temporary files is nearly full.
        Unavailable: the registry, the store or the disk for temporary files is unavailable.
    """
    max_bytes = max_archive_bytes(info.limits)
    too_large = f"the tar has more than {max_bytes} bytes, the tenant's limit for an import"
    async with spooled(pool, chunks, max_bytes=max_bytes, too_large=too_large, min_free_bytes=min_free_bytes) as file:
        members = await run_blocking(pool, _index, file, max_adapter_bytes)
        tasks = await run_blocking(pool, _read_manifest, file, members)
        fields_by_digest = {}
        for digest in members:
            data = await run_blocking(pool, _read_file, file, members, digest)
            fields_by_digest[digest] = await _checked(check, digest, data)
        restored = [_restored(task, fields_by_digest) for task in tasks]
        for digest in members:
            await run_blocking(pool, _put, store, file, members, digest)
        await registry.restore(by, info.tenant, restored)
        # From now on garbage collection keeps these files. One that ran before may have removed some.
        for digest in members:
            if await run_blocking(pool, store.find, digest) is None:
                await run_blocking(pool, _put, store, file, members, digest)
    return restored


def max_archive_bytes(limits: TenantLimits) -> int:
    """Return the size limit of a tar that a tenant with these limits can import."""
    return limits.stored_bytes + MAX_MANIFEST_BYTES + MAX_FILES * 2 * BLOCK_BYTES


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
        "typicality": True if Typicality.of(adapter.tensors) else None,
    }


def _manifest(info: TenantInfo, tasks: Sequence[WholeTask]) -> bytes:
    limits = info.limits.model_dump(mode="json")
    head = json.dumps({"format": FORMAT, "tenant": info.tenant, "limits": limits}, ensure_ascii=False)
    return f'{head[:-1]}, "tasks": [{", ".join(map(_task_entry, tasks))}]}}'.encode()


def _task_entry(task: WholeTask) -> str:
    """Return a task's JSON. The versions' texts are not parsed: they may have 100 MB, and all tenants would wait."""
    versions = ", ".join(stored.json for stored in _stored(task))
    body = {
        "aliases": task.aliases,
        "history": task.history,
        "sharing": task.sharing.model_dump(mode="json"),
    }
    # Only if a setting was set: a hub without settings refuses the member.
    body |= {"settings": task.settings.given()} if task.settings.given() else {}
    name, last_number = json.dumps(task.name), max([task.last_number, *task.versions])
    rest = json.dumps(body, ensure_ascii=False)[1:]
    return f'{{"name": {name}, "last_number": {last_number}, "versions": [{versions}], {rest}'


def _stored(task: WholeTask) -> Sequence[StoredVersion]:
    """Return the versions of a task that was read from the registry."""
    return task.versions.stored() if isinstance(task.versions, StoredVersions) else []


async def _tar(store: Store, pool: Pool, manifest: bytes, digests: Sequence[str]) -> AsyncIterator[bytes]:
    yield _header(MANIFEST, len(manifest)) + manifest + _padding(len(manifest))
    for digest in digests:
        data = await run_blocking(pool, store.get, digest)
        yield _header(f"{FOLDER}{digest}.safetensors", len(data))
        for at in range(0, len(data), CHUNK_BYTES):
            yield data[at : at + CHUNK_BYTES]
        yield _padding(len(data))
    yield END


def _header(name: str, size_bytes: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    return member.tobuf(tarfile.USTAR_FORMAT)


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % BLOCK_BYTES)


@dataclass(frozen=True)
class _Member:
    """Position of a member's content in the tar."""

    offset: int
    size_bytes: int


def _index(file: IO[bytes], max_adapter_bytes: int) -> dict[str, _Member]:
    """Return the members by digest; the manifest is first, under `MANIFEST`.

    The index parses headers with `TarInfo.frombuf`, not with `TarFile`: that class also follows extensions (long names,
    sparse files, links), which an export never has and a hostile file may have.

    Raises:
        InvalidRequest: not exactly the members of an export, each complete and only once.
    """
    end = file.seek(0, 2)
    members: dict[str, _Member] = {}
    offset = 0
    while True:
        file.seek(offset)
        header = file.read(BLOCK_BYTES)
        if header == bytes(BLOCK_BYTES):
            break
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise _invalid(f"not a tar, or the tar is truncated or damaged at byte {offset}") from error
        match = FILE.fullmatch(member.name.removeprefix(FOLDER)) if member.name.startswith(FOLDER) else None
        digest = match[1] if match else member.name
        if (digest != MANIFEST and match is None) or member.type != tarfile.REGTYPE:
            raise _invalid(f"the member at byte {offset} is neither {MANIFEST} nor {FOLDER}<digest>.safetensors")
        if digest in members or len(members) > MAX_FILES or (digest == MANIFEST) != (not members):
            raise _invalid(f"{member.name} is a duplicate, {MANIFEST} is not first, or over {MAX_FILES} files")
        max_bytes = MAX_MANIFEST_BYTES if digest == MANIFEST else max_adapter_bytes
        if not 0 <= member.size <= max_bytes:
            raise _invalid(f"{member.name} has {member.size} bytes; the limit is {max_bytes}")
        members[digest] = _Member(offset + BLOCK_BYTES, member.size)
        offset += BLOCK_BYTES + member.size + len(_padding(member.size))
    end_blocks = file.read(MAX_PADDING_BYTES)
    max_end = offset + BLOCK_BYTES + MAX_PADDING_BYTES
    if not members or len(end_blocks) < BLOCK_BYTES or any(end_blocks) or end > max_end:
        raise _invalid("the tar has no valid end: two blocks of zeros")
    return members


def _read_manifest(file: IO[bytes], members: dict[str, _Member]) -> list[_TaskEntry]:
    """Return the tasks and remove the manifest from `members`, so that only adapter files remain.

    Raises:
        InvalidRequest: the manifest is invalid, or it names other files than the tar has.
    """
    try:
        tenant = _Manifest.model_validate_json(_read(file, members.pop(MANIFEST)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _invalid(f"{MANIFEST}: {where or 'the document'}: {first['msg']}") from error
    named = {v.digest for task in tenant.tasks for v in task.versions}
    if named != members.keys():
        digest = min(named ^ members.keys())
        raise _invalid(f"file {digest!r} is only in {MANIFEST} or only in {FOLDER}")
    return tenant.tasks


def _read(file: IO[bytes], member: _Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size_bytes)


def _read_file(file: IO[bytes], members: Mapping[str, _Member], digest: str) -> bytes:
    data = _read(file, members[digest])
    if hashlib.sha256(data).hexdigest() != digest:
        raise _invalid(f"file {digest} is damaged: its sha256 differs")
    return data


def _put(store: Store, file: IO[bytes], members: Mapping[str, _Member], digest: str) -> None:
    store.put(digest, _read(file, members[digest]))


async def _checked(check: Check, digest: str, data: bytes) -> dict[str, Any]:
    try:
        return version_fields(await check(data))
    except InvalidAdapter as error:
        raise InvalidAdapter(f"file {digest}: {error.detail}", error.errors) from error


def _restored(task: _TaskEntry, fields_by_digest: Mapping[str, dict[str, Any]]) -> WholeTask:
    """Return the task for the registry, with each version's fields from its file.

    Raises:
        InvalidRequest: the manifest contradicts a file.
    """
    versions = {}
    for stated in sorted(task.versions, key=lambda v: v.version):
        kept = VersionInfo(version=stated.version, registered=stated.registered, **fields_by_digest[stated.digest])
        known, claimed = json.loads(kept.model_dump_json()), json.loads(stated.model_dump_json())
        if known | claimed != known:  # an older hub's manifest has no coverage and no typicality
            raise _invalid(f"{MANIFEST}: version {stated.version} of task {task.name!r} contradicts its file")
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


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest.at("body", message)
