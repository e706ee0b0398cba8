"""A registry that an older hub has written: tasks without summaries, and the public tasks as a set."""

import redis

from hub.registry.audit import OPERATOR
from hub.registry.health import RegistryIntegrity
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry
from hub.schemas import Sharing, TaskSummary
from tests.support.hub_app import in_registry
from tests.support.registry import version, write_old_registry


def keys_of(url: str) -> set[str]:
    with redis.Redis.from_url(url, decode_responses=True) as client:
        return {str(name) for name in client.keys("karst:*")}


async def listed(registry: TaskRegistry, tenant: str) -> list[TaskSummary]:
    found, cursor = await registry.page(tenant, 10, "", lambda _name: True)
    assert cursor is None
    return found


def test_tasks_of_an_older_hub_are_read_and_listed(empty_redis: str) -> None:
    write_old_registry(empty_redis)

    async def use(connection: RegistryConnection) -> None:
        registry = TaskRegistry(connection)
        flowers, leaves = await registry.dump("one")
        assert flowers.digests == {n: f"{n:064x}" for n in (1, 2, 4)}
        assert flowers.aliases == {"latest": {4: 1}, "stable": {1: 90, 2: 10}}
        assert flowers.history == {"latest": [{1: 1}, {2: 1}, {3: 1}], "stable": [{1: 1}]}
        assert flowers.settings.given() == {"unknown_below": 0.05}
        assert (flowers.sharing, leaves.sharing) == (Sharing(tenants=["two", "three"]), Sharing(public=True))
        assert flowers.versions[4].metrics == (await registry.version("one", flowers, 4)).info().metrics
        assert [s.task for s in await listed(registry, "one")] == ["flowers", "leaves"]
        assert [s.task for s in await listed(registry, "two")] == ["trees", "one:flowers", "one:leaves"]
        own, *_ = await listed(registry, "one")
        assert (own.latest, own.classes, own.train_images) == (4, 2, 104)
        assert own.accuracy is not None
        assert own.accuracy.accuracy == 0.54
        assert await registry.is_shared("one", "leaves", "three")
        assert not await registry.is_shared("two", "trees", "one")

    in_registry(empty_redis, use)


def test_tasks_of_an_older_hub_are_changed_and_deleted_without_a_trace(empty_redis: str) -> None:
    write_old_registry(empty_redis)

    async def use(connection: RegistryConnection) -> None:
        registry, tenants = TaskRegistry(connection), TenantRegistry(connection)
        integrity = RegistryIntegrity(connection)
        await registry.roll_back(OPERATOR, "one", "flowers", "latest")
        stored, created = await registry.register(OPERATOR, "one", "flowers", version("b" * 64), ["latest"])
        assert (stored.version, created) == (5, True)
        known, created = await registry.register(OPERATOR, "one", "flowers", version(f"{4:064x}"), ["latest"])
        assert (known.version, known.size_bytes, created) == (4, 1004, False)
        await registry.delete_version(OPERATOR, "one", "flowers", 4)
        assert (await tenants.usage("one")).used.stored_bytes == 1001 + 1002 + 1009 + 1
        await integrity.check_complete()
        await registry.share(OPERATOR, "one", "leaves", Sharing())
        assert not await registry.is_shared("one", "leaves", "three")
        for task in ("flowers", "leaves"):
            await registry.delete_task(OPERATOR, "one", task)
        assert (await tenants.usage("one")).used.stored_bytes == 0
        await integrity.check_complete()
        assert await listed(registry, "three") == []
        await tenants.delete(OPERATOR, "two")
        await integrity.check_complete()

    in_registry(empty_redis, use)
    left = {name for name in keys_of(empty_redis) if name.startswith("karst:t:")}
    counts = {"karst:t:one:bytes", "karst:t:one:numbers", "karst:t:one:registry", "karst:t:one:audit"}
    counts |= {"karst:t:one:deleted", "karst:t:one:orphans"}  # files that no collection has removed yet
    assert left <= counts


def test_an_upgrade_adds_each_summary_and_changes_nothing_else(empty_redis: str) -> None:
    write_old_registry(empty_redis)

    async def use(connection: RegistryConnection) -> None:
        registry = TaskRegistry(connection)
        before = [await registry.dump(tenant) for tenant in ("one", "two")]
        lists = [await listed(registry, tenant) for tenant in ("one", "two", "three")]
        await registry.upgrade()
        assert [await registry.dump(tenant) for tenant in ("one", "two")] == before
        assert [await listed(registry, tenant) for tenant in ("one", "two", "three")] == lists
        fields = await connection.redis.hkeys("karst:t:one:task:flowers")
        assert sorted(name for name in fields if str(name).startswith("i:")) == ["i:1", "i:2", "i:4"]
        missing = [page async for page in registry.missing_summaries("one", "flowers")]
        assert missing == []

    in_registry(empty_redis, use)


def test_the_registry_bytes_are_those_of_the_fields_when_a_task_has_changed_in_every_way(empty_redis: str) -> None:
    write_old_registry(empty_redis)

    async def use(connection: RegistryConnection) -> None:
        registry = TaskRegistry(connection)

        async def counted() -> tuple[int, int]:
            total = 0
            for task in await registry.task_names("one"):
                fields = await connection.redis.hgetall(f"karst:t:one:task:{task}")
                total += sum(len(name) + len(text) for name, text in fields.items())
            return int(await connection.redis.get("karst:t:one:registry") or 0), total

        await registry.upgrade()
        await registry.register(OPERATOR, "one", "new", version("b" * 64), ["latest", "stable"])
        await registry.register(OPERATOR, "one", "new", version("c" * 64), ["latest"])
        await registry.share(OPERATOR, "one", "new", Sharing(tenants=["two"]))
        await registry.set_alias(OPERATOR, "one", "new", "stable", {1: 90, 2: 10})
        await registry.roll_back(OPERATOR, "one", "new", "stable")
        await registry.delete_alias(OPERATOR, "one", "flowers", "stable")
        await registry.delete_version(OPERATOR, "one", "flowers", 1)
        stored, total = await counted()
        assert abs(stored - total) < 16 * 3  # the length of the counters themselves
        for task in await registry.task_names("one"):
            await registry.delete_task(OPERATOR, "one", task)
        assert await counted() == (0, 0)

    in_registry(empty_redis, use)
