"""One image and many tasks at a worker: answers as those of single calls, and what they cost."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from adapters import Adapter, Backbone
from hub.errors import InvalidAdapter, LimitReached
from hub.storage.store import Store
from hub.worker.replica import Worker
from hub.worker_api import TaskAnswers
from tests.support.models import calibrated_adapter, random_adapter, with_metadata
from tests.support.workers import fix_batch_size, make_worker, run

HEADS = 40
LATE = ("blocks.4.*", "blocks.5.*")  # of six


@pytest.fixture(scope="module")
def heads(backbone: Backbone) -> list[Adapter]:
    plain = [random_adapter(backbone, seed=i, kernels=0, rescale="none", classes=2 + i % 3) for i in range(HEADS - 1)]
    return [*plain, calibrated_adapter(backbone)]


@pytest.fixture(scope="module")
def late(backbone: Backbone) -> list[Adapter]:
    return [random_adapter(backbone, seed=100 + i, kernels=1, rank=2, sites=LATE) for i in range(3)]


@pytest.fixture(scope="module")
def early(backbone: Backbone) -> list[Adapter]:
    return [random_adapter(backbone, seed=200 + i, kernels=1, rank=2) for i in range(3)]


@pytest.fixture
def store(tmp_path: Path, heads: list[Adapter], late: list[Adapter], early: list[Adapter]) -> Store:
    store = Store(str(tmp_path / "store"))
    for adapter in (*heads, *late, *early):
        store.put(adapter.digest, adapter.data)
    return store


@pytest.fixture(params=[2, 12])
def worker(
    empty_redis: str, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Worker:
    """Return a worker whose slots hold two adapters of a call, or all."""
    fix_batch_size(monkeypatch)
    return make_worker(empty_redis, store, tmp_path, slots=request.param)


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 32, 32), dtype=np.uint8)


async def answers(worker: Worker, *adapters: Adapter, seed: int = 0) -> TaskAnswers:
    return await worker.classify_tasks("t", [adapter.digest for adapter in adapters], image(seed))


def test_every_task_gets_the_answer_of_a_call_of_its_own(
    worker: Worker, heads: list[Adapter], late: list[Adapter], early: list[Adapter]
) -> None:
    """Also with more adapters than slots, and in two calls at once."""
    chosen = [early[0], *heads, *late, *early[1:]]

    async def use() -> None:
        both = await asyncio.gather(answers(worker, *chosen), answers(worker, *reversed(chosen)))
        for found in (*both, await answers(worker, *chosen)):
            assert found.invalid == {}
            by_digest = found.answers()
            assert by_digest.keys() == {adapter.digest for adapter in chosen}
            for adapter in chosen:
                (alone,) = await worker.classify("t", adapter.digest, [image()])
                own = by_digest[adapter.digest]
                np.testing.assert_allclose(own.probabilities, alone.probabilities, atol=1e-5)
                assert (own.typicality is None) == (alone.typicality is None)
                assert own.typicality is None or own.typicality == pytest.approx(alone.typicality, rel=1e-3)

    run(use)


def test_heads_take_one_pass_and_no_slot(worker: Worker, heads: list[Adapter], early: list[Adapter]) -> None:
    async def use() -> None:
        await worker.classify("t", early[0].digest, [image()])
        found = await answers(worker, *heads)
        assert {(stats.images, stats.tasks) for stats in found.computed} == {(1, HEADS)}
        status = worker.status()
        assert (status.slots_used, status.evictions, status.loads) == (1, 0, 1)
        assert status.images_per_pass == 1

    run(use)


def test_late_adapters_count_as_the_passes_that_they_cost(
    worker: Worker, heads: list[Adapter], late: list[Adapter]
) -> None:
    """Two rows in the last two of six blocks beside the shared one: 5 thirds of a pass, counted as 2."""

    async def use() -> None:
        found = await answers(worker, heads[0], *late[:2])
        if worker.status().slots == 12:
            assert {(stats.images, stats.tasks) for stats in found.computed} == {(2, 3)}

    run(use)


def test_an_adapter_that_does_not_fit_is_named_and_the_others_answer(
    worker: Worker, store: Store, heads: list[Adapter], early: list[Adapter]
) -> None:
    bad = Adapter.read(with_metadata(heads[0], fingerprint="0" * 64, backbone="other"))
    store.put(bad.digest, bad.data)

    async def use() -> None:
        found = await answers(worker, bad, heads[1], early[0])
        assert [*found.invalid] == [bad.digest]
        assert isinstance(found.invalid[bad.digest], InvalidAdapter)
        assert found.answers().keys() == {heads[1].digest, early[0].digest}
        assert (await answers(worker, bad)).answers() == {}

    run(use)


def test_a_call_beyond_the_queue_is_refused_and_leaves_no_lease(
    worker: Worker, late: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use() -> None:
        calls = [answers(worker, *late, seed=i) for i in range(600)]
        found = await asyncio.gather(*calls, return_exceptions=True)  # otherwise some would still be queued
        refused = [reply for reply in found if isinstance(reply, BaseException)]
        assert refused
        assert all(isinstance(error, LimitReached) and "images of this tenant" in str(error) for error in refused)
        await asyncio.gather(*(worker.classify("t", adapter.digest, [image()]) for adapter in late))

    run(use)
