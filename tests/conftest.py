"""Fixtures of all tests, and the groups in which pytest-xdist runs them."""

import os
from pathlib import Path

import pytest

# libgomp reads it when torch is imported; processes that tests start inherit it. With two threads a process, tests of
# tiny tensors take 10 to 50 times longer beside another busy process: each operation waits for both threads.
os.environ["OMP_NUM_THREADS"] = "1"

HERE = Path(__file__).parent
# One process runs all tests that share whole hubs, beside the process that runs the rest.
HUBS = "hubs"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put each module into one group, so that its fixtures are made once, and the group of hubs first."""
    for item in items:
        path = item.path.relative_to(HERE)
        item.add_marker(pytest.mark.xdist_group(HUBS if path.parts[0] == "system" else path.as_posix()))
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    """Return the rank of a test: hubs, the test that stops the shared hub, trainings, all others."""
    folder = item.path.relative_to(HERE).parts[0]
    if folder == "system":
        return 1 if "restarted" in getattr(item, "fixturenames", ()) else 0
    return 2 if folder == "adapters" else 3


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
