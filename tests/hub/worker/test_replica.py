"""The worker without a cluster: mixed batches, cancelled calls, status, prewarming."""

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from adapters import Adapter, Backbone, BackboneError
from adapters.backbone import features
from adapters.data.images import decode_image, eval_transform, normalise
from adapters.serving import cpu_operators
from adapters.serving.frozen_forms import FrozenForms, unmeasured_forms
from hub.errors import HubError, Unavailable
from hub.observability.request_context import CallOrigin
from hub.registry.redis.connection import RegistryConnection
from hub.registry.status import StatusBoard
from hub.storage.store import Store
from hub.worker import replica
from hub.worker.prewarming import Prewarming
from hub.worker.replica import Worker
from hub.worker_api import Answer, CallFailed
from tests.support.hub_app import REDIS_PATIENCE
from tests.support.marks import needs_vnni
from tests.support.models import calibrated_adapter, flat_png, png
from tests.support.workers import PassGate, fix_batch_size, make_worker, run


@pytest.fixture
def store(tmp_path: Path, adapters: list[Adapter]) -> Store:
    store = Store(str(tmp_path / "store"))
    for adapter in adapters:
        store.put(adapter.digest, adapter.data)
    return store


@pytest.fixture
def worker(empty_redis: str, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Worker:
    fix_batch_size(monkeypatch)
    return make_worker(empty_redis, store, tmp_path)


def images(count: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def held_call(
    worker: Worker, digest: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[PassGate, "asyncio.Task[list[Answer]]"]:
    """Return a gate, and a call of one image whose pass waits for it."""
    gate = PassGate(monkeypatch)
    running = asyncio.create_task(worker.classify("t", digest, images(1)))
    await until(gate.started.is_set)
    return gate, running


def test_adapters_share_a_pass_and_each_call_gets_its_own_answers(worker: Worker, adapters: list[Adapter]) -> None:
    async def use() -> None:
        alone = [await worker.classify("t", a.digest, images(2, i)) for i, a in enumerate(adapters[:2])]
        calls = (worker.classify("t", a.digest, images(2, i)) for i, a in enumerate(adapters[:2]))
        together = await asyncio.gather(*calls)
        for one, other in zip([*alone[0], *alone[1]], [*together[0], *together[1]], strict=True):
            np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
        assert {(a.computed.images, a.computed.tasks) for group in together for a in group} == {(4, 2)}

    run(use)


def test_features_are_those_of_the_frozen_backbone_beside_any_adapter(
    worker: Worker, adapters: list[Adapter], backbone: Backbone
) -> None:
    async def use() -> None:
        pixels = images(6)
        before = await worker.features(pixels)
        await worker.classify("t", adapters[0].digest, pixels)
        after = await worker.features(pixels)
        assert not isinstance(before, HubError)
        assert not isinstance(after, HubError)
        mean, std = (torch.tensor(backbone.data_config[name]) for name in ("mean", "std"))
        with torch.inference_mode():
            expected = features(backbone.model, normalise(torch.from_numpy(np.stack(pixels)), mean, std))
        for rows in (before, after):
            assert {row.dtype for row in rows} == {np.dtype(np.float16)}
            np.testing.assert_allclose(np.stack(rows), expected.numpy(), rtol=2e-3, atol=2e-3)

    run(use)


def test_answers_in_idle_turns_are_those_of_other_calls(worker: Worker, adapters: list[Adapter]) -> None:
    async def use() -> None:
        digest, pixels = adapters[0].digest, images(6)
        usual = await worker.classify("t", digest, pixels)
        idle, beside = await asyncio.gather(
            worker.classify("t", digest, pixels, idle=True), worker.classify("t", adapters[1].digest, images(6, 1))
        )
        for one, other in zip(usual, idle, strict=True):
            np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
        assert len(beside) == 6

    run(use)


def test_an_answer_has_typicality_where_its_adapter_has_it(
    worker: Worker, adapters: list[Adapter], backbone: Backbone, store: Store
) -> None:
    adapter = calibrated_adapter(backbone)
    store.put(adapter.digest, adapter.data)
    transform = eval_transform(adapter.preprocess)
    pixels = [transform(decode_image(data)).numpy() for data in (png(1), flat_png())]

    async def use() -> None:
        for digest in (adapter.digest, adapters[0].digest):
            await worker.classify("t", digest, pixels)  # loads it
        calls = (worker.classify("t", digest, pixels) for digest in (adapter.digest, adapters[0].digest))
        calibrated, old = await asyncio.gather(*calls)
        assert {answer.computed.tasks for answer in (*calibrated, *old)} == {2}
        assert [answer.typicality for answer in old] == [None, None]
        own, foreign = (answer.typicality for answer in calibrated)
        assert own is not None
        assert foreign is not None
        assert own > 0.01 > foreign >= 0
        sent = pickle.loads(pickle.dumps(calibrated))  # as Serve sends it
        assert [answer.typicality for answer in sent] == [own, foreign]

    run(use)


def test_a_slot_keeps_its_adapter_until_its_pass_ends_when_the_call_is_cancelled(
    worker: Worker, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third adapter needs the slot while the pass runs: its load waits, and all answers are right."""
    a, b, c = (adapter.digest for adapter in adapters[:3])

    async def use() -> None:
        expected = {d: (await worker.classify("t", d, images(16)))[0].probabilities for d in (a, b, c, a, b)}
        gate = PassGate(monkeypatch)
        gone, stays = (asyncio.create_task(worker.classify("t", d, images(16))) for d in (a, b))
        await until(gate.started.is_set)
        third = asyncio.create_task(worker.classify("t", c, images(1)))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert not third.done()
        gate.open.set()
        np.testing.assert_allclose((await stays)[0].probabilities, expected[b], atol=1e-5)
        np.testing.assert_allclose((await third)[0].probabilities, expected[c], atol=1e-5)

    run(use)


def test_a_worker_reports_its_adapters_and_images_to_serve(worker: Worker, adapters: list[Adapter]) -> None:
    async def use() -> None:
        await worker.classify("t", adapters[0].digest, images(1))
        idle = worker.record_autoscaling_stats()
        assert idle == {"images": 0.0, "batch": 32.0}
        running = asyncio.create_task(worker.classify("t", adapters[0].digest, images(3)))
        await asyncio.sleep(0)
        assert worker.record_autoscaling_stats() == idle | {"images": 3.0}
        await running
        assert worker.record_autoscaling_stats() == idle
        assert worker.record_routing_stats() == {"digests": [adapters[0].digest[:16]], "batch": 32}

    run(use)


def test_queued_images_are_not_computed_when_their_call_is_cancelled(
    worker: Worker, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use() -> None:
        digest = adapters[0].digest
        gate, running = await held_call(worker, digest, monkeypatch)
        gone, stays = (asyncio.create_task(worker.classify("t", digest, images(3))) for _ in range(2))
        await until(lambda: worker.status().waiting == 6)
        gone.cancel()
        gate.open.set()
        await running
        assert {answer.computed.images for answer in await stays} == {3}

    run(use)


def test_a_new_worker_has_the_recently_used_adapters(
    worker: Worker, empty_redis: str, tmp_path: Path, adapters: list[Adapter], store: Store
) -> None:
    a, b = (adapter.digest for adapter in adapters[:2])

    async def use() -> None:
        for digest in (a, b):
            await worker.classify("t", digest, images(1))
        await worker.refresh_prewarming()

    run(use)
    another = make_worker(empty_redis, store, tmp_path)
    store.delete(a)
    assert another.status().slots_used == 2

    async def use_again() -> None:
        await another.classify("t", a, images(1))  # needs no file

    run(use_again)


def test_a_new_worker_starts_when_a_recently_used_adapter_is_not_in_the_store(
    worker: Worker, empty_redis: str, tmp_path: Path, adapters: list[Adapter], store: Store
) -> None:
    asyncio.run(Prewarming(empty_redis, []).record_digests([adapters[0].digest, "0" * 64]))
    assert make_worker(empty_redis, store, tmp_path).status().slots_used == 1


def test_used_adapters_are_reported_later_when_the_registry_was_unavailable(
    worker: Worker, empty_redis: str, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use() -> None:
        await worker.classify("t", adapters[0].digest, images(1))
        with monkeypatch.context() as without_redis:
            without_redis.setattr(Prewarming, "record_digests", Prewarming("redis://127.0.0.1:1", []).record_digests)
            with pytest.raises(Unavailable):
                await worker.refresh_prewarming()
        await worker.refresh_prewarming()
        assert await Prewarming(empty_redis, []).recent_digests(1) == [adapters[0].digest]

    run(use)


def test_a_worker_reports_its_status_to_the_registry(
    worker: Worker, empty_redis: str, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub.worker.replica.STATUS_INTERVAL_S", 0.02)

    async def use() -> None:
        await worker.check_health()  # starts the reports
        await worker.classify("acme", adapters[0].digest, images(3), 1.0, CallOrigin("r", "digits"))
        connection = RegistryConnection(empty_redis, patience=REDIS_PATIENCE)
        try:
            while not (found := await StatusBoard(connection).workers()) or not found[0].loads:
                await asyncio.sleep(0.01)
        finally:
            await connection.close()
        (reported,) = found
        assert (reported.slots, reported.slots_used, reported.loads, reported.waiting) == (2, 1, 1, 0)
        assert reported.worker == worker.status().worker

    run(use)


def test_an_unavailable_adapter_fails_only_its_own_callers(worker: Worker, adapters: list[Adapter]) -> None:
    async def use() -> None:
        bad, good = await asyncio.gather(
            worker.classify("t", "0" * 64, images(1)),
            worker.classify("t", adapters[0].digest, images(1)),
            return_exceptions=True,
        )
        assert isinstance(bad, Unavailable)
        assert not isinstance(good, BaseException)
        assert len(good[0].probabilities) == adapters[0].num_classes
        answer = pickle.loads(pickle.dumps(await worker.answer("t", "0" * 64, images(1))))  # as Serve sends it
        assert isinstance(answer, HubError)
        assert (type(answer), answer.problem()) == (Unavailable, bad.problem())

    run(use)


def test_each_call_has_its_own_answer_or_error_when_calls_come_together(
    worker: Worker, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use() -> None:
        good, bad = adapters[0].digest, "0" * 64
        calls = {"good": ("t", good, images(2)), "bad": ("u", bad, images(1)), "fault": ("v", good, None)}
        found: dict[str, object] = {}
        async for running, results in worker.answer_together(calls):
            found |= pickle.loads(pickle.dumps(results))  # as Serve sends them
            assert running == 3 - len(found)
        assert isinstance(found["bad"], Unavailable)
        assert isinstance(found["fault"], CallFailed)
        answers = found["good"]
        assert isinstance(answers, list)
        expected = await worker.classify("t", good, images(2))
        for one, other in zip(answers, expected, strict=True):
            np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)

    run(use)


def test_images_of_a_dropped_call_are_not_computed_and_its_neighbours_are(
    worker: Worker, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use() -> None:
        digest = adapters[0].digest
        gate, running = await held_call(worker, digest, monkeypatch)

        async def together() -> dict[str, object]:
            found: dict[str, object] = {}
            async for _, results in worker.answer_together({x: (x, digest, images(3)) for x in ("gone", "stays")}):
                found |= results
            return found

        calls = asyncio.create_task(together())
        await until(lambda: worker.status().waiting == 6)
        await worker.forget(["gone", "unknown"])
        gate.open.set()
        await running
        found = await calls
        assert list(found) == ["stays"]
        assert isinstance(found["stays"], list)
        assert {answer.computed.images for answer in found["stays"]} == {3}

    run(use)


def test_calls_end_when_the_gateway_that_sent_them_together_is_gone(
    worker: Worker, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use() -> None:
        digest = adapters[0].digest
        gate, running = await held_call(worker, digest, monkeypatch)

        async def together() -> None:
            async for _ in worker.answer_together({str(i): ("t", digest, images(3)) for i in range(2)}):
                pass

        calls = asyncio.create_task(together())
        await until(lambda: worker.status().waiting == 6)
        calls.cancel()
        await until(lambda: worker.status().waiting == 0)
        gate.open.set()
        await running

    run(use)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=needs_vnni)])
def test_a_worker_logs_and_reports_the_form_of_each_kind_of_frozen_layer(
    empty_redis: str, tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture, dtype: Literal["float32", "int8"]
) -> None:
    with caplog.at_level("INFO", "hub.worker.replica"):
        worker = make_worker(empty_redis, store, tmp_path, dtype=dtype)
    lines = worker.status().frozen_layers
    assert {line.split()[0] for line in lines} == {"qkv", "proj", "fc1", "fc2"}
    for line in lines:
        assert f"frozen layers {line}" in caplog.text
        assert ("int8" in line) == (dtype == "int8")


def test_a_worker_measures_forms_with_the_threads_of_two_batches_at_once(
    empty_redis: str, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def measure(backbone: Backbone, *_: object, **__: object) -> FrozenForms:
        threads.append(torch.get_num_threads())
        return unmeasured_forms(backbone)

    monkeypatch.setattr(replica, "measure_forms", measure)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        make_worker(empty_redis, store, tmp_path)
    finally:
        torch.set_num_threads(before)
    assert threads == [2]


def test_a_worker_is_refused_int8_on_a_cpu_without_vnni(
    empty_redis: str, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_operators, "has_int8", lambda: False)
    with pytest.raises(BackboneError, match="int8 needs a CPU with VNNI, and this one has none; use float32"):
        make_worker(empty_redis, store, tmp_path, dtype="int8")
