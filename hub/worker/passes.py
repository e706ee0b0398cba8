"""Forward passes of one worker: the thread that computes them, and the way of images to it and of answers back."""

import asyncio
import ctypes
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from adapters import Bank, Heads, ImageScores, ImageTasks
from adapters.data.images import normalise, preprocess_of

from .adapter_cache import Resident
from .batch_tuner import BatchTuner, Way
from .fair_queue import BatchSize

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

PAUSE_S, LONGEST_PAUSE_S = 0.001, 1.0  # of a pass that gives way to classification
TRIALS_TIMEOUT_S = 5.0  # of the trial passes of a new worker


@dataclass(frozen=True, eq=False)
class Item:
    """One image of a batch, with all adapters that classify it.

    Attributes:
        passes: as how many images it counts: its work in frozen passes of one image, rounded up.
    """

    pixels: NDArray[np.uint8]  # (3, H, W)
    mean: torch.Tensor  # (3,) float32, of its normalisation
    std: torch.Tensor
    adapters: Sequence[Resident]
    load_ms: float
    queued_at_s: float  # of time.perf_counter()
    traceparent: str  # of its call; "" if the call is not traced
    heads: Heads | None = None
    passes: int = 1

    @property
    def tasks(self) -> int:
        """Number of adapters."""
        return len(self.adapters) + (len(self.heads.classes) if self.heads is not None else 0)


class ItemScores(NamedTuple):
    """Answers to an item: of its adapters in slots, then of its heads.

    Attributes:
        probabilities: float32, those of one adapter behind those of another.
        sizes: number of labels of each adapter.
        typicality: in [0, 1]; NaN for an adapter without typicality.
    """

    probabilities: NDArray[np.float32]
    sizes: list[int]
    typicality: NDArray[np.float64]


class Passes:
    """The forward passes of a bank.

    One thread computes those of classification. Where two halves of a pass are faster, a second thread computes one of
    them. It also computes whole passes beside those of the first thread, where two share the cores. Another thread
    computes features. It lets classification go first before each block of the backbone.
    """

    def __init__(self, bank: Bank, tuner: BatchTuner, thread: ThreadPoolExecutor) -> None:
        """Measure passes with empty adapters, otherwise the first callers would wait for the tuner's trials.

        Args:
            thread: one thread, which has loaded the backbone. Each thread that runs torch with several threads keeps
                a pool of helper threads; two pools on the same cores slow each other down.
        """
        self._bank = bank
        self._tuner = tuner
        self._thread = thread
        self._second_thread = ThreadPoolExecutor(1, "half-pass")
        self._beside = {thread: 0, self._second_thread: 0}  # passes on half of the cores
        self._features_thread = ThreadPoolExecutor(1, "features", initializer=torch.set_num_threads, initargs=(1,))
        # On a GPU one thread copies the next batch to the device while a pass computes.
        self._copy_thread = ThreadPoolExecutor(1, "copy") if bank.device.type == "cuda" else None
        thread.submit(self._run_trials).result()
        self._half_size = size = tuner.half_size()
        if self._copy_thread is None:  # on a GPU the size follows the tuner
            logger.info("batches beside another one: %s", f"{size.beside} to {size.full} images" if size else "none")

    @property
    def shared_size(self) -> BatchSize | None:
        """Return the size limits of a pass beside which another may run; None if only one can run.

        On a GPU the other one's images are copied meanwhile. A full batch waits for that, as more images may join a
        smaller one.
        """
        if self._copy_thread is None:
            return self._half_size
        size = self._tuner.next_size
        return size._replace(beside=size.full)

    async def run(self, items: Sequence[Item], shared: bool = False) -> list[ItemScores]:
        """Return the answers to each item of one pass.

        Args:
            shared: another pass may run at the same time.
        """
        loop = asyncio.get_running_loop()
        pixels, half = None, self._tuner.half
        if self._copy_thread is not None:
            pixels = await loop.run_in_executor(self._copy_thread, self._gather, items)
        elif half is not None and (shared or any(self._beside.values())):  # its halves would wait for the other pass
            return await self._run_beside(items, half)
        return await loop.run_in_executor(self._thread, self._compute, items, pixels)

    async def _run_beside(self, items: Sequence[Item], half: Way) -> list[ItemScores]:
        """Run a pass on half of the cores, in the thread that has fewer of them.

        The tuner does not learn from it: its duration depends on what the other half does.
        """
        beside = self._beside
        thread = min(beside, key=beside.__getitem__)
        beside[thread] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, self._compute, items, None, half)
        finally:
            beside[thread] -= 1

    async def features(
        self, images: Sequence[NDArray[np.uint8]], is_idle: Callable[[], bool]
    ) -> list[NDArray[np.float16]]:
        """Return the frozen features (D,) of images in a small pass without adapters.

        Args:
            is_idle: returns whether no image waits for classification; called in another thread. Otherwise the pass
                waits before its next block, for `LONGEST_PAUSE_S` at most.
        """
        config = preprocess_of(self._bank.limits.backbone)
        mean, std = (torch.tensor(config[name], device=self._bank.device) for name in ("mean", "std"))

        def run() -> list[NDArray[np.float16]]:
            pixels = torch.from_numpy(np.stack(images)).to(self._bank.device)
            pooled = self._bank.frozen_features(normalise(pixels, mean, std), give_way)
            return [row.numpy() for row in pooled.half().cpu()]

        paused_s = 0.0

        def give_way() -> None:
            nonlocal paused_s
            while not is_idle() and paused_s < LONGEST_PAUSE_S:
                time.sleep(PAUSE_S)
                paused_s += PAUSE_S

        return await asyncio.get_running_loop().run_in_executor(self._features_thread, run)

    def _gather(self, items: Sequence[Item]) -> torch.Tensor:
        """Return the normalised pixels (B, 3, H, W) on the device."""
        device = self._bank.device
        pixels = torch.from_numpy(np.stack([item.pixels for item in items])).to(device)
        mean = torch.stack([item.mean for item in items]).to(device)
        std = torch.stack([item.std for item in items]).to(device)
        return normalise(pixels, mean, std)

    def _compute(self, items: Sequence[Item], pixels: torch.Tensor | None, way: Way | None = None) -> list[ItemScores]:
        """Compute a pass, in the tuner's way unless one is given.

        Args:
            pixels: (B, 3, H, W), normalised, on the device; those of the items if None.
        """
        inputs = self._gather(items) if pixels is None else pixels

        def answers(part: slice) -> list[ItemScores]:
            return [*map(_scores_of, items[part], self._bank.score_images(inputs[part], tasks[part]))]

        tasks = [ImageTasks([adapter.slot for adapter in item.adapters], item.heads) for item in items]
        if way is not None:
            torch.set_num_threads(way.threads)
            return answers(slice(None))
        return self._run_timed([item.passes for item in items], answers)

    def _run_timed(self, sizes: Sequence[int], compute: Callable[[slice], list[Result]]) -> list[Result]:
        """Run a pass, which must wait for the device, in the tuner's way; record its duration.

        Args:
            sizes: as how many images each item of the pass counts.
            compute: returns the results of a part of the items.
        """
        images = sum(sizes)
        way = self._tuner.choose_way(images, most_parts=len(sizes))

        def run(part: slice) -> list[Result]:
            torch.set_num_threads(way.threads)
            return compute(part)

        started_s = time.perf_counter()
        if way.parts == 1:
            results = run(slice(None))
        else:
            middle = _middle(sizes)
            second = self._second_thread.submit(run, slice(middle, None))
            try:
                results = run(slice(middle))
            finally:
                wait([second])  # the caller may evict the adapters of a pass that failed
            results += second.result()
        self._tuner.record(images, way, (time.perf_counter() - started_s) * 1000)
        return results

    def _run_trials(self) -> None:
        bank = self._bank
        started_s = time.monotonic()
        for size in self._tuner.sizes:
            pixels = torch.zeros(size, *bank.input_size, device=bank.device, dtype=bank.dtype)
            trial = partial(self._run_trial, pixels)
            trial(slice(None))  # the first pass of a size is slower
            for _ in range(self._tuner.trials):
                self._run_timed([1] * size, trial)
            if self._tuner.is_settled() or time.monotonic() - started_s > TRIALS_TIMEOUT_S:
                break
        _return_freed_memory()
        costs = {size: round(ms, 3) for size, ms in self._tuner.costs().items()}
        logger.info("batch size %d; milliseconds per image by batch size: %s", self._tuner.best_size, costs)

    def _run_trial(self, pixels: torch.Tensor, part: slice) -> list[torch.Tensor]:
        return [self._bank.warm_up(pixels[part], kernels=2, rank=8).cpu()]  # `cpu` waits for a GPU


def _return_freed_memory() -> None:
    """Return memory that the start has freed to the system; glibc keeps 45 MB of it."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _scores_of(item: Item, found: ImageScores) -> ItemScores:
    scores, heads = found
    parts = [x.logits.float().softmax(0).cpu().numpy() for x in scores]
    typicality = [np.nan if x.typicality is None else x.typicality for x in scores]
    sizes = [len(part) for part in parts]
    if heads is not None and item.heads is not None:
        parts.append(item.heads.probabilities(heads.logits))
        typicality += heads.typicality.tolist()
        sizes += item.heads.classes
    probabilities = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return ItemScores(probabilities, sizes, np.array(typicality, float))


def _middle(sizes: Sequence[int]) -> int:
    """Return where to divide at least two items, so that the larger part is small."""
    before = [*accumulate(sizes)]
    return 1 + min(range(len(sizes) - 1), key=lambda i: max(before[i], before[-1] - before[i]))
