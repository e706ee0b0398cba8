"""What a worker learns from its passes: the right size and threads, at little cost, and anew when things change."""

import random
from collections.abc import Callable

import pytest

from hub.worker.batch_tuner import Pace

Cost = Callable[[int, int], float]  # (images, threads) -> ms


def drive(pace: Pace, ms: Cost, passes: int, *, waiting: int = 1000, noise: float = 0.0, seed: int = 0) -> list[float]:
    """Milliseconds an image of passes as a worker makes them while so many images wait."""
    rng = random.Random(seed)
    taken = []
    for _ in range(passes):
        images = min(pace.next_images, waiting)
        threads = pace.threads(images)
        cost = ms(images, threads) * (1 + rng.random() * noise) * (10 if rng.random() < noise / 10 else 1)
        pace.note(images, threads, cost)
        taken.append(cost / images)
    return taken


def rehearsed(most: int, threads: list[int], ms: Cost) -> Pace:
    """As a new worker tries its sizes."""
    pace = Pace(most, threads)
    for size in pace.sizes:
        for _ in range(4):
            n = pace.threads(size)
            pace.note(size, n, ms(size, n))
        if pace.settled():
            break
    return pace


@pytest.mark.parametrize(
    ("ms", "most", "images"),
    [
        (lambda n: 10.0 * n, 32, 1),  # a CPU with a large model
        (lambda n: 10.0 + 0.01 * n, 32, 32),  # a GPU
        (lambda n: 10.0 + 10.0 * n, 32, 16),
        (lambda n: 10.0 + max(0, n - 8) * 2.0, 32, 8),
        (lambda n: 10.0 + 0.01 * n, 20, 20),
        (lambda _n: 10.0, 1, 1),
    ],
)
def test_the_smallest_pass_that_is_nearly_as_fast_is_taken(ms, most, images) -> None:
    pace = rehearsed(most, [1], lambda n, _threads: ms(n))
    drive(pace, lambda n, _threads: ms(n), 200)
    assert pace.images == images


def test_trials_cost_little() -> None:
    def ms(n: int, threads: int) -> float:
        return (4 + 3 * n) / (1 if threads == 1 else 1.7)

    taken = drive(rehearsed(32, [1, 2], ms), ms, 3000)
    assert sum(taken) / len(taken) < 1.05 * 1.05 * ms(32, 2) / 32


def test_threads_are_given_up_while_others_have_the_cores_and_taken_again() -> None:
    def quiet(n: int, threads: int) -> float:
        return (4 + 3 * n) / (1 if threads == 1 else 1.7)

    def busy(n: int, threads: int) -> float:
        return (4 + 3 * n) * (1.2 if threads == 1 else 1.5)

    def mostly(pace: Pace, ms: Cost) -> int:
        drive(pace, ms, 600, noise=0.2)
        tried = [pace.threads(8) for _ in range(101)]
        return sorted(tried)[50]

    pace = rehearsed(8, [1, 2], quiet)
    assert mostly(pace, quiet) == 2
    assert mostly(pace, busy) == 1
    assert mostly(pace, quiet) == 2


def test_a_start_beside_others_is_not_for_ever() -> None:
    rng = random.Random(1)

    def ms(n: int, _threads: int) -> float:
        return 4 + 3.0 * n

    for _ in range(20):
        pace = rehearsed(32, [1], lambda n, threads: ms(n, threads) * rng.uniform(1, 3))
        drive(pace, ms, 1000, noise=0.1)
        chosen = []
        for seed in range(100):
            drive(pace, ms, 10, noise=0.1, seed=seed)
            chosen.append(pace.images)
        assert sorted(chosen)[50] in (16, 32), str(pace)


def test_what_never_waits_together_is_not_waited_for() -> None:
    pace = Pace(32, [1])
    drive(pace, lambda n, _threads: 10.0, 500, waiting=3)
    assert pace.images == 4  # the size of passes of three
    assert pace.next_images in (2, 8)  # not known: the next pass may be that large


def test_beside_tenants_who_send_little_a_pass_is_short_or_much_faster() -> None:
    cpu = rehearsed(32, [1], lambda n, _threads: 2 + 8.0 * n)
    assert (cpu.images, cpu.most(False), cpu.most(True)) == (4, cpu.next_images, 1)
    gpu = rehearsed(32, [1], lambda n, _threads: 10.0 + 0.2 * n)
    assert gpu.most(True) == gpu.most(False) == gpu.images == 32
    slower_gpu = rehearsed(32, [1], lambda n, _threads: 10.0 + 1.0 * n)
    assert (slower_gpu.images, slower_gpu.most(True)) == (32, 8)  # 18 ms; 16 images would take 26, one takes 11
    assert Pace(32, [1]).most(True) == 32  # nothing is known yet
