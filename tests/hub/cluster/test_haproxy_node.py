"""HAProxy of a node: its program, its settings, its drain."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hub.api.security_headers import DISCONNECT_HEADER, RAY_HEADERS, RAY_REQUEST_ID
from hub.cluster.haproxy_node import drain, frontend
from hub.settings import Settings
from tests.support.serve import ray_haproxy_config

PROGRAM = Path(sys.executable).with_name("karst-hub-haproxy")


def run_program(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], env=os.environ | variables, capture_output=True, text=True, timeout=60)


def test_haproxy_removes_the_same_headers_as_the_stock_proxy_and_sets_one(tmp_path: Path) -> None:
    options = frontend(Settings(), None, tmp_path)
    assert {*options.delete_headers, DISCONNECT_HEADER} == {*RAY_HEADERS}
    assert options.request_id == f"^{RAY_REQUEST_ID}$"


def test_certificate_and_key_are_in_one_private_file(tmp_path: Path) -> None:
    for name in ("cert", "key"):
        (tmp_path / name).write_text(f"the {name}")
    settings = Settings(tls_cert=tmp_path / "cert", tls_key=tmp_path / "key")
    both = Path(str(frontend(settings, None, tmp_path).certificate))
    assert both.read_text() == "the cert\nthe key"
    assert both.stat().st_mode & 0o077 == 0


def test_the_program_of_a_node_uses_the_node_s_settings(tmp_path: Path) -> None:
    """The real HAProxy reads the configuration."""
    config = ray_haproxy_config(tmp_path)
    assert "bind 127.0.0.1:8000" in config
    home = tmp_path / "home"
    done = run_program("-vv", "-f", tmp_path / "haproxy.cfg", HUB_HOME=str(home), HUB_TRUSTED_PROXIES='["10.0.0.0/8"]')
    assert done.stdout.startswith("HAProxy version"), done
    changed = (tmp_path / "haproxy.cfg").read_text()
    assert "bind 127.0.0.1:8000" in changed
    assert "%[src] unless { src 10.0.0.0/8 }" in changed
    assert (home / "haproxy").stat().st_mode & 0o777 == 0o700


def test_the_program_of_a_node_ends_with_one_line_when_a_setting_is_wrong(tmp_path: Path) -> None:
    done = run_program("-f", tmp_path / "haproxy.cfg", HUB_HOME=str(tmp_path), HUB_TRUSTED_PROXIES="everybody")
    assert done.returncode == 2
    assert done.stderr == 'karst-hub-haproxy: HUB_TRUSTED_PROXIES: expected JSON, such as ["a", "b"]\n'


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="drain needs /proc")
def test_drain_stops_the_haproxy_of_its_folder_softly(tmp_path: Path) -> None:
    ours, others = tmp_path / "ours", tmp_path / "others"
    code = "import signal as s; s.signal(s.SIGUSR1, lambda *_: exit(7)); print(flush=True); s.pause()"
    running = [
        subprocess.Popen(
            ["/bin/haproxy", "-c", code, str(folder / "haproxy.cfg")], executable=sys.executable, stdout=subprocess.PIPE
        )
        for folder in (ours, others)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
            process.stdout.close()
        drain(ours)
        assert running[0].wait(10) == 7
        assert running[1].poll() is None
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
