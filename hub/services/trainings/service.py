"""Trainings in the hub: the images of a dataset in, a new version out. No HTTP, no Ray."""

import asyncio
import hashlib
import io
import secrets
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from ...admission.authentication import Caller
from ...admission.quotas import TRAINING_STREAMS, TRAININGS, TRAININGS_QUEUED
from ...concurrency import TenantConcurrencyLimit, TenantThreads, run_blocking
from ...dataset_schemas import ENDED, TrainingInfo, TrainingList, TrainingRequest, TrainingState
from ...errors import Conflict, HubError, InvalidRequest, NotFound, Unauthenticated
from ...registry.datasets.entries import ListedImage
from ...registry.datasets.files import StoredName
from ...registry.datasets.index import DatasetIndex
from ...registry.datasets.trainings import Author, Job, Training, TrainingRegistry
from ...registry.tasks import TaskRegistry
from ...registry.versions import TrainingEndedError
from ...storage.store import Store
from ..classification import ClassificationService
from ..datasets.features import FeatureService
from ..datasets.near_duplicates import split_warnings
from ..datasets.removal import FileRemoval
from ..datasets.snapshots import Snapshot
from .instant import REPORT, fit_instant
from .jobs import TrainingJobs
from .promotion import PromotionService

INSTANT = "instant"
JOB_RECIPES = ("karst", "auto")
INTERRUPTED = "The gateway stopped before the training ended. Train again."
FOLLOW_INTERVAL_S = 1.0
LISTED_BYTES = 4 * 1024**2  # of trainings with their figures in a list; a training has up to 512 KiB
COMPARED = 10_000  # images of a queued training whose stored features are compared; digests are in no order of content


class TrainingService:
    """Trainings of the tasks of a caller's own tenant. Every method raises `NotFound` for another tenant's task."""

    def __init__(
        self,
        *,
        index: DatasetIndex,
        trainings: TrainingRegistry,
        tasks: TaskRegistry,
        snapshots: Store,
        reports: Store,
        features: FeatureService,
        removal: FileRemoval,
        classification: ClassificationService,
        promotion: PromotionService,
        jobs: TrainingJobs,
        threads: TenantThreads,
        parse_threads: TenantThreads,
        fits: TenantThreads,
    ) -> None:
        """
        Args:
            threads: thread pool for calls to the store.
            parse_threads: thread pool for snapshots.
            fits: thread pool for fits, whose threads run torch with one thread each.
        """
        self._index = index
        self._trainings = trainings
        self._tasks = tasks
        self._snapshots = snapshots
        self._reports = reports
        self._features = features
        self._removal = removal
        self._classification = classification
        self._promotion = promotion
        self._jobs = jobs
        self._threads = threads
        self._parse_threads = parse_threads
        self._fits = fits
        self._limit = TenantConcurrencyLimit(TRAININGS, TRAININGS + TRAININGS_QUEUED)
        self._queueing = TenantConcurrencyLimit(TRAININGS, TRAININGS + TRAININGS_QUEUED)
        self._streams = TenantConcurrencyLimit(TRAINING_STREAMS, TRAINING_STREAMS)

    async def train(self, caller: Caller, name: str, request: TrainingRequest) -> TrainingInfo:
        """Train a new version from the task's dataset.

        Recipe `instant` returns when the version is registered; other recipes return a queued training. The version
        becomes `latest`, and by the task's setting `promote` also `stable`.

        Raises:
            InvalidRequest: the hub does not have the recipe.
            Conflict: the images cannot train a classifier.
            LimitReached: too many trainings of the tenant wait.
            HubError: of `instant`: any error of `RegistrationService.register`; the training is then `failed`.
        """
        task = caller.own_task(name)
        if request.recipe == INSTANT:
            async with self._limit.acquire(caller.tenant):
                return await self._train(caller, task)
        if request.recipe not in JOB_RECIPES:
            known = ", ".join(map(repr, (INSTANT, *JOB_RECIPES)))
            raise InvalidRequest.at("recipe", f"is {request.recipe[:40]!r}; must be one of {known}")
        async with self._queueing.acquire(caller.tenant):
            await self._tasks.task(caller.tenant, task)
            await self._trainings.check_room(caller.tenant)
            snapshot = await self._snapshot(caller.tenant, await self._index.all(caller.tenant, task))
            compared = [image.digest for image in snapshot.images[:COMPARED]]
            rows = await self._features.stored(caller.tenant, compared)
            training = await self._started(caller, task, request, snapshot, rows, "queued")
        self._jobs.wake()
        return training.public()

    async def list(self, caller: Caller, name: str) -> TrainingList:
        """Return the trainings of a task, newest first. Those beyond `LISTED_BYTES` have no `report`."""
        found = await self._trainings.all(caller.tenant, caller.own_task(name), max_bytes=LISTED_BYTES)
        return TrainingList(trainings=[training.public() for training in found])

    async def get(self, caller: Caller, name: str, id: str) -> TrainingInfo:
        """Return one training."""
        return (await self._trainings.get(caller.tenant, caller.own_task(name), id)).public()

    async def snapshot(self, caller: Caller, name: str, id: str) -> bytes:
        """Return the JSON text of a training's snapshot."""
        training = await self._trainings.get(caller.tenant, caller.own_task(name), id)
        pool = self._threads.of(caller.tenant)
        return await run_blocking(pool, self._snapshots.get, training.snapshot.digest)

    async def report(self, caller: Caller, name: str, id: str, file: str) -> bytes:
        """Return a file of a training's report.

        Raises:
            NotFound: the training has no such file: it has not ended, or its recipe makes no report.
        """
        training = await self._trainings.get(caller.tenant, caller.own_task(name), id)
        if training.report_digest is None or file not in training.report_files:
            raise NotFound.at("file", f"training {id!r} has no file {file!r}; `report_files` lists its files")
        pool = self._threads.of(caller.tenant)
        data = await run_blocking(pool, self._reports.get, training.report_digest)
        return await run_blocking(pool, _member, data, file)

    async def cancel(self, caller: Caller, name: str, id: str) -> TrainingInfo:
        """End a queued or running training, and return it.

        One that has ended stays as it is, and so does one whose version is registered already: it ends as `done`.
        """
        task = caller.own_task(name)
        training = await self._trainings.get(caller.tenant, task, id)
        if training.state in ENDED:
            return training.public()
        ended = training.model_copy(update={"state": "cancelled", "progress": None})
        if not await self._trainings.cancel(caller, Job(caller.tenant, task, id), ended):
            return (await self._trainings.get(caller.tenant, task, id)).public()
        return ended.public()

    def stream(self, caller: Caller) -> AbstractAsyncContextManager[None]:
        """Hold one of the tenant's streams of progress.

        Raises:
            LimitReached: the tenant has too many at this gateway.
        """
        return self._streams.acquire(caller.tenant)

    async def follow(
        self, caller: Caller, name: str, id: str, check: Callable[[], Awaitable[None]]
    ) -> AsyncIterator[TrainingInfo]:
        """Yield a training now, and after each change until it has ended or is deleted, or the caller's key ends.

        Args:
            check: raises `Unauthenticated` if the caller's key was revoked or has expired.
        """
        last = None
        while last is None or last.state not in ENDED:
            try:
                await check()
                training = await self.get(caller, name, id)
            except (NotFound, Unauthenticated):
                return
            if training != last:
                yield training
            last = training
            if training.state not in ENDED:
                await asyncio.sleep(FOLLOW_INTERVAL_S)

    async def _train(self, caller: Caller, task: str) -> TrainingInfo:
        started_s = time.monotonic()
        await self._tasks.task(caller.tenant, task)
        dataset = await self._index.all(caller.tenant, task)
        # A first look, before the features are read: most faults of a dataset show here.
        await self._snapshot(caller.tenant, dataset)
        labelled = [image.digest for image in dataset if image.label is not None]
        rows = await self._features.of(caller.tenant, labelled)
        snapshot = await self._snapshot(caller.tenant, [image for image in dataset if image.digest in rows])
        left_out = len(labelled) - len(rows)
        training = await self._started(caller, task, TrainingRequest(), snapshot, rows, "failed", left_out)
        try:
            backbone = (await self._classification.limits()).backbone
            extra = {"snapshot": training.snapshot.digest, "training": training.id}
            classifier, report = await run_blocking(
                self._fits.of(caller.tenant), fit_instant, snapshot, rows, backbone, extra
            )
            digest = hashlib.sha256(report).hexdigest()
            await run_blocking(self._threads.of(caller.tenant), self._reports.put, digest, report)
            name = Job(caller.tenant, task, training.id).name
            registered, promotion = await self._promotion.register(caller, task, classifier.adapter.data, (name, ""))
        except TrainingEndedError:
            raise Conflict("The task was deleted while it trained.") from None
        except HubError as error:
            failed = training.model_copy(update={"error": error.detail, "seconds": _since(started_s)})
            await self._trainings.put(caller, caller.tenant, task, failed, audited=True, is_known=True)
            raise
        done = {
            "state": "done",
            "version": registered.version,
            "report": registered.metrics,
            "report_digest": digest,
            "file_bytes": training.file_bytes + len(report),
            "report_files": [REPORT],
            "promotion": promotion,
            "seconds": _since(started_s),
            "error": None,
        }
        training = training.model_copy(update=done)
        await self._trainings.put(caller, caller.tenant, task, training, audited=True, is_known=True)
        await run_blocking(self._threads.of(caller.tenant), self._reports.put_missing, digest, report)
        return training.public()

    async def _snapshot(self, tenant: str, dataset: Sequence[ListedImage]) -> Snapshot:
        return await run_blocking(self._parse_threads.of(tenant), Snapshot.of, dataset)

    async def _started(
        self,
        caller: Caller,
        task: str,
        request: TrainingRequest,
        snapshot: Snapshot,
        rows: Mapping[str, NDArray[np.float16]],
        state: TrainingState,
        left_out: int = 0,
    ) -> Training:
        """Store a new training with its snapshot, and return it.

        Args:
            rows: features by digest, in which near-duplicates are looked for.
        """
        text = await run_blocking(self._parse_threads.of(caller.tenant), snapshot.text, task)
        info = await run_blocking(self._parse_threads.of(caller.tenant), snapshot.info, text)
        similar = await run_blocking(self._fits.of(caller.tenant), split_warnings, snapshot, rows)
        warnings = [*snapshot.warnings, *similar]
        if left_out:
            warnings.append(f"{left_out} images cannot be read and were left out")
        queued = state == "queued"
        training = Training(
            id=secrets.token_hex(8),
            task=task,
            recipe=request.recipe,
            state=state,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            seconds=0,
            snapshot=info,
            version=None,
            report=None,
            warnings=warnings,
            file_bytes=len(text),
            error=None if queued else INTERRUPTED,  # until the training ends: no training seems to run for ever
            author=Author(key=caller.key, name=caller.name, role=caller.role, address=caller.address),
            budget_s=request.budget_s if queued else 0,
        )
        await run_blocking(self._threads.of(caller.tenant), self._snapshots.put, info.digest, text)
        try:
            dropped = await self._trainings.put(caller, caller.tenant, task, training, audited=queued, queued=queued)
        except HubError:  # otherwise refused trainings would fill the disk until the next collection
            await self._removal.remove([StoredName("s:", info.digest)])
            raise
        # The last other training with this snapshot may have gone between the write and the listing.
        await run_blocking(self._threads.of(caller.tenant), self._snapshots.put_missing, info.digest, text)
        await self._removal.remove(dropped)
        return training


def _since(started_s: float) -> float:
    return round(time.monotonic() - started_s, 3)


def _member(report: bytes, file: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(report)) as archive:
        return archive.read(file)
