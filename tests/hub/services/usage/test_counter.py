"""Counts in a gateway's memory: their bounds, and their way into a real Redis."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from hub.admin_schemas import LimitsChange
from hub.admission.quotas import USAGE_BYTES, USAGE_LABELS, USAGE_QUEUED, USAGE_TASK_BYTES, USAGE_VERSIONS
from hub.errors import Unavailable
from hub.local.embedded_redis import embedded_redis
from hub.registry.audit import OPERATOR
from hub.registry.datasets.usage import OTHER, RETENTION_DAYS, DayName, UsageDay, UsageRegistry, VersionCounts, parsed
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry
from hub.registry.versions import ServedVersion
from hub.schemas import TaskSettings
from hub.services.predictions import Predicted
from hub.services.usage.counter import DAY_S, UsageCounter
from hub.worker_api import Answer, PassStats
from tests.support.hub_app import REDIS_PATIENCE, in_registry

STATS = PassStats("engine", 1, 1, 0.0, 0.0, 0.0)


def predicted(labels: Sequence[str], chosen: Sequence[int], version: int = 1) -> Predicted:
    """Return answers with the numbers of their best labels."""
    served = ServedVersion(version=version, digest="d" * 64, labels=[*labels], preprocess={}, size_bytes=1)
    scores = [np.zeros(len(labels), np.float32) for _ in chosen]
    for row, k in zip(scores, chosen, strict=True):
        row[k] = 1
    return Predicted(served, [Answer(row, STATS, None) for row in scores], 0.01, None)


async def add_tasks(connection: RegistryConnection, *tasks: str, tenant: str = "acme") -> None:
    await TenantRegistry(connection).create(OPERATOR, tenant, LimitsChange())
    for task in tasks:
        await TaskRegistry(connection).put(OPERATOR, tenant, task, TaskSettings())


def today() -> int:
    return int(time.time() // DAY_S)


def counted(labels: int = 1, images: int = 1) -> UsageDay:
    """Return a day with one version and labels of 200 characters."""
    named = {f"{i:0200d}": images for i in range(labels)}
    return UsageDay(v={"1": VersionCounts(n=labels * images, l=named)})


def bytes_of(url: str) -> tuple[int, dict[str, int]]:
    """Return the tenant's account of bytes, and the true size of each task's records."""
    with redis.Redis.from_url(url, decode_responses=True) as client:
        sizes = {}
        for name in client.keys("karst:t:acme:data:*:usage"):
            stored = client.hgetall(name)
            sizes[str(name).split(":")[4]] = sum(len(v.encode()) for day, v in stored.items() if day != "b")
            assert int(stored["b"]) == sizes[str(name).split(":")[4]]
        return int(client.get("karst:t:acme:usage_bytes") or 0), sizes


def test_a_gateways_counts_reach_redis_once_though_a_reply_is_lost(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        await add_tasks(connection, "t")
        registry = UsageRegistry(connection)
        name = DayName("acme", "t", today())
        for _ in range(2):
            await registry.add("gateway", 1, {name: counted(2, 3)})
        await registry.add("other", 1, {name: counted(1)})
        await registry.add("gateway", 2, {name: UsageDay(k=1, c=2, r=3)})
        found = parsed(await registry.read("acme", "t", [today()]))[today()]
        assert (found.v["1"].n, found.k, found.c, found.r) == (7, 1, 2, 3)
        assert found.v["1"].l == {f"{0:0200d}": 4, f"{1:0200d}": 3}

    in_registry(empty_redis, use)


def test_a_write_ends_though_answers_come_during_it(empty_redis: str) -> None:
    """Otherwise a gateway under load would write to Redis without a pause."""

    async def use(connection: RegistryConnection) -> None:
        await add_tasks(connection, "t")
        writes = 0

        class BesideAnswers(UsageRegistry):
            async def add(self, *call: Any) -> None:
                nonlocal writes
                await super().add(*call)
                writes += 1
                counter.answered("acme", "t", predicted(["a"], [0]))

        registry = BesideAnswers(connection)
        counter = UsageCounter(registry)
        counter.answered("acme", "t", predicted(["a"], [0]))
        for number in (1, 2):
            async with asyncio.timeout(5):
                await counter.write()
            assert writes == number
            assert parsed(await registry.read("acme", "t", [today()]))[today()].v["1"].n == number

    in_registry(empty_redis, use)


def test_labels_and_versions_beyond_their_limits_are_counted_as_others(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        await add_tasks(connection, "t")
        registry = UsageRegistry(connection)
        counter = UsageCounter(registry)
        labels = [f"label {i}" for i in range(2 * USAGE_LABELS)]
        for half in (labels[:USAGE_LABELS], labels[USAGE_LABELS:]):  # two writes: also Redis has the limit
            counter.answered("acme", "t", predicted(half, range(len(half))))
            await counter.write()
        counter.answered("acme", "t", predicted(labels, range(len(labels))))
        for version in range(2, USAGE_VERSIONS + 5):
            counter.answered("acme", "t", predicted(["a"], [0], version))
        await counter.write()
        found = parsed(await registry.read("acme", "t", [today()]))[today()]
        counts = found.v["1"]
        assert (counts.n, len(counts.l)) == (4 * USAGE_LABELS, USAGE_LABELS + 1)
        assert counts.l[OTHER] == 2 * USAGE_LABELS
        assert sum(counts.l.values()) == counts.n
        assert len(found.v) == USAGE_VERSIONS + 1
        assert sum(part.n for part in found.v.values()) == 4 * USAGE_LABELS + USAGE_VERSIONS + 3

    in_registry(empty_redis, use)


def test_days_expire_and_days_that_no_clock_has_reached_are_dropped(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        await add_tasks(connection, "t")
        registry = UsageRegistry(connection)
        oldest = today() - RETENTION_DAYS + 1
        days = [oldest - 1, oldest, today() - 1, today() + 5]
        await registry.add("g", 1, {DayName("acme", "t", day): counted() for day in days})
        await connection.execute(connection.redis.hset("karst:t:acme:data:t:usage", str(oldest - 1), "{}"))
        await registry.add("g", 2, {DayName("acme", "t", today()): counted()})
        assert [*await registry.read("acme", "t", [*days, today()])] == [oldest, today() - 1, today()]

    in_registry(empty_redis, use)


def test_a_tasks_oldest_days_make_room_for_new_ones(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        await add_tasks(connection, "t")
        registry = UsageRegistry(connection)
        full = counted(USAGE_LABELS)
        days = range(today() - 399, today() + 1)
        for number, day in enumerate(days, 1):
            await registry.add("g", number, {DayName("acme", "t", day): full})
        kept = [*await registry.read("acme", "t", days)]
        assert kept == [*days][-len(kept) :]
        assert len(kept) < 400

    in_registry(empty_redis, use)
    total, sizes = bytes_of(empty_redis)
    assert total == sizes["t"] <= USAGE_TASK_BYTES


@pytest.mark.slow
def test_a_tenants_counts_take_no_more_bytes_than_its_limit(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        names = [f"t{i}" for i in range(40)]
        await add_tasks(connection, *names)
        registry = UsageRegistry(connection)
        full, first = counted(USAGE_LABELS), today() - 149
        for i, name in enumerate(names):
            for part in range(10):
                days = range(first + 15 * part, first + 15 * part + 15)
                await registry.add("g", 10 * i + part + 1, {DayName("acme", name, day): full for day in days})

    in_registry(empty_redis, use)
    total, sizes = bytes_of(empty_redis)
    assert total == sum(sizes.values())
    assert total <= USAGE_BYTES


def test_a_deleted_task_or_tenant_takes_its_counts(empty_redis: str) -> None:
    async def use(connection: RegistryConnection) -> None:
        await add_tasks(connection, "one", "two")
        registry = UsageRegistry(connection)
        names = [DayName("acme", task, today()) for task in ("one", "two")]
        await registry.add("g", 1, {name: counted() for name in names})
        await TaskRegistry(connection).delete_task(OPERATOR, "acme", "one")
        total, sizes = bytes_of(empty_redis)
        assert (total, [*sizes]) == (sizes["two"], ["two"])
        await registry.add("g", 2, {name: counted() for name in names})  # counts of the deleted task are dropped
        assert [*bytes_of(empty_redis)[1]] == ["two"]
        await TenantRegistry(connection).delete(OPERATOR, "acme")
        await registry.add("g", 3, {name: counted() for name in names})
        assert bytes_of(empty_redis) == (0, {})

    in_registry(empty_redis, use)


def test_counts_wait_while_redis_is_away_and_are_bounded_by_tenant(tmp_path: Path) -> None:
    lost: list[int] = []

    async def use(url: str) -> UsageDay:
        connection = RegistryConnection(url, quiet=True, patience=REDIS_PATIENCE)
        registry = UsageRegistry(connection)
        counter = UsageCounter(registry, count_lost=lost.append)
        counter.answered("acme", "t", predicted(["a", "b"], [0, 0, 1]))
        with pytest.raises(Unavailable):
            await counter.write()
        for i in range(2 * USAGE_QUEUED):
            counter.answered("greedy", f"task{i}", predicted(["a"], [0]))
        counter.answered("acme", "t", predicted(["a", "b"], [1, 1]))
        counter.reviewed("acme", "t", correct=False)
        with embedded_redis(tmp_path):
            for _ in range(200):
                try:
                    await add_tasks(connection, "t")
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)
            await counter.write()
            found = parsed(await registry.read("acme", "t", [today()]))[today()]
        await connection.close()
        return found

    with embedded_redis(tmp_path) as url:
        pass  # the address of a Redis that is stopped
    found = asyncio.run(use(url))
    assert found.v["1"].l == {"a": 2, "b": 3}
    assert found.r == 1
    assert USAGE_QUEUED < sum(lost) < 2 * USAGE_QUEUED
