"""The queue of trainings in a real Redis: order, leases, and what a lost lease allows no more."""

from datetime import UTC, datetime
from typing import Any

import pytest

from hub.admin_schemas import LimitsChange
from hub.admission.quotas import TRAINING_BYTES, TRAINING_JOBS
from hub.dataset_schemas import SnapshotInfo
from hub.errors import LimitReached, NotFound, Unavailable
from hub.registry.audit import OPERATOR
from hub.registry.datasets.files import StoredName
from hub.registry.datasets.trainings import MAX_TRAININGS, Job, Training, TrainingRegistry
from hub.registry.redis.connection import as_optional_text, tenant_key
from hub.schemas import TaskSettings
from tests.support.datasets import Registry, digest_of, unpaced_reads, with_datasets
from tests.support.registry import version

LONG_S = 1000


def training(id: str, snapshot: str = "s", **fields: Any) -> Training:
    """Return a queued training."""
    body: dict[str, Any] = {
        "id": id,
        "task": "flowers",
        "recipe": "karst",
        "state": "queued",
        "created": datetime.now(UTC).isoformat(),
        "seconds": 0,
        "snapshot": SnapshotInfo(digest=digest_of(snapshot), images=3, train=2, test=1),
        "version": None,
        "report": None,
        "warnings": [],
    }
    return Training(**body | fields)


async def queue(trainings: TrainingRegistry, *ids: str, tenant: str = "t") -> None:
    for id in ids:
        await trainings.put(OPERATOR, tenant, "flowers", training(id), queued=True)


async def registry_bytes(registry: Registry) -> int:
    return int(as_optional_text(await registry.connection.redis.get(tenant_key("t", "registry"))) or 0)


async def take(trainings: TrainingRegistry, token: str = "me", lease_s: float = LONG_S, running: int = 100) -> str:
    """Return `tenant id` of the next job, or nothing."""
    job = (await trainings.take(token, lease_s=lease_s, max_running=running)).job
    return "" if job is None else f"{job.tenant} {job.id}"


def test_tenants_take_turns_and_each_tenants_jobs_keep_their_order(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings = TrainingRegistry(registry.connection, unpaced_reads())
        for tenant in ("a", "b", "c"):
            await registry.tenants.create(OPERATOR, tenant, LimitsChange())
            await registry.tasks.put(OPERATOR, tenant, "flowers", TaskSettings())
        await queue(trainings, *(f"a{i}" for i in range(10)), tenant="a")
        await queue(trainings, *(f"b{i}" for i in range(7)), tenant="b")
        await queue(trainings, *(f"c{i}" for i in range(3)), tenant="c")
        order = [await take(trainings) for _ in range(20)]
        assert await take(trainings) == ""
        turns = [(t, i) for i in range(10) for t, count in (("a", 10), ("b", 7), ("c", 3)) if i < count]
        assert order == [f"{tenant} {tenant}{i}" for tenant, i in turns]

    with_datasets(empty_redis, use)


def test_a_tenant_that_comes_back_waits_for_the_others_turns(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings = TrainingRegistry(registry.connection, unpaced_reads())
        await queue(trainings, "t1")
        assert await take(trainings) == "t t1"
        await queue(trainings, "t2")
        await queue(trainings, "o1", tenant="other")
        assert [await take(trainings), await take(trainings)] == ["other o1", "t t2"]

    with_datasets(empty_redis, use)


def test_no_more_jobs_run_than_the_hub_allows(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings = TrainingRegistry(registry.connection, unpaced_reads())
        await queue(trainings, "x", "y")
        assert [await take(trainings, running=1), await take(trainings, running=1)] == ["t x", ""]
        assert await trainings.finish(Job("t", "flowers", "x"), "me", training("x", state="done"))
        assert await take(trainings, running=1) == "t y"

    with_datasets(empty_redis, use)


def test_a_job_whose_lease_has_expired_goes_to_the_front_and_its_gateway_loses_it(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings, job = TrainingRegistry(registry.connection, unpaced_reads()), Job("t", "flowers", "x")
        await queue(trainings, "x", "y")
        assert await take(trainings, "first", lease_s=-1) == "t x"
        taken = await trainings.take("second", lease_s=LONG_S, max_running=1)
        assert (taken.job, taken.expired) == (None, [job])
        assert await trainings.requeue(job, "", training("x"))
        assert not await trainings.requeue(job, "", training("x"))
        assert await take(trainings, "second") == "t x"
        running = training("x", state="running")
        assert not await trainings.write(job, "first", running, lease_s=LONG_S)
        assert not await trainings.finish(job, "first", running)
        assert not await trainings.requeue(job, "", running)  # the second lease holds
        assert await trainings.write(job, "second", running, lease_s=LONG_S)
        assert (await trainings.get(*job)).state == "running"

    with_datasets(empty_redis, use)


def test_old_trainings_make_room_when_the_tenants_snapshots_and_reports_fill_its_quota(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings = TrainingRegistry(registry.connection, unpaced_reads())

        async def put(id: str, size: int, *, queued: bool = False) -> list[StoredName]:
            return await trainings.put(
                OPERATOR, "t", "flowers", training(id, id, state="failed", file_bytes=size), queued=queued
            )

        assert await put("old", TRAINING_BYTES // 2) == []
        assert await put("job", TRAINING_BYTES // 2, queued=True) == []
        assert await put("new", 10) == [StoredName("s:", digest_of("old"))]
        with pytest.raises(LimitReached, match="snapshots and reports"):  # the job is needed
            await put("large", TRAINING_BYTES // 2 + 1)
        kept = [found.id for found in await trainings.all("t", "flowers")]
        assert kept == ["new", "job"]  # a refusal changes nothing
        assert (await registry.tenants.usage("t")).used.training_bytes == TRAINING_BYTES // 2 + 10
        await take(trainings)
        done = training("job", "job", state="done", file_bytes=TRAINING_BYTES)  # with its report
        assert await trainings.finish(Job("t", "flowers", "job"), "me", done)
        assert {name.digest for name in await put("large", 11)} == {digest_of("job")}
        await registry.tasks.delete_task(OPERATOR, "t", "flowers")
        await registry.tasks.put(OPERATOR, "t", "flowers", TaskSettings())
        assert await put("full", TRAINING_BYTES, queued=True) == []  # nothing of the deleted task counts

    with_datasets(empty_redis, use)


def test_a_cancelled_job_leaves_the_queue_and_its_gateway_loses_it(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings = TrainingRegistry(registry.connection, unpaced_reads())
        await queue(trainings, "x", "y")
        await take(trainings, running=1)
        for id in ("x", "y"):
            job, ended = Job("t", "flowers", id), training(id, state="cancelled")
            assert await trainings.cancel(OPERATOR, job, ended)
            assert not await trainings.cancel(OPERATOR, job, ended)
            assert not await trainings.write(job, "me", training(id, state="running"), lease_s=LONG_S)
        assert await take(trainings) == ""
        assert [found.state for found in await trainings.all("t", "flowers")] == ["cancelled", "cancelled"]
        assert [action for action, _ in await registry.entries()][-2:] == ["training.cancel", "training.cancel"]

    with_datasets(empty_redis, use)


def test_a_deleted_task_takes_its_jobs_with_it(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings, job = TrainingRegistry(registry.connection, unpaced_reads()), Job("t", "flowers", "x")
        await queue(trainings, "x", "y")
        await take(trainings, running=1)
        await registry.tasks.delete_task(OPERATOR, "t", "flowers")
        assert await take(trainings) == ""
        assert not await trainings.finish(job, "me", training("x", state="done"))
        with pytest.raises(NotFound):
            await trainings.put(OPERATOR, "t", "flowers", training("z"), queued=True)

    with_datasets(empty_redis, use)


def test_a_deleted_task_releases_the_snapshot_and_report_of_several_trainings(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings, report = TrainingRegistry(registry.connection, unpaced_reads()), digest_of("report")
        for id in ("x", "y"):
            await queue(trainings, id)
            await take(trainings)
            ended = training(id, state="done", report_digest=report)
            assert await trainings.finish(Job("t", "flowers", id), "me", ended)
        async with registry.files.claimed(StoredName("r:", report)) as claimed:
            assert not claimed
        await registry.tasks.delete_task(OPERATOR, "t", "flowers")
        found = []
        more = True
        while more:
            names, more = await registry.files.drain(100)
            found += names
        assert sorted(found) == [StoredName("r:", report), StoredName("s:", digest_of("s"))]

    with_datasets(empty_redis, use)


@pytest.mark.parametrize("how", ["deleted", "interrupted", "cancelled"])
def test_a_job_that_has_written_its_report_releases_no_other_trainings_report(empty_redis: str, how: str) -> None:
    async def use(registry: Registry) -> None:
        trainings, report, job = TrainingRegistry(registry.connection, unpaced_reads()), digest_of("r"), "running"
        await registry.tasks.put(OPERATOR, "t", "other", TaskSettings())
        done = training("done", state="done", report_digest=report)
        await trainings.put(OPERATOR, "other", "flowers", done)
        await trainings.put(OPERATOR, "t", "other", training(job), queued=True)
        assert await take(trainings) == f"t {job}"
        running = training(job, state="running", report_digest=report)
        assert await trainings.write(Job("t", "other", job), "me", running, lease_s=LONG_S)
        if how == "interrupted":
            assert await trainings.requeue(Job("t", "other", job), "me", running)
            await take(trainings)
            assert await trainings.write(Job("t", "other", job), "me", training(job), lease_s=LONG_S)
        elif how == "cancelled":  # by a request that has read the training before
            assert await trainings.cancel(OPERATOR, Job("t", "other", job), training(job, state="cancelled"))
        await registry.tasks.delete_task(OPERATOR, "t", "other")
        names, more = await registry.files.drain(100)
        assert (names, more) == ([], False)
        async with registry.files.claimed(StoredName("r:", report)) as claimed:
            assert not claimed
        await registry.tasks.delete_task(OPERATOR, "other", "flowers")
        names, _ = await registry.files.drain(100)
        assert StoredName("r:", report) in names

    with_datasets(empty_redis, use)


def test_a_job_names_no_report_that_the_store_is_removing(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings, report, job = TrainingRegistry(registry.connection, unpaced_reads()), digest_of("r"), "x"
        await queue(trainings, job)
        await take(trainings, lease_s=0.1)
        running = training(job, state="running", report_digest=report)
        async with registry.files.claimed(StoredName("r:", report)) as claimed:
            assert claimed
            for change in (
                trainings.write(Job("t", "flowers", job), "me", running, lease_s=LONG_S),
                trainings.requeue(Job("t", "flowers", job), "me", running),
                trainings.finish(Job("t", "flowers", job), "me", running),
                trainings.cancel(OPERATOR, Job("t", "flowers", job), running),
            ):
                with pytest.raises(Unavailable):
                    await change
        assert (await trainings.get("t", "flowers", job)).report_digest is None
        assert (await trainings.take("other", lease_s=LONG_S, max_running=9)).expired == []  # the lease goes on
        assert await trainings.finish(Job("t", "flowers", job), "me", running)

    with_datasets(empty_redis, use)


def test_a_tenant_has_a_limit_of_jobs(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings = TrainingRegistry(registry.connection, unpaced_reads())
        await queue(trainings, *map(str, range(TRAINING_JOBS)))
        with pytest.raises(LimitReached, match=f"limit {TRAINING_JOBS}"):
            await queue(trainings, "more")
        await queue(trainings, "more", tenant="other")

    with_datasets(empty_redis, use)


def test_old_trainings_are_dropped_but_no_job_that_has_not_ended(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings = TrainingRegistry(registry.connection, unpaced_reads())
        await queue(trainings, "job")
        dropped = []
        for i in range(MAX_TRAININGS + 1):
            ended = training(str(i), f"s{i}", state="done")
            dropped += await trainings.put(OPERATOR, "t", "flowers", ended)
        assert dropped == [StoredName("s:", digest_of("s0"))]
        assert {"job", "1"} <= {found.id for found in await trainings.all("t", "flowers")}
        assert await take(trainings) == "t job"

    with_datasets(empty_redis, use)


def test_a_training_stays_while_the_task_has_its_version(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings = TrainingRegistry(registry.connection, unpaced_reads())
        first, _ = await registry.tasks.register(OPERATOR, "t", "flowers", version("a" * 64), ["latest"])
        made = training("made", "of version", state="done", version=first.version)
        await trainings.put(OPERATOR, "t", "flowers", made)
        for i in range(MAX_TRAININGS):
            await trainings.put(OPERATOR, "t", "flowers", training(str(i), f"s{i}", state="failed"))
        assert (await trainings.get("t", "flowers", "made")).version == first.version
        await registry.tasks.register(OPERATOR, "t", "flowers", version("b" * 64), ["latest"])
        await registry.tasks.delete_version(OPERATOR, "t", "flowers", first.version)
        dropped = await trainings.put(OPERATOR, "t", "flowers", training("next", "next", state="failed"))
        assert set(dropped) == {StoredName("s:", digest_of(s)) for s in ("of version", "s0")}

    with_datasets(empty_redis, use)


def test_list_of_the_hub_has_running_next_and_last_trainings_of_all_tenants(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings = TrainingRegistry(registry.connection, unpaced_reads())
        for tenant in ("a", "b"):
            await registry.tenants.create(OPERATOR, tenant, LimitsChange())
            await registry.tasks.put(OPERATOR, tenant, "flowers", TaskSettings())
        await queue(trainings, "a0", "a1", "a2", tenant="a")
        await queue(trainings, "b0", "b1", tenant="b")
        assert await take(trainings) == "a a0"
        assert await take(trainings) == "b b0"
        done = training("b0", state="done", version=4)
        await trainings.finish(Job("b", "flowers", "b0"), "me", done)
        await trainings.put(OPERATOR, "a", "flowers", training("i", recipe="instant", state="failed", error="few"))
        await trainings.put(OPERATOR, "a", "flowers", training("i", recipe="instant", state="done"), audited=True)
        found = await trainings.of_hub()
        assert [(t.tenant, t.id) for t in found.trainings] == [
            ("a", "a0"), ("a", "a1"), ("b", "b1"), ("a", "a2"), ("a", "i"), ("b", "b0")
        ]  # fmt: skip
        assert (found.running, found.queued) == (1, 3)
        assert [t.ended is None for t in found.trainings] == [True] * 4 + [False] * 2
        assert found.trainings[5].version == 4
        await registry.tenants.delete(OPERATOR, "a")
        assert [(t.tenant, t.id) for t in (await trainings.of_hub()).trainings] == [("b", "b1"), ("b", "b0")]
        await registry.tasks.delete_task(OPERATOR, "b", "flowers")
        assert (await trainings.of_hub()).trainings == []
        assert await registry.connection.redis.zcard("karst:training-ended") == 0

    with_datasets(empty_redis, use)


def test_texts_of_trainings_count_as_registry_bytes_and_old_ones_make_room(
    empty_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub.registry.datasets.trainings.REGISTRY_BYTES", 500_000)

    async def use(registry: Registry) -> None:
        trainings, figures = TrainingRegistry(registry.connection, unpaced_reads()), {"f1": "x" * 200_000}
        of_tasks = await registry_bytes(registry)
        for id in ("a", "b", "c"):
            await trainings.put(OPERATOR, "t", "flowers", training(id, id, state="failed"))
            await trainings.put(OPERATOR, "t", "flowers", training(id, id, state="failed", report=figures))
        await trainings.put(OPERATOR, "t", "flowers", training("d", "d", state="failed"))
        kept = await trainings.all("t", "flowers")
        assert [found.id for found in kept] == ["d", "c", "b"]
        texts = sum(len(found.model_dump_json()) for found in kept)
        assert await registry_bytes(registry) == of_tasks + texts
        await registry.connection.redis.hset(tenant_key("t", "task:flowers"), "v:1", "{}")
        for id in ("e", "f"):  # the last trainings of a version stay
            await trainings.put(OPERATOR, "t", "flowers", training(id, id, state="done", version=1, report=figures))
        await trainings.put(
            OPERATOR, "t", "flowers", training("f", "f", state="done", version=1, report={"x": "x" * 300_000})
        )
        with pytest.raises(LimitReached, match="metadata of tasks, versions and trainings"):
            await trainings.put(OPERATOR, "t", "flowers", training("g", "g"), queued=True)
        await registry.connection.redis.hdel(tenant_key("t", "task:flowers"), "v:1")
        await registry.tasks.delete_task(OPERATOR, "t", "flowers")
        assert await registry_bytes(registry) == 0

    with_datasets(empty_redis, use)


def test_no_change_decodes_the_texts_of_other_trainings(empty_redis: str) -> None:
    """The figures of 200 trainings of 300 KB took Redis 1.4 s for each new training, and 3.3 s for a deletion."""

    async def use(registry: Registry) -> None:
        trainings = TrainingRegistry(registry.connection, unpaced_reads())
        texts = tenant_key("t", "data:flowers:trainings")
        for number in range(MAX_TRAININGS):
            await trainings.put(OPERATOR, "t", "flowers", training(f"{number}", f"{number}", state="failed"))
            await registry.connection.redis.hset(texts, f"{number}", "no JSON")
        assert await trainings.put(OPERATOR, "t", "flowers", training("new", "new")) == [
            StoredName("s:", digest_of("0"))
        ]
        await registry.tasks.delete_task(OPERATOR, "t", "flowers")
        assert await registry.connection.redis.hlen(texts) == 0

    with_datasets(empty_redis, use)


def test_trainings_of_an_older_hub_make_room_without_counting(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings = TrainingRegistry(registry.connection, unpaced_reads())
        before = await registry_bytes(registry)
        for number in range(MAX_TRAININGS):
            await trainings.put(OPERATOR, "t", "flowers", training(f"{number}", f"{number}", state="failed"))
        await registry.connection.redis.delete(tenant_key("t", "data:flowers:training-heads"))
        await registry.connection.redis.set(tenant_key("t", "registry"), before)
        new = training("new", "new", state="failed")
        assert await trainings.put(OPERATOR, "t", "flowers", new) == [StoredName("s:", digest_of("0"))]
        assert await registry_bytes(registry) == before + len(new.model_dump_json())
        await registry.tasks.delete_task(OPERATOR, "t", "flowers")
        assert await registry_bytes(registry) == 0

    with_datasets(empty_redis, use)


def test_a_list_beyond_its_bytes_leaves_out_figures_of_older_trainings(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        trainings = TrainingRegistry(registry.connection, unpaced_reads())
        for id in ("a", "b", "c"):
            figures = {"f1": id * 1000}
            await trainings.put(OPERATOR, "t", "flowers", training(id, state="failed", report=figures))
        found = await trainings.all("t", "flowers", max_bytes=3500)
        assert [(each.id, each.report is None) for each in found] == [("c", False), ("b", False), ("a", True)]
        assert all(each.report for each in await trainings.all("t", "flowers"))

    with_datasets(empty_redis, use)
