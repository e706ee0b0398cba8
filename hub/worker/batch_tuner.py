"""Batch size and use of the cores of forward passes, learned from the measured passes.

A GPU needs many images per pass. On a CPU a few images fill the cores, and a larger pass only adds waiting time. A
second thread helps while a core is free, and slows a pass down while a gateway uses that core: the threads of a
product wait for each other. Two halves of a pass, each on its own cores, do not. None of this is known when a worker
starts, and all of it changes with the load of the machine.
"""

from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

from .fair_queue import BatchSize

MIN_SPEEDUP = 1.05  # per image; a size that is not this much faster than a smaller one is not worth its waiting time
RETRY_PASSES = 16  # passes until an alternative as fast as the best one is measured again
WEIGHT_IF_FASTER, WEIGHT_IF_SLOWER = 0.5, 0.1  # of one measurement in the moving average
MAX_SLOWDOWN = 1.5  # a measurement counts as at most this many times the average: another process had the cores
# A short pass, while tenants with few images wait for passes of a heavy tenant:
SHORT_MAX_DURATION = 2.0  # at most this many times as long as a pass of the smallest size, and
SHORT_MIN_SPEEDUP = 1.5  # per image at least this many times as fast
# A batch on half of the cores, beside another one:
BESIDE_MIN_SPEEDUP = 1.02  # as MIN_SPEEDUP; two at once gain more from their size than the trials of one alone show
BESIDE_LEAST_FULL = 8  # images; the noise of a start can hide what a size gains, and trials of a large model end early
BESIDE_MAX_COST = 1.3  # per image at most this many times that of the best size on these cores, and
HALVES_MAX_COST = 1.1  # of two at once: at most this many times the cost of the fastest way


class Way(NamedTuple):
    """How a pass uses the cores: in parts that are computed at the same time, each with a number of torch's threads."""

    threads: int
    parts: int = 1


def ways_of(threads: int, *, on_gpu: bool) -> list[Way]:
    """Return the ways of a worker that may use this many threads: one thread, half of them, all, and two halves."""
    if on_gpu:
        return [Way(threads)]
    halves = [Way(threads // 2), Way(threads // 2, parts=2)] if threads > 1 else []
    return [Way(1), Way(threads), *halves]


class BatchTuner:
    """Moving average of the milliseconds per image, by batch size (powers of two) and use of the cores.

    Explore/exploit rule. The tuner exploits the smallest size whose cost per image is within `MIN_SPEEDUP` of the
    lowest cost, in the way that is fastest for that size. It explores the next smaller size, the next larger size and
    the other ways: at once if an alternative has never been measured, else after
    `RETRY_PASSES * ratio**3` passes, where `ratio` is its cost divided by the cost of the exploited choice. So an
    alternative that costs twice as much takes part in one of 128 passes. Averages fall fast and rise slowly
    (`WEIGHT_IF_FASTER`, `WEIGHT_IF_SLOWER`), because other load on the machine can only make a pass slower.

    One thread records passes and chooses ways; any thread may read the attributes.

    Attributes:
        sizes: the batch sizes, ascending.
        best_size: the exploited size.
        next_size: size limits of the next batch; `full` is `best_size` or the size to explore.
    """

    def __init__(self, max_images: int, ways: Sequence[Way]) -> None:
        """
        Args:
            max_images: largest batch size.
            ways: to choose from; the first one has one part.
        """
        self.sizes: list[int] = [*(2**k for k in range(max_images.bit_length()) if 2**k < max_images), max_images]
        self.best_size = max_images
        self.next_size = BatchSize(max_images, max_images)
        self._ways = tuple(dict.fromkeys(ways))
        self._image_ms: dict[tuple[int, Way], float] = {}  # (size, way) -> average
        self._passes_left: dict[Hashable, float] = {}  # alternative -> passes until it is explored

    def choose_way(self, images: int, most_parts: int) -> Way:
        """Return the way for a pass of this many images: the fastest one, or one to explore.

        Args:
            most_parts: into which the pass can be divided.
        """
        size = self._size(images)
        ways = [way for way in self._ways if way.parts <= most_parts]
        measured = {way: self._image_ms[size, way] for way in ways if (size, way) in self._image_ms}
        best = min(measured, key=measured.__getitem__, default=ways[0])
        for way in ways:
            if way != best and self._is_due((size, way), measured[way] / measured[best] if way in measured else None):
                return way
        return best

    def record(self, images: int, way: Way, duration_ms: float) -> None:
        """Add one measured pass."""
        choice = self._size(images), way
        measured_ms = duration_ms / images
        average = self._image_ms.get(choice, measured_ms)
        change = min(measured_ms, MAX_SLOWDOWN * average) - average
        self._image_ms[choice] = average + change * (WEIGHT_IF_FASTER if change < 0 else WEIGHT_IF_SLOWER)
        costs = self.costs()
        self.best_size = _smallest_size_within(MIN_SPEEDUP, costs)
        full = self._size_to_explore(costs) or self.best_size
        self.next_size = BatchSize(full, min(full, _short_size(costs)))

    @property
    def trials(self) -> int:
        """Return the number of passes of a new size in which each way has its turn; most have two."""
        return 2 * len(self._ways) - 1

    @property
    def half(self) -> Way | None:
        """Return the way of a pass beside another one, on half of the cores; None if passes cannot share the cores."""
        return next((Way(way.threads) for way in self._ways if way.parts > 1), None)

    def half_size(self) -> BatchSize | None:
        """Return the size limits of passes in the way `half`; None if two at once would be slower than one by one.

        The sizes measured so far must be those of a quiet machine, as in a new worker's trials.
        """
        half = self.half
        costs = self.costs([half]) if half is not None else {}
        halves = self.costs([way for way in self._ways if way.parts > 1])  # as two passes at once
        if not costs or not halves or min(halves.values()) > HALVES_MAX_COST * min(self.costs().values()):
            return None
        full, beside = (_smallest_size_within(ratio, costs) for ratio in (BESIDE_MIN_SPEEDUP, BESIDE_MAX_COST))
        full = max(full, min(BESIDE_LEAST_FULL, self.sizes[-1]))
        return BatchSize(full, full, beside)

    def costs(self, ways: Collection[Way] | None = None) -> dict[int, float]:
        """Return the milliseconds per image of each measured size in its fastest way, ascending by size.

        Args:
            ways: those to consider; all if None.
        """
        costs: dict[int, float] = {}
        for (size, way), ms in sorted(self._image_ms.items()):
            if ways is None or way in ways:
                costs[size] = min(ms, costs.get(size, ms))
        return costs

    def is_settled(self) -> bool:
        """Return whether two sizes above the best one are measured, so that larger ones need no trial at start."""
        return sum(size > self.best_size for size in self.costs()) >= 2

    def _size_to_explore(self, costs: dict[int, float]) -> int | None:
        place = self.sizes.index(self.best_size)
        for size in self.sizes[max(0, place - 1) : place + 2]:
            ratio = costs[size] / costs[self.best_size] if size in costs else None
            if size != self.best_size and self._is_due(size, ratio):
                return size
        return None

    def _size(self, images: int) -> int:
        """Return the smallest size that holds the images, or the largest size."""
        return next((size for size in self.sizes if size >= images), self.sizes[-1])

    def _is_due(self, alternative: Hashable, ratio: float | None) -> bool:
        """Count one pass, and return whether the alternative is explored now.

        Args:
            ratio: the alternative's cost divided by the best cost; None if it was never measured.
        """
        if ratio is None:
            self._passes_left[alternative] = 0.0
            return True
        left = self._passes_left.get(alternative, RETRY_PASSES) - 1
        due = left <= 0
        self._passes_left[alternative] = RETRY_PASSES * ratio**3 if due else left
        return due


def _smallest_size_within(ratio: float, costs: dict[int, float]) -> int:
    """Return the smallest size that costs at most `ratio` times as much per image as the cheapest one."""
    threshold = ratio * min(costs.values())
    return next(size for size, ms in costs.items() if ms <= threshold)


def _short_size(costs: dict[int, float]) -> int:
    """Return the largest size that meets both limits of a short pass, or the smallest measured size."""
    smallest = min(costs)
    max_ms = SHORT_MAX_DURATION * smallest * costs[smallest]
    max_image_ms = costs[smallest] / SHORT_MIN_SPEEDUP
    return max((size for size, ms in costs.items() if size * ms <= max_ms and ms <= max_image_ms), default=smallest)
