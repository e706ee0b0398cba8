"""A registry in a real Redis, without HTTP."""

import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import redis

from hub.admin_schemas import LimitsChange
from hub.registry.audit import OPERATOR
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry
from hub.schemas import VersionInfo
from tests.support.hub_app import in_registry

T = TypeVar("T")
OLD_REGISTRY = Path(__file__).parents[1] / "golden" / "registry.json"


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


def write_old_registry(url: str) -> None:
    """Write the keys of a registry of version 0.1.0 before versions had summaries."""
    with redis.Redis.from_url(url, decode_responses=True) as client:
        for name, key in json.loads(OLD_REGISTRY.read_text("utf-8")).items():
            match key["type"]:
                case "hash":
                    client.hset(name, mapping=key["value"])
                case "set":
                    client.sadd(name, *key["value"])
                case _:
                    client.set(name, key["value"])


def with_registry(
    url: str, use: Callable[[TaskRegistry], Awaitable[T]], tenants: Sequence[str] = ("t", "one", "two")
) -> T:
    """Run `use(registry)` on its own event loop, after creating these tenants."""

    async def run(connection: RegistryConnection) -> T:
        for tenant in tenants:
            await TenantRegistry(connection).create(OPERATOR, tenant, LimitsChange())
        return await use(TaskRegistry(connection))

    return in_registry(url, run)
