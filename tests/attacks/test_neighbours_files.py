"""Files of a running hub: other users of the machine read none, and deleted ones stay within their tenant's quota."""

import os
import stat
from pathlib import Path

import pytest

from adapters import Adapter
from hub.local.run_folder import RECORD
from tests.support.models import with_metadata

from .conftest import AttackedHub, Victim

pytestmark = pytest.mark.slow
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def open_to_others(folder: Path) -> list[str]:
    """Return every file and folder that another user can reach and read or write, by the modes from this folder on."""
    found = []
    for place, folders, files in os.walk(folder):
        mode = Path(place).stat().st_mode
        if mode & OTHERS:
            found.append(f"{mode & 0o777:o} {place}")
        if not mode & (stat.S_IXGRP | stat.S_IXOTH):
            folders.clear()  # others reach nothing below
            continue
        paths = [Path(place, name) for name in files]
        modes = [(path, path.lstat().st_mode) for path in paths if not path.is_symlink()]
        found += [f"{mode & 0o777:o} {path}" for path, mode in modes if mode & OTHERS]
    return found


def test_hub_leaves_nothing_readable_for_other_users_when_it_runs(hub: AttackedHub, victim: Victim) -> None:
    run_folder = Path((hub.home / RECORD).read_text())
    assert (run_folder / "session").is_dir() or list(run_folder.iterdir())  # Ray's sessions lie below this folder
    assert open_to_others(hub.home) == []
    assert open_to_others(run_folder) == []


def test_disk_stays_within_the_quota_when_a_tenant_registers_and_deletes(hub: AttackedHub, victim: Victim) -> None:
    key, quota = hub.tenant({"stored_bytes": 10**6}), 10**6
    before = stored_bytes(hub.home)
    with hub.client(key) as client:
        for number in range(12):
            client.register("t", with_metadata(Adapter.read(victim.adapter), producer=f"{number}" + "x" * 300_000))
            client.delete_task("t")
            assert stored_bytes(hub.home) - before <= quota
        used = client.usage().used
    assert used.stored_bytes == 0
    assert used.deleted_bytes == stored_bytes(hub.home) - before > 0


def stored_bytes(home: Path) -> int:
    return sum(path.stat().st_size for path in (home / "store").rglob("*.safetensors"))


def test_hub_writes_private_files_when_its_home_is_private(hub: AttackedHub, victim: Victim) -> None:
    """A copy of the home, or a later chmod of it, exposes nothing either."""
    paths = [Path(place, name) for place, folders, files in os.walk(hub.home) for name in folders + files]
    assert any(path.suffix == ".safetensors" for path in paths)
    assert [str(path) for path in paths if not path.is_symlink() and path.stat().st_mode & OTHERS] == []
