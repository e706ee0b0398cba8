"""Trainings as Ray tasks of a whole hub: progress through HAProxy, a killed process, a killed hub."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from hub.client.client import Client
from hub.dataset_schemas import ENDED, TrainingInfo
from hub.local.ports import free_port
from tests.support.hub_process import Served, command, descendants, serve
from tests.support.models import coloured_noise, wait_until

from .conftest import SharedHub

pytestmark = pytest.mark.slow
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}


def add_colours(client: Client, folder: Path) -> None:
    """Create a task `colours` with its images."""
    coloured_noise(folder, COLOURS, count=12, seed=0)
    client.create_task("colours", promote="if_better")
    for label in COLOURS:
        client.images.add("colours", sorted((folder / label).iterdir()), label=label)


def training_processes(served: Served) -> list[int]:
    return [pid for pid in descendants(served.process.pid) if command(pid).startswith("ray::_train")]


def test_a_job_is_followed_through_haproxy_and_starts_again_when_its_process_is_killed(
    hub: SharedHub, tmp_path: Path
) -> None:
    key = hub.tenant("trains")
    with Client(hub.url, key) as client:
        add_colours(client, tmp_path / "colours")
        started = client.train("colours", recipe="karst", budget_s=20, wait=False)
        states: list[TrainingInfo] = []
        headers = {"authorization": f"Bearer {key}"}
        url = f"{hub.url}/v1/tasks/colours/trainings/{started.id}/events"
        killed = False
        with httpx.stream("GET", url, headers=headers, timeout=120) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    states.append(TrainingInfo(**json.loads(line.removeprefix("data: "))))
                    if not killed and (found := training_processes(hub.served)):
                        pid = found[0]
                        wait_until(lambda pid=pid: os.getpriority(os.PRIO_PROCESS, pid) == 19)  # type: ignore[misc]
                        os.kill(pid, signal.SIGKILL)
                        killed = True
        assert killed
        done = states[-1]
        assert (done.state, done.attempt, done.version) == ("done", 2, 1), done
        assert done.promotion is not None
        assert done.promotion.promoted
        page = client.training_report("colours", done.id, tmp_path / "report.html")
        assert page.read_text().startswith("<!doctype html>")
        reply_to = client.classify("colours", tmp_path / "colours" / "red" / "0.png")
        assert reply_to.version == 1
        cancelled = client.train("colours", recipe="karst", budget_s=600, wait=False)
        wait_until(lambda: bool(training_processes(hub.served)), 60)
        client.cancel_training("colours", cancelled.id)
        wait_until(lambda: not training_processes(hub.served), 30)


@pytest.mark.long
def test_a_job_of_a_hub_that_is_killed_runs_again_after_the_restart(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = serve(home, free_port())
    assert first.key is not None
    with Client(first.url, first.key) as client:
        add_colours(client, tmp_path / "colours")
        id = client.train("colours", recipe="karst", budget_s=600, wait=False).id
        wait_until(lambda: bool(training_processes(first)), 90)
    for pid in [first.process.pid, *descendants(first.process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    first.process.communicate()
    second = serve(home, free_port())
    try:
        with Client(second.url, first.key) as client:
            wait_until(lambda: client.training("colours", id).attempt == 2, 60)
            wait_until(lambda: bool(training_processes(second)), 60)
            assert client.training("colours", id).state not in ENDED
            assert client.cancel_training("colours", id).state == "cancelled"
    finally:
        second.stop()
