"""A hub in a process of its own, started by `karst-hub serve`, and the processes under it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from hub.local.bootstrap import KEYS_FILE

KARST_HUB = Path(sys.executable).parent / "karst-hub"
START_S = 600.0  # beside four busy processes on two cores a start took 190 s
GATEWAY_PORTS = range(30_000, 31_001)  # Ray's default, behind HAProxy


@dataclass
class Served:
    """A hub in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    key: str | None
    admin_key: str | None
    log: Path

    def stop(self) -> str:
        """Send SIGTERM and return the text of stderr; fail if one of the hub's processes stays alive."""
        group = descendants(self.process.pid)
        assert group
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=90)
        errors = self.logged()
        assert self.process.returncode == 0, errors
        deadline = time.monotonic() + 15
        while left := [pid for pid in group if alive(pid)]:
            assert time.monotonic() < deadline, f"left behind: {[command(pid) for pid in left]}"
            time.sleep(0.1)
        return errors

    def logged(self) -> str:
        """Return the text of stderr so far."""
        return self.log.read_text(errors="replace")


def serve(home: Path, port: int, *, prefix: Sequence[str] = (), **settings: str) -> Served:
    """Start `karst-hub serve` and return when it prints its URL; fail after `START_S` seconds.

    Args:
        prefix: command that runs `karst-hub`, such as `setpriv`.
    """
    environment = os.environ | {"HUB_BACKBONE": "demo", "HUB_HOME": str(home), "HUB_PORT": str(port)} | settings
    log = home.with_name(f"{home.name}-{port}.log")
    with log.open("wb") as errors:
        command = [*prefix, str(KARST_HUB), "serve"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    watchdog = threading.Timer(START_S, process.kill)
    watchdog.start()
    url = None
    assert process.stdout is not None
    for line in process.stdout:
        name, _, value = line.strip().partition("=")
        if name == "HUB_URL":
            url = value
            break
    watchdog.cancel()
    if url is None:
        process.communicate()
        pytest.fail(f"the hub did not start: {log.read_text(errors='replace')}")
    keys = _take_first_keys(home)
    return Served(process, url, keys.get("HUB_KEY"), keys.get("HUB_ADMIN_KEY"), log)


def _take_first_keys(home: Path) -> dict[str, str]:
    """Return the keys that this start created, and remove their file, so that a restart's are its own."""
    file = home / KEYS_FILE
    if not file.exists():
        return {}
    assert file.stat().st_mode & 0o777 == 0o600
    keys = dict(line.split("=", 1) for line in file.read_text().splitlines())
    file.unlink()
    return keys


def descendants(pid: int) -> list[int]:
    """Return the ids of all living processes under this one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child)
    return found


def listening_sockets(pids: Iterable[int]) -> set[tuple[str, int]]:
    """Return (address, port) of every TCP socket that these processes listen on."""
    found = set()
    for pid in pids:
        with suppress(psutil.Error):  # it has just ended
            sockets = psutil.Process(pid).net_connections("tcp")
            found |= {(s.laddr.ip, s.laddr.port) for s in sockets if s.status == psutil.CONN_LISTEN}
    return found


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command(pid: int) -> str:
    """Return the first 100 bytes of a process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:100]
    except OSError:
        return "gone"


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment that a process started with.

    Nothing is returned for a process that has ended, or that has overwritten its environment: Ray's agents and
    Redis write a title over their command line, and a title longer than that continues into the environment.
    """
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    except OSError:
        return {}
    if text.startswith("\0"):
        return {}
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)
