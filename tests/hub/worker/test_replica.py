"""The worker without a cluster: its batches mix tasks, and a caller that goes away takes nothing from the others."""

import asyncio
import pickle

import numpy as np
import pytest

from hub.errors import Unavailable
from hub.settings import Settings
from hub.storage.store import Store
from hub.worker.batch_tuner import Pace
from hub.worker.prewarming import Warmth

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, at import


@pytest.fixture
def store(tmp_path, adapters) -> Store:
    store = Store(str(tmp_path))
    for adapter in adapters:
        store.put(adapter.digest, adapter.data)
    return store


@pytest.fixture
def make_worker(empty_redis, tmp_path, store, monkeypatch):
    from hub.worker.replica import Worker

    monkeypatch.setattr(Pace, "note", lambda *_: None)  # whatever this machine is quick at

    def make():
        settings = Settings(backbone="demo", slots=2, batch_wait_ms=50, home=tmp_path)
        return Worker(settings, store, Warmth(empty_redis, []), sharing=lambda: 1)

    return make


@pytest.fixture
def worker(make_worker):
    return make_worker()


def images(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))


def test_adapters_share_a_pass_and_get_their_own_answers(worker, adapters) -> None:
    async def use():
        alone = [await worker.classify("t", a.digest, images(2, i)) for i, a in enumerate(adapters[:2])]
        calls = (worker.classify("t", a.digest, images(2, i)) for i, a in enumerate(adapters[:2]))
        together = await asyncio.gather(*calls)
        for one, other in zip([*alone[0], *alone[1]], [*together[0], *together[1]], strict=True):
            np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
        assert {(a.computed.images, a.computed.tasks) for group in together for a in group} == {(4, 2)}

    asyncio.run(use())


def test_the_slot_of_a_caller_that_goes_away_stays_until_its_pass_is_over(worker, adapters) -> None:
    """A third adapter wants the slot while the pass runs: it must wait, and all answers are right."""
    a, b, c = (adapter.digest for adapter in adapters[:3])

    async def use():
        right = {d: (await worker.classify("t", d, images(16)))[0].probabilities for d in (a, b, c, a, b)}
        for _ in range(10):
            gone, stays = (asyncio.create_task(worker.classify("t", d, images(16))) for d in (a, b))
            while worker._batcher.waiting or not worker._batcher._running:
                await asyncio.sleep(0)
            third = asyncio.create_task(worker.classify("t", c, images(1)))
            gone.cancel()
            np.testing.assert_allclose((await stays)[0].probabilities, right[b], atol=1e-5)
            np.testing.assert_allclose((await third)[0].probabilities, right[c], atol=1e-5)
            with pytest.raises(asyncio.CancelledError):
                await gone

    asyncio.run(use())


def test_a_worker_tells_what_it_holds_and_what_is_under_way(worker, adapters) -> None:
    async def use():
        await worker.classify("t", adapters[0].digest, images(1))
        idle = worker.record_autoscaling_stats()
        assert idle == {"images": 0.0, "batch": 32.0}
        running = asyncio.create_task(worker.classify("t", adapters[0].digest, images(3)))
        await asyncio.sleep(0)
        assert worker.record_autoscaling_stats() == idle | {"images": 3.0}
        await running
        assert worker.record_autoscaling_stats() == idle
        assert worker.record_routing_stats() == {"digests": [adapters[0].digest[:16]], "batch": 32}

    asyncio.run(use())


def test_images_of_a_caller_that_goes_away_are_not_computed(worker, adapters) -> None:
    async def use():
        digest = adapters[0].digest
        running = asyncio.create_task(worker.classify("t", digest, images(1)))
        while not worker._batcher._running:
            await asyncio.sleep(0)
        gone, stays = (asyncio.create_task(worker.classify("t", digest, images(3))) for _ in range(2))
        while worker._batcher.waiting < 6:
            await asyncio.sleep(0)
        gone.cancel()
        await running
        assert {answer.computed.images for answer in await stays} == {3}

    asyncio.run(use())


def test_a_worker_starts_with_what_was_busy(make_worker, adapters, store) -> None:
    a, b = (adapter.digest for adapter in adapters[:2])

    async def use(worker):
        for digest in (a, b):
            await worker.classify("t", digest, images(1))
        await worker._warmth.note(worker._used | {"0" * 64})  # the last one is in no store

    asyncio.run(use(make_worker()))
    worker = make_worker()
    store.get = None  # nobody reads it any more
    assert worker._tiers.resident == 2
    asyncio.run(worker.classify("t", a, images(1)))


def test_an_adapter_that_cannot_be_had_fails_only_its_own_callers(worker, adapters) -> None:
    async def use():
        bad, good = await asyncio.gather(
            worker.classify("t", "0" * 64, images(1)),
            worker.classify("t", adapters[0].digest, images(1)),
            return_exceptions=True,
        )
        assert isinstance(bad, Unavailable)
        assert len(good[0].probabilities) == adapters[0].num_classes
        told = pickle.loads(pickle.dumps(await worker.answer("t", "0" * 64, images(1))))  # as it goes to the gateway
        assert (type(told), told.problem()) == (Unavailable, bad.problem())

    asyncio.run(use())
