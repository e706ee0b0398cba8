"""Fixtures of all tests, and the order in which tests run in one process or in several."""

import os

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# libgomp reads it when torch is imported; processes that tests start inherit it. With two threads a process, tests of
# tiny tensors take 10 to 50 times longer beside another busy process: each operation waits for both threads.
os.environ["OMP_NUM_THREADS"] = "1"

CONSOLE = "tests/console/"  # these share a hub and wait for a browser
# Tests that share whole hubs.
HUBS = ("tests/system/", "tests/attacks/test_neighbours", "tests/attacks/test_smuggling", CONSOLE)


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no types
    """Order of pytest-xdist: one process runs the tests of whole hubs, one those of the console, one starts the rest.

    A module's tests stay in one process, so that its fixtures are made once. pytest-xdist 3.8's own `loadgroup` finds
    no groups with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(CONSOLE):
            return CONSOLE
        return "hubs" if nodeid.startswith(HUBS) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist's plugin the hook does not exist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of whole hubs first: they take longest and wait most."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    """Return the rank of a test: hubs, the test that stops the shared hub, console, Prometheus, trainings, the others.

    Hubs, console and Prometheus start at once, in a process each. Those of Prometheus wait for ten minutes.
    """
    restarted = "restarted" in getattr(item, "fixturenames", ())
    first = (CONSOLE, "tests/alerts/", "tests/adapters/", "tests/")
    if item.nodeid.startswith(HUBS) and not item.nodeid.startswith(CONSOLE):
        return 1 if restarted else 0
    return 2 + next(rank for rank, folder in enumerate(first) if item.nodeid.startswith(folder))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
