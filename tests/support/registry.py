"""A registry in a real Redis, without HTTP."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from hub.admin_schemas import LimitsChange
from hub.registry.audit import OPERATOR
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry
from hub.schemas import VersionInfo
from tests.support.hub_app import in_registry

T = TypeVar("T")


def version(digest: str) -> VersionInfo:
    """Return a version without a number, of an adapter with this digest."""
    return VersionInfo(
        version=0,
        digest=digest,
        labels=["a", "b"],
        backbone="demo",
        fingerprint="f" * 64,
        config={},
        preprocess={},
        metrics=None,
        size_bytes=1,
        registered="2026-01-01T00:00:00+00:00",
    )


def with_registry(
    url: str, use: Callable[[TaskRegistry], Awaitable[T]], tenants: Sequence[str] = ("t", "one", "two")
) -> T:
    """Run `use(registry)` on its own event loop, after creating these tenants."""

    async def run(connection: RegistryConnection) -> T:
        for tenant in tenants:
            await TenantRegistry(connection).create(OPERATOR, tenant, LimitsChange())
        return await use(TaskRegistry(connection))

    return in_registry(url, run)
