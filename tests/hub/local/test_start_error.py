"""The error of a start that failed: the output of HAProxy and of Ray's processes is part of it."""

import subprocess
from pathlib import Path

from hub.cluster.ray_compat import HAPROXY_SOCKET, SESSIONS, find_haproxy
from hub.local.start_error import start_error

TRACEBACK = "Deploying failed\n  File 'x.py', line 1\n    ray.exceptions.ActorError: why: it said no\n"


def test_the_reason_is_the_last_error_of_a_traceback_or_the_first_line(tmp_path: Path) -> None:
    prefix = "Ray Serve could not start the hub: "
    assert start_error(RuntimeError(TRACEBACK), tmp_path) == f"{prefix}ActorError: why: it said no"
    assert start_error(RuntimeError("first\nsecond"), tmp_path) == f"{prefix}first"


def test_the_alerts_of_the_real_haproxy_are_shown(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    config = tmp_path / "haproxy.cfg"
    config.write_text("global\n    stats socket /" + "x" * 200 + "\n")
    log = tmp_path / "node" / f"{HAPROXY_SOCKET}.1.1.stderr.log"
    with log.open("wb") as stderr:
        subprocess.run([str(find_haproxy()), "-db", "-f", str(config)], stderr=stderr, check=False)
    text = start_error(TimeoutError("the proxies are late"), tmp_path)
    assert "the proxies are late\nHAProxy: config : parsing" in text
    assert "too long" in text


def test_errors_of_ray_s_processes_and_of_the_hub_s_haproxy_program_are_shown_without_secrets(tmp_path: Path) -> None:
    logs = tmp_path / SESSIONS / "session_latest" / "logs"
    logs.mkdir(parents=True)
    (logs / "gcs_server.out").write_text(
        "[2026-11-28 18:54:20,100 I 1 1] (gcs_server) gcs.cc:1: fine\n"
        "[2026-11-28 18:54:20,195 E 1 1] (gcs_server) gcs.cc:2: cannot reach redis://user:secret@host\n"
    )
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / f"{HAPROXY_SOCKET}.1.1.stderr.log").write_text("Set HUB_HAPROXY=false.\n[NOTICE] fine\n")
    assert start_error(RuntimeError("late"), tmp_path).splitlines()[1:] == [
        "HAProxy: Set HUB_HAPROXY=false.",
        "Ray: (gcs_server) gcs.cc:2: cannot reach redis://***@host",
    ]
