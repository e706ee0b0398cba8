"""Passes in two halves give each image its own answers, and end together."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from adapters import Adapter, Backbone, Bank
from adapters.data.images import preprocess_of
from hub.worker.adapter_cache import Resident
from hub.worker.batch_tuner import BatchTuner, Way
from hub.worker.fair_queue import BatchSize
from hub.worker.passes import Item, ItemScores, Passes

IMAGES = 7


@pytest.fixture
def bank(backbone: Backbone) -> Bank:
    return Bank(backbone, slots=4)


@pytest.fixture
def items(backbone: Backbone, bank: Bank, adapters: Sequence[Adapter]) -> list[Item]:
    """Return images with one adapter each, the first one with two."""
    config = preprocess_of(bank.limits.backbone)
    mean, std = (torch.tensor(config[name]) for name in ("mean", "std"))
    residents = [Resident(a.digest, bank.put(a), mean, std, first_block=0) for a in adapters]
    noise = np.random.default_rng(0).integers(0, 256, (IMAGES, *bank.input_size), dtype=np.uint8)
    return [
        Item(
            pixels, mean, std, residents[i % 4 : i % 4 + (2 if i == 0 else 1)], 0.0, 0.0, "", passes=2 if i == 0 else 1
        )
        for i, pixels in enumerate(noise)
    ]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def passes(bank: Bank, way: Way, thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> Passes:
    monkeypatch.setattr(Passes, "_run_trials", lambda _self: None)  # an unused bank has them
    return Passes(bank, BatchTuner(16, [way]), thread)


def test_halves_give_each_image_the_answers_of_a_whole_pass(
    bank: Bank, items: list[Item], threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = asyncio.run(passes(bank, Way(1), threads, monkeypatch).run(items))
    used = set()
    score = Bank.score_images

    def noted(self: Bank, pixels: torch.Tensor, *others: object) -> object:
        used.add((threading.get_ident(), len(pixels)))
        return score(self, pixels, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Bank, "score_images", noted)
    halves = asyncio.run(passes(bank, Way(1, parts=2), threads, monkeypatch).run(items))
    assert sorted(count for _, count in used) == [3, 4]  # the first image counts twice
    assert len({thread for thread, _ in used}) == 2
    assert [one.sizes for one in halves] == [one.sizes for one in whole] == [[5, 5], *[[5]] * (IMAGES - 1)]
    for one, other in zip(halves, whole, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)


def test_a_pass_whose_first_half_fails_ends_with_its_second_half(
    bank: Bank, items: list[Item], threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    def score(_self: Bank, pixels: torch.Tensor, *_others: object) -> object:
        if len(pixels) == 3:
            raise ValueError("the adapter was evicted")
        time.sleep(0.3)
        ended.append(len(pixels))
        return []

    monkeypatch.setattr(Bank, "score_images", score)
    with pytest.raises(ValueError, match="evicted"):
        asyncio.run(passes(bank, Way(1, parts=2), threads, monkeypatch).run(items))
    assert ended == [4]


def test_passes_beside_each_other_have_a_thread_each(
    bank: Bank, items: list[Item], threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = passes(bank, Way(1, parts=2), threads, monkeypatch)
    whole = asyncio.run(both.run(items))
    meeting = threading.Barrier(2, timeout=10)
    score = Bank.score_images

    def met(self: Bank, pixels: torch.Tensor, *others: object) -> object:
        meeting.wait()  # both passes run
        return score(self, pixels, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Bank, "score_images", met)

    async def run() -> tuple[list[ItemScores], list[ItemScores]]:
        return await asyncio.gather(both.run(items[:3], True), both.run(items[3:], True))

    first, second = asyncio.run(run())
    for one, other in zip([*first, *second], whole, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_a_pass_beside_another_takes_the_thread_that_is_free(
    shared: bool, bank: Bank, items: list[Item], threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[int, set[int]] = {}
    begun, go = threading.Event(), threading.Event()
    score = Bank.score_images

    def noted(self: Bank, pixels: torch.Tensor, *others: object) -> object:
        used.setdefault(len(pixels), set()).add(threading.get_ident())
        if len(pixels) == 2:
            begun.set()
            assert go.wait(10)
        if len(pixels) == 1:
            raise ValueError("the adapter was evicted")
        return score(self, pixels, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Bank, "score_images", noted)
    both = passes(bank, Way(1, parts=2), threads, monkeypatch)

    async def run() -> None:
        long = asyncio.create_task(both.run(items[:2], True))
        await asyncio.to_thread(begun.wait, 10)
        with pytest.raises(ValueError, match="evicted"):
            await both.run(items[:1], True)
        await both.run(items[:4], shared)  # one of idle turns is not shared, but must not wait for the long one
        go.set()
        await long

    asyncio.run(run())
    assert used[1] == used[4] != used[2]
    assert len(used[4]) == 1


def test_a_gpu_copies_a_full_batch_beside_a_pass(
    bank: Bank, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = passes(bank, Way(1), threads, monkeypatch)
    assert gpu.shared_size is None
    monkeypatch.setattr(gpu, "_copy_thread", threads)
    assert gpu.shared_size == BatchSize(16, 16, beside=16)
