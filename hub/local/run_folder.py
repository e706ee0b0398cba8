"""The private folder of a running hub: sockets, Ray's token and logs, HAProxy's configuration.

A hub that ends removes the folder, and kills what still writes into it. The hub's home names the folder, so that the
next start does the same for a hub that was killed.
"""

import fcntl
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..cluster.ray_compat import RUN_FOLDER_BYTES
from .errors import StartError

PREFIX = "karst-hub-"
RANDOM_CHARACTERS = 8  # of `tempfile.mkdtemp`
RECORD = "run-folder"  # file in the home with the folder's path
LOCK = "lock"  # file in the folder that the running hub holds locked
END_TIMEOUT_S = 10.0  # of leftover processes after SIGKILL


@contextmanager
def run_folder(home: Path) -> Iterator[Path]:
    """Create the private folder of a hub, and remove it at the end. The caller holds the lock of the home.

    A process that still writes into the folder then is killed: Ray's idle workers at times outlive their cluster.

    First, processes and the folder of a hub that was killed in this home are removed.

    Raises:
        StartError: no folder for temporary files is usable.
    """
    record = home / RECORD
    remove_leftovers(record)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=short_base(_bases())))  # only this user may read it
    record.write_text(str(folder), encoding="utf-8", errors="surrogateescape")
    try:
        # A copy of the home has the record as well. Its hub must not take this one's folder for a leftover.
        with (folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                yield folder
            finally:
                _kill_processes(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        record.unlink(missing_ok=True)


def short_base(bases: Sequence[Path]) -> Path:
    """Return the first folder that can hold a hub's folder: short enough for sockets, writable, programs can run.

    Raises:
        StartError: there is none.
    """
    longest = RUN_FOLDER_BYTES - len(f"/{PREFIX}") - RANDOM_CHARACTERS
    for base in bases:
        if len(os.fsencode(base)) <= longest and os.access(base, os.W_OK | os.X_OK) and not _is_noexec(base):
            return base
    names = ", ".join(map(str, bases))
    raise StartError(
        f"No folder for the hub's sockets and programs: none of {names} is writable, has a path of at most {longest} "
        "bytes and is mounted without noexec. Set TMPDIR to such a folder."
    )


def remove_leftovers(record: Path) -> None:
    """Kill the processes of a killed hub and remove its folder, which `record` names; leave those of a running hub."""
    with suppress(OSError):  # no record, no folder, or the lock of a hub that runs
        folder = Path(record.read_text(encoding="utf-8", errors="surrogateescape"))
        with (folder / LOCK).open() as lock:  # to read only: see `_belongs`
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.name.startswith(PREFIX) and folder.stat().st_uid == os.getuid():
                _kill_processes(folder)
                shutil.rmtree(folder, ignore_errors=True)
    record.unlink(missing_ok=True)


def _bases() -> list[Path]:
    """Return the folders to try: the configured one, then the usual ones of Linux."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    usual = [Path("/tmp"), *([Path(runtime)] if runtime else []), Path("/var/tmp"), Path("/dev/shm")]  # noqa: S108
    return list(dict.fromkeys([Path(tempfile.gettempdir()), *usual]))


def _is_noexec(base: Path) -> bool:
    return bool(os.statvfs(base).f_flag & getattr(os, "ST_NOEXEC", 0))


def _kill_processes(folder: Path) -> None:
    deadline = time.monotonic() + END_TIMEOUT_S
    while (found := _processes(folder)) and time.monotonic() < deadline:
        for pid in found:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _processes(folder: Path) -> list[int]:
    """Return the processes of the hub that had the folder; none on systems without /proc."""
    own = str(os.getpid())  # holds the folder's lock
    real = f"{os.path.realpath(folder)}/"
    found = [entry for entry in Path("/proc").glob("[0-9]*") if entry.name != own and _belongs(entry, real)]
    return [int(entry.name) for entry in found]


def _belongs(process: Path, folder: str) -> bool:
    """Return whether a process writes to a file in the folder, as Ray's processes and HAProxy do.

    A program that only reads one, such as `tail -f` on a log, does not belong to the hub.
    """
    with suppress(OSError):  # a process of another user, or one that has just ended
        for file in (process / "fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                if os.readlink(file).startswith(folder) and file.lstat().st_mode & stat.S_IWUSR:
                    return True
    return False
