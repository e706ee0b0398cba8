"""The batch tuner finds the right size and thread count at little cost, and again when the machine's load changes."""

import random
from collections.abc import Callable, Sequence

import pytest

from hub.worker.batch_tuner import BatchTuner, Way, ways_of
from hub.worker.fair_queue import BatchSize

Cost = Callable[[int, int], float]  # (images, threads) -> ms


def drive(
    tuner: BatchTuner, cost: Cost, passes: int, *, queued: int = 1000, noise: float = 0.0, seed: int = 0
) -> list[float]:
    """Return the milliseconds per image of passes, as a worker runs them while this many images are queued."""
    rng = random.Random(seed)
    image_ms = []
    for _ in range(passes):
        images = min(tuner.next_size.full, queued)
        way = tuner.choose_way(images, images)
        ms = cost(images, way.threads) * (1 + rng.random() * noise) * (10 if rng.random() < noise / 10 else 1)
        tuner.record(images, way, ms)
        image_ms.append(ms / images)
    return image_ms


def tried(max_images: int, threads: Sequence[int], cost: Cost) -> BatchTuner:
    """Return a tuner after the trials of a new worker."""
    tuner = BatchTuner(max_images, [Way(n) for n in threads])
    for size in tuner.sizes:
        for _ in range(4):
            way = tuner.choose_way(size, size)
            tuner.record(size, way, cost(size, way.threads))
        if tuner.is_settled():
            break
    return tuner


def median(values: Sequence[int]) -> int:
    return sorted(values)[len(values) // 2]


@pytest.mark.parametrize(
    ("cost", "max_images", "best"),
    [
        (lambda n, _threads: 10.0 * n, 32, 1),  # a CPU with a large model
        (lambda n, _threads: 10.0 + 0.01 * n, 32, 32),  # a GPU
        (lambda n, _threads: 10.0 + 10.0 * n, 32, 16),
        (lambda n, _threads: 10.0 + max(0, n - 8) * 2.0, 32, 8),
        (lambda n, _threads: 10.0 + 0.01 * n, 20, 20),
        (lambda _n, _threads: 10.0, 1, 1),
    ],
)
def test_the_tuner_takes_the_smallest_size_that_is_nearly_as_fast_as_any(
    cost: Cost, max_images: int, best: int
) -> None:
    tuner = tried(max_images, [1], cost)
    drive(tuner, cost, 200)
    assert tuner.best_size == best


def test_exploring_costs_little() -> None:
    def cost(n: int, threads: int) -> float:
        return (4 + 3 * n) / (1 if threads == 1 else 1.7)

    image_ms = drive(tried(32, [1, 2], cost), cost, 3000)
    assert sum(image_ms) / len(image_ms) < 1.05 * 1.05 * cost(32, 2) / 32


def test_the_thread_count_follows_the_load_when_others_use_the_cores_for_a_while() -> None:
    def quiet(n: int, threads: int) -> float:
        return (4 + 3 * n) / (1 if threads == 1 else 1.7)

    def busy(n: int, threads: int) -> float:
        return (4 + 3 * n) * (1.2 if threads == 1 else 1.5)

    def usual_threads(tuner: BatchTuner, cost: Cost) -> int:
        drive(tuner, cost, 600, noise=0.2)
        return median([tuner.choose_way(8, 8).threads for _ in range(101)])

    tuner = tried(8, [1, 2], quiet)
    assert usual_threads(tuner, quiet) == 2
    assert usual_threads(tuner, busy) == 1
    assert usual_threads(tuner, quiet) == 2


def test_the_tuner_recovers_when_its_first_measurements_were_wrong() -> None:
    rng = random.Random(1)

    def cost(n: int, _threads: int) -> float:
        return 4 + 3.0 * n

    for _ in range(20):
        tuner = tried(32, [1], lambda n, threads: cost(n, threads) * rng.uniform(1, 3))
        drive(tuner, cost, 1000, noise=0.1)
        chosen = []
        for seed in range(100):
            drive(tuner, cost, 10, noise=0.1, seed=seed)
            chosen.append(tuner.best_size)
        assert median(chosen) in (16, 32), tuner.costs()


def test_the_size_is_small_when_few_images_are_queued_at_once() -> None:
    tuner = BatchTuner(32, [Way(1)])
    drive(tuner, lambda _n, _threads: 10.0, 500, queued=3)
    assert tuner.best_size == 4  # the size of passes with three images
    assert tuner.next_size.full in (2, 8)  # never measured, so explored at once


def test_a_short_pass_has_few_images_unless_more_are_much_faster() -> None:
    cpu = tried(32, [1], lambda n, _threads: 2 + 8.0 * n)
    assert (cpu.best_size, cpu.next_size.short) == (4, 1)
    gpu = tried(32, [1], lambda n, _threads: 10.0 + 0.2 * n)
    assert gpu.next_size == BatchSize(32, 32)
    slower_gpu = tried(32, [1], lambda n, _threads: 10.0 + 1.0 * n)
    assert (slower_gpu.best_size, slower_gpu.next_size.short) == (32, 8)  # 18 ms; 16 images take 26 ms, one takes 11


def test_a_new_tuner_allows_the_largest_size() -> None:
    assert BatchTuner(32, [Way(1)]).next_size == BatchSize(32, 32)


def test_a_pass_of_one_item_is_not_divided() -> None:
    tuner = BatchTuner(8, ways_of(2, on_gpu=False))
    found = set()
    for _ in range(6):
        way = tuner.choose_way(8, 8)
        tuner.record(8, way, 10.0 - way.parts)
        found.add(way)
    assert found == {Way(1), Way(2), Way(1, parts=2)}
    assert tuner.choose_way(8, 8) == Way(1, parts=2)  # the fastest
    assert tuner.choose_way(8, 1).parts == 1
    assert ways_of(1, on_gpu=False) == [Way(1), Way(1)]
    assert set(ways_of(8, on_gpu=False)) == {Way(1), Way(4), Way(8), Way(4, parts=2)}
    assert ways_of(2, on_gpu=True) == [Way(2)]


@pytest.mark.parametrize(
    ("half_ms", "halves", "size"),
    [
        (lambda n: 10.0 + 10.0 * n, 0.5, BatchSize(32, 32, beside=4)),
        (lambda n: 1.0 + 10.0 * n, 0.5, BatchSize(8, 8, beside=1)),
        (lambda n: 10.0 * n, 0.5, BatchSize(8, 8, beside=1)),  # a large model
        (lambda n: 10.0 + 0.1 * n, 0.5, BatchSize(32, 32, beside=32)),
        (lambda n: 10.0 * n, 0.9, None),  # two passes at once slow each other down
    ],
)
def test_two_passes_share_the_cores_where_that_is_not_slower(
    half_ms: Callable[[int], float], halves: float, size: BatchSize | None
) -> None:
    """One pass on all cores takes 0.6 times as long as on half of them; its two halves at once, `halves` times."""
    tuner = BatchTuner(32, ways_of(2, on_gpu=False))
    for images in tuner.sizes:
        for way, share in ((Way(1), 1.0), (Way(2), 0.6), (Way(1, parts=2), halves)):
            tuner.record(images, way, share * half_ms(images))
    assert (tuner.half, tuner.half_size()) == (Way(1), size)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_the_trials_of_a_size_measure_each_way(threads: int) -> None:
    ways = ways_of(threads, on_gpu=False)
    tuner = BatchTuner(8, ways)
    found: set[Way] = set()
    for _ in range(tuner.trials):
        way = tuner.choose_way(8, 8)
        tuner.record(8, way, 10.0 if len(found) else 5.0)  # the first one is the fastest
        found.add(way)
    assert found == set(ways)


def test_passes_of_one_thread_and_of_a_gpu_have_no_halves() -> None:
    for ways in (ways_of(1, on_gpu=False), ways_of(4, on_gpu=True)):
        tuner = BatchTuner(32, ways)
        tuner.record(1, ways[0], 10.0)
        assert (tuner.half, tuner.half_size()) == (None, None)
