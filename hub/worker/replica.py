"""One Ray Serve replica: the frozen backbone, its bank, and batches that mix adapters and tenants."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from adapters import Bank, BankLimits, load_backbone
from adapters.data.images import normalise, preprocess_of
from adapters.serving.frozen_forms import can_int8, measure_forms

from ..admin_schemas import WorkerStatus
from ..admission.quotas import WORKER_FEATURES_QUEUED, WORKER_IMAGES_QUEUED
from ..errors import HubError
from ..observability import log_format, request_context, tracing
from ..observability.metrics import MetricTypes
from ..settings import Settings
from ..storage.store import Store
from ..worker_api import ROUTING_DIGEST_CHARS, Answer, CallOrigin, PassStats
from .adapter_cache import AdapterCache, Resident
from .batch_tuner import BatchTuner
from .batcher import Batcher
from .host_cache import HostCache
from .idle_passes import IdlePasses
from .metrics import WorkerMetrics
from .prewarming import Prewarming
from .stats import WorkerStats

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

LOAD_TIMEOUT_S = 15.0  # of a call that waits for its adapter; the gateway then answers 503
STATUS_INTERVAL_S = 2.0
PREWARMING_INTERVAL_S = 30.0
MAX_ROUTED_DIGESTS = 1000  # resident adapters that a worker reports to the routers
STORE_READERS = 8  # threads that read from the store
FEATURE_IMAGES, FEATURE_IMAGES_GPU = 4, 32  # of a pass without adapters: small, since a classification may wait for it
FEATURE_WAIT_S = 1.0  # between two such passes of a worker that is never idle
FORM_IMAGES = 8  # of the passes for which the forms of the frozen layers are measured: a usual batch on a CPU
TRIALS_PER_SIZE, TRIALS_TIMEOUT_S = 4, 5.0  # trial passes of a new worker


@dataclass(frozen=True, eq=False)
class Item:
    """One image of a batch."""

    pixels: NDArray[np.uint8]  # (3, H, W)
    adapter: Resident
    load_ms: float
    queued_at_s: float  # of time.perf_counter()
    traceparent: str  # of its call; "" if the call is not traced


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
        # One thread runs the passes, one after another, and loads the backbone. Each thread that runs torch keeps a
        # pool of helper threads; two pools on the same cores slow each other down.
        self._pass_thread = ThreadPoolExecutor(1, "pass")
        self._bank = self._pass_thread.submit(self._create_bank, settings).result()
        on_gpu = self._bank.device.type == "cuda"
        self._tuner = BatchTuner(settings.batch_size, (self._threads,) if on_gpu else (1, self._threads))
        self._pass_thread.submit(self._run_trials).result()
        self._name = f"{os.uname().nodename}/{os.getpid()}"
        readers, writer = (
            ThreadPoolExecutor(threads, name, initializer=torch.set_num_threads, initargs=(1,))
            for name, threads in (("read", STORE_READERS), ("put", 1))
        )
        self._host = HostCache(self._bank, store, readers=readers, limit_bytes=settings.host_cache_bytes)
        self._host_limit_bytes = settings.host_cache_bytes
        self._cache = AdapterCache(self._bank, self._host, writer=writer, wait_s=LOAD_TIMEOUT_S)
        # On a GPU one thread copies the next batch to the device while a pass computes.
        self._copy_thread = ThreadPoolExecutor(1, "copy") if on_gpu else None
        self._batcher: Batcher[Item, Answer] = Batcher(
            self._run_batch,
            batch_size=lambda: self._tuner.next_size,
            wait_s=settings.batch_wait_ms / 1000,
            tenant_limit=WORKER_IMAGES_QUEUED,
            max_running=2 if on_gpu else 1,
        )
        self._feature_passes: IdlePasses[NDArray[np.uint8], NDArray[np.float16]] = IdlePasses(
            self._run_features,
            lambda: self._batcher.is_idle,
            size=FEATURE_IMAGES_GPU if on_gpu else FEATURE_IMAGES,
            limit=WORKER_FEATURES_QUEUED,
            longest_wait_s=FEATURE_WAIT_S,
        )
        self._metrics = WorkerMetrics(metric_types())
        self._stats = WorkerStats()
        self._prewarming = prewarming
        self._used_digests: set[str] = set()  # since the last report to the registry
        self._images = 0  # queued and computed here
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
        if int8 and not can_int8(backbone):
            logger.warning("HUB_DTYPE=int8 needs a CPU with VNNI; this worker computes in float32")
        forms = measure_forms(backbone, min(settings.batch_size, FORM_IMAGES), int8=int8)
        for line in forms.describe():
            logger.info("frozen layers %s", line)
        return Bank(
            backbone,
            slots=settings.slots,
            max_rank=settings.max_rank,
            max_kernels=settings.max_kernels,
            forms=forms,
        )

    def _run_trials(self) -> None:
        """Measure passes with empty adapters, otherwise the first callers would wait for the tuner's trials."""
        bank = self._bank
        started_s = time.monotonic()
        for size in self._tuner.sizes:
            pixels = torch.zeros(size, *bank.input_size, device=bank.device, dtype=bank.dtype)
            trial = partial(self._run_trial, pixels)
            trial()  # the first pass of a size is slower
            for _ in range(TRIALS_PER_SIZE):
                self._run_timed(size, trial)
            if self._tuner.is_settled() or time.monotonic() - started_s > TRIALS_TIMEOUT_S:
                break
        costs = {size: round(ms, 3) for size, ms in self._tuner.costs().items()}
        logger.info("batch size %d; milliseconds per image by batch size: %s", self._tuner.best_size, costs)

    def _run_trial(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._bank.warm_up(pixels, kernels=2, rank=8).cpu()  # `cpu` waits for a GPU

    def _run_timed(self, images: int, compute: Callable[[], Result]) -> Result:
        """Run a pass, which must wait for the device, with the tuner's thread count; record its duration."""
        threads = self._tuner.choose_threads(images)
        torch.set_num_threads(threads)
        started_s = time.perf_counter()
        result = compute()
        self._tuner.record(images, threads, (time.perf_counter() - started_s) * 1000)
        return result

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

    async def classify(
        self,
        tenant: str,
        digest: str,
        images: Sequence[NDArray[np.uint8]],
        weight: float = 1.0,
        origin: CallOrigin = CallOrigin(),  # noqa: B008 (a tuple)
    ) -> list[Answer]:
        """Return one answer for each preprocessed image, all from one adapter.

        Args:
            tenant: the tenant whose share of this worker's time the images use.
            digest: sha256 of the adapter's file.
            images: uint8 arrays (3, H, W).
            weight: the tenant's share, relative to other tenants.
            origin: the request behind the call.

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
                items = [Item(pixels, adapter, load_ms, queued_at_s, origin.traceparent) for pixels in images]
                self._images += len(images)
                try:
                    return await self._batcher.submit(tenant, items, weight)
                finally:
                    self._images -= len(images)

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

    async def _run_batch(self, items: list[Item]) -> list[Answer]:
        """Compute one forward pass."""
        started_s = time.perf_counter()
        adapters = [item.adapter for item in items]
        # The pass has its own leases: a cancelled call must not free a slot that the pass reads.
        self._cache.retain(adapters)
        try:
            scores = await self._forward(items)
        finally:
            self._cache.release(adapters)
        compute_ms = (time.perf_counter() - started_s) * 1000
        tasks = len({adapter.digest for adapter in adapters})
        queue_ms = [(started_s - item.queued_at_s) * 1000 for item in items]
        self._metrics.record_pass(len(items), tasks, max(queue_ms), compute_ms)
        self._stats.record_pass(len(items), tasks)
        calls = {x.traceparent: (x.load_ms, ms) for x, ms in zip(items, queue_ms, strict=True) if x.traceparent}
        tracing.record_pass(calls, worker=self._name, images=len(items), tasks=tasks, compute_ms=compute_ms)
        return [
            Answer(row, PassStats(self._name, len(items), tasks, item.load_ms, ms, compute_ms), typicality)
            for item, (row, typicality), ms in zip(items, scores, queue_ms, strict=True)
        ]

    async def _run_features(self, images: list[NDArray[np.uint8]]) -> list[NDArray[np.float16]]:
        """Compute one small pass without adapters."""
        config = preprocess_of(self._bank.limits.backbone)
        mean, std = (torch.tensor(config[name], device=self._bank.device) for name in ("mean", "std"))

        def run() -> list[NDArray[np.float16]]:
            pixels = torch.from_numpy(np.stack(images)).to(self._bank.device)
            pooled = self._bank.frozen_features(normalise(pixels, mean, std))
            return [row.numpy() for row in pooled.half().cpu()]

        return await asyncio.get_running_loop().run_in_executor(self._pass_thread, run)

    async def _forward(self, items: list[Item]) -> list[tuple[NDArray[np.float32], float | None]]:
        """Return the probabilities of each image, float32 (K,), and its typicality."""
        loop = asyncio.get_running_loop()
        if self._copy_thread is None:
            return await loop.run_in_executor(self._pass_thread, lambda: self._compute(items, self._gather(items)))
        pixels = await loop.run_in_executor(self._copy_thread, self._gather, items)
        return await loop.run_in_executor(self._pass_thread, self._compute, items, pixels)

    def _gather(self, items: list[Item]) -> torch.Tensor:
        """Return the normalised pixels (B, 3, H, W) on the device."""
        device = self._bank.device
        pixels = torch.from_numpy(np.stack([item.pixels for item in items])).to(device)
        mean = torch.stack([item.adapter.mean for item in items]).to(device)
        std = torch.stack([item.adapter.std for item in items]).to(device)
        return normalise(pixels, mean, std)

    def _compute(self, items: list[Item], pixels: torch.Tensor) -> list[tuple[NDArray[np.float32], float | None]]:
        slots = [item.adapter.slot for item in items]

        def run() -> list[tuple[NDArray[np.float32], float | None]]:
            scores = self._bank.score(pixels, slots)
            return [(x.logits.float().softmax(0).cpu().numpy(), x.typicality) for x in scores]

        return self._run_timed(len(items), run)

    def _start_background(self) -> None:
        """Start the periodic tasks once. Not in `__init__`, which Serve may call outside of the event loop."""
        if not self._background:
            self._background = [
                asyncio.create_task(self._report_status()),
                asyncio.create_task(
                    _repeat(self.refresh_prewarming, PREWARMING_INTERVAL_S, "prewarming", logging.WARNING)
                ),
            ]

    async def _report_status(self) -> None:
        async with self._prewarming.status_board() as board:

            async def report() -> None:
                status = self.status()
                self._metrics.record_status(status, self._host.store_reads)
                await board.report(status)

            await _repeat(report, STATUS_INTERVAL_S, "status report", logging.DEBUG)


async def _repeat(step: Callable[[], Awaitable[None]], interval_s: float, name: str, level: int) -> None:
    """Run a step until the task is cancelled. A failed step is logged and does not end the repetition.

    Args:
        level: of the log line for an error of the hub, such as an unavailable registry.
    """
    task = asyncio.current_task()
    # redis-py 8.1.0 on Python 3.11 drops about one in sixteen cancellations at random moments (measured: 2,219 of
    # 36,382). Without this check the task would then never end.
    while task is None or not task.cancelling():
        try:
            await step()
        except HubError as error:
            logger.log(level, "%s failed, next try in %g s: %s", name, interval_s, error)
        except Exception:
            logger.exception("%s failed, next try in %g s", name, interval_s)
        await asyncio.sleep(interval_s)
