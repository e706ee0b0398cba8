"""Tenants to export and import, and their archives taken apart and written again."""

import io
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters import Adapter, AdapterError
from hub.admin_schemas import LimitsChange, TenantInfo
from hub.errors import HubError
from hub.registry.audit import OPERATOR
from hub.registry.models import WholeTask
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry
from hub.schemas import Sharing, VersionInfo
from hub.services.archives.tenant_archive import export_tenant, import_tenant, version_fields
from hub.storage.store import Store
from hub.worker_api import invalid_adapter
from tests.support.datasets import unpaced_reads
from tests.support.hub_app import in_registry

MAX_ADAPTER_BYTES = 1_000_000
Members = list[tuple[str, bytes]]


class Case:
    """Tenant `one` with two complete tasks in a store of its own, and tenant `two` without tasks."""

    def __init__(self, database: RegistryConnection, folder: Path, adapters: Sequence[Adapter]) -> None:
        self.connection = database
        self.registry = TaskRegistry(database)
        self.tenants = TenantRegistry(database)
        self.stores = {name: Store(str(folder / name)) for name in ("one", "two")}
        self.folder = folder
        self.adapters = adapters

    async def fill(self) -> None:
        await self.tenants.create(OPERATOR, "one", LimitsChange(tasks=7))
        await self.tenants.create(OPERATOR, "two", LimitsChange())
        await self.tenants.create(OPERATOR, "three", LimitsChange())
        for task, i in (("flowers", 0), ("flowers", 1), ("flowers", 2), ("flowers", 3), ("leaves", 1)):
            await self.register("one", task, self.adapters[i])
        registry = self.registry
        for targets in ({1: 1}, {2: 1}, {1: 90, 2: 10}):
            await registry.set_alias(OPERATOR, "one", "flowers", "stable", targets)
        await registry.set_alias(OPERATOR, "one", "flowers", "latest", {3: 1})
        await registry.delete_version(OPERATOR, "one", "flowers", 4)
        await registry.share(OPERATOR, "one", "flowers", Sharing(tenants=["two", "three"]))
        await registry.share(OPERATOR, "one", "leaves", Sharing(public=True))

    async def register(self, tenant: str, task: str, adapter: Adapter) -> VersionInfo:
        self.stores[tenant].put(adapter.digest, adapter.data)
        registered = "2026-01-01T00:00:00.000+00:00"
        version = VersionInfo(version=0, registered=registered, **version_fields(adapter))
        kept, _ = await self.registry.register(OPERATOR, tenant, task, version, ["latest"])
        return kept

    async def info(self, tenant: str) -> TenantInfo:
        return await self.tenants.get(tenant)

    async def export(self, tenant: str = "one") -> bytes:
        info = await self.info(tenant)
        export = await export_tenant(self.registry, unpaced_reads(), self.stores[tenant], None, info)
        data = b"".join([chunk async for chunk in export.chunks])
        assert len(data) == export.size_bytes
        return data

    async def restore(self, tar: bytes | AsyncIterator[bytes], tenant: str = "two", **options: Any) -> list[WholeTask]:
        arguments: dict[str, Any] = {"max_adapter_bytes": MAX_ADAPTER_BYTES, "registry": self.registry} | options
        return await import_tenant(
            store=self.stores[tenant],
            pool=None,
            check=check,
            by=OPERATOR,
            info=await self.info(tenant),
            chunks=pieces(tar) if isinstance(tar, bytes) else tar,
            **arguments,
        )

    async def refused(self, kind: type[HubError], tar: bytes | AsyncIterator[bytes], **options: Any) -> str:
        """Return the detail of a refused import. Nothing of the import may remain."""
        with pytest.raises(kind) as caught:
            await self.restore(tar, **options)
        assert await self.registry.dump("two") == []
        return caught.value.detail

    async def listed(self, tenant: str) -> list[str]:
        """Return the names of the tasks that a tenant sees."""
        found, cursor = await self.registry.page(tenant, 1000, "", lambda _name: True)
        assert cursor is None
        return [task.task for task in found]

    def stored(self, tenant: str) -> list[str]:
        return sorted(file.digest for file in self.stores[tenant].files())


async def check(data: bytes) -> Adapter:
    try:
        return Adapter.read(data)
    except AdapterError as error:
        raise invalid_adapter(error) from error


async def pieces(data: bytes, size: int = 70_001) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


Run = Callable[[Callable[[Case], Coroutine[Any, Any, None]]], None]


def runner(url: str, adapters: Sequence[Adapter], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs `use(case)` on an event loop. No temporary file may remain."""
    spool = folder / "spool"
    spool.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spool))

    def run(use: Callable[[Case], Coroutine[Any, Any, None]]) -> None:
        async def with_database(database: RegistryConnection) -> None:
            case = Case(database, folder, adapters)
            await case.fill()
            await use(case)

        in_registry(url, with_database)
        assert list(spool.iterdir()) == []

    return run


def members(tar: bytes) -> Members:
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        return [(m.name, archive.extractfile(m).read()) for m in archive.getmembers()]  # type: ignore[union-attr]


def written(entries: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """Return a tar written by Python's `tarfile`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=format) as archive:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
