"""Trainings of 20 tenants on two Ray nodes, one of which is killed: all end, in a fair order, and nothing is lost."""

import time
from pathlib import Path

import pytest

from adapters import load_backbone
from hub.client.client import Client
from hub.dataset_schemas import ENDED, TrainingInfo
from tests.support.faults.cluster import Node, hub_on_a_cluster
from tests.support.hub_process import command, descendants
from tests.support.models import coloured_noise, wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}
TENANTS = 20
GREEDY_JOBS = 5  # of the first tenant; two of them run before the others are queued
PATIENCE_S = 2400


def training_processes(node: Node) -> list[int]:
    return [pid for pid in descendants(node.process.pid) if command(pid).startswith("ray::_train")]


def test_trainings_of_20_tenants_end_in_a_fair_order_when_a_node_is_killed(tmp_path: Path) -> None:
    folder = coloured_noise(tmp_path / "colours", COLOURS, count=6, seed=0)
    images = {label: sorted((folder / label).iterdir()) for label in COLOURS}
    home = tmp_path / "hub"
    home.mkdir()
    with hub_on_a_cluster(home, load_backbone("demo"), min_workers=1, max_workers=1, max_trainings=2) as cluster:
        url = cluster.head_url()
        owners: list[Client] = []
        with Client(url, cluster.admin_key, retry_s=60) as admin:
            for i in range(TENANTS):
                admin.create_tenant(f"t{i}")
                owners.append(Client(url, admin.create_key(f"t{i}", "owner", role="owner").key, retry_s=120))
        for owner in owners:
            owner.create_task("colours")
            for label, files in images.items():
                owner.images.add("colours", files, label=label)
        queued = [(owners[0], queue(owners[0])) for _ in range(GREEDY_JOBS)]
        queued += [(owner, queue(owner)) for owner in owners[1:]]

        def states() -> list[TrainingInfo]:
            return [owner.training("colours", id) for owner, id in queued]

        started_s = time.monotonic()
        wait_until(lambda: sum(t.state == "done" for t in states()) >= 3, PATIENCE_S, "three trainings")
        wait_until(lambda: any(map(training_processes, cluster.nodes)), 120, "a training that runs")
        victim = next(node for node in cluster.nodes if training_processes(node))
        victim.kill()
        cluster.nodes.remove(victim)
        wait_until(lambda: all(t.state in ENDED for t in states()), PATIENCE_S, "the end of all trainings")
        ended = states()
        print(f"{len(ended)} trainings took {time.monotonic() - started_s:.0f} s")
        assert {t.state for t in ended} == {"done"}, [t.error for t in ended]
        assert max(t.attempt for t in ended) > 1  # the node had one that began again on the other node
        greedy, others = ended[:GREEDY_JOBS], ended[GREEDY_JOBS:]
        assert sorted(t.version or 0 for t in greedy) == list(range(1, GREEDY_JOBS + 1))
        assert [t.version for t in others] == [1] * (TENANTS - 1)
        last = max(str(t.started) for t in others if t.attempt == 1)
        assert all(str(t.started) > last for t in greedy[2:]), [(t.started, t.attempt) for t in ended]
        for owner in owners:
            assert owner.images.info("colours").images == 12
            answer = owner.classify("colours", images["red"][0])
            assert answer.predictions[0][0].label == "red"
            owner.close()


def queue(owner: Client) -> str:
    return owner.train("colours", recipe="auto", budget_s=1, wait=False).id
