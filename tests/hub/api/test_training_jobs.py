"""Trainings that run as jobs, over HTTP: progress, reports, cancellation, killed processes, stopped gateways."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters import Backbone
from hub.admission.quotas import TRAINING_JOBS, TRAINING_STREAMS
from hub.dataset_schemas import ENDED, TrainingProgress
from hub.services.trainings.promotion import PromotionService
from hub.training.job import TrainingJob, TrainingResult
from tests.support.hub_app import OCTETS, Hub, running
from tests.support.models import coloured_noise, random_adapter, wait_until
from tests.support.trainers import ProcessTrainer
from tests.support.zips import zip_of

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}
TRAININGS = "/v1/tasks/colours/trainings"
JOB = {"recipe": "karst", "budget_s": 5}


def add_colours(hub: Hub, folder: Path, task: str = "colours", count: int = 8, **options: Any) -> None:
    """Create a task with images of three colours."""
    hub.http.put(f"/v1/tasks/{task}", json={}, **options)
    coloured_noise(folder, COLOURS, count=count, seed=0)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}
    options["headers"] = options.get("headers", {}) | {"content-type": "application/zip"}
    reply = hub.http.post(f"/v1/tasks/{task}/images", content=zip_of(files), **options)
    assert reply.json()["counts"]["added"] == 3 * count, reply.text


@pytest.fixture
def colours(hub: Hub, tmp_path: Path) -> Hub:
    """A hub with a task `colours`."""
    add_colours(hub, tmp_path / "colours")
    return hub


def start(hub: Hub, **body: Any) -> str:
    """Queue a training and return its path."""
    reply = hub.http.post(TRAININGS, json=JOB | body)
    assert reply.status_code == 202, reply.text
    assert reply.json()["state"] == "queued"
    return f"{TRAININGS}/{reply.json()['id']}"


def state(hub: Hub, path: str) -> dict[str, Any]:
    found: dict[str, Any] = hub.http.get(path).json()
    return found


def ended(hub: Hub, path: str) -> dict[str, Any]:
    """Wait for the end of a training and return it."""
    wait_until(lambda: state(hub, path)["state"] in ENDED, 120, lambda: state(hub, path))
    return state(hub, path)


def wait_for_process(hub: Hub, path: str) -> str:
    """Wait until the process of a training runs, and return the training's id."""
    id = path.rpartition("/")[2]
    wait_until(lambda: id in hub.trainer.pids and state(hub, path)["progress"] is not None, 60)
    return id


@pytest.mark.slow
def test_a_job_makes_a_version_with_a_report(colours: Hub) -> None:
    path = start(colours)
    training = ended(colours, path)
    assert (training["state"], training["version"], training["attempt"]) == ("done", 1, 1), training
    assert training["report"]["snapshot"] == training["snapshot"]["digest"]
    assert training["report"]["training"] == training["id"]
    version = colours.http.get("/v1/tasks/colours").json()["versions"][0]
    assert version["metrics"]["training"] == training["id"]
    page = colours.http.get(f"{path}/report/report.html")
    assert page.headers["content-type"].startswith("text/html")
    assert "sandbox" in page.headers["content-security-policy"]
    assert "KARST" in colours.http.get(f"{path}/report/report.json").json()["comparison"]
    assert colours.http.get(f"{path}/report/curves.png").content.startswith(b"\x89PNG")
    assert colours.http.get(f"{path}/report/other.png").status_code == 422
    actions = [e["action"] for e in colours.http.get("/v1/tenants/default/audit").json()["entries"]]
    assert (actions.count("training.queue"), actions.count("training.run")) == (1, 1)
    colours.http.delete("/v1/tasks/colours")
    wait_until(lambda: not any(name.endswith((".json", ".zip")) for name in colours.stored()), timeout_s=20)


@pytest.mark.slow
def test_events_follow_a_job_to_its_end(colours: Hub) -> None:
    path = start(colours)
    states = []
    with colours.http.stream("GET", f"{path}/events") as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        for line in reply.iter_lines():
            if line.startswith("data: "):
                states.append(json.loads(line.removeprefix("data: ")))
    assert states[-1]["state"] == "done"
    stages = [found["progress"]["stage"] for found in states if found["progress"]]
    assert stages, states
    assert len(states) >= 3
    assert colours.http.get(f"{TRAININGS}/{'0' * 16}/events").status_code == 404


@pytest.mark.slow
def test_a_cancelled_job_ends_at_once_and_makes_no_version(colours: Hub) -> None:
    running, queued = start(colours, budget_s=600), start(colours)
    id = wait_for_process(colours, running)
    for path in (queued, running):
        assert colours.http.delete(path).json()["state"] == "cancelled"
        assert colours.http.delete(path).json()["state"] == "cancelled"
    wait_until(lambda: id not in colours.trainer.pids, 20)
    assert [state(colours, path)["state"] for path in (running, queued)] == ["cancelled", "cancelled"]
    assert colours.http.get("/v1/tasks/colours").json()["versions"] == []


@pytest.mark.slow
def test_a_job_whose_process_is_killed_starts_again(colours: Hub) -> None:
    path = start(colours)
    colours.trainer.kill(wait_for_process(colours, path))
    training = ended(colours, path)
    assert (training["state"], training["attempt"], training["version"]) == ("done", 2, 1)


@pytest.mark.slow
def test_a_job_whose_process_is_killed_three_times_has_failed(colours: Hub) -> None:
    path = start(colours, budget_s=600)
    for attempt in (1, 2, 3):
        wait_until(lambda a=attempt: state(colours, path)["attempt"] == a, 60)  # type: ignore[misc]
        colours.trainer.kill(wait_for_process(colours, path))
        wait_until(lambda a=attempt: state(colours, path)["attempt"] != a or state(colours, path)["state"] in ENDED, 60)  # type: ignore[misc]
    training = ended(colours, path)
    assert (training["state"], training["version"]) == ("failed", None)
    assert training["error"] == "interrupted 3 times: its process was killed"


@pytest.mark.slow
def test_a_job_of_a_gateway_that_stops_goes_to_another_gateway(colours: Hub) -> None:
    trainer = ProcessTrainer()
    with colours.another_gateway(trainer) as other:
        while True:
            id = other.post(TRAININGS, json=JOB).json()["id"]
            wait_until(lambda id=id: id in trainer.pids or id in colours.trainer.pids, 60)  # type: ignore[misc]
            if id in trainer.pids:
                break
            other.delete(f"{TRAININGS}/{id}")  # the first gateway was faster
    assert trainer.pids == {}
    training = ended(colours, f"{TRAININGS}/{id}")
    assert (training["state"], training["version"], training["attempt"]) == ("done", 1, 1)
    assert colours.trainer.starts[-1] == id


@pytest.mark.slow
def test_a_classifier_that_is_no_better_than_chance_is_not_registered(hub: Hub, tmp_path: Path) -> None:
    grey = dict.fromkeys(COLOURS, (128, 128, 128))
    folder = coloured_noise(tmp_path / "grey", grey, count=8, seed=0)
    hub.http.put("/v1/tasks/colours", json={})
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}
    hub.http.post("/v1/tasks/colours/images", content=zip_of(files), headers={"content-type": "application/zip"})
    path = start(hub)
    training = ended(hub, path)
    assert (training["state"], training["version"]) == ("failed", None)
    assert training["error"].startswith("The adapter is not clearly better than a constant answer")
    assert "/" not in training["error"].replace("karst-hub", "")
    assert hub.http.get(f"{path}/report/report.html").status_code == 200


def test_a_deleted_task_kills_its_job(colours: Hub) -> None:
    id = wait_for_process(colours, start(colours, budget_s=600))
    colours.http.delete("/v1/tasks/colours")
    wait_until(lambda: id not in colours.trainer.pids, 20)


def test_too_many_jobs_of_a_tenant_are_refused(colours: Hub) -> None:
    paths = [start(colours, budget_s=600) for _ in range(TRAINING_JOBS)]
    reply = colours.http.post(TRAININGS, json=JOB)
    assert reply.status_code == 429
    assert reply.json()["errors"][0]["field"] == "training_jobs"
    colours.http.delete(paths[-1])
    assert colours.http.post(TRAININGS, json=JOB).status_code == 202


def test_a_job_of_an_unfit_dataset_is_refused_before_it_is_queued(hub: Hub, tmp_path: Path) -> None:
    hub.http.put("/v1/tasks/colours", json={})
    assert hub.http.post(TRAININGS, json=JOB).status_code == 409
    assert hub.http.post("/v1/tasks/absent/trainings", json=JOB).status_code == 404
    assert hub.http.post(TRAININGS, json={"recipe": "karst", "budget_s": 0}).status_code == 422
    reply = hub.http.post(TRAININGS, json={"recipe": "best"})
    assert reply.status_code == 422
    assert "must be one of 'instant', 'karst', 'auto'" in reply.json()["detail"]


def test_an_instant_training_has_no_report_files(colours: Hub) -> None:
    made = colours.http.post(TRAININGS).json()
    reply = colours.http.get(f"{TRAININGS}/{made['id']}/report/report.html", headers=OCTETS)
    assert reply.status_code == 404


@pytest.mark.slow
def test_twenty_jobs_of_four_tenants_all_end_and_tenants_take_turns(hub: Hub, tmp_path: Path) -> None:
    keys = {name: hub.key_of(name) for name in ("a", "b", "c", "d")}
    owners = {}
    for name, key in keys.items():
        add_colours(hub, tmp_path / name, headers=key)
    for name, key in keys.items():
        for _ in range(5):
            reply = hub.http.post(TRAININGS, json={"recipe": "karst", "budget_s": 1}, headers=key)
            assert reply.status_code == 202, reply.text
            owners[reply.json()["id"]] = name

    def states() -> list[str]:
        lists = [hub.http.get(TRAININGS, headers=key).json().get("trainings", []) for key in keys.values()]
        return [training["state"] for trainings in lists for training in trainings]

    wait_until(lambda: len(found := states()) == 20 and set(found) <= {"done"}, 300, states)
    starts = [owners[id] for id in hub.trainer.starts]
    assert len(starts) == 20
    # Some jobs of the first tenant may start before the others are queued; from then on each round has all four.
    last = [starts[i : i + 4] for i in range(4, 16, 4)]
    assert all(len(set(group)) >= 3 for group in last), starts


def test_a_stream_of_progress_ends_when_its_key_is_revoked(colours: Hub, url: str) -> None:
    path = start(colours, budget_s=600)
    made = colours.http.post(
        "/v1/tenants/default/keys", json={"name": "guest", "role": "owner"}, headers=colours.admin
    ).json()
    header = {"authorization": f"Bearer {made['key']}"}
    with httpx.Client(base_url=url, headers=header, timeout=30) as http, http.stream("GET", f"{path}/events") as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith(("event: ", "data: ", "id: ", ":"))
        assert colours.http.delete(f"/v1/tenants/default/keys/{made['id']}", headers=colours.admin).status_code == 204
        for _ in lines:  # without the check it would go on for the ten minutes of the job
            pass
    assert state(colours, path)["state"] in ("queued", "running")
    colours.http.delete(path)


@pytest.mark.slow
def test_streams_of_progress_beyond_the_quota_are_refused_until_one_ends(colours: Hub, url: str) -> None:
    path = start(colours, budget_s=600)
    with (
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {colours.key}"}) as http,
        ExitStack() as open_streams,
    ):
        first = open_streams.enter_context(http.stream("GET", f"{path}/events"))
        replies = [open_streams.enter_context(http.stream("GET", f"{path}/events")) for _ in range(TRAINING_STREAMS)]
        assert [reply.status_code for reply in replies] == [200] * (TRAINING_STREAMS - 1) + [429]
        first.close()

        def accepted() -> bool:
            with http.stream("GET", f"{path}/events") as reply:
                return reply.status_code == 200

        wait_until(accepted)
        colours.http.delete(path)


class QuickTrainer(ProcessTrainer):
    """A `Trainer` whose jobs end at once, with an adapter."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self._adapter = random_adapter(backbone)

    async def run(self, job: TrainingJob) -> AsyncGenerator[TrainingProgress | TrainingResult, None]:
        yield TrainingResult(self._adapter.data, zip_of({"report.json": b"{}"}))


def test_a_job_that_has_made_its_version_cannot_be_cancelled(
    empty_redis: str, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a training would be cancelled, and its version there. Two clients cancel it at two gateways."""
    registered, cancelled = threading.Event(), threading.Event()
    register = PromotionService.register

    async def register_and_wait(self: PromotionService, *args: Any) -> Any:
        made = await register(self, *args)
        registered.set()
        assert await asyncio.to_thread(cancelled.wait, 60)
        return made

    monkeypatch.setattr(PromotionService, "register", register_and_wait)
    with (
        running(empty_redis, backbone, tmp_path / "store", trainer=QuickTrainer(backbone)) as hub,
        hub.another_gateway(QuickTrainer(backbone)) as other,
    ):
        add_colours(hub, tmp_path / "colours")
        path = start(hub)
        assert registered.wait(60)
        try:
            replies = [http.delete(path) for http in (hub.http, other)]
        finally:
            cancelled.set()
        assert {reply.status_code for reply in replies} == {200}
        assert {reply.json()["state"] for reply in replies} <= {"queued", "running"}
        training = ended(hub, path)
        assert (training["state"], training["version"]) == ("done", 1)
