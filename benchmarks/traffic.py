"""Traffic for the engine benchmark: a worker in this process over a growing store, and several kinds of callers."""

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_model

from adapters import Adapter, Backbone, KarstConfig
from adapters.data.images import normalise
from hub.admin_schemas import WorkerStatus
from hub.cluster.ray_compat import ray_metrics
from hub.errors import LimitReached
from hub.registry.status import StatusBoard
from hub.settings import Settings
from hub.storage.store import Store
from hub.worker.prewarming import Prewarming
from hub.worker.replica import Worker

from .common import copy_of, random_adapter

CONFIG = KarstConfig(kernels=2, rank=8)
BATCH = 32
CALLERS = 2 * BATCH
DISTINCT = 8  # adapters with different numbers; the others differ only in their metadata, and so in their digest
TOLERANCE = 1e-4


class CountingStore(Store):
    """Store that counts its reads."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads = 0

    def get(self, digest: str) -> bytes:
        self.reads += 1
        return super().get(digest)


class Site:
    """Shared parts of the scenarios: a backbone, a growing store, sizes."""

    def __init__(self, backbone: Backbone, folder: Path, rounds: int, images: int, scale: float) -> None:
        self.backbone, self.rounds, self.images = backbone, rounds, images
        self.store = CountingStore(str(folder / "store"))
        self._scale = scale
        self._checkpoint = folder / "backbone.safetensors"
        save_model(backbone.model, str(self._checkpoint))
        self._originals = [random_adapter(backbone, CONFIG, seed=seed) for seed in range(DISTINCT)]
        self._digests: list[str] = []
        pixels = np.random.default_rng(0).integers(0, 256, (4, *backbone.input_size), dtype=np.uint8)
        self.pixels = list(pixels)

    def count(self, full: int) -> int:
        return max(4, round(full * self._scale))

    def digests(self, count: int) -> list[str]:
        """Return the digests of `count` adapters in the store, and add those that are missing."""
        for i in track(range(len(self._digests), count), "adapters", disable=len(self._digests) >= count):
            adapter = copy_of(self._originals[i % DISTINCT], i, torch.float16)
            self.store.put(adapter.digest, adapter.data)
            self._digests.append(adapter.digest)
        return self._digests[:count]

    async def worker(self, slots: int, **settings: Any) -> Worker:
        """Return a worker as in the hub, over this store.

        Raises:
            RuntimeError: its answers differ from those of merged models.
        """
        made = Settings(
            backbone=self.backbone.name,
            checkpoint=self._checkpoint,
            slots=slots,
            max_rank=CONFIG.rank,
            max_kernels=CONFIG.kernels,
            batch_size=BATCH,
            **settings,
        )
        worker = Worker(made, self.store, _Cold(), lambda: 1, ray_metrics)
        answers = await asyncio.gather(
            *(worker.classify("check", digest, [self.pixels[0]]) for digest in self.digests(min(4, slots)))
        )
        for digest, (answer,) in zip(self._digests, answers, strict=False):
            adapter = Adapter.read(self.store.get(digest))
            mean, std = (torch.tensor(adapter.preprocess[name]) for name in ("mean", "std"))
            with torch.inference_mode():
                pixels = normalise(torch.from_numpy(self.pixels[0])[None], mean, std)
                expected = adapter.merge(self.backbone)(pixels)[0].softmax(0)
            difference = float(np.abs(expected.numpy() - answer.probabilities).max())
            if not difference <= TOLERANCE:
                raise RuntimeError(f"mixed and merged differ by {difference:.1e}, allowed are {TOLERANCE:.0e}")
        return worker


class _Cold(Prewarming):
    """Prewarming without recent adapters, which records no digests."""

    def __init__(self) -> None:
        pass

    async def pinned(self) -> dict[str, str]:
        return {}

    async def recent_digests(self, limit: int) -> list[str]:
        return []

    async def record_digests(self, digests: Iterable[str]) -> None:
        pass

    @asynccontextmanager
    async def status_board(self) -> AsyncIterator[StatusBoard]:
        yield _Silent()


class _Silent(StatusBoard):
    """Status board that discards reports and does not use Redis."""

    def __init__(self) -> None:
        pass

    async def report(self, status: WorkerStatus) -> None:
        pass


@dataclass(frozen=True)
class Driven:
    """Figures of a run of traffic: images per second, and each call's milliseconds."""

    rate: float
    ms: list[float]

    @property
    def p50(self) -> float:
        return statistics.median(self.ms)

    @property
    def p95(self) -> float:
        return float(np.quantile(self.ms, 0.95))

    @property
    def p99(self) -> float:
        return float(np.quantile(self.ms, 0.99))


async def drive(
    worker: Worker, site: Site, digests: Iterable[str], callers: int = CALLERS, tenant: str = "tenant"
) -> Driven:
    """Classify one image for each of `digests`, by several callers in a closed loop."""
    left = iter(digests)
    ms: list[float] = []

    async def call(pixels: np.ndarray) -> None:
        for digest in left:
            began = time.perf_counter()
            await worker.classify(tenant, digest, [pixels])
            ms.append(1e3 * (time.perf_counter() - began))

    began = time.perf_counter()
    await asyncio.gather(*(call(site.pixels[i % len(site.pixels)]) for i in range(callers)))
    return Driven(len(ms) / (time.perf_counter() - began), ms)


async def probed(worker: Worker, site: Site, warm: Sequence[str], asked: Iterator[str]) -> tuple[list[float], Driven]:
    """Return milliseconds of calls for `asked`, five per second, and figures of four concurrent callers of `warm`."""
    others = asyncio.create_task(drive(worker, site, itertools.islice(itertools.cycle(warm), site.images), 4))
    ms = []
    while not others.done():
        began = time.perf_counter()
        await worker.classify("probe", next(asked), [site.pixels[0]])
        ms.append(1e3 * (time.perf_counter() - began))
        await asyncio.sleep(0.2)
    return ms, await others


async def arriving(worker: Worker, site: Site, digests: Sequence[str], tenant: str, rate: float) -> Driven:
    """Run an open loop of single images at exponential intervals, `rate` per second on average."""
    rng = random.Random(0)
    ms: list[float] = []

    async def call() -> None:
        began = time.perf_counter()
        await worker.classify(tenant, rng.choice(digests), [site.pixels[0]])
        ms.append(1e3 * (time.perf_counter() - began))

    began = time.perf_counter()
    at, calls = began, []
    for _ in range(site.images // 4):
        at += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        calls.append(asyncio.create_task(call()))
    await asyncio.gather(*calls)
    return Driven(len(ms) / (time.perf_counter() - began), ms)


async def flooding(worker: Worker, site: Site, digests: Sequence[str], rate: float) -> float:
    """Offer `rate` images per second until cancelled; return the refused share."""
    offered, refused, calls = 0, 0, set()

    async def call(digest: str) -> None:
        nonlocal refused
        try:
            await worker.classify("greedy", digest, [site.pixels[1]])
        except LimitReached:
            refused += 1

    began = time.perf_counter()
    try:
        for digest in itertools.cycle(digests):
            await asyncio.sleep(max(0.0, began + offered / rate - time.perf_counter()))
            task = asyncio.create_task(call(digest))
            calls.add(task)
            task.add_done_callback(calls.discard)
            offered += 1
    except asyncio.CancelledError:
        for task in list(calls):
            task.cancel()
    return refused / max(offered, 1)
