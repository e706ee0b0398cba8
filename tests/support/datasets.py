"""Datasets in a real Redis, without HTTP."""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from hub.admin_schemas import LimitsChange
from hub.concurrency import ActiveTenants, TenantReads
from hub.dataset_schemas import DatasetImage, Split, Use
from hub.registry.audit import OPERATOR, AuditLog
from hub.registry.datasets.entries import AddStatus, NewImage
from hub.registry.datasets.files import DatasetFiles
from hub.registry.datasets.index import DatasetIndex
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry
from hub.schemas import TaskSettings
from tests.support.hub_app import in_registry

T = TypeVar("T")
TENANTS = ("t", "other")
NO_CHANGE = LimitsChange()


def unpaced_reads() -> TenantReads:
    """Return turns of reads without any active tenant, so that none rests."""
    return TenantReads(100, ActiveTenants())


def digest_of(i: int | str) -> str:
    """Return the digest of a made-up image."""
    return hashlib.sha256(str(i).encode()).hexdigest()


def new_image(i: int | str, label: str | None = None, split: Split | None = None, size_bytes: int = 100) -> NewImage:
    """Return a made-up image."""
    return NewImage(digest_of(i), f"{i}.png", size_bytes, label, split)


@dataclass(frozen=True)
class Registry:
    """The index of datasets with the task `flowers` of each tenant, and the registries beside it."""

    connection: RegistryConnection
    index: DatasetIndex
    files: DatasetFiles
    tasks: TaskRegistry
    tenants: TenantRegistry

    async def add(
        self, *images: NewImage, tenant: str = "t", task: str = "flowers", audited: bool = False
    ) -> list[AddStatus]:
        statuses, _ = await self.index.add(OPERATOR, tenant, task, images, {"files": len(images)}, audited=audited)
        return statuses

    async def page(
        self, *, label: str | None = None, unlabelled: bool = False, use: Use | None = None, count: int = 1000
    ) -> list[DatasetImage]:
        page = await self.index.page("t", "flowers", label=label, unlabelled=unlabelled, use=use, before=0, count=count)
        return page.images

    async def names(self, label: str | None = None, *, unlabelled: bool = False, use: Use | None = None) -> list[str]:
        """Return the names of the images of a list, newest first."""
        return [
            image.name.removesuffix(".png") for image in await self.page(label=label, unlabelled=unlabelled, use=use)
        ]

    async def counts(self) -> dict[str, int]:
        """Return the number of images of each label."""
        found = await self.index.describe("t", "flowers")
        return {str(count.label): count.train + count.test for count in found.labels}

    async def entries(self, tenant: str = "t") -> list[tuple[str, dict[str, Any]]]:
        """Return a tenant's audit: actions and details."""
        page = await AuditLog(self.connection, unpaced_reads()).read(tenant, "0", 100)
        return [(entry.action, entry.detail) for entry in page.entries]


def with_datasets(url: str, use: Callable[[Registry], Awaitable[T]], limits: LimitsChange = NO_CHANGE) -> T:
    """Run `use(registry)` on its own event loop, with two tenants that have a task `flowers` each."""

    async def run(connection: RegistryConnection) -> T:
        tasks, tenants = TaskRegistry(connection), TenantRegistry(connection)
        for tenant in TENANTS:
            await tenants.create(OPERATOR, tenant, limits)
            await tasks.put(OPERATOR, tenant, "flowers", TaskSettings())
        return await use(
            Registry(connection, DatasetIndex(connection, unpaced_reads()), DatasetFiles(connection), tasks, tenants)
        )

    return in_registry(url, run)
