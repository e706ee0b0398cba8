"""Training jobs as Ray tasks on a local cluster: progress and result, a killed process, a job that is let go."""

import asyncio
import hashlib
import json
import os
import signal
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray

from adapters import Adapter, Backbone
from adapters.serving import cpu_operators
from adapters.serving.cpu_operators import has_int8
from hub.cluster.ray_compat import local_cluster_options
from hub.cluster.trainings import RayTrainer
from hub.dataset_schemas import TrainingProgress
from hub.storage.store import IMAGES, Store
from hub.training.job import BackboneSource, TrainingInterrupted, TrainingJob, TrainingResult
from hub.training.run import train
from tests.support.models import coloured_noise, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray leaves sockets and files open
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}


@pytest.fixture(scope="module")
def trainer() -> Iterator[RayTrainer]:
    with tempfile.TemporaryDirectory(
        dir="/tmp", prefix="karst-hub-", ignore_cleanup_errors=True
    ) as folder:  # a short path
        options = local_cluster_options(None, Path(folder))
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, **options)
        yield RayTrainer(1, 0)
        ray.shutdown()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> TrainingJob:
    """A job of a few seconds, with its images in a store."""
    folder = tmp_path_factory.mktemp("store")
    store, images = Store(str(folder), IMAGES), []
    for path in sorted(coloured_noise(folder / "pictures", COLOURS, count=8, seed=0).rglob("*.png")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        store.put(digest, path.read_bytes())
        images.append([digest, path.parent.name, "test" if path.stem == "0" else "train"])
    snapshot = json.dumps({"images": sorted(images)}).encode()
    source = BackboneSource("demo", None, None, "cpu")
    return TrainingJob(
        id="0" * 16,
        title="colours",
        recipe="auto",
        store_url=str(folder),
        snapshot=snapshot,
        snapshot_digest=hashlib.sha256(snapshot).hexdigest(),
        backbone=source,
        fingerprint=backbone.fingerprint,
        budget_s=5,
        max_kernels=4,
        max_rank=8,
    )


async def first(items: AsyncGenerator[TrainingProgress | TrainingResult, None]) -> TrainingProgress:
    """Return the first item of a job once its process trains."""
    item = await anext(items)
    assert isinstance(item, TrainingProgress)
    return item


def processes() -> list[int]:
    """Return the processes of this test's Ray that run a training; hubs of other tests run theirs beside it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::_train"):
                found.append(process.pid)
    return found


def test_a_job_yields_progress_and_then_an_adapter_with_its_report(trainer: RayTrainer, job: TrainingJob) -> None:
    async def run() -> list[TrainingProgress | TrainingResult]:
        return [item async for item in trainer.run(job)]

    *progress, result = asyncio.run(run())
    assert isinstance(result, TrainingResult)
    assert result.error == ""
    assert result.adapter is not None
    assert result.report is not None
    metrics = Adapter.read(result.adapter).metrics or {}
    assert (metrics["training"], metrics["snapshot"]) == (job.id, job.snapshot_digest)
    assert metrics["test_images"] == 3
    stages = {item.stage for item in progress if isinstance(item, TrainingProgress)}
    assert {"loading the backbone", "reading images", "computing features"} <= stages
    wait_until(lambda: processes() == [], 30)  # a process with the lowest priority serves nothing else


@pytest.mark.skipif(not has_int8(), reason="this CPU has no VNNI")
def test_a_job_of_an_int8_hub_reports_the_agreement_with_float32(job: TrainingJob) -> None:
    *_, result = train(replace(job, int8=True, recipe="karst", budget_s=1))
    assert isinstance(result, TrainingResult)
    assert result.warnings == ()
    assert result.adapter is not None
    metrics = Adapter.read(result.adapter).metrics or {}
    assert metrics["int8_images"] == metrics["test_images"] == 3
    assert metrics["int8_same_labels"] in (0.0, 0.3333, 0.6667, 1.0)
    assert (metrics["training"], metrics["snapshot"]) == (job.id, job.snapshot_digest)


def test_a_job_of_an_int8_hub_warns_when_its_machine_cannot_compute_in_int8(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_operators, "has_int8", lambda: False)
    *_, result = train(replace(job, int8=True, recipe="instant"))
    assert isinstance(result, TrainingResult)
    assert result.adapter is not None
    assert "int8_same_labels" not in (Adapter.read(result.adapter).metrics or {})
    assert [text for text in result.warnings if "VNNI" in text] == [
        "the agreement of int8 with float32 was not measured: the training does not run on a CPU with VNNI"
    ]


def test_a_job_whose_process_is_killed_is_interrupted(trainer: RayTrainer, job: TrainingJob) -> None:
    async def run() -> None:
        async with aclosing(trainer.run(job)) as items:
            await first(items)
            (pid,) = processes()
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(TrainingInterrupted, match="killed"):
                async for _ in items:
                    pass

    asyncio.run(run())


def test_a_job_whose_generator_is_closed_is_killed(trainer: RayTrainer, job: TrainingJob) -> None:
    async def run() -> None:
        async with aclosing(trainer.run(job)) as items:
            await first(items)

    asyncio.run(run())
    wait_until(lambda: processes() == [], 30)


def test_a_job_for_other_weights_fails_with_the_reason(trainer: RayTrainer, job: TrainingJob) -> None:
    async def run() -> list[TrainingProgress | TrainingResult]:
        changed = TrainingJob(**{**vars(job), "fingerprint": "f" * 64})
        return [item async for item in trainer.run(changed)]

    result = asyncio.run(run())[-1]
    assert isinstance(result, TrainingResult)
    assert result.adapter is None
    assert "fingerprint" in result.error
