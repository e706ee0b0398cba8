"""A gateway's cache of the registry."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from hub.admin_schemas import LimitsChange
from hub.errors import NotFound, Unavailable
from hub.registry.audit import OPERATOR
from hub.registry.cache import KEY_TRUST_S, RegistryCache
from hub.registry.events import EventLog
from hub.registry.keys import KeyRegistry, key_id
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry
from hub.registry.versions import StoredVersion
from tests.support.hub_app import in_registry
from tests.support.registry import version


def new_cache(
    connection: RegistryConnection, events: EventLog | None = None, clock: Callable[[], float] = lambda: 0.0
) -> RegistryCache:
    return RegistryCache(
        tasks=TaskRegistry(connection),
        keys=KeyRegistry(connection),
        tenants=TenantRegistry(connection),
        events=events or EventLog(connection),
        clock=clock,
    )


async def while_following(cache: RegistryCache, use: Callable[[], Awaitable[None]]) -> None:
    following = asyncio.create_task(cache.follow())
    try:
        await use()
    finally:
        following.cancel()
        await asyncio.wait((following,))


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await true():
            await asyncio.sleep(0.01)


def test_a_task_is_cached_until_an_event_reports_its_change(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        registry, cache = TaskRegistry(connection), new_cache(connection)
        await TenantRegistry(connection).create(OPERATOR, "t", LimitsChange())
        await registry.register(OPERATOR, "t", "x", version("a" * 64), ["latest"])
        assert (await cache.task("t", "x")).digests == {1: "a" * 64}
        assert cache.cached_task("t", "x") is None  # no events yet, so the cache could become stale

        async def is_cached() -> bool:
            await cache.task("t", "x")
            return cache.cached_task("t", "x") is not None

        async def is_changed() -> bool:
            return (await cache.task("t", "x")).current == 2

        async def is_absent() -> bool:
            try:
                await cache.task("t", "x")
            except NotFound:
                return True
            return False

        async def follow() -> None:
            await until(is_cached)
            await registry.register(OPERATOR, "t", "x", version("b" * 64), ["latest"])
            await until(is_changed)
            await TenantRegistry(connection).delete(OPERATOR, "t")
            await until(is_absent)

        await while_following(cache, follow)

    in_registry(empty_redis, use)


def test_a_key_is_rejected_when_the_registry_has_not_answered_for_five_minutes(empty_redis: str) -> None:
    now_s = 0.0

    async def use(connection: RegistryConnection) -> None:
        nonlocal now_s
        cache = new_cache(connection, clock=lambda: now_s)
        await TenantRegistry(connection).create(OPERATOR, "t", LimitsChange())
        key = (await KeyRegistry(connection).create(OPERATOR, "t", "owner", "test")).key
        now_s = KEY_TRUST_S
        assert (await cache.key(key_id(key))) is not None
        now_s = KEY_TRUST_S + 1
        with pytest.raises(Unavailable, match="no API key can be verified"):
            await cache.key(key_id(key))

    in_registry(empty_redis, use)


def test_versions_with_the_same_preprocessing_share_one_object() -> None:
    texts = ['{"mean": [0.5], "crop_pct": 1.0}', '{"crop_pct": 1.0, "mean": [0.5]}', '{"mean": [0.4], "crop_pct": 1.0}']
    one, same, other = (
        StoredVersion(n, f'{{"digest": "{n}", "labels": [], "size_bytes": 1, "preprocess": {text}}}').served()
        for n, text in enumerate(texts)
    )
    assert one.preprocess is same.preprocess
    assert one.preprocess_key is same.preprocess_key
    assert other.preprocess == {"mean": [0.4], "crop_pct": 1.0}
    assert other.preprocess_key != one.preprocess_key
