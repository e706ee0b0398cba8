"""Fixtures of all tests, and the order in which tests run in one process or in several."""

import os
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# libgomp reads it when torch is imported; processes that tests start inherit it. With two threads a process, tests of
# tiny tensors take 10 to 50 times longer beside another busy process: each operation waits for both threads.
os.environ["OMP_NUM_THREADS"] = "1"

HERE = Path(__file__).parent
HUBS = ("tests/system/", "tests/console/", "tests/attacks/test_neighbours")  # tests that share whole hubs


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no types
    """Order of pytest-xdist: one process runs all tests that share whole hubs, another starts with the rest.

    A module's tests stay in one process, so that its fixtures are made once. pytest-xdist 3.8's own `loadgroup` finds
    no groups with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "hubs" if nodeid.startswith(HUBS) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist's plugin the hook does not exist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of whole hubs first: they take longest and wait most."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    """Return the rank of a test: hubs, the test that stops the shared hub, Prometheus, trainings, all others."""
    folder = item.path.relative_to(HERE).parts[0]
    if item.nodeid.startswith(HUBS):
        return 1 if "restarted" in getattr(item, "fixturenames", ()) else 0
    if folder == "alerts":  # waits for ten minutes, so the second process must start with it
        return 1
    return 2 if folder == "adapters" else 3


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
