"""The worker without a cluster: its batches mix tasks, and a caller that goes away takes nothing from the others."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from hub.settings import Settings
from hub.store import Store

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, at import


@pytest.fixture
def worker(tmp_path, adapters, monkeypatch):
    from ray import serve

    from hub.worker import Worker

    # `serve.batch` asks its replica for this one number, to warn where it is too small; the rest of it is real.
    config = SimpleNamespace(max_ongoing_requests=1000)
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(_deployment_config=config))
    store = Store(str(tmp_path))
    for adapter in adapters:
        store.put(adapter.digest, adapter.data)
    return Worker(Settings(backbone="demo", slots=2, batch_wait_ms=50, home=tmp_path), store, threads=1)


def images(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))


def test_passes_are_shared_and_survive_callers_that_go_away(worker, adapters) -> None:
    """One test, since `serve.batch` keeps its queue on the class and with it the event loop."""

    async def use():
        await shared_pass(worker, adapters)
        await caller_goes_away(worker, adapters)

    asyncio.run(use())


async def shared_pass(worker, adapters) -> None:
    """Two adapters share a pass and get their own answers."""
    alone = [await worker.classify(a.digest, images(2, i)) for i, a in enumerate(adapters[:2])]
    together = await asyncio.gather(*(worker.classify(a.digest, images(2, i)) for i, a in enumerate(adapters[:2])))
    for one, other in zip([*alone[0], *alone[1]], [*together[0], *together[1]], strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
    assert {(a.computed.images, a.computed.tasks) for group in together for a in group} == {(4, 2)}


async def caller_goes_away(worker, adapters) -> None:
    """Its image may be in a pass already: the slot stays its adapter's until the pass is over."""
    a, b, c = (adapter.digest for adapter in adapters[:3])
    for digest in (a, b):
        await worker.classify(digest, images(1))
    gone, stays = (asyncio.create_task(worker.classify(digest, images(1))) for digest in (a, b))
    await asyncio.sleep(0.01)  # both wait for their batch
    third = asyncio.create_task(worker.classify(c, images(1)))
    await asyncio.sleep(0.01)  # waits for a slot
    gone.cancel()
    (answer,) = await stays
    assert answer.computed.images == 2
    assert len((await third)[0].probabilities) == adapters[2].num_classes
    with pytest.raises(asyncio.CancelledError):
        await gone
