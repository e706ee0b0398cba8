"""One Ray Serve replica: the frozen backbone, its bank, and batches that mix adapters and tenants."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import isnan
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapters import Bank, BankLimits, load_backbone
from adapters.serving.frozen_forms import check_int8, measure_forms

from ..admin_schemas import WorkerStatus
from ..admission.quotas import WORKER_FEATURES_QUEUED, WORKER_IMAGES_QUEUED
from ..coroutines import Together
from ..errors import HubError
from ..observability import log_format, request_context, tracing
from ..observability.metrics import MetricTypes
from ..observability.request_context import CallOrigin
from ..registry.redis.repetition import repeat
from ..settings import Settings
from ..storage.store import Store
from ..worker_api import ROUTING_DIGEST_CHARS, Answer, CallFailed, PassStats, TaskAnswers
from .adapter_cache import AdapterCache
from .batch_tuner import BatchTuner, ways_of
from .batcher import Batcher
from .host_cache import HostCache
from .idle_passes import IdlePasses
from .many_tasks import ManyTasks
from .metrics import WorkerMetrics
from .passes import Item, ItemScores, Passes
from .prewarming import Prewarming
from .stats import WorkerStats

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 15.0  # of a call that waits for its adapter; the gateway then answers 503
STATUS_INTERVAL_S = 2.0
PREWARMING_INTERVAL_S = 30.0
MAX_ROUTED_DIGESTS = 1000  # resident adapters that a worker reports to the routers
STORE_READERS = 8  # threads that read from the store
FEATURE_IMAGES, FEATURE_IMAGES_GPU = 4, 32  # of a pass without adapters: small, since a classification may wait for it
FORM_IMAGES = 8  # of the passes for which the forms of the frozen layers are measured: a usual batch on a CPU
HEADS_SHARE = 4  # stacked heads may take the limit of host memory for adapters, divided by this


class Worker:
    """Classifies preprocessed images with any adapter of the store. `cluster.app.build` deploys it."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        prewarming: Prewarming,
        workers_per_node: Callable[[], int],
        metric_types: Callable[[], MetricTypes],
    ) -> None:
        """Load the backbone, create the bank, and load the adapters that calls will need first.

        Args:
            workers_per_node: returns the number of workers that share this node's CPUs.
            metric_types: returns the types of the metrics library. Called here, because Serve adds the labels of the
                replica that creates a metric.
        """
        log_format.start(settings.log_format, settings.log_level)
        tracing.start(settings.traces_exporter, settings.otlp_protocol)
        self._started_s = time.monotonic()
        self._threads = max(1, torch.get_num_threads() // workers_per_node())
        pass_thread = ThreadPoolExecutor(1, "pass")
        self._bank = pass_thread.submit(self._create_bank, settings).result()
        on_gpu = self._bank.device.type == "cuda"
        self._tuner = BatchTuner(settings.batch_size, ways_of(self._threads, on_gpu=on_gpu))
        self._passes = Passes(self._bank, self._tuner, pass_thread)
        self._name = f"{os.uname().nodename}/{os.getpid()}"
        readers, writer = (
            ThreadPoolExecutor(threads, name, initializer=torch.set_num_threads, initargs=(1,))
            for name, threads in (("read", STORE_READERS), ("put", 1))
        )
        self._host = HostCache(self._bank, store, readers=readers, limit_bytes=settings.host_cache_bytes)
        self._host_limit_bytes = settings.host_cache_bytes
        self._cache = AdapterCache(self._bank, self._host, writer=writer, wait_s=LOAD_TIMEOUT_S)
        self._many = ManyTasks(
            self._bank,
            self._host,
            self._cache,
            threads=writer,
            heads_limit_bytes=settings.host_cache_bytes // HEADS_SHARE,
        )
        self._batcher: Batcher[Item, tuple[ItemScores, PassStats]] = Batcher(
            self._run_batch,
            batch_size=lambda: self._tuner.next_size,
            wait_s=settings.batch_wait_ms / 1000,
            tenant_limit=WORKER_IMAGES_QUEUED,
            shared_size=lambda: self._passes.shared_size,
            always_shared=on_gpu,
            images_of=lambda item: item.passes,
        )

        passes: dict[str, Any] = {
            "is_idle": lambda: self._batcher.is_idle,
            "size": FEATURE_IMAGES_GPU if on_gpu else FEATURE_IMAGES,
            "limit": WORKER_FEATURES_QUEUED,
        }
        self._feature_passes: IdlePasses[NDArray[np.uint8], NDArray[np.float16]]
        self._feature_passes = IdlePasses(partial(self._passes.features, is_idle=passes["is_idle"]), **passes)
        self._idle_answers: IdlePasses[Item, tuple[ItemScores, PassStats]] = IdlePasses(self._run_batch, **passes)
        self._metrics = WorkerMetrics(metric_types())
        self._stats = WorkerStats()
        self._prewarming = prewarming
        self._used_digests: set[str] = set()  # since the last report to the registry
        self._images = 0  # queued and computed here
        self._together: Together[list[Answer] | HubError] = Together()
        self._background: list[asyncio.Task[None]] = []
        writer.submit(self._preload).result()

    def _create_bank(self, settings: Settings) -> Bank:
        torch.set_num_threads(self._threads)
        backbone = load_backbone(
            settings.backbone,
            settings.checkpoint,
            device=settings.torch_device,
            dtype=getattr(torch, settings.weights_dtype),
            image_size=settings.image_size,
        )
        int8 = settings.dtype == "int8"
        if int8:
            check_int8(backbone)
        torch.set_num_threads(max(1, self._threads // 2))  # of a batch beside another one, as under load
        forms = measure_forms(backbone, min(settings.batch_size, FORM_IMAGES), int8=int8)
        torch.set_num_threads(self._threads)
        for line in forms.describe():
            logger.info("frozen layers %s", line)
        return Bank(
            backbone,
            slots=settings.slots,
            max_rank=settings.max_rank,
            max_kernels=settings.max_kernels,
            forms=forms,
        )

    def _preload(self) -> None:
        """Load the pinned and the recently used adapters, as many as there are slots."""
        try:
            pinned = asyncio.run(self._prewarming.pinned())
            recent = asyncio.run(self._prewarming.recent_digests(self._bank.slots))
        except Exception:  # a worker without preloaded adapters is better than none
            logger.exception("no adapter is preloaded")
            return
        self._cache.pin(list(pinned.values()))
        for digest in list(dict.fromkeys([*pinned.values(), *recent]))[: self._bank.slots]:
            try:
                self._cache.preload(digest)
            except Exception as error:  # such as a deleted version, or an adapter of another backbone
                logger.info("adapter %s is not preloaded: %s", digest[:12], error)

    async def limits(self) -> BankLimits:
        """Return the limits of adapters on this worker. An answer means that the backbone is loaded."""
        self._start_background()
        return self._bank.limits

    async def prefetch(self, digest: str) -> None:
        """Load an adapter before its first call. A failure is left to that call."""
        await self._cache.prefetch(digest)

    async def check_health(self) -> None:
        """Answer Ray Serve's health check, which comes every ten seconds, also before the first call."""
        self._start_background()

    def record_routing_stats(self) -> dict[str, Any]:
        """Return the resident adapters and the batch size; Ray Serve passes them to the gateways' routers."""
        digests = [digest[:ROUTING_DIGEST_CHARS] for digest in self._cache.resident_digests()[-MAX_ROUTED_DIGESTS:]]
        return {"digests": digests, "batch": self._tuner.best_size}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the images on this worker and the batch size; Ray Serve passes them to the autoscaling policy.

        A load that waits for a slot counts as one image. A load that waits for its file does not count: on another
        worker it would wait as long.
        """
        images = float(self._images + self._cache.loads_without_slot)
        return {"images": images, "batch": float(self._tuner.best_size)}

    async def answer(self, *args: Any) -> list[Answer] | HubError:
        """Return the result of `classify`, or its error as a value.

        Serve logs each raised error with a traceback, on the event loop of all calls. A burst of refused calls would
        delay the accepted ones.
        """
        try:
            return await self.classify(*args)
        except HubError as error:
            return error

    async def answer_together(
        self, calls: Mapping[str, Sequence[Any]]
    ) -> AsyncGenerator[tuple[int, dict[str, list[Answer] | Exception]], None]:
        """Yield the results of `answer` for calls that were sent together, each as soon as it is there.

        An error of this worker's code belongs to its own call. The calls end with the send.

        Args:
            calls: id -> arguments of `answer`.

        Yields:
            The number of calls at this worker, and some of the results by id. A call that was dropped has none.
        """
        run = {id: self.answer(*arguments) for id, arguments in calls.items()}
        async for ended in self._together.results(run):
            yield len(self._together), {id: _result(task) for id, task in ended.items()}

    async def forget(self, ids: Sequence[str]) -> None:
        """Drop calls of `answer_together` whose clients disconnected."""
        self._together.drop(ids)

    async def classify(
        self,
        tenant: str,
        digest: str,
        images: Sequence[NDArray[np.uint8]],
        weight: float = 1.0,
        origin: CallOrigin = CallOrigin(),  # noqa: B008 (a tuple)
        idle: bool = False,
    ) -> list[Answer]:
        """Return one answer for each preprocessed image, all from one adapter.

        Args:
            tenant: the tenant whose share of this worker's time the images use.
            digest: sha256 of the adapter's file.
            images: uint8 arrays (3, H, W).
            weight: the tenant's share, relative to other tenants.
            origin: the request behind the call.
            idle: compute the images while no other image waits.

        Raises:
            Unavailable: the store cannot return the adapter's file, or the adapter is not in a slot in time.
            InvalidAdapter: the adapter does not fit this worker's backbone.
            LimitReached: too many images of the tenant are queued.
        """
        self._start_background()
        started_s = time.perf_counter()
        with request_context.use_origin(origin, tenant, digest):
            async with self._cache.lease(digest, tenant) as adapter:
                self._used_digests.add(digest)
                self._stats.record_call(tenant, origin.task, len(images))
                queued_at_s = time.perf_counter()
                load_ms = (queued_at_s - started_s) * 1000
                items = [
                    Item(pixels, adapter.mean, adapter.std, (adapter,), load_ms, queued_at_s, origin.traceparent)
                    for pixels in images
                ]
                # Answers in idle turns are not part of the load, which adds workers.
                found = await (self._idle_answers.submit(items) if idle else self._submit(tenant, weight, items))
                typicality = [float(scores.typicality[0]) for scores, _ in found]
                return [
                    Answer(scores.probabilities, stats, None if isnan(share) else share)
                    for (scores, stats), share in zip(found, typicality, strict=True)
                ]

    async def answer_tasks(self, *args: Any) -> TaskAnswers | HubError:
        """Return the result of `classify_tasks`, or its error as a value, as `answer` does."""
        try:
            return await self.classify_tasks(*args)
        except HubError as error:
            return error

    async def classify_tasks(
        self,
        tenant: str,
        digests: Sequence[str],
        image: NDArray[np.uint8],
        weight: float = 1.0,
        origin: CallOrigin = CallOrigin(),  # noqa: B008 (a tuple)
    ) -> TaskAnswers:
        """Return the answers of several adapters to one image; see `Workers.classify_tasks` and `many_tasks`."""
        self._start_background()
        with request_context.use_origin(origin, tenant, ""):
            self._used_digests.update(digests)
            self._stats.record_call(tenant, origin.task, 1)
            submit = partial(self._submit, tenant, weight)
            return await self._many.answer(tenant, digests, image, origin.traceparent, submit)

    async def _submit(
        self, tenant: str, weight: float, items: Sequence[Item]
    ) -> Sequence[tuple[ItemScores, PassStats]]:
        images = sum(item.passes for item in items)
        self._images += images
        try:
            return await self._batcher.submit(tenant, items, weight)
        finally:
            self._images -= images

    async def features(self, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float16]] | HubError:
        """Return the frozen backbone's features of images (see `Workers.features`), or the error as a value."""
        self._start_background()
        try:
            return await self._feature_passes.submit(images)
        except HubError as error:
            return error

    def status(self) -> WorkerStatus:
        """Return the worker's status. Its rates cover the time since the last call of this method."""
        rates = self._stats.next_interval()
        counts = self._cache.counts
        return WorkerStatus(
            worker=self._name,
            uptime_s=time.monotonic() - self._started_s,
            device=str(self._bank.device),
            slots=self._bank.slots,
            slots_used=self._cache.resident_count,
            host_bytes=self._host.size_bytes,
            host_limit_bytes=self._host_limit_bytes,
            waiting=self._batcher.queued,
            images_per_second=rates.images_per_second,
            images_per_pass=rates.images_per_pass,
            adapters_per_pass=rates.adapters_per_pass,
            tasks=rates.tasks,
            hits=counts.hits,
            loads=counts.loads,
            load_s=counts.load_s,
            evictions=counts.evictions,
            failures=counts.failures,
            frozen_layers=self._bank.forms.describe(),
        )

    async def refresh_prewarming(self) -> None:
        """Report the used adapters to the registry, and load the adapters of pinned tasks.

        Raises:
            Unavailable: the registry does not answer. The used adapters are part of the next report.
        """
        used, self._used_digests = self._used_digests, set()
        try:
            await self._prewarming.record_digests(used)
            pinned = list((await self._prewarming.pinned()).values())
        except HubError:
            self._used_digests |= used
            raise
        self._cache.pin(pinned)
        for digest in pinned:
            await self._cache.prefetch(digest)

    async def _run_batch(self, items: list[Item], shared: bool = False) -> list[tuple[ItemScores, PassStats]]:
        """Compute one forward pass."""
        started_s = time.perf_counter()
        adapters = [adapter for item in items for adapter in item.adapters]
        # The pass has its own leases: a cancelled call must not free a slot that the pass reads.
        self._cache.retain(adapters)
        try:
            scores = await self._passes.run(items, shared)
        finally:
            self._cache.release(adapters)
        compute_ms = (time.perf_counter() - started_s) * 1000
        images = sum(item.passes for item in items)
        heads = {item.heads: len(item.heads.classes) for item in items if item.heads is not None}
        tasks = len({adapter.digest for adapter in adapters}) + sum(heads.values())
        queue_ms = [(started_s - item.queued_at_s) * 1000 for item in items]
        self._metrics.record_pass(images, tasks, max(queue_ms), compute_ms)
        self._stats.record_pass(images, tasks)
        calls = {x.traceparent: (x.load_ms, ms) for x, ms in zip(items, queue_ms, strict=True) if x.traceparent}
        tracing.record_pass(calls, worker=self._name, images=images, tasks=tasks, compute_ms=compute_ms)
        return [
            (own, PassStats(self._name, images, tasks, item.load_ms, ms, compute_ms))
            for item, own, ms in zip(items, scores, queue_ms, strict=True)
        ]

    def _start_background(self) -> None:
        """Start the periodic tasks once. Not in `__init__`, which Serve may call outside of the event loop."""
        if not self._background:
            self._background = [
                asyncio.create_task(self._report_status()),
                asyncio.create_task(
                    repeat(self.refresh_prewarming, PREWARMING_INTERVAL_S, "prewarming", logging.WARNING)
                ),
            ]

    async def _report_status(self) -> None:
        async with self._prewarming.status_board() as board:

            async def report() -> None:
                status = self.status()
                self._metrics.record_status(status, self._host.store_reads)
                await board.report(status)

            await repeat(report, STATUS_INTERVAL_S, "status report", logging.DEBUG)


def _result(task: "asyncio.Task[list[Answer] | HubError]") -> list[Answer] | Exception:
    """Return what a call returned, or its error in a form that every process can read."""
    error = task.exception()
    if error is None:
        return task.result()
    logger.error("a call failed", exc_info=error)
    return CallFailed(f"{type(error).__name__}: {error}")
