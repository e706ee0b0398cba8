"""Trainings that run as jobs: each gateway takes jobs from the registry's queue, has them run, and ends them.

A gateway holds a lease on each of its jobs, which it renews with the progress. If the gateway dies, its jobs die with
it and the lease expires: another gateway returns the job to the queue, from where it starts again with its snapshot. A
version is registered only while the lease holds, in one atomic step with a note of its number. So no two attempts of a
job make two versions, and each job ends.
"""

import asyncio
import hashlib
import io
import logging
import secrets
import zipfile
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from ...admission.authentication import Caller
from ...concurrency import TenantThreads, run_blocking
from ...dataset_schemas import TrainingProgress, TrainingState
from ...errors import HubError, NotFound, Unavailable
from ...registry.datasets.trainings import Job, Training, TrainingRegistry
from ...registry.tasks import TaskRegistry
from ...registry.versions import TrainingEndedError
from ...settings import Settings
from ...storage.store import Store
from ...training.job import BackboneSource, Trainer, TrainingInterrupted, TrainingJob, TrainingResult
from ..classification import ClassificationService
from .promotion import PromotionService

logger = logging.getLogger(__name__)

T = TypeVar("T")
LEASE_S = 20.0
BEAT_S = 1.0  # between two renewals
POLL_S = 2.0  # between two looks into the queue
RETRY_S = 2.0
STOP_S = 5.0  # to kill a job and to return it to the queue
PATIENCE_S = 600.0  # with an unavailable store, registry or worker at the start and at the end of a job
MAX_ATTEMPTS = 3
# Longest attempt: it ends a process that hangs. An image takes less than a second on the slowest machine.
BASE_S, PER_IMAGE_S, PER_BUDGET_S = 600.0, 1.0, 2.0
ABANDONED = "the gateway that ran it stopped"


@dataclass(frozen=True)
class JobSettings:
    """Settings that all jobs of a hub share.

    Attributes:
        max_running: jobs that the whole hub runs at once.
        max_pixels: limit on an image's width times height.
        threads: of torch, per job.
        int8: whether the workers compute frozen layers in int8.
    """

    store_url: str
    backbone: BackboneSource
    max_running: int
    max_pixels: int
    threads: int
    int8: bool = False

    @classmethod
    def of(cls, settings: Settings) -> "JobSettings":
        """Return what the trainings of a hub share."""
        device = "cuda" if settings.training_gpus else "cpu"
        return cls(
            store_url=str(settings.store_url),
            backbone=BackboneSource(settings.backbone, settings.checkpoint, settings.image_size, device),
            max_running=settings.max_trainings,
            max_pixels=settings.max_image_pixels,
            threads=settings.training_cpus,
            int8=settings.dtype == "int8",
        )


@dataclass
class _Held:
    """A job of this gateway, and its training as it will be written next."""

    job: Job
    token: str
    training: Training

    def update(self, **fields: Any) -> None:
        self.training = self.training.model_copy(update=fields)


class TrainingJobs:
    """The jobs that this gateway runs. `run` must run beside it, and `close` after it."""

    def __init__(
        self,
        *,
        trainings: TrainingRegistry,
        tasks: TaskRegistry,
        snapshots: Store,
        reports: Store,
        classification: ClassificationService,
        promotion: PromotionService,
        trainer: Trainer | None,
        settings: JobSettings,
        threads: TenantThreads,
    ) -> None:
        """
        Args:
            trainer: None: this gateway runs no jobs.
            threads: thread pool for calls to the store.
        """
        self._trainings = trainings
        self._tasks = tasks
        self._snapshots = snapshots
        self._reports = reports
        self._classification = classification
        self._promotion = promotion
        self._trainer = trainer
        self._settings = settings
        self._threads = threads
        self._woken = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """Look into the queue at once."""
        self._woken.set()

    async def run(self) -> None:
        """Take jobs and run them, until cancelled."""
        while self._trainer is not None:
            self._woken.clear()
            try:
                while await self._take():
                    pass
            except HubError:
                pass  # the registry is unavailable; the next round repeats
            except Exception:
                logger.exception("the queue of trainings cannot be read")
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):  # `wait_for` of Python 3.11 drops some cancellations
                    await self._woken.wait()

    async def close(self) -> None:
        """Kill the jobs of this gateway and return them to the queue, for other gateways."""
        while running := list(self._running):
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=STOP_S)

    async def _take(self) -> bool:
        """Take one job, and care for jobs of gateways that died. Return whether there was one."""
        token = secrets.token_hex(8)
        taken = await self._trainings.take(token, lease_s=LEASE_S, max_running=self._settings.max_running)
        for job in taken.expired:
            with suppress(NotFound):
                await self._give_up(_Held(job, "", await self._trainings.get(*job)), ABANDONED)
        if taken.job is None:
            return False
        task = asyncio.create_task(self._run(taken.job, token))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return True

    async def _run(self, job: Job, token: str) -> None:
        """Run a job to its end, and renew its lease meanwhile. If the lease is lost, kill the job."""
        try:
            training = await _insist(lambda: self._trainings.get(*job))
        except HubError as error:
            logger.error("training %s of %s:%s cannot start: %s", job.id, job.tenant, job.task, error.detail)
            return
        held = _Held(job, token, training)
        held.update(state="running", attempt=training.attempt + 1, started=_now(), progress=None)
        work = asyncio.create_task(self._work(held))
        try:
            while not work.done():
                with suppress(HubError):  # repeated; without Redis no gateway can take the job away
                    if not await self._trainings.write(job, token, held.training, lease_s=LEASE_S):
                        break  # it has ended, was cancelled, or its task is deleted
                await asyncio.wait({work}, timeout=BEAT_S)
        except asyncio.CancelledError:  # the gateway stops
            await _stopped(work)
            held.update(state="queued", attempt=training.attempt, progress=None)
            with suppress(HubError):
                await self._trainings.requeue(job, token, held.training)
            raise
        await _stopped(work)
        self.wake()

    async def _work(self, held: _Held) -> None:
        try:
            result = await self._result(held)
            await self._end(held, result)
        except TrainingInterrupted as error:
            reason = str(error)
            await _insist(lambda: self._give_up(held, reason))
        except TrainingEndedError:
            pass
        except HubError as error:
            await self._fail(held, error.detail)
        except Exception as error:
            logger.exception("training %s failed", held.job.id)
            await self._fail(held, f"internal error ({type(error).__name__}); the hub's log has it")

    async def _result(self, held: _Held) -> TrainingResult:
        """Have the job run, and return its result.

        Raises:
            TrainingInterrupted: its process ended without a result, or takes too long.
        """
        assert self._trainer is not None  # noqa: S101 (`run` takes no job without one)
        job = await self._job(held)
        longest_s = BASE_S + PER_IMAGE_S * held.training.snapshot.images + PER_BUDGET_S * job.budget_s
        try:
            async with asyncio.timeout(None) as deadline, aclosing(self._trainer.run(job)) as items:
                async for item in items:
                    if isinstance(item, TrainingResult):
                        return item
                    if deadline.when() is None:  # from its first sign on: before, it may wait for a machine
                        deadline.reschedule(asyncio.get_running_loop().time() + longest_s)
                    held.update(progress=item)
        except TimeoutError as error:
            raise TrainingInterrupted(f"its process did not end within {longest_s:.0f} s") from error
        raise TrainingInterrupted("its process ended without a result")

    async def _job(self, held: _Held) -> TrainingJob:
        training, shared = held.training, self._settings
        pool = self._threads.of(held.job.tenant)
        held.update(progress=TrainingProgress(stage="waiting for a machine"))
        limits = await _insist(self._classification.limits)
        snapshot = await _insist(lambda: run_blocking(pool, self._snapshots.get, training.snapshot.digest))
        # An attempt that was interrupted may have left its report.
        held.update(report_digest=None, report_files=[], file_bytes=len(snapshot))
        return TrainingJob(
            id=training.id,
            title=training.task,
            recipe=training.recipe,
            store_url=shared.store_url,
            snapshot=snapshot,
            snapshot_digest=training.snapshot.digest,
            backbone=shared.backbone,
            fingerprint=limits.backbone.fingerprint,
            budget_s=training.budget_s,
            max_kernels=limits.max_kernels,
            max_rank=limits.max_rank,
            max_pixels=shared.max_pixels,
            threads=shared.threads,
            int8=shared.int8,
        )

    async def _end(self, held: _Held, result: TrainingResult) -> None:
        """Keep the report, register the version, and end the job.

        Raises:
            HubError: the version cannot be registered.
            TrainingEndedError: the job was cancelled or taken away.
        """
        held.update(progress=TrainingProgress(stage="registering"))
        held.update(warnings=[*held.training.warnings, *result.warnings])
        report = result.report
        if report is not None:
            await self._keep_report(held, report)
        await self._conclude(held, result)
        if report is not None:  # the last other training with the same report may have gone before this one had it
            pool, digest = self._threads.of(held.job.tenant), str(held.training.report_digest)
            await _insist(lambda: run_blocking(pool, self._reports.put_missing, digest, report))

    async def _conclude(self, held: _Held, result: TrainingResult) -> None:
        if result.adapter is None:
            await self._fail(held, result.error)
            return
        data, job = result.adapter, held.job
        caller = Caller(**held.training.author.model_dump(), tenant=job.tenant)
        registered, promotion = await _insist(
            lambda: self._promotion.register(caller, job.task, data, (job.name, held.token))
        )
        made = {"version": registered.version, "report": registered.metrics, "promotion": promotion}
        await self._finish(held, "done", **made)

    async def _keep_report(self, held: _Held, report: bytes) -> None:
        digest = hashlib.sha256(report).hexdigest()
        pool = self._threads.of(held.job.tenant)
        await _insist(lambda: run_blocking(pool, self._reports.put, digest, report))
        with zipfile.ZipFile(io.BytesIO(report)) as archive:
            size = held.training.file_bytes + len(report)
            held.update(report_digest=digest, report_files=archive.namelist(), file_bytes=size)

    async def _give_up(self, held: _Held, reason: str) -> None:
        """Return an interrupted job to the queue; after the last attempt it has failed.

        Raises:
            Unavailable: the registry is unavailable.
        """
        version = await self._trainings.made_version(held.job)
        if version is not None:  # only the end was missing
            task = await self._tasks.task(held.job.tenant, held.job.task)
            made = (await self._tasks.version(held.job.tenant, task, version)).info()
            await self._finish(held, "done", version=version, report=made.metrics)
            return
        interruptions = [*held.training.interruptions, reason]
        logger.warning("training %s was interrupted: %s", held.job.id, reason)
        held.update(interruptions=interruptions, progress=None)
        if len(interruptions) < MAX_ATTEMPTS:
            held.update(state="queued")
            await self._trainings.requeue(held.job, held.token, held.training)
            self.wake()
        else:
            reasons = "; ".join(dict.fromkeys(interruptions))
            await self._fail(held, f"interrupted {len(interruptions)} times: {reasons}")

    async def _fail(self, held: _Held, reason: str) -> None:
        await self._finish(held, "failed", error=reason)

    async def _finish(self, held: _Held, state: TrainingState, **fields: Any) -> None:
        started = datetime.fromisoformat(held.training.started or held.training.created)
        seconds = round((datetime.now(UTC) - started).total_seconds(), 3)
        held.update(state=state, seconds=seconds, progress=None, **fields)
        await _insist(lambda: self._trainings.finish(held.job, held.token, held.training))


async def _insist(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call while a part of the hub is unavailable, for `PATIENCE_S` at most. Then raise `Unavailable`."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + PATIENCE_S
    while True:
        try:
            return await call()
        except Unavailable:
            if loop.time() > end_s:
                raise
        await asyncio.sleep(RETRY_S)


async def _stopped(work: "asyncio.Task[None]") -> None:
    """Cancel a job's work, and wait until its process is killed."""
    work.cancel()
    await asyncio.wait({work})
    if not work.cancelled() and (error := work.exception()):
        logger.error("a training ended with an error: %s", error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
