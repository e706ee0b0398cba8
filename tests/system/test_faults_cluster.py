"""A hub on a head and two nodes of Ray, under steady load: it is upgraded, its head is killed, and a whole node."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters import load_backbone
from tests.support.faults.cluster import Cluster, hub_on_a_cluster, kill_head, kill_node, upgrade, upgrade_often

pytestmark = pytest.mark.long


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """One for each test: where nodes or a head came and went, all replicas may be on one node."""
    with hub_on_a_cluster(tmp_path, load_backbone("demo")) as cluster:
        yield cluster


def test_an_upgrade_fails_nothing(cluster: Cluster) -> None:
    report = upgrade(cluster, slots=32, max_rank=12, batch_wait_ms=3.0)
    assert (report.failed, report.wrong) == ({}, 0), report
    assert report.notes["workers replaced"] == 2


@pytest.mark.timeout(1800)
def test_ten_upgrades_in_a_row_lose_no_call(cluster: Cluster) -> None:
    report = upgrade_often(cluster, 10)
    assert (report.failed, report.wrong) == ({}, 0), report
    assert report.notes["workers replaced"] == [2] * 10
    assert report.asked > 1000


def test_the_head_is_killed(cluster: Cluster) -> None:
    report = kill_head(cluster, 10)
    assert report.wrong == 0, report
    assert report.notes["answered without a head"] > 0


def test_a_node_is_killed(cluster: Cluster) -> None:
    report = kill_node(cluster)  # returns when there are as many workers as before
    assert report.wrong == 0, report
    assert report.notes["lost"]["worker"] > 0
    if not report.notes["lost"]["gateway"]:  # else calls that it had are lost with it
        assert report.failed == {}, report
