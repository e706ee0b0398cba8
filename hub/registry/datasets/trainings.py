"""Trainings of tasks in Redis: what each used, its result, and its report."""

from ...dataset_schemas import TrainingInfo
from ...errors import NotFound, Unavailable
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
from ..redis.scripts import TRAININGS
from .files import StoredName

MAX_TRAININGS = 100  # kept per task


class TrainingRegistry:
    """Reads and atomic changes of trainings. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection
        self._redis = connection.redis

    async def put(
        self, by: Actor, tenant: str, task: str, training: TrainingInfo, *, audited: bool = False
    ) -> list[StoredName]:
        """Add a training, or replace it.

        Args:
            audited: write an audit entry; once per training.

        Returns:
            Snapshots of dropped trainings that no training uses any more.

        Raises:
            NotFound: the task does not exist.
        """
        details = {"recipe": training.recipe, "state": training.state, "snapshot": training.snapshot.digest}
        reply = await self._connection.change(
            TRAININGS,
            "put",
            tenant=tenant,
            task=task,
            entry=by.entry(tenant, "training.run", task=task, id=training.id, version=training.version, **details),
            id=training.id,
            body=training.model_dump_json(),
            snapshot=training.snapshot.digest,
            max_trainings=MAX_TRAININGS,
            audited=audited,
        )
        if reply.outcome == "removing":
            raise Unavailable("The store is removing an old copy of the snapshot. Train again.", retry_after_s=60)
        if reply.outcome != "done":
            raise task_not_found(task)
        return [StoredName.parse(name) for name in reply.names]

    async def all(self, tenant: str, task: str) -> list[TrainingInfo]:
        """Return the trainings of a task, newest first.

        Raises:
            NotFound: the task does not exist.
        """
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.exists(tenant_key(tenant, f"task:{task}"))
        pipeline.zrevrange(tenant_key(tenant, f"data:{task}:training-order"), 0, -1)
        exists, ids = await self._connection.execute(pipeline.execute(), timeout_s=READ_TIMEOUT_S)
        if not as_integer(exists):
            raise task_not_found(task)
        if not as_texts(ids):
            return []
        command = self._redis.hmget(tenant_key(tenant, f"data:{task}:trainings"), as_texts(ids))
        texts = as_optional_texts(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
        return [TrainingInfo.model_validate_json(text) for text in texts if text is not None]

    async def get(self, tenant: str, task: str, id: str) -> TrainingInfo:
        """Return one training.

        Raises:
            NotFound: the task has no such training.
        """
        command = self._redis.hget(tenant_key(tenant, f"data:{task}:trainings"), id)
        text = as_optional_text(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
        if text is None:
            raise NotFound.at("training", f"task {task!r} has no training {id!r}")
        return TrainingInfo.model_validate_json(text)
