"""Tasks, versions and aliases against a real Redis: atomic changes, unique numbers, change events."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hub.admin_schemas import LimitsChange
from hub.errors import Conflict, InvalidRequest, LimitReached, NotFound, Unauthenticated, Unavailable
from hub.registry.audit import OPERATOR, Actor
from hub.registry.events import EventLog
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import MAX_ALIAS_HISTORY, TaskRegistry
from hub.registry.tenants import TenantRegistry
from hub.registry.versions import MAX_ALIASES
from hub.schemas import Sharing, TaskSettings
from tests.support.hub_app import in_registry
from tests.support.registry import version, with_registry


def test_fifty_concurrent_writers_get_fifty_numbers(empty_redis: str) -> None:
    async def use(registry: TaskRegistry) -> None:
        jobs = (registry.register(OPERATOR, "t", "flowers", version(f"{i:064x}"), ["latest"]) for i in range(50))
        registered = await asyncio.gather(*jobs)
        assert sorted(stored.version for stored, _ in registered) == list(range(1, 51))
        assert all(created for _, created in registered)
        task = await registry.task("t", "flowers")
        for i, (stored, _) in enumerate(registered):
            assert task.digests[stored.version] == stored.digest == f"{i:064x}"
        assert len(task.aliases["latest"]) == 1

    with_registry(empty_redis, use)


def test_concurrent_writers_of_the_same_bytes_get_one_version(empty_redis: str) -> None:
    async def use(registry: TaskRegistry) -> None:
        registered = await asyncio.gather(
            *(registry.register(OPERATOR, "t", "x", version("a" * 64), ["latest"]) for _ in range(20))
        )
        assert {stored.version for stored, _ in registered} == {1}
        assert sum(created for _, created in registered) == 1

    with_registry(empty_redis, use)


def test_tenants_have_separate_tasks_of_the_same_name(empty_redis: str) -> None:
    async def use(registry: TaskRegistry) -> None:
        await registry.register(OPERATOR, "one", "flowers", version("a" * 64), ["latest"])
        await registry.register(OPERATOR, "two", "flowers", version("b" * 64), ["latest"])
        assert (await registry.task("one", "flowers")).digests == {1: "a" * 64}
        assert (await registry.task("two", "flowers")).digests == {1: "b" * 64}
        await registry.delete_task(OPERATOR, "one", "flowers")
        assert [t.name for t in await registry.dump("two")] == ["flowers"]
        with pytest.raises(NotFound, match="there is no task 'flowers'"):
            await registry.task("one", "flowers")

    with_registry(empty_redis, use)


def test_a_refused_change_changes_nothing_and_publishes_no_event(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        registry, events = TaskRegistry(connection), EventLog(connection)
        await TenantRegistry(connection).create(OPERATOR, "t", LimitsChange())
        await registry.register(OPERATOR, "t", "x", version("a" * 64), ["latest", "stable"])
        await registry.register(OPERATOR, "t", "x", version("b" * 64), ["latest"])
        before, span = await registry.task("t", "x"), await events.spans()
        with pytest.raises(Conflict, match="alias 'stable' of task 'x' points at version 1"):
            await registry.delete_version(OPERATOR, "t", "x", 1)
        with pytest.raises(InvalidRequest, match="version: task 'x' has no version 3"):
            await registry.set_alias(OPERATOR, "t", "x", "canary", {1: 90, 3: 10})
        with pytest.raises(NotFound, match="has no version or alias '9'; it has 1, 2, latest, stable"):
            await registry.delete_version(OPERATOR, "t", "x", 9)
        with pytest.raises(NotFound):
            await registry.set_alias(OPERATOR, "t", "y", "canary", {1: 1})
        assert await registry.task("t", "x") == before
        assert await events.spans() == span

    in_registry(empty_redis, use)


def test_a_revoked_key_changes_nothing_when_its_request_was_in_flight(empty_redis: str) -> None:
    async def use(registry: TaskRegistry) -> None:
        await registry.register(OPERATOR, "t", "x", version("a" * 64), ["latest"])
        revoked = Actor("0" * 16, "camera", "owner", "127.0.0.1")
        for change in (
            registry.register(revoked, "t", "x", version("b" * 64), ["latest"]),
            registry.check_quota(revoked, "t", "x", version("b" * 64)),
            registry.set_alias(revoked, "t", "x", "stable", {1: 1}),
            registry.roll_back(revoked, "t", "x", "latest"),
            registry.share(revoked, "t", "x", Sharing(public=True)),
            registry.put(revoked, "t", "x", TaskSettings(unknown_below=0.5)),
            registry.delete_version(revoked, "t", "x", 1),
            registry.delete_task(revoked, "t", "x"),
            registry.restore(revoked, "t", []),
        ):
            with pytest.raises(Unauthenticated, match="key was revoked"):
                await change
        (task,) = await registry.dump("t")
        assert (list(task.versions), dict(task.aliases)) == ([1], {"latest": {1: 1}})
        assert task.settings == TaskSettings()

    with_registry(empty_redis, use)


def test_every_change_of_a_task_publishes_an_event(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        registry, events = TaskRegistry(connection), EventLog(connection)
        await TenantRegistry(connection).create(OPERATOR, "t", LimitsChange())
        start = {stream: span.newest for stream, span in (await events.spans()).items()}
        await registry.register(OPERATOR, "t", "x", version("a" * 64), ["latest"])
        await registry.set_alias(OPERATOR, "t", "x", "stable", {1: 1})
        await registry.register(OPERATOR, "t", "x", version("b" * 64), ["latest"])
        await registry.set_alias(OPERATOR, "t", "x", "stable", {2: 1})
        await registry.delete_version(OPERATOR, "t", "x", 1)
        await registry.put(OPERATOR, "t", "x", TaskSettings(unknown_below=0.5))
        await registry.delete_task(OPERATOR, "t", "x")
        found = await events.read(start, 10)
        assert [(e.tenant, e.kind, e.name) for e in found] == [("t", "task", "x")] * 7
        assert await events.read(start | {found[-1].stream: found[-1].id}, 10) == []

    in_registry(empty_redis, use)


def test_an_unreachable_registry_is_unavailable(tmp_path: Path) -> None:
    async def use(registry: TaskRegistry) -> None:
        with pytest.raises(Unavailable, match="does not answer") as caught:
            await registry.task("t", "x")
        assert caught.value.retry_after_s == 2

    with_registry(f"unix://{tmp_path}/absent.sock", use, tenants=())


def test_a_dump_is_restored_in_another_tenant(empty_redis: str) -> None:
    async def use(registry: TaskRegistry) -> None:
        for i in range(3):
            await registry.register(OPERATOR, "one", "x", version(f"{i:064x}"), ["latest", "stable"])
        await registry.set_alias(OPERATOR, "one", "x", "canary", {1: 90, 3: 10})
        await registry.delete_version(OPERATOR, "one", "x", 2)
        await registry.share(OPERATOR, "one", "x", Sharing(tenants=["t"]))
        await registry.put(OPERATOR, "one", "x", TaskSettings(unknown_below=0.1 + 0.2))
        await registry.register(OPERATOR, "one", "y", version("a" * 64), ["latest"])
        dump = await registry.dump("one")
        await registry.restore(OPERATOR, "two", dump)
        assert await registry.dump("two") == dump
        assert [task.settings.given() for task in dump] == [{"unknown_below": 0.1 + 0.2}, {}]
        seen, _ = await registry.page("t", 10, "", lambda _name: True)
        assert [task.task for task in seen] == ["one:x", "two:x"]
        with pytest.raises(Conflict, match="existing tasks: x, y"):
            await registry.restore(OPERATOR, "two", dump)
        stored, created = await registry.register(OPERATOR, "two", "x", version("b" * 64), ["latest"])
        assert (stored.version, created) == (4, True)

    with_registry(empty_redis, use)


def test_a_restore_stops_at_each_limit_of_the_tenant(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        registry, tenants = TaskRegistry(connection), TenantRegistry(connection)
        for tenant in ("from", "to"):
            await tenants.create(OPERATOR, tenant, LimitsChange())
        for i in range(2):
            await registry.register(OPERATOR, "from", "x", version(f"{i:064x}"), ["latest"])
        await registry.register(OPERATOR, "from", "y", version("a" * 64), ["latest"])
        dump = await registry.dump("from")
        for limits, message in (
            (LimitsChange(tasks=1), r"tasks: too many tasks \(limit 1\)"),
            (LimitsChange(tasks=9, versions=1), r"versions: too many versions per task \(limit 1\)"),
            (LimitsChange(versions=9, stored_bytes=2), r"stored_bytes: too many stored bytes \(limit 2\)"),
        ):
            await tenants.change_limits(OPERATOR, "to", limits)
            with pytest.raises(LimitReached, match=message):
                await registry.restore(OPERATOR, "to", dump)
            assert await registry.dump("to") == []
        await tenants.change_limits(OPERATOR, "to", LimitsChange(stored_bytes=10**14))
        await registry.restore(OPERATOR, "to", dump)
        assert (await tenants.usage("to")).used.stored_bytes == 3
        assert (await tenants.get("to")).limits.stored_bytes == 10**14

    in_registry(empty_redis, use)


def test_an_alias_keeps_its_last_former_targets(empty_redis: str) -> None:
    async def use(registry: TaskRegistry) -> None:
        count = MAX_ALIAS_HISTORY + 3
        for i in range(count):
            await registry.register(OPERATOR, "t", "x", version(f"{i:064x}"), ["latest"])
        (task,) = await registry.dump("t")
        assert task.history["latest"] == [{n: 1} for n in range(3, count)]

    with_registry(empty_redis, use)


def test_a_setting_takes_no_place_of_an_alias(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        registry = TaskRegistry(connection)
        await TenantRegistry(connection).create(OPERATOR, "t", LimitsChange())
        for task, settings in (("x", TaskSettings()), ("y", TaskSettings(unknown_below=0.5))):
            await registry.register(OPERATOR, "t", task, version("a" * 64), ["latest"], settings=settings)
            fields: dict[Any, Any] = {f"a:alias-{i}": '{"1":1}' for i in range(MAX_ALIASES - 1)}  # besides `latest`
            await connection.redis.hset(f"karst:t:t:task:{task}", mapping=fields)
            await registry.set_alias(OPERATOR, "t", task, "last", {1: 1})
            with pytest.raises(LimitReached, match="too many aliases"):
                await registry.set_alias(OPERATOR, "t", task, "further", {1: 1})

    in_registry(empty_redis, use)


def test_a_task_of_a_newer_hub_is_read_when_it_has_unknown_settings(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        registry = TaskRegistry(connection)
        await TenantRegistry(connection).create(OPERATOR, "t", LimitsChange())
        settings = TaskSettings(unknown_below=0.5)
        await registry.register(OPERATOR, "t", "x", version("a" * 64), ["latest"], settings=settings)
        await connection.redis.hset("karst:t:t:task:x", "s:keep", '{"images": "none"}')
        assert (await registry.task("t", "x")).settings == settings

    in_registry(empty_redis, use)


def test_a_version_is_refused_while_its_file_is_being_removed(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        registry = TaskRegistry(connection)
        for tenant in ("t", "one"):
            await TenantRegistry(connection).create(OPERATOR, tenant, LimitsChange())
        assert await registry.claim_orphan("a" * 64)
        with pytest.raises(Unavailable, match="the store is removing an old copy"):
            await registry.register(OPERATOR, "t", "x", version("a" * 64), ["latest"])
        await connection.redis.delete("karst:gc:" + "a" * 64)  # the claim expires
        await registry.register(OPERATOR, "t", "x", version("a" * 64), ["latest"])
        assert not await registry.claim_orphan("a" * 64)
        await registry.register(OPERATOR, "one", "y", version("a" * 64), ["latest"])
        await registry.delete_task(OPERATOR, "t", "x")
        assert not await registry.claim_orphan("a" * 64)  # a version of the other tenant refers to the file
        await registry.delete_task(OPERATOR, "one", "y")
        assert await registry.claim_orphan("a" * 64)

    in_registry(empty_redis, use)


def test_a_registration_is_refused_when_the_registry_bytes_of_the_tenant_are_reached(
    empty_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub.registry.tasks.REGISTRY_BYTES", 5_000_000)
    metrics = {"notes": "m" * 500_000}

    async def use(connection: RegistryConnection) -> None:
        registry = TaskRegistry(connection)
        await TenantRegistry(connection).create(OPERATOR, "t", LimitsChange(versions=1000))
        large = [version(f"{i:064x}").model_copy(update={"metrics": metrics}) for i in range(12)]

        async def register_all() -> None:
            for v in large:
                await registry.register(OPERATOR, "t", "x", v, ["latest"])

        with pytest.raises(LimitReached, match="bytes of metadata of tasks, versions and trainings") as caught:
            await register_all()
        assert caught.value.errors[0].field == "registry_bytes"
        assert len((await registry.task("t", "x")).digests) == 9
        with pytest.raises(LimitReached):
            await registry.check_quota(OPERATOR, "t", "x", large[-1])
        with pytest.raises(LimitReached):
            await registry.restore(OPERATOR, "t", [replace(task, name="y") for task in await registry.dump("t")])
        assert not await connection.redis.keys("karst:t:t:staged:*")
        await registry.share(OPERATOR, "t", "x", Sharing())  # no change adds bytes
        await registry.delete_version(OPERATOR, "t", "x", 1)
        await registry.register(OPERATOR, "t", "x", large[-1], ["latest"])

    in_registry(empty_redis, use)
