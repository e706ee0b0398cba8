"""Trainings in the hub: the images of a dataset in, a new version out. No HTTP, no Ray."""

import secrets
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from datetime import UTC, datetime

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.backbone import BackboneInfo
from adapters.data.errors import DataError
from adapters.training.auto import Classifier, instant_from_features

from ...admission.authentication import Caller
from ...admission.quotas import TRAININGS, TRAININGS_QUEUED
from ...concurrency import TenantConcurrencyLimit, TenantThreads, run_blocking
from ...dataset_schemas import TrainingInfo, TrainingList, TrainingRequest
from ...errors import Conflict, HubError, InvalidRequest
from ...registry.datasets.index import DatasetIndex
from ...registry.datasets.trainings import TrainingRegistry
from ...registry.tasks import TaskRegistry
from ...storage.store import Store
from ..classification import ClassificationService
from ..registration import RegistrationService
from .features import FeatureService
from .removal import FileRemoval
from .snapshots import Snapshot

STABLE = "stable"
INSTANT = "instant"
PLANNED = ("karst", "auto")
INTERRUPTED = "The gateway stopped before the training ended. Train again."


class TrainingService:
    """Trainings of the tasks of a caller's own tenant. Every method raises `NotFound` for another tenant's task."""

    def __init__(
        self,
        *,
        index: DatasetIndex,
        trainings: TrainingRegistry,
        tasks: TaskRegistry,
        snapshots: Store,
        features: FeatureService,
        removal: FileRemoval,
        classification: ClassificationService,
        registration: RegistrationService,
        threads: TenantThreads,
        fits: Executor,
    ) -> None:
        """
        Args:
            threads: thread pool for calls to the store.
            fits: thread pool for fits, whose threads run torch with one thread each.
        """
        self._index = index
        self._trainings = trainings
        self._tasks = tasks
        self._snapshots = snapshots
        self._features = features
        self._removal = removal
        self._classification = classification
        self._registration = registration
        self._threads = threads
        self._fits = fits
        self._limit = TenantConcurrencyLimit(TRAININGS, TRAININGS + TRAININGS_QUEUED)

    async def train(self, caller: Caller, name: str, request: TrainingRequest) -> TrainingInfo:
        """Train a new version from the task's dataset, and return when it is registered.

        The version becomes `latest`, and with the task's setting `promote: always` also `stable`.

        Raises:
            InvalidRequest: the hub does not have the recipe.
            Conflict: the images cannot train a classifier.
            HubError: any error of `RegistrationService.register`; the training is then `failed` with this reason.
        """
        task = caller.own_task(name)
        if request.recipe in PLANNED:
            message = f"{request.recipe!r} is not in this hub yet; use karst-hub train, or the recipe {INSTANT!r}"
            raise InvalidRequest.at("recipe", message)
        if request.recipe != INSTANT:
            raise InvalidRequest.at("recipe", f"is {request.recipe[:40]!r}; must be {INSTANT!r}")
        async with self._limit.acquire(caller.tenant):
            return await self._train(caller, task)

    async def list(self, caller: Caller, name: str) -> TrainingList:
        """Return the trainings of a task, newest first."""
        return TrainingList(trainings=await self._trainings.all(caller.tenant, caller.own_task(name)))

    async def get(self, caller: Caller, name: str, id: str) -> TrainingInfo:
        """Return one training."""
        return await self._trainings.get(caller.tenant, caller.own_task(name), id)

    async def snapshot(self, caller: Caller, name: str, id: str) -> bytes:
        """Return the JSON text of a training's snapshot."""
        training = await self.get(caller, name, id)
        return await run_blocking(self._threads.of(caller.tenant), self._snapshots.get, training.snapshot.digest)

    async def _train(self, caller: Caller, task: str) -> TrainingInfo:
        started_s = time.monotonic()
        settings = (await self._tasks.task(caller.tenant, task)).settings
        dataset = await self._index.all(caller.tenant, task)
        # A first look, before the features are read: most faults of a dataset show here.
        Snapshot.of(dataset)
        labelled = [image.digest for image in dataset if image.label is not None]
        rows = await self._features.of(caller.tenant, labelled)
        snapshot = Snapshot.of([image for image in dataset if image.digest in rows])
        text = snapshot.text(task)
        info = snapshot.info(text)
        warnings = list(snapshot.warnings)
        if len(rows) < len(labelled):
            warnings.append(f"{len(labelled) - len(rows)} images cannot be read and were left out")
        await run_blocking(self._threads.of(caller.tenant), self._snapshots.put, info.digest, text)
        training = TrainingInfo(
            id=secrets.token_hex(8),
            task=task,
            recipe=INSTANT,
            state="failed",
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            seconds=0,
            snapshot=info,
            version=None,
            report=None,
            warnings=warnings,
            error=INTERRUPTED,  # until the training ends: no training seems to run for ever
        )
        await self._removal.remove(await self._trainings.put(caller, caller.tenant, task, training))
        try:
            backbone = (await self._classification.limits()).backbone
            classifier = await run_blocking(self._fits, _fit, snapshot, rows, backbone, info.digest)
            alias = STABLE if settings.promote == "always" else None
            registered, _ = await self._registration.register(
                caller, task, classifier.adapter.data, alias, labels_may_change=True
            )
        except HubError as error:
            failed = {"error": error.detail, "seconds": _since(started_s)}
            await self._trainings.put(caller, caller.tenant, task, training.model_copy(update=failed), audited=True)
            raise
        done = {
            "state": "done",
            "version": registered.version,
            "report": registered.metrics,
            "seconds": _since(started_s),
            "error": None,
        }
        training = training.model_copy(update=done)
        await self._trainings.put(caller, caller.tenant, task, training, audited=True)
        return training


def _since(started_s: float) -> float:
    return round(time.monotonic() - started_s, 3)


def _fit(
    snapshot: Snapshot, rows: Mapping[str, NDArray[np.float16]], backbone: BackboneInfo, digest: str
) -> Classifier:
    """Fit the instant head to the features of a snapshot.

    Raises:
        Conflict: the images are too few.
    """
    numbers = {label: i for i, label in enumerate(snapshot.labels)}
    parts = {}
    for use in ("train", "test"):
        images = [image for image in snapshot.images if image.use == use]
        if images:
            features = torch.from_numpy(np.stack([rows[image.digest] for image in images]).astype(np.float32))
            parts[use] = features, torch.tensor([numbers[image.label] for image in images])
    try:
        return instant_from_features(
            *parts["train"], snapshot.labels, backbone, test=parts.get("test"), extra={"snapshot": digest}
        )
    except DataError as error:
        raise Conflict(f"Cannot train: {error}.") from error
