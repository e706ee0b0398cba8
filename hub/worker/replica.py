"""One Ray Serve replica: the frozen backbone, its bank, and batches that mix tasks and tenants."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from adapters import Bank, BankLimits, load_backbone
from adapters.data.images import normalise

from ..cluster.metrics import WorkerMetrics
from ..errors import HubError
from ..observability import log_format, request_context, tracing
from ..registry.status import TELL_S, Tally
from ..schemas import WorkerStatus
from ..settings import Settings
from ..storage.store import Store
from ..worker_api import ROUTING_DIGEST_CHARS, Answer, CallOrigin, PassStats
from .adapter_cache import Resident, Tiers
from .batch_tuner import Pace
from .batcher import Batcher
from .prewarming import Warmth

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

PARKED_S = 15.0
TENANT_QUEUE = 512  # images of one tenant that wait at one worker; more are refused
WARMTH_S = 30.0
TOLD = 1000  # resident adapters that a worker tells the routers of
READERS = 8  # files read from the store at once
TRIALS, REHEARSAL_S = 4, 5.0  # how often, and for how long, a new worker tries each size of pass


@dataclass(frozen=True, eq=False)
class Item:
    """One image of a batch: uint8 (3, H, W), and whose it is."""

    pixels: np.ndarray
    adapter: Resident
    load_ms: float
    since: float  # time.perf_counter() when it joined the queue
    traceparent: str  # of its call; "" where it is not traced


class Worker:
    """Classifies preprocessed images with any adapter in the store. Deployed by `app.build`."""

    def __init__(self, settings: Settings, store: Store, warmth: Warmth, sharing: Callable[[], int]) -> None:
        """Load the backbone, make the bank, and fill it with what will be asked for.

        Args:
            sharing: tells how many workers have torch's threads of this node between them.
        """
        log_format.start(settings.log_format, settings.log_level)
        tracing.start(settings.traces_exporter, settings.otlp_protocol)
        self._started = time.monotonic()
        self._threads = max(1, torch.get_num_threads() // sharing())
        # One thread for passes, so that they run one after another; it loads the backbone too, since every thread
        # that runs torch keeps a pool of helpers of its own, and two pools on the same cores slow each other down.
        self._passes = ThreadPoolExecutor(1, "pass")
        self._bank = self._passes.submit(self._load, settings).result()
        on_cpu = self._bank.device.type == "cpu"
        self._pace = Pace(settings.batch_size, (1, self._threads) if on_cpu else (self._threads,))
        self._passes.submit(self._rehearse).result()
        self._name = f"{os.uname().nodename}/{os.getpid()}"
        reads, puts = (
            ThreadPoolExecutor(threads, name, initializer=torch.set_num_threads, initargs=(1,))
            for name, threads in (("read", READERS), ("put", 1))
        )
        self._tiers = Tiers(
            self._bank, store, reads=reads, puts=puts, host_cache_bytes=settings.host_cache_bytes, wait_s=PARKED_S
        )
        # On a GPU the next batch is on its way to the device while one computes.
        self._ahead = ThreadPoolExecutor(1, "ahead") if self._bank.device.type == "cuda" else None
        self._batcher: Batcher[Item, Answer] = Batcher(
            self._run,
            batch_size=self._pace.most,
            wait_s=settings.batch_wait_ms / 1000,
            tenant_queue=TENANT_QUEUE,
            in_flight=2 if self._ahead else 1,
        )
        self._metrics = WorkerMetrics(
            self._tiers,
            slots=self._bank.slots,
            host_limit_bytes=settings.host_cache_bytes,
            waiting=lambda: self._batcher.waiting,
        )
        self._host_limit_bytes = settings.host_cache_bytes
        self._tally = Tally()
        self._warmth = warmth
        self._used: set[str] = set()
        self._images = 0  # queued or computed here
        self._keeping_warm: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        puts.submit(self._preload).result()

    def _load(self, settings: Settings) -> Bank:
        torch.set_num_threads(self._threads)
        backbone = load_backbone(
            settings.backbone, settings.checkpoint, device=settings.torch_device, dtype=getattr(torch, settings.dtype)
        )
        return Bank(backbone, slots=settings.slots, max_rank=settings.max_rank, max_kernels=settings.max_kernels)

    def _rehearse(self) -> None:
        """Passes over images with small adapters, so that the first callers' are not all trials."""
        bank = self._bank
        began = time.monotonic()
        for size in self._pace.sizes:
            pixels = torch.zeros(size, *bank.input_size, device=bank.device, dtype=bank.dtype)
            rehearse = partial(self._rehearse_once, pixels)
            rehearse()  # the first of a size takes longer
            for _ in range(TRIALS):
                self._timed(size, rehearse)
            if self._pace.settled() or time.monotonic() - began > REHEARSAL_S:
                break
        logger.info("at most %s images a pass", self._pace)

    def _rehearse_once(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._bank.warm_up(pixels, kernels=2, rank=8).cpu()  # waits for a GPU

    def _timed(self, images: int, work: Callable[[], Result]) -> Result:
        """What `work`, a pass that waits for the device, gives; its time is noted."""
        threads = self._pace.threads(images)
        torch.set_num_threads(threads)
        began = time.perf_counter()
        result = work()
        self._pace.note(images, threads, (time.perf_counter() - began) * 1000)
        return result

    def _preload(self) -> None:
        """Pinned and recently busy adapters, before this worker says that it is ready."""
        try:
            pinned = asyncio.run(self._warmth.pinned())
            busy = asyncio.run(self._warmth.busy(self._bank.slots))
        except Exception:  # whatever it is, a worker without it is better than none
            logger.exception("nothing was preloaded")
            return
        self._tiers.pin(list(pinned.values()))
        for digest in list(dict.fromkeys([*pinned.values(), *busy]))[: self._bank.slots]:
            try:
                self._tiers.preload(digest)
            except Exception as error:  # a version that is gone, or of another backbone
                logger.info("adapter %s was not preloaded: %s", digest[:12], error)

    async def limits(self) -> BankLimits:
        """What adapters must fit here; the answer also says that the backbone is loaded."""
        self._stay_warm()
        return self._bank.limits

    async def prefetch(self, digest: str) -> None:
        """Bring an adapter here that will be asked for soon. Errors are left for whoever asks."""
        await self._tiers.prefetch(digest)

    async def check_health(self) -> None:
        """Ray Serve asks for this every ten seconds, also of a worker that nobody has called yet."""
        self._stay_warm()

    def record_routing_stats(self) -> dict[str, Any]:
        """Ray Serve asks for this, for the routers: adapters in slots here, and images of the largest pass."""
        digests = [digest[:ROUTING_DIGEST_CHARS] for digest in self._tiers.resident_digests()[-TOLD:]]
        return {"digests": digests, "batch": self._pace.images}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray Serve asks for this, for the autoscaler: images queued and computed here, and of the largest pass.

        A cold adapter that waits for its file is left out: another worker would wait for that just as long. One that
        waits for a slot counts as an image.
        """
        return {"images": float(self._images + self._tiers.reserving), "batch": float(self._pace.images)}

    async def answer(self, *args: Any) -> list[Answer] | HubError:
        """`classify` for the gateways; an error of ours is a value: whatever is raised Serve logs with its traceback,
        on the loop that all calls share, and a crowd that is refused would hold up the others."""
        try:
            return await self.classify(*args)
        except HubError as error:
            return error

    async def classify(
        self,
        tenant: str,
        digest: str,
        images: Sequence[np.ndarray],
        weight: float = 1.0,
        origin: CallOrigin = CallOrigin(),  # noqa: B008 (a tuple)
    ) -> list[Answer]:
        """Probabilities of preprocessed images, all for one adapter.

        Args:
            tenant: in whose turn they are computed.
            digest: which adapter.
            images: uint8 arrays (3, H, W).
            weight: the tenant's share beside other tenants.
            origin: of the call, for log lines, traces and the list of busy tasks.

        Raises:
            Unavailable: the adapter's file cannot be had, or it is not in a slot in time.
            InvalidAdapter: it does not fit this worker.
            LimitReached: too many of the tenant's images are waiting here.
        """
        self._stay_warm()
        began = time.perf_counter()
        with request_context.use_origin(origin, tenant, digest):
            async with self._tiers.lease(digest, tenant) as adapter:
                self._used.add(digest)
                self._tally.note_images(tenant, origin.task, len(images))
                since = time.perf_counter()
                load_ms = (since - began) * 1000
                items = [Item(pixels, adapter, load_ms, since, origin.traceparent) for pixels in images]
                self._images += len(images)
                try:
                    return await self._batcher.submit(tenant, items, weight)
                finally:
                    self._images -= len(images)

    async def _run(self, items: list[Item]) -> list[Answer]:
        """One forward pass."""
        began = time.perf_counter()
        adapters = [item.adapter for item in items]
        # The pass has leases of its own: a caller that goes away must not let its slot be taken from under it.
        self._tiers.keep(adapters)
        try:
            probabilities = await self._forward(items)
        finally:
            self._tiers.release(adapters)
        compute_ms = (time.perf_counter() - began) * 1000
        tasks = len({adapter.digest for adapter in adapters})
        queue_ms = [(began - item.since) * 1000 for item in items]
        self._metrics.note(len(items), tasks, max(queue_ms), compute_ms)
        self._tally.note_pass(len(items), tasks)
        calls = {x.traceparent: (x.load_ms, ms) for x, ms in zip(items, queue_ms, strict=True) if x.traceparent}
        tracing.record_pass(calls, worker=self._name, images=len(items), tasks=tasks, compute_ms=compute_ms)
        return [
            Answer(row, PassStats(self._name, len(items), tasks, item.load_ms, waited_ms, compute_ms))
            for item, row, waited_ms in zip(items, probabilities, queue_ms, strict=True)
        ]

    async def _forward(self, items: list[Item]) -> list[np.ndarray]:
        loop = asyncio.get_running_loop()
        if self._ahead is None:
            return await loop.run_in_executor(self._passes, lambda: self._compute(items, self._gather(items)))
        pixels = await loop.run_in_executor(self._ahead, self._gather, items)
        return await loop.run_in_executor(self._passes, self._compute, items, pixels)

    def _gather(self, items: list[Item]) -> torch.Tensor:
        """Normalised pixels (B, 3, H, W) on the device."""
        device = self._bank.device
        pixels = torch.from_numpy(np.stack([item.pixels for item in items])).to(device)
        mean, std = (
            torch.stack([getattr(item.adapter, name) for item in items]).to(device) for name in ("mean", "std")
        )
        return normalise(pixels, mean, std)

    def _compute(self, items: list[Item], pixels: torch.Tensor) -> list[np.ndarray]:
        slots = [item.adapter.slot for item in items]
        return self._timed(
            len(items), lambda: [row.float().softmax(0).cpu().numpy() for row in self._bank.forward(pixels, slots)]
        )

    def _stay_warm(self) -> None:
        """Here and not in `__init__`, which Serve may call outside of the loop."""
        if self._keeping_warm is None:
            self._keeping_warm = asyncio.create_task(self._keep_warm())
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        """Tell how this worker is: metrics and the registry; for ever, beside everything else."""
        async with self._warmth.board() as board:
            while True:
                try:
                    self._metrics.refresh()
                    await board.tell(self._status())
                except HubError as error:
                    logger.debug("how this worker is was not told: %s", error)
                except Exception:
                    logger.exception("how this worker is was not told")
                await asyncio.sleep(TELL_S)

    def _status(self) -> WorkerStatus:
        images_per_second, images_per_pass, adapters_per_pass, tasks = self._tally.told()
        counts = self._tiers.counts
        return WorkerStatus(
            worker=self._name,
            uptime_s=time.monotonic() - self._started,
            device=str(self._bank.device),
            slots=self._bank.slots,
            slots_used=self._tiers.resident,
            host_bytes=self._tiers.host_bytes,
            host_limit_bytes=self._host_limit_bytes,
            waiting=self._batcher.waiting,
            images_per_second=images_per_second,
            images_per_pass=images_per_pass,
            adapters_per_pass=adapters_per_pass,
            tasks=tasks,
            hits=counts.hits,
            loads=counts.loads,
            load_s=counts.load_s,
            evictions=counts.evictions,
            failures=counts.failures,
        )

    async def _keep_warm(self) -> None:
        """Tell what is busy here, and follow the pinned tasks; for ever, beside everything else."""
        while True:
            used, self._used = self._used, set()
            try:
                await self._warmth.note(used)
                pinned = list((await self._warmth.pinned()).values())
                self._tiers.pin(pinned)
                for digest in pinned:
                    await self._tiers.prefetch(digest)
            except HubError as error:
                self._used |= used
                logger.warning("what is busy was not noted: %s", error)
            except Exception:
                logger.exception("what is busy was not noted")
            await asyncio.sleep(WARMTH_S)
