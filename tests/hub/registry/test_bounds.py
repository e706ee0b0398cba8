"""Bounds of what one tenant leaves in Redis: shares, names, changes, audit entries, change events."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import redis

from adapters import Adapter
from hub.admin_schemas import LimitsChange
from hub.admission.quotas import AUDIT_ENTRIES, CHANGES_PER_MINUTE
from hub.errors import LimitReached
from hub.registry.audit import OPERATOR, Actor, AuditLog
from hub.registry.cache import RegistryCache
from hub.registry.events import Event, EventLog
from hub.registry.keys import KeyRegistry, key_id
from hub.registry.redis.connection import RegistryConnection, as_entries
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry
from hub.schemas import Sharing, TaskSettings
from tests.support.datasets import unpaced_reads
from tests.support.hub_app import OCTETS, REDIS_PATIENCE, Hub, in_registry
from tests.support.registry import version

OWNER = Actor("", "an owner", "owner", "127.0.0.1")
DAY_MS = 86_400_000


async def with_tenants(connection: RegistryConnection, *names: str) -> TaskRegistry:
    for name in names:
        await TenantRegistry(connection).create(OPERATOR, name, LimitsChange())
    return TaskRegistry(connection)


def put_sharing(hub: Hub, names: Sequence[str], task: str = "t") -> Any:
    return hub.http.put(f"/v1/tasks/{task}/sharing", json={"tenants": list(names)})


def test_sharing_is_refused_and_leaves_nothing_when_it_names_absent_tenants(hub: Hub, adapters: list[Adapter]) -> None:
    hub.http.post("/v1/tasks/t/versions", content=adapters[0].data, headers=OCTETS)
    hub.key_of("friend")
    with redis.Redis.from_url(hub.redis_url) as client:
        assert put_sharing(hub, ["friend", "friend"]).json()["sharing"]["tenants"] == ["friend"]
        refused = put_sharing(hub, ["friend", *(f"absent{n}" for n in range(900))])
        assert refused.status_code == 422
        assert refused.json()["errors"][0]["field"] == "tenants"
        assert "'absent0', 'absent1', 'absent2', 'absent3', 'absent4' and 895 more" in refused.json()["detail"]
        assert client.keys("karst:t:absent*") == []
    beyond = put_sharing(hub, ["friend"])  # each absent name takes a change, so names cannot be tried without end
    assert (beyond.status_code, beyond.json()["errors"][0]["field"]) == (429, "changes_per_minute")
    assert int(beyond.headers["retry-after"]) > 0


def test_a_share_does_not_reach_a_later_tenant_of_the_same_name(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        registry = await with_tenants(connection, "one", "two")
        await registry.register(OPERATOR, "one", "x", version("a" * 64), ["latest"])
        await registry.share(OPERATOR, "one", "x", Sharing(tenants=["two"]))
        await TenantRegistry(connection).delete(OPERATOR, "two")
        assert (await registry.task("one", "x")).sharing == Sharing()
        # An older hub shared with names that no tenant had.
        await connection.execute(connection.redis.sadd("karst:t:two:shared", "one:x"))
        await connection.execute(
            connection.redis.hset("karst:t:one:task:x", "share", '{"public":false,"tenants":["two"]}')
        )
        await with_tenants(connection, "two")
        assert not await connection.execute(connection.redis.exists("karst:t:two:shared"))
        assert (await registry.task("one", "x")).sharing == Sharing()

    in_registry(empty_redis, use)


def test_an_import_leaves_out_shares_with_tenants_that_this_hub_does_not_have(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        registry = await with_tenants(connection, "one", "two", "friend")
        await registry.register(OPERATOR, "one", "x", version("a" * 64), ["latest"])
        await registry.share(OPERATOR, "one", "x", Sharing(tenants=["friend"]))
        dump = await registry.dump("one")
        await registry.delete_task(OPERATOR, "one", "x")
        await TenantRegistry(connection).delete(OPERATOR, "friend")
        await registry.restore(OPERATOR, "two", dump)
        assert (await registry.task("two", "x")).sharing == Sharing()

    in_registry(empty_redis, use)


def test_shares_are_refused_at_their_limits(empty_redis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub.registry.tasks.SHARES", 3)
    monkeypatch.setattr("hub.registry.tasks.SHARED_WITH_ONE", 2)

    async def use(connection: RegistryConnection) -> None:
        registry = await with_tenants(connection, "one", "a", "b", "c")
        for n, task in enumerate("xyz"):
            await registry.register(OPERATOR, "one", task, version(f"{n:064x}"), ["latest"])
        await registry.share(OPERATOR, "one", "x", Sharing(tenants=["a"]))
        await registry.share(OPERATOR, "one", "y", Sharing(tenants=["a"]))
        with pytest.raises(LimitReached, match=r"shared_with_one: too many tasks shared with one tenant \(limit 2\)"):
            await registry.share(OPERATOR, "one", "z", Sharing(tenants=["a"]))
        with pytest.raises(LimitReached, match="shares: too many tenants in the sharing of all tasks together"):
            await registry.share(OPERATOR, "one", "z", Sharing(tenants=["b", "c"]))
        await registry.share(OPERATOR, "one", "y", Sharing(tenants=["b"]))  # replaces a name
        await registry.share(OPERATOR, "one", "z", Sharing(tenants=["a"]))
        await registry.delete_task(OPERATOR, "one", "x")
        await registry.share(OPERATOR, "one", "z", Sharing(tenants=["b", "c"]))

    in_registry(empty_redis, use)


def test_a_tenants_changes_are_refused_beyond_those_of_a_minute(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        registry = await with_tenants(connection, "one", "two")
        for tenant in ("one", "two"):
            await registry.register(OPERATOR, tenant, "x", version("a" * 64), ["latest"])
        made = 0

        async def change_without_end() -> None:
            nonlocal made
            while True:
                await registry.share(OWNER, "one", "x", Sharing(public=True))
                made += 1

        with pytest.raises(LimitReached, match=f"changes_per_minute: this tenant made {CHANGES_PER_MINUTE} changes"):
            await change_without_end()
        assert made >= CHANGES_PER_MINUTE
        await registry.share(OPERATOR, "one", "x", Sharing())  # an admin
        await registry.share(OWNER, "two", "x", Sharing())  # another tenant
        keys = KeyRegistry(connection)
        key = (await keys.create(OPERATOR, "one", "owner", "stolen")).key
        await keys.revoke(OWNER, "one", key_id(key))  # a flood prevents no revocation

    in_registry(empty_redis, use)


def test_names_of_deleted_tasks_are_forgotten_without_using_a_number_twice(
    empty_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(connection: RegistryConnection) -> None:
        registry = await with_tenants(connection, "t")
        names: dict[Any, Any] = {f"former{n}": 1 for n in range(10_000)}
        await connection.execute(connection.redis.hset("karst:t:t:numbers", mapping=names))
        for n in range(3):
            await registry.register(OPERATOR, "t", "x", version(f"{n:064x}"), ["latest"])
        await registry.delete_task(OPERATOR, "t", "x")
        assert await connection.execute(connection.redis.hlen("karst:t:t:numbers")) == 10_000
        for name in ("x", "y"):
            stored, _ = await registry.register(OPERATOR, "t", name, version("a" * 64), ["latest"])
            assert stored.version == 4
        stored, _ = await registry.register(OPERATOR, "t", "former7", version("a" * 64), ["latest"])
        assert stored.version == 2

    in_registry(empty_redis, use)


def test_a_tenants_entries_push_out_only_its_own_oldest_ones(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        registry, audit = await with_tenants(connection, "noisy", "quiet"), AuditLog(connection, unpaced_reads())
        for tenant in ("noisy", "quiet"):
            await registry.register(OPERATOR, tenant, "x", version("a" * 64), ["latest"])
        await registry.share(OWNER, "quiet", "x", Sharing(public=True))
        pipeline = connection.redis.pipeline(transaction=False)
        for n in range(AUDIT_ENTRIES):  # as the scripts append them, only faster
            for stream in ("karst:audit", "karst:t:noisy:audit"):
                entry = OWNER.entry("noisy", "task.share", number=n)
                pipeline.xadd(stream, {"tenant": "noisy", "entry": entry}, id=f"{2 * 10**12 + n}-0")
        await connection.execute(pipeline.execute())
        for _ in range(5):
            await registry.share(OWNER, "noisy", "x", Sharing())
        own = connection.redis.xlen("karst:t:noisy:audit")
        assert await connection.execute(own) == AUDIT_ENTRIES
        kept = await audit.read("quiet", "0", 10)
        assert [e.action for e in kept.entries] == ["tenant.create", "version.register", "task.share"]
        whole = await audit.read(None, "0", 10)
        actions = [(e.tenant, e.action) for e in whole.entries if e.tenant == "quiet" or e.role == "admin"]
        assert ("quiet", "task.share") in actions
        assert ("noisy", "tenant.create") in actions  # an admin's change stays
        assert await connection.execute(connection.redis.xlen("karst:audit")) == AUDIT_ENTRIES + 5

    in_registry(empty_redis, use)


def test_audit_entries_are_small_and_pages_end_early_when_changes_have_long_values(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        registry, audit = await with_tenants(connection, "t"), AuditLog(connection, unpaced_reads())
        labels = [f"{n:04}".ljust(200, "\U0001f600") for n in range(1000)]
        for task in ("x", "y"):
            await registry.put(OWNER, "t", task, TaskSettings(labels=labels))
        _, first, second = (await audit.read("t", "0", 10)).entries
        assert first.detail["labels"] == [labels[0], "... 999 more"]
        assert second.detail["task"] == "y"
        stored = as_entries(await connection.execute(connection.redis.xrange("karst:t:t:audit")))
        assert max(len(fields["entry"]) for _, fields in stored) < 4000
        entry = OWNER.entry("t", "task.share", note="n" * 5000, names=["a"] * 10, many={n: n for n in range(1000)})
        detail = json.loads(entry)["detail"]
        assert detail["note"] == f"{'n' * 200}..."
        assert detail["names"] == ["a"] * 10
        assert len(detail["many"]) < 300
        assert detail["many"]["..."].endswith(" more")
        # As an older hub wrote them.
        pipeline = connection.redis.pipeline(transaction=False)
        large = json.dumps(json.loads(OWNER.entry("t", "task.settings")) | {"detail": {"labels": ["l" * 60_000]}})
        for _ in range(100):
            pipeline.xadd("karst:t:t:audit", {"tenant": "t", "entry": large})
        await connection.execute(pipeline.execute())
        found, after, pages = 0, "0", 0
        while True:
            page = await audit.read("t", after, 1000)
            found, pages = found + len(page.entries), pages + 1
            assert len(page.entries) <= 60
            if page.next is None:
                break
            after = page.next
        assert (found, pages) == (103, 3)

    in_registry(empty_redis, use)


def test_audit_entries_are_removed_by_their_age(empty_redis: str) -> None:
    async def use(_connection: RegistryConnection) -> None:
        connection = RegistryConnection(empty_redis, audit_days=30, patience=REDIS_PATIENCE)
        try:
            now_ms = (await connection.execute(connection.redis.time()))[0] * 1000
            streams = "karst:audit", "karst:t:t:audit"
            for stream in streams:
                for day in range(60, 20, -1):  # a stream removes whole nodes, so `~` keeps some that are older
                    for n in range(10):
                        fields: Mapping[Any, Any] = {"tenant": "t", "entry": OWNER.entry("t", "task.share")}
                        id = f"{now_ms - day * DAY_MS}-{n}"
                        await connection.execute(connection.redis.xadd(stream, dict(fields), id=id))
            await with_tenants(connection, "t")
            for stream in streams:
                (oldest, _), *_ = as_entries(await connection.execute(connection.redis.xrange(stream, count=1)))
                assert int(oldest.partition("-")[0]) > now_ms - 45 * DAY_MS
                assert 80 < await connection.execute(connection.redis.xlen(stream)) < 250
        finally:
            await connection.close()

    in_registry(empty_redis, use)


class SlowLog(EventLog):
    """An event log whose reader waits, so that the common stream overtakes it."""

    def __init__(self, connection: RegistryConnection) -> None:
        super().__init__(connection)
        self.may_read = asyncio.Event()

    async def read(self, after: Mapping[str, str], wait_ms: int) -> list[Event]:
        await self.may_read.wait()
        return await super().read(after, wait_ms)


def test_a_slow_gateway_sees_a_revocation_when_other_events_were_removed(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        tenants, keys, events = TenantRegistry(connection), KeyRegistry(connection), SlowLog(connection)
        await tenants.create(OPERATOR, "t", LimitsChange())
        key = (await keys.create(OPERATOR, "t", "owner", "test")).key
        cache = RegistryCache(tasks=TaskRegistry(connection), keys=keys, tenants=tenants, events=events)
        following = asyncio.create_task(cache.follow())
        try:
            while await connection.execute(connection.redis.exists("karst:keys")):
                assert await cache.key(key_id(key)) is not None  # cached once the gateway follows the events
                await asyncio.sleep(0.3)
                await keys.revoke(OPERATOR, "t", key_id(key))
            await connection.execute(connection.redis.xtrim("karst:events", maxlen=0))
            events.may_read.set()
            async with asyncio.timeout(10):
                while await cache.key(key_id(key)) is not None:
                    await asyncio.sleep(0.01)
        finally:
            following.cancel()
            await asyncio.wait((following,))

    in_registry(empty_redis, use)
