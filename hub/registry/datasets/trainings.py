"""Trainings of tasks in Redis: what each used, its result and report, and the queue of those that run as jobs.

Keys, besides those in `index` and `files`:

    training-jobs              hash    job (`tenant:task:id`) -> token of the gateway that runs it; '' while queued
    training-leases            zset    running job -> end of its gateway's lease, in seconds since 1970 by Redis' clock
    training-turns             zset    tenant with queued jobs -> turn in which its last job started
    training-versions          hash    running job -> version that it has registered
    training-ended             zset    the hub's last ended trainings -> time of their end
    training-number            string  last place in a queue, and last turn
    t:{tenant}:training-queue  zset    queued job -> place; 0 for a job that was interrupted
    t:{tenant}:training-jobs   set     queued and running jobs
    t:{tenant}:training_bytes  string  bytes of the snapshots and reports of the tenant's trainings
    t:{tenant}:training-turn   string  turn in which the tenant's last job started; expires after a day
"""

import itertools
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

from ...admin_schemas import HubTraining, HubTrainingList
from ...admission.quotas import REGISTRY_BYTES, TRAINING_BYTES, TRAINING_JOBS
from ...concurrency import TenantReads
from ...dataset_schemas import TrainingInfo
from ...errors import LimitReached, NotFound, Unavailable
from ..audit import Actor
from ..models import task_not_found
from ..redis.connection import (
    READ_TIMEOUT_S,
    RegistryConnection,
    as_integer,
    as_optional_text,
    as_optional_texts,
    as_texts,
    tenant_key,
)
from ..redis.scripts import TRAININGS, ChangeReply
from .files import StoredName

MAX_TRAININGS = 100  # newest ones kept per task; older ones stay while they are jobs, or while their version exists
TRAININGS_PER_READ = 4  # each may have the figures of thousands of labels, up to 512 KiB
MAX_LISTED = 100  # in each part of the hub's list


class Author(BaseModel):
    """The actor that started a training, for the audit and for the registration at its end."""

    key: str = ""
    name: str = ""
    role: str = ""
    address: str = ""


class Training(TrainingInfo):
    """A training as Redis stores it.

    Attributes:
        interruptions: reasons why attempts ended without a result.
        file_bytes: of its snapshot and its report, which count against the tenant; 0 in older registries.
    """

    author: Author = Author()
    budget_s: int = 0
    interruptions: list[str] = Field(default=[])
    report_digest: str | None = None
    file_bytes: int = 0

    def public(self) -> TrainingInfo:
        """Return what clients see."""
        return TrainingInfo(**self.model_dump(include=set(TrainingInfo.model_fields)))

    def of_tenant(self, tenant: str, ended_s: float | None) -> HubTraining:
        """Return what admins see.

        Args:
            ended_s: time of its end in seconds since 1970; None: it has not ended.
        """
        ended = None if ended_s is None else datetime.fromtimestamp(ended_s, UTC).isoformat(timespec="milliseconds")
        named = self.model_dump(include=set(HubTraining.model_fields))
        return HubTraining(**named, tenant=tenant, images=self.snapshot.images, ended=ended)


class Job(NamedTuple):
    """The name of a training that runs as a job."""

    tenant: str
    task: str
    id: str

    @property
    def name(self) -> str:
        """The name in Redis."""
        return ":".join(self)


class Taken(NamedTuple):
    """Work for a gateway: a job to run, and jobs whose gateway let its lease expire."""

    job: Job | None
    expired: list[Job]


class TrainingRegistry:
    """Reads and atomic changes of trainings. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection, reads: TenantReads) -> None:
        """
        Args:
            reads: turns of every read whose size the tenant decides.
        """
        self._connection = connection
        self._redis = connection.redis
        self._reads = reads

    async def check_room(self, tenant: str) -> None:
        """Check that the tenant may queue a job.

        Raises:
            LimitReached: the tenant's limit of queued and running jobs.
        """
        command = self._redis.scard(tenant_key(tenant, "training-jobs"))
        if as_integer(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S)) >= TRAINING_JOBS:
            raise _too_many_jobs()

    async def put(
        self,
        by: Actor,
        tenant: str,
        task: str,
        training: Training,
        *,
        audited: bool = False,
        queued: bool = False,
        is_known: bool = False,
    ) -> list[StoredName]:
        """Add a training, or replace it.

        Args:
            audited: write an audit entry; once per training.
            queued: add a job to the tenant's queue.
            is_known: replace only; the training of a task that was deleted is not added to a new one of its name.

        Returns:
            Snapshots and reports of dropped trainings that no training uses any more.

        Raises:
            NotFound: the task does not exist, or not with this training.
            LimitReached: the tenant's limit of queued and running jobs, of bytes of trainings, or of registry bytes.
        """
        action = "training.queue" if queued else "training.run"
        reply = await self._connection.change(
            TRAININGS,
            "put",
            tenant=tenant,
            task=task,
            entry=_entry(by, action, Job(tenant, task, training.id), training),
            id=training.id,
            body=training.model_dump_json(),
            snapshot=training.snapshot.digest,
            max_trainings=MAX_TRAININGS,
            audited=audited,
            queued=queued,
            is_known=is_known,
            max_jobs=TRAINING_JOBS,
            max_bytes=TRAINING_BYTES,
            max_registry_bytes=REGISTRY_BYTES,
            max_ended=MAX_LISTED,
        )
        _check_removing(reply)
        if reply.outcome == "limit" and reply.limit == "training_jobs":
            raise _too_many_jobs()
        if reply.outcome == "limit" and reply.limit == "training_bytes":
            raise _too_many_bytes()
        if reply.outcome == "limit" and reply.limit == "registry_bytes":
            raise _too_many_texts()
        if reply.outcome != "done":
            raise task_not_found(task)
        return [StoredName.parse(name) for name in reply.names]

    async def take(self, token: str, *, lease_s: float, max_running: int) -> Taken:
        """Take the next job for a gateway, unless `max_running` are running. The job needs `write` within its lease.

        Tenants take turns: the tenant whose last job started first is next. A tenant's own jobs are in order of their
        arrival.

        Args:
            token: new for each job; it proves to the other methods that the gateway still has the job.
        """
        reply = await self._connection.change(TRAININGS, "take", token=token, lease_s=lease_s, max_running=max_running)
        job = Job(*reply.text.split(":")) if reply.text else None
        return Taken(job, [Job(*name.split(":")) for name in reply.names])

    async def write(self, job: Job, token: str, training: Training, *, lease_s: float) -> bool:
        """Replace a running training and renew its lease. Return whether the gateway still has the job."""
        return await self._change("write", job, token, training, lease_s=lease_s)

    async def requeue(self, job: Job, token: str, training: Training) -> bool:
        """Return a job to the front of its tenant's queue. Return whether that was possible.

        Args:
            token: of the gateway that has the job; "" for a job whose lease has expired.
        """
        return await self._change("requeue", job, token, training)

    async def finish(self, job: Job, token: str, training: Training) -> bool:
        """End a running job. Return whether that was possible.

        Args:
            token: as in `requeue`.
        """
        entry = _entry(_actor(training), "training.run", job, training)
        return await self._change("finish", job, token, training, entry=entry)

    async def cancel(self, by: Actor, job: Job, training: Training) -> bool:
        """End a queued or running job. Return False if it has ended already, or has made its version."""
        return await self._change("cancel", job, "", training, entry=_entry(by, "training.cancel", job, training))

    async def made_version(self, job: Job) -> int | None:
        """Return the version that a job has registered; None: none yet."""
        command = self._redis.hget("karst:training-versions", job.name)
        found = as_optional_text(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
        return None if found is None else int(found)

    async def all(self, tenant: str, task: str, *, max_bytes: int | None = None) -> list[Training]:
        """Return the trainings of a task, newest first.

        Args:
            max_bytes: of the trainings' texts; further trainings come without `report`. None: no limit.

        Raises:
            NotFound: the task does not exist.
        """
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.exists(tenant_key(tenant, f"task:{task}"))
        pipeline.zrevrange(tenant_key(tenant, f"data:{task}:training-order"), 0, -1)
        exists, names = await self._connection.execute(pipeline.execute(), timeout_s=READ_TIMEOUT_S)
        if not as_integer(exists):
            raise task_not_found(task)
        found, ids, size = list[Training](), as_texts(names), 0
        for start in range(0, len(ids), TRAININGS_PER_READ):
            part = ids[start : start + TRAININGS_PER_READ]
            async with self._reads.turn(tenant):
                command = self._redis.hmget(tenant_key(tenant, f"data:{task}:trainings"), part)
                texts = as_optional_texts(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
                for text in filter(None, texts):
                    training = Training.model_validate_json(text)
                    size += len(text)
                    left_out = max_bytes is not None and size > max_bytes
                    found.append(training.model_copy(update={"report": None}) if left_out else training)
        return found

    async def get(self, tenant: str, task: str, id: str) -> Training:
        """Return one training.

        Raises:
            NotFound: the task has no such training.
        """
        async with self._reads.turn(tenant):  # a training has up to 512 KiB
            command = self._redis.hget(tenant_key(tenant, f"data:{task}:trainings"), id)
            text = as_optional_text(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
            if text is None:
                raise NotFound.at("training", f"task {task!r} has no training {id!r}")
            return Training.model_validate_json(text)

    async def of_hub(self) -> HubTrainingList:
        """Return the running trainings of all tenants, the next ones, and the last ones."""
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.zcard("karst:training-leases")
        pipeline.hlen("karst:training-jobs")
        pipeline.zrange("karst:training-leases", 0, MAX_LISTED - 1)
        pipeline.zrange("karst:training-turns", 0, MAX_LISTED - 1)
        pipeline.zrange("karst:training-ended", 0, MAX_LISTED - 1, desc=True, withscores=True)
        running, jobs, leased, tenants, ended = await self._connection.execute(pipeline.execute())
        pipeline = self._redis.pipeline(transaction=False)
        for tenant in as_texts(tenants):
            pipeline.zrange(tenant_key(tenant, "training-queue"), 0, MAX_LISTED - 1)
        queues = [as_texts(queue) for queue in await self._connection.execute(pipeline.execute())]
        rounds = itertools.zip_longest(*queues)  # tenants take turns
        queued = [name for one_round in rounds for name in one_round if name is not None][:MAX_LISTED]
        times = dict.fromkeys([*as_texts(leased), *queued]) | dict(ended)
        found, ids = list[HubTraining](), list(times.items())
        for start in range(0, len(ids), TRAININGS_PER_READ):
            part = ids[start : start + TRAININGS_PER_READ]
            pipeline = self._redis.pipeline(transaction=False)
            for name, _ in part:
                tenant, task, id = name.split(":")
                pipeline.hget(tenant_key(tenant, f"data:{task}:trainings"), id)
            texts = as_optional_texts(await self._connection.execute(pipeline.execute()))
            found += [
                Training.model_validate_json(text).of_tenant(name.split(":")[0], ended_s)
                for (name, ended_s), text in zip(part, texts, strict=True)
                if text is not None  # its task was deleted in the meantime
            ]
        return HubTrainingList(
            trainings=found, running=as_integer(running), queued=as_integer(jobs) - as_integer(running)
        )

    async def _change(self, function: str, job: Job, token: str, training: Training, **argument: Any) -> bool:
        body = training.model_dump_json()
        reply = await self._connection.change(
            TRAININGS, function, **job._asdict(), token=token, body=body, max_ended=MAX_LISTED, **argument
        )
        _check_removing(reply)
        if reply.outcome == "limit":
            raise LimitReached.at(reply.limit, f"too many changes (limit {reply.maximum}); try again in a second")
        return reply.outcome == "done"


def _too_many_jobs() -> LimitReached:
    message = f"too many queued and running trainings (limit {TRAINING_JOBS}); wait, or cancel some"
    return LimitReached.at("training_jobs", message, retry_after_s=60)


def _too_many_bytes() -> LimitReached:
    remedy = "delete old versions that trainings made, or tasks"
    message = f"the snapshots and reports of trainings would exceed {TRAINING_BYTES} bytes; {remedy}"
    return LimitReached.at("training_bytes", message)


def _too_many_texts() -> LimitReached:
    remedy = "delete old versions, or tasks"
    message = f"the metadata of tasks, versions and trainings would exceed {REGISTRY_BYTES} bytes; {remedy}"
    return LimitReached.at("registry_bytes", message)


def _actor(training: Training) -> Actor:
    return Actor(**training.author.model_dump())


def _entry(by: Actor, action: str, job: Job, training: Training) -> str:
    details: dict[str, object] = {
        "recipe": training.recipe,
        "state": training.state,
        "snapshot": training.snapshot.digest,
    }
    if training.error:
        details["error"] = training.error[:200]
    if training.promotion is not None:
        details["promotion"] = training.promotion.model_dump(exclude_none=True)
    return by.entry(job.tenant, action, task=job.task, id=job.id, version=training.version, **details)


def _check_removing(reply: ChangeReply) -> None:
    if reply.outcome == "removing":
        raise Unavailable("The store is removing an old copy of the file. Try again.", retry_after_s=60)
