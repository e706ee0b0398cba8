"""One Ray Serve replica: the frozen backbone, its bank, and batches that mix tasks and tenants."""

import asyncio
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray import serve

from adapters import Bank, BankLimits, load_backbone
from adapters.backbone import features
from adapters.data import normalise

from .answers import Answer, Pass
from .settings import Settings
from .store import Store
from .tiers import Resident, Tiers

SLOT_WAIT_S = 10.0
SMALL_PASS_MS = 20.0


@dataclass(frozen=True)
class Item:
    """One image of a batch: uint8 (3, H, W), and whose it is."""

    pixels: np.ndarray
    adapter: Resident
    since: float  # time.perf_counter() when it joined the queue


class Worker:
    """Classifies preprocessed images with any adapter in the store. Deployed by `app.build`."""

    def __init__(self, settings: Settings, store: Store, threads: int) -> None:
        """Load the backbone and make the bank.

        Args:
            threads: torch's threads for one forward pass.
        """
        self._threads = threads
        # One thread for passes, so that they run one after another; it loads the backbone too, since every thread
        # that runs torch keeps a pool of helpers of its own, and two pools on the same cores slow each other down.
        self._passes = ThreadPoolExecutor(1, "pass")
        self._bank = self._passes.submit(self._load, settings).result()
        self._image_ms = self._passes.submit(self._time_one_image).result()
        self._name = f"{os.uname().nodename}/{os.getpid()}"
        self._tiers = Tiers(
            self._bank,
            store,
            ThreadPoolExecutor(2, "load"),
            host_cache_bytes=settings.host_cache_bytes,
            wait_s=SLOT_WAIT_S,
        )
        batch: Any = self._batch  # what `serve.batch` adds is not in its type
        batch.set_max_batch_size(settings.batch_size)
        batch.set_batch_wait_timeout_s(settings.batch_wait_ms / 1000)

    def _load(self, settings: Settings) -> Bank:
        torch.set_num_threads(self._threads)
        backbone = load_backbone(
            settings.backbone, settings.checkpoint, device=settings.torch_device, dtype=getattr(torch, settings.dtype)
        )
        return Bank(backbone, slots=settings.slots, max_rank=settings.max_rank, max_kernels=settings.max_kernels)

    def _time_one_image(self) -> float:
        """Milliseconds of the frozen backbone for one image on one thread."""
        backbone = self._bank.backbone
        pixels = torch.zeros(1, *backbone.input_size, device=backbone.device, dtype=backbone.dtype)
        torch.set_num_threads(1)
        taken = []
        with torch.inference_mode():
            for _ in range(3):
                began = time.perf_counter()
                features(backbone.model, pixels)
                taken.append((time.perf_counter() - began) * 1000)
        return min(taken)

    async def limits(self) -> BankLimits:
        """What adapters must fit here; the answer also says that the backbone is loaded."""
        return self._bank.limits

    async def classify(self, digest: str, images: Sequence[np.ndarray]) -> list[Answer]:
        """Probabilities of preprocessed images, all for one adapter.

        Args:
            digest: which adapter.
            images: uint8 arrays (3, H, W).

        Raises:
            Unavailable: the adapter's file cannot be had, or every slot is in use.
            InvalidAdapter: it does not fit this worker.
        """
        # Shielded: the lease must outlast the batch even where the caller goes away, or its slot could be taken
        # from under a pass that others share.
        return await asyncio.shield(asyncio.create_task(self._leased(digest, images)))

    async def _leased(self, digest: str, images: Sequence[np.ndarray]) -> list[Answer]:
        began = time.perf_counter()
        async with self._tiers.lease(digest) as adapter:
            since = time.perf_counter()
            load_ms = (since - began) * 1000
            jobs = (self._batch(Item(pixels, adapter, since)) for pixels in images)
            done = await asyncio.gather(*jobs, return_exceptions=True)  # all of them, whatever becomes of one
        answers = []
        for result in done:
            if isinstance(result, BaseException):
                raise result
            probabilities, shape, times = result
            answers.append(Answer(probabilities, Pass(self._name, *shape, load_ms, *times)))
        return answers

    @serve.batch
    async def _batch(self, items: list[Item]) -> list[tuple[np.ndarray, tuple[int, int], tuple[float, float]]]:
        """One forward pass; for each item its probabilities, (images, tasks) and (queue, compute) milliseconds."""
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        probabilities = await loop.run_in_executor(self._passes, self._compute, items)
        compute_ms = (time.perf_counter() - began) * 1000
        shape = len(items), len({item.adapter.digest for item in items})
        return [
            (p, shape, ((began - item.since) * 1000, compute_ms)) for p, item in zip(probabilities, items, strict=True)
        ]

    def _compute(self, items: list[Item]) -> list[np.ndarray]:
        device = self._bank.backbone.device
        # A small pass is over before a second thread is awake.
        torch.set_num_threads(1 if len(items) * self._image_ms < SMALL_PASS_MS else self._threads)
        pixels = torch.from_numpy(np.stack([item.pixels for item in items])).to(device)  # (B, 3, H, W)
        mean, std = (
            torch.stack([getattr(item.adapter, name) for item in items]).to(device) for name in ("mean", "std")
        )
        logits = self._bank.forward(normalise(pixels, mean, std), [item.adapter.slot for item in items])
        return [row.float().softmax(0).cpu().numpy() for row in logits]
