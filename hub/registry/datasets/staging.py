"""Datasets of an import that no task has yet: they count in the tenant's limits, and no client sees them.

Their keys are those of a task with an invalid name; `files` has the list of all. `TaskRegistry.restore` makes them the
datasets of tasks.
"""

import json
from collections.abc import Sequence

from ...admission.quotas import DATASET_LABELS
from ...field_types import folded_label
from ..audit import Actor
from ..redis.connection import RegistryConnection
from ..redis.scripts import DATASETS, ChangeReply
from ..tenants import tenant_not_found
from .entries import ArchivedImage, StagedDataset, use_of
from .index import DEFAULT_LIMITS, labels_full, limit_error
from .trainings import Training


class StagedDatasets:
    """Atomic changes of staged datasets. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection

    async def add(self, by: Actor, tenant: str, name: str, images: Sequence[ArchivedImage]) -> list[str]:
        """Add images. A dataset that gets none for an hour is removed.

        Returns:
            The digests whose old files the store is removing: try these again.

        Raises:
            NotFound: the tenant does not exist.
            LimitReached: the tenant's limit of images or of their bytes, or the dataset has too many labels.
        """
        body = [
            {
                "digest": image.digest,
                "label": image.label or "",
                "fold": folded_label(image.label or ""),
                "split": image.split,
                "used": use_of(image.digest, image.split),
                "size": image.size_bytes,
                "name": image.name,
                "at": image.added,
            }
            | ({"kept": image.expires} if image.expires is not None else {})
            | ({"answer": image.answer.model_dump(exclude_none=True)} if image.answer is not None else {})
            for image in images
        ]
        reply = await self._stage(by, tenant, name, body, None)
        statuses = json.loads(reply.text)
        for found in statuses:
            if found["status"] == "limit":
                raise limit_error(found["limit"], int(found["maximum"]))
            if found["status"] == "labels":
                raise labels_full()
        return [image.digest for image, found in zip(images, statuses, strict=True) if found["status"] == "removing"]

    async def add_training(self, by: Actor, tenant: str, name: str, training: Training) -> bool:
        """Add a training that has ended, newer than those before. Its snapshot must be in the store.

        Returns:
            False: the store is removing an old copy of the snapshot; try again.

        Raises:
            NotFound: the tenant does not exist.
        """
        body = {"id": training.id, "snapshot": training.snapshot.digest, "body": training.model_dump_json()}
        return (await self._stage(by, tenant, name, [], body)).outcome == "done"

    async def _stage(
        self, by: Actor, tenant: str, name: str, images: Sequence[object], training: object | None
    ) -> ChangeReply:
        reply = await self._connection.change(
            DATASETS,
            "stage",
            tenant=tenant,
            task=name,
            entry=by.entry(tenant, "image.add"),
            images=images,
            training=training,
            staged=True,
            limits=DEFAULT_LIMITS,
            max_labels=DATASET_LABELS,
            patience_s=0,
        )
        if reply.outcome not in ("done", "removing"):
            raise tenant_not_found(tenant)
        return reply

    async def drop(self, tenant: str, staged: StagedDataset) -> None:
        """Remove a dataset, unless a task has it by now."""
        await self._connection.change(DATASETS, "drop_staged", tenant=tenant, task=staged.name)
