"""The disk of `HUB_HOME` is full while adapters are registered: a clean error, no partial state, and recovery."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from adapters import load_backbone
from hub.client.client import Client
from hub.errors import Unavailable
from hub.local.ports import free_port
from tests.support.faults.disk import fill, small_disk
from tests.support.faults.load import Load, Tasks
from tests.support.hub_process import serve
from tests.support.models import wait_until

pytestmark = pytest.mark.long
DISK_MB = 16


def test_a_full_disk(tmp_path: Path) -> None:
    backbone = load_backbone("demo")
    tasks, more = Tasks(backbone, 2), Tasks(backbone, 3, "more", seed=100)
    with ExitStack() as stack:
        try:
            home = stack.enter_context(small_disk(tmp_path / "disk", DISK_MB))
        except PermissionError as error:
            pytest.skip(f"no small disk can be mounted here: {error}")
        served = serve(home / "hub", free_port(), HUB_MIN_FREE_DISK="0")  # the floor would refuse every upload
        stack.callback(served.stop)
        assert served.key is not None
        client = stack.enter_context(Client(served.url, served.key, retry_s=0))
        tasks.register(client)
        before, files = client.tasks(), stored(home)
        with Load(served.url, served.key, tasks, callers=2) as load:
            load.wait_for(20)
            filling = fill(home)
            for name, adapter in more.adapters.items():
                with pytest.raises(Unavailable) as refused:
                    client.register(name, adapter.data)
                assert refused.value.retry_after_s
                assert stored(home) == files
            load.wait_for(20)
            filling.unlink()
            wait_until(lambda: answers(client), 60, "the registry")
            assert client.tasks() == before
            more.register(client)
            load.wait_for(20)
        assert (load.failures(), load.wrong) == ([], [])
        assert len(client.tasks().tasks) == 5
        assert len(stored(home)) == len(files) + 3


def stored(home: Path) -> set[str]:
    """Files of the store, half-written ones too."""
    return {path.name for path in (home / "hub" / "store").rglob("*") if path.is_file()}


def answers(client: Client) -> bool:
    try:
        client.tasks()
    except Unavailable:
        return False
    return True
