"""A whole tenant as one file, from one hub to another: an uncompressed tar, format `karst-tenant/1`.

`tenant.json` comes first: every task with its versions, aliases, their history, sharing and last number. Then each
adapter file once, as `files/<digest>.safetensors`. Keys are not in it, nor counts, nor the audit.
"""

import hashlib
import json
import tarfile
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from adapters import Adapter

from ..errors import InvalidAdapter, InvalidRequest, TooLarge, Unavailable
from ..registry.audit import Actor
from ..registry.models import Task
from ..registry.tasks import MAX_ALIAS_HISTORY, TaskRegistry
from ..schemas import LATEST, Name, Sharing, TenantInfo, TenantLimits, VersionInfo, VersionNumber, Weight
from ..storage.store import FILE, OffLoop, Store

FORMAT = "karst-tenant/1"
MANIFEST = "tenant.json"
FOLDER = "files/"
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
CHUNK = 1024**2
MAX_MANIFEST_BYTES = 128 * 1024**2
MAX_FILES = 200_000
MAX_PADDING = 64 * 1024  # zeros after the end, which some tools add

Targets = Annotated[dict[VersionNumber, Weight], Field(min_length=1)]
Check = Callable[[bytes], Awaitable[Adapter]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Task(_Strict):
    name: Name
    last_number: Annotated[int, Field(ge=1, le=10**12)]
    versions: list[VersionInfo] = Field(min_length=1)
    aliases: dict[Name, Targets]
    history: dict[Name, Annotated[list[Targets], Field(max_length=MAX_ALIAS_HISTORY)]]
    sharing: Sharing

    @model_validator(mode="after")
    def _consistent(self) -> "_Task":
        numbers = [v.version for v in self.versions]
        for which, values in (("number", numbers), ("digest", [v.digest for v in self.versions])):
            if len(set(values)) < len(values):
                raise ValueError(f"two versions have the same {which}")
        if min(numbers) < 1 or max(numbers) > self.last_number:
            raise ValueError(f"a version's number is not within 1 to {self.last_number}, the last that was given")
        if LATEST not in self.aliases:
            raise ValueError(f"there is no alias {LATEST!r}")
        for alias, targets in self.aliases.items():
            if alias.isdecimal() or not targets.keys() <= set(numbers):
                raise ValueError(f"alias {alias!r} is a number, or points at a version that is not there")
        if not self.history.keys() <= self.aliases.keys():
            raise ValueError("there is a history of an alias that is not there")
        for version in self.versions:
            if datetime.fromisoformat(version.registered).tzinfo is None:
                raise ValueError(f"version {version.version} was registered at no certain time")
        return self


class _Tenant(_Strict):
    format: Literal["karst-tenant/1"]
    tenant: Name
    limits: dict[str, Any]
    tasks: list[_Task]

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: list[_Task]) -> list[_Task]:
        if len({t.name for t in tasks}) < len(tasks):
            raise ValueError("two tasks have the same name")
        return tasks


@dataclass(frozen=True)
class Export:
    """A tenant's tar: how long it is, and its bytes. What ends before that length is not whole."""

    size_bytes: int
    chunks: AsyncIterator[bytes]


async def export_tenant(registry: TaskRegistry, store: Store, off_loop: OffLoop, info: TenantInfo) -> Export:
    """All of a tenant but its keys. The same tenant gives the same bytes.

    Every file is looked up before the first byte. One that cannot be read later ends `chunks` with an error: send
    `size_bytes` as `content-length`, and the receiver knows; the tar has no end then, and no hub imports it.

    Raises:
        Unavailable: registry or store are away, or the store lacks a file.
        TooLarge: so many versions that no hub would import them at once.
    """
    tasks = await registry.dump(info.tenant)
    sizes = {v.digest: v.size_bytes for task in tasks for v in task.versions.values()}
    for digest, size_bytes in sizes.items():
        file = await off_loop(store.find, digest)
        if file is None or file.size_bytes != size_bytes:
            raise Unavailable(f"the adapter store has no whole file {digest}")
    manifest = await off_loop(_manifest, info, tasks)
    if len(manifest) > MAX_MANIFEST_BYTES or len(sizes) > MAX_FILES:
        raise TooLarge(f"an export has at most {MAX_FILES} files and {MAX_MANIFEST_BYTES} bytes of {MANIFEST}")
    lengths = [len(manifest), *sizes.values()]
    size_bytes = sum(BLOCK + length + len(_padding(length)) for length in lengths) + len(END)
    return Export(size_bytes, _tar(store, off_loop, manifest, sorted(sizes)))


async def import_tenant(
    registry: TaskRegistry,
    store: Store,
    off_loop: OffLoop,
    check: Check,
    by: Actor,
    info: TenantInfo,
    chunks: AsyncIterable[bytes],
    max_adapter_bytes: int,
) -> list[Task]:
    """Make a tenant's tasks as an export has them, in one step at the end; all or none.

    Args:
        check: an adapter file -> the adapter, if this hub can serve it; raises InvalidAdapter.
        info: the tenant that gets them, whatever name it had where it comes from.
        chunks: the tar.

    Raises:
        InvalidRequest, InvalidAdapter: the tar is not what `export_tenant` makes, or a file does not fit this hub.
        TooLarge: more bytes than the tenant may store.
        Conflict: some of the tasks are there.
        LimitReached: of tasks, of versions a task, or of stored bytes.
        Unavailable: registry, store or the disk for temporary files.
    """
    with _spool() as file:
        await _receive(off_loop, file, chunks, most_bytes(info.limits))
        places = await off_loop(_index, file, max_adapter_bytes)
        tasks = await off_loop(_read_manifest, file, places)
        facts_of = {}
        for digest in places:
            data = await off_loop(_read_file, file, places, digest)
            facts_of[digest] = await _checked(check, digest, data)
        restored = [_restored(task, facts_of) for task in tasks]
        for digest in places:
            await off_loop(_put, store, file, places, digest)
        await registry.restore(by, info.tenant, restored)
        # From here on no collection takes a file. One that ran before may have.
        for digest in places:
            if await off_loop(store.find, digest) is None:
                await off_loop(_put, store, file, places, digest)
    return restored


def most_bytes(limits: TenantLimits) -> int:
    """Of a tar that a tenant could import."""
    return limits.stored_bytes + MAX_MANIFEST_BYTES + MAX_FILES * 2 * BLOCK


def facts(adapter: Adapter) -> dict[str, Any]:
    """What a version tells of its adapter: all fields of `VersionInfo` but `version` and `registered`."""
    return {
        "digest": adapter.digest,
        "labels": list(adapter.labels),
        "backbone": adapter.backbone,
        "fingerprint": adapter.fingerprint,
        "config": adapter.config.model_dump(),
        "preprocess": adapter.preprocess,
        "metrics": adapter.metrics,
        "size_bytes": len(adapter.data),
    }


def _manifest(info: TenantInfo, tasks: Sequence[Task]) -> bytes:
    body = {
        "format": FORMAT,
        "tenant": info.tenant,
        "limits": info.limits.model_dump(mode="json"),
        "tasks": [
            {
                "name": task.name,
                "last_number": max([task.last_number, *task.versions]),
                "versions": [version.model_dump(mode="json") for version in task.versions.values()],
                "aliases": task.aliases,
                "history": task.history,
                "sharing": task.sharing.model_dump(mode="json"),
            }
            for task in tasks
        ],
    }
    return json.dumps(body, ensure_ascii=False).encode()


async def _tar(store: Store, off_loop: OffLoop, manifest: bytes, digests: Sequence[str]) -> AsyncIterator[bytes]:
    yield _header(MANIFEST, len(manifest)) + manifest + _padding(len(manifest))
    for digest in digests:
        data = await off_loop(store.get, digest)
        yield _header(f"{FOLDER}{digest}.safetensors", len(data))
        for at in range(0, len(data), CHUNK):
            yield data[at : at + CHUNK]
        yield _padding(len(data))
    yield END


def _header(name: str, size_bytes: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    return member.tobuf(tarfile.USTAR_FORMAT)


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % BLOCK)


@contextmanager
def _spool() -> Iterator[IO[bytes]]:
    """A file without a name: it is gone whatever happens."""
    try:
        with tempfile.TemporaryFile() as file:
            yield file
    except OSError as error:
        raise Unavailable(f"the hub cannot keep the import while it reads it: {error.strerror or error}") from error


async def _receive(off_loop: OffLoop, file: IO[bytes], chunks: AsyncIterable[bytes], max_bytes: int) -> None:
    total, waiting = 0, bytearray()
    async for chunk in chunks:
        total += len(chunk)
        if total > max_bytes:
            message = f"the tar has more than the {max_bytes} bytes that are allowed"
            raise TooLarge.at("body", message)
        waiting += chunk
        if len(waiting) >= CHUNK:
            await off_loop(file.write, bytes(waiting))
            waiting.clear()
    await off_loop(file.write, bytes(waiting))
    await off_loop(file.flush)


@dataclass(frozen=True)
class _Place:
    """Where a member's bytes are in the tar."""

    at: int
    size_bytes: int


def _index(file: IO[bytes], max_adapter_bytes: int) -> dict[str, _Place]:
    """Digest -> where its file is; the manifest stands under `MANIFEST`, first.

    One header after the other by `TarInfo.frombuf`, not by `TarFile`: that also follows extensions (long names, sparse
    files, links), which no export has and a hostile file may.

    Raises:
        InvalidRequest: anything but the members of an export, whole, each once.
    """
    end = file.seek(0, 2)
    places: dict[str, _Place] = {}
    at = 0
    while True:
        file.seek(at)
        block = file.read(BLOCK)
        if block == bytes(BLOCK):
            break
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            where = f"at byte {at} the tar" if at else "this is no tar, or its beginning"
            raise _invalid(f"{where} is cut short or damaged") from error
        match = FILE.fullmatch(member.name.removeprefix(FOLDER)) if member.name.startswith(FOLDER) else None
        digest = match[1] if match else member.name
        if (digest != MANIFEST and match is None) or member.type != tarfile.REGTYPE:
            raise _invalid(f"at byte {at} the tar has something else than {MANIFEST} or {FOLDER}<digest>.safetensors")
        if digest in places or len(places) > MAX_FILES or (digest == MANIFEST) != (not places):
            raise _invalid(f"{member.name} comes twice, or {MANIFEST} not first, or there are over {MAX_FILES} files")
        if not 0 <= member.size <= (MAX_MANIFEST_BYTES if digest == MANIFEST else max_adapter_bytes):
            raise _invalid(f"{member.name} is larger than is allowed")
        places[digest] = _Place(at + BLOCK, member.size)
        at += BLOCK + member.size + len(_padding(member.size))
    rest = file.read(MAX_PADDING)
    if not places or len(rest) < BLOCK or any(rest) or end > at + BLOCK + MAX_PADDING:
        raise _invalid("the tar does not end as it should")
    return places


def _read_manifest(file: IO[bytes], places: dict[str, _Place]) -> list[_Task]:
    """The tasks. Takes the manifest out of `places`, which are the files then.

    Raises:
        InvalidRequest: not what an export has, or not with these files.
    """
    try:
        tenant = _Tenant.model_validate_json(_read(file, places.pop(MANIFEST)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _invalid(f"{MANIFEST}: {where or 'the whole'}: {first['msg']}") from error
    named = {v.digest for task in tenant.tasks for v in task.versions}
    if named != places.keys():
        digest = min(named ^ places.keys())
        raise _invalid(f"file {digest!r} is only in {MANIFEST} or only in {FOLDER}")
    return tenant.tasks


def _read(file: IO[bytes], place: _Place) -> bytes:
    file.seek(place.at)
    return file.read(place.size_bytes)


def _read_file(file: IO[bytes], places: Mapping[str, _Place], digest: str) -> bytes:
    data = _read(file, places[digest])
    if hashlib.sha256(data).hexdigest() != digest:
        raise _invalid(f"file {digest} is damaged: its sha256 is another")
    return data


def _put(store: Store, file: IO[bytes], places: Mapping[str, _Place], digest: str) -> None:
    store.put(digest, _read(file, places[digest]))


async def _checked(check: Check, digest: str, data: bytes) -> dict[str, Any]:
    try:
        return facts(await check(data))
    except InvalidAdapter as error:
        raise InvalidAdapter(f"file {digest}: {error.detail}", error.errors) from error


def _restored(task: _Task, facts_of: Mapping[str, dict[str, Any]]) -> Task:
    """The task for the registry; its versions tell what the files tell.

    Raises:
        InvalidRequest: the manifest tells something else.
    """
    versions = {}
    for said in sorted(task.versions, key=lambda v: v.version):
        kept = VersionInfo(version=said.version, registered=said.registered, **facts_of[said.digest])
        if json.loads(kept.model_dump_json()) != json.loads(said.model_dump_json()):
            raise _invalid(f"{MANIFEST}: version {said.version} of task {task.name!r} is not what its file says")
        versions[said.version] = kept
    return Task(task.name, versions, task.aliases, task.sharing, task.history, task.last_number)


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest.at("body", message)
