"""Lists of tasks in an order, in a real Redis: the order is true after every change, and costs few short steps."""

from typing import Any

import pytest

from hub.admin_schemas import LimitsChange
from hub.registry.audit import OPERATOR
from hub.registry.task_reads import TaskOrder
from hub.schemas import TaskSettings, TaskSort
from tests.support.datasets import Registry, with_datasets
from tests.support.registry import version

SORTS: tuple[TaskSort, ...] = ("name", "labels", "images", "accuracy", "version", "registered")


async def listed(registry: Registry, by: TaskSort, *, descending: bool = False, limit: int = 1000) -> list[str]:
    """Return the names of all pages."""
    names, cursor = [], ""
    while True:
        order = TaskOrder(by, descending)
        page, following = await registry.tasks.page("s", limit, cursor, lambda _: True, order)
        names += [summary.task for summary in page]
        if following is None:
            return names
        cursor = following


async def add(registry: Registry, task: str, number: int, **fields: Any) -> None:
    info = version(f"{task}{number}").model_copy(update=fields)
    await registry.tasks.register(OPERATOR, "s", task, info, ["latest"])


def test_lists_follow_each_order_in_pages_and_after_changes(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        await registry.tenants.create(OPERATOR, "s", LimitsChange())
        for name, labels, images, right in (("b", 3, 50, 0.7), ("a", 2, 90, 0.9), ("c", 4, 10, 0.8)):
            metrics = {"test_accuracy": right, "train_images": images, "test_images": 20}
            registered = f"2026-01-0{labels}T10:00:00.000+00:00"
            await add(registry, name, 1, labels=[*map(str, range(labels))], metrics=metrics, registered=registered)
        await registry.tasks.put(OPERATOR, "s", "empty", TaskSettings())
        await add(
            registry, "c", 2, labels=[*"0123"], metrics={"train_images": 11}, registered="2026-02-01T10:00:00+00:00"
        )
        expected = {
            "name": "a b c empty",
            "labels": "empty a b c",
            "images": "empty c b a",
            "accuracy": "c empty b a",
            "version": "empty a b c",
            "registered": "empty a b c",
        }
        for by in SORTS:
            names = expected[by].split()
            assert await listed(registry, by) == names, by
            assert await listed(registry, by, limit=1) == names, by
            assert await listed(registry, by, descending=True, limit=3) == names[::-1], by
        await registry.tasks.delete_task(OPERATOR, "s", "b")
        await registry.tasks.put(OPERATOR, "s", "new", TaskSettings())
        await registry.tasks.set_alias(OPERATOR, "s", "c", "latest", {1: 1})
        assert await listed(registry, "version", descending=True) == ["c", "a", "new", "empty"]
        assert await listed(registry, "accuracy", descending=True) == ["a", "c", "new", "empty"]
        await registry.connection.redis.unlink("karst:t:s:by:name")  # as if Redis had lost it
        assert await listed(registry, "images") == ["empty", "new", "c", "a"]
        await registry.tenants.delete(OPERATOR, "s")
        assert await registry.connection.redis.keys("karst:t:s:by:*") == []

    with_datasets(empty_redis, use)


@pytest.mark.slow
def test_order_of_10_000_tasks_takes_steps_of_a_few_milliseconds(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        await registry.tenants.create(OPERATOR, "s", LimitsChange(tasks=20_000))
        redis = registry.connection.redis
        pipeline = redis.pipeline(transaction=False)
        for i in range(10_000):  # as the registry stores a task; its changes are limited to 600 a minute
            key, number = f"karst:t:s:task:t{i}", i % 7 + 1
            pipeline.hset(key, mapping={"a:latest": f'{{"{number}":1}}', "n": "1"})
            pipeline.hset(key, f"i:{number}", f'900 {{"size_bytes":900,"classes":{i % 50},"train_images":{i}}}')
            pipeline.sadd("karst:t:s:tasks", f"t{i}")
        await pipeline.execute()
        await redis.config_resetstat()
        assert (await listed(registry, "images", descending=True, limit=1000))[:2] == ["t9999", "t9998"]
        stats = await redis.info("commandstats")
        assert stats["cmdstat_spop"]["calls"] == 40 + 9  # 250 tasks a step, then a look for each further page
        await registry.tasks.put(OPERATOR, "s", "t5", TaskSettings())
        await redis.config_resetstat()
        page, _ = await registry.tasks.page("s", 25, "", lambda _: True, TaskOrder("labels", descending=True))
        assert len(page) == 25
        stats = await redis.info("commandstats")
        assert stats["cmdstat_zadd"]["calls"] == len(SORTS)  # of the one that changed
        assert "cmdstat_smembers" not in stats  # nothing is read whole

    with_datasets(empty_redis, use)
