"""Faults of one hub, one after another, under steady load: no answer is wrong, and the hub recovers.

Real processes: two workers, two gateways, a redis-server and a store of their own. Figures: docs/faults.md.
"""

from collections.abc import Iterator

import pytest

from adapters import load_backbone
from tests.support.faults.hub import (
    Hub,
    break_store,
    broken_hub,
    kill_gateway,
    kill_registry,
    kill_worker,
    stop_registry,
    terminate,
)

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with broken_hub(tmp_path_factory.mktemp("hub"), load_backbone("demo")) as hub:
        yield hub


def test_a_worker_is_killed(hub: Hub) -> None:
    report = kill_worker(hub)
    assert (report.failed, report.wrong) == ({}, 0), report
    assert report.notes["workers before"] == 2


def test_a_gateway_is_killed(hub: Hub) -> None:
    assert len(hub.replicas("gateway")) == 2
    once, again = kill_gateway(hub)
    assert (again.failed, again.wrong, once.wrong) == ({}, 0, 0), again
    assert sum(once.failed.values()) <= 3, once  # each caller had one call in flight


def test_the_registry_hangs(hub: Hub) -> None:
    report = stop_registry(hub, 7)
    assert (report.failed, report.wrong) == ({}, 0), report
    assert report.slowest_s < 4, report  # a call to a Redis that hangs takes 5 s
    assert report.notes["changes refused"] > 2
    assert 0 not in report.notes["Retry-After, s"]


def test_the_registry_is_killed_under_fifty_writers(hub: Hub) -> None:
    report = kill_registry(hub, 2)
    assert (report.failed, report.wrong) == ({}, 0), report
    assert report.notes["of these lost"] == 0
    assert report.notes["changes refused"] > 0
    assert report.notes["kinds"] == ["Unavailable"]
    assert 0 not in report.notes["Retry-After, s"]


def test_the_store_is_damaged(hub: Hub) -> None:
    report = break_store(hub, "corrupt", 3)
    assert (report.failed, report.wrong) == ({}, 0), report
    assert report.notes["cold task answered"] == 0
    assert report.notes["kinds"] == ["Unavailable"]
    assert all("is damaged" in detail for detail in report.notes["details"])
    assert report.notes["log"]


def test_the_store_is_away(hub: Hub) -> None:
    report = break_store(hub, "away", 4)
    assert (report.failed, report.wrong) == ({}, 0), report
    assert report.notes["cold task answered"] == 0
    assert report.notes["kinds"] == ["Unavailable"]


def test_the_store_is_slow(hub: Hub) -> None:
    report = break_store(hub, "slowly 2", 6)
    assert (report.failed, report.wrong) == ({}, 0), report
    assert report.pause_s < 2, report  # the others do not wait for the store


def test_sigterm_drains(hub: Hub) -> None:
    report = terminate(hub)
    assert report.wrong == 0
    assert set(report.failed) <= {"ConnectError"}, report  # refused before anything was sent; nothing else is lost
