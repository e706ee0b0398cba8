"""The private folder of a running hub: its place, and what a killed hub left."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub.cluster.ray_compat import RUN_FOLDER_BYTES
from hub.local.errors import StartError
from hub.local.run_folder import LOCK, RECORD, run_folder, short_base


def process_in(folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that writes its output into a folder, and ignores SIGTERM."""
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    with (folder / "output").open("wb") as output:
        return subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that writes into the folder of a hub that was killed."""
    folder = tmp_path / "karst-hub-leftover"
    folder.mkdir()
    (folder / LOCK).touch()
    process = process_in(folder)
    yield process
    process.kill()
    process.wait()


def test_the_folder_is_private_short_and_removed_at_the_end(tmp_path: Path) -> None:
    with run_folder(tmp_path) as folder:
        assert folder.stat().st_mode & 0o077 == 0
        assert len(os.fsencode(folder)) <= RUN_FOLDER_BYTES
        assert (tmp_path / RECORD).read_text() == str(folder)
    assert not folder.exists()
    assert not (tmp_path / RECORD).exists()


def test_the_end_kills_processes_that_still_write_into_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.setattr("hub.local.run_folder.short_base", lambda _bases: tmp_path / "link")
    started = []
    try:
        with run_folder(tmp_path) as folder:
            started = [process_in(folder), subprocess.Popen(["tail", "-f", folder / LOCK])]
        assert started[0].wait(10) == -9
        assert started[1].poll() is None  # only reads
        assert not folder.exists()
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_start_removes_the_processes_and_the_folder_of_a_killed_hub(
    tmp_path: Path, writer: subprocess.Popen[bytes]
) -> None:
    other = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    (tmp_path / RECORD).write_text(str(tmp_path / "karst-hub-leftover"))
    try:
        with run_folder(tmp_path):
            assert writer.wait(10) == -9
            assert other.poll() is None
            assert not (tmp_path / "karst-hub-leftover").exists()
    finally:
        other.kill()
        other.wait()


def test_a_start_removes_no_folder_with_another_name(tmp_path: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / LOCK).touch()
    (tmp_path / RECORD).write_text(str(other))
    with run_folder(tmp_path):
        assert other.is_dir()


def test_the_start_of_a_copied_home_leaves_the_hub_that_runs(tmp_path: Path) -> None:
    home, copy = tmp_path / "home", tmp_path / "copy"
    home.mkdir()
    with run_folder(home) as folder, (folder / "output").open("wb") as output:
        process = subprocess.Popen(["sleep", "60"], stdout=output)
        try:
            shutil.copytree(home, copy)
            with run_folder(copy) as other:
                assert other != folder
            assert process.poll() is None
            assert folder.is_dir()
        finally:
            process.kill()
            process.wait()


def test_the_first_short_writable_folder_that_runs_programs_is_used(tmp_path: Path) -> None:
    long, absent = tmp_path / ("l" * 61), Path("/absent")
    long.mkdir()
    assert short_base([long, absent, Path("/tmp"), Path("/var/tmp")]) == Path("/tmp")
    assert short_base([Path("/var/tmp"), Path("/tmp")]) == Path("/var/tmp")
    with pytest.raises(StartError, match=r"none of .*/l{61}, /absent .* Set TMPDIR"):
        short_base([long, absent])


@pytest.mark.skipif(not os.access("/proc/mounts", os.R_OK), reason="needs /proc")
def test_a_folder_without_programs_is_passed_over() -> None:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    noexec = [Path(m[1]) for m in mounts if "noexec" in m[3].split(",") and len(m[1]) < 19 and os.access(m[1], os.W_OK)]
    if not noexec:
        pytest.skip("no file system here is mounted with noexec")
    assert short_base([*noexec, Path("/tmp")]) == Path("/tmp")
