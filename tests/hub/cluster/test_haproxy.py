"""HAProxy's configuration: Ray's own with the hub's rules, in a golden file and in the real HAProxy."""

import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from hub.cluster import haproxy
from hub.cluster.haproxy import RULES, ConfigurationError, Frontend, command, rewrite
from hub.cluster.haproxy_node import connections_for
from hub.cluster.ray_compat import find_haproxy
from hub.errors import LimitReached
from hub.local.ports import free_port
from tests.support.haproxy import in_front_of, plain_frontend
from tests.support.models import listens, wait_until
from tests.support.serve import ray_haproxy_config

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Frontend:
    """Options of a hub without TLS."""
    return plain_frontend(tmp_path_factory.mktemp("haproxy"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Configuration that Ray generates, with a fixed name of its folder."""
    folder = tmp_path_factory.mktemp("ray")
    return ray_haproxy_config(folder).replace(str(folder), "/run/karst-hub")


def lines(config: str) -> list[str]:
    return [line.strip() for line in config.splitlines()]


def binds(config: str) -> list[str]:
    return [line for line in lines(config) if line.startswith("bind")]


def test_configuration_is_the_golden_file(config: str, plain: Frontend) -> None:
    """After an intended change: compare the two files, and write the new one."""
    assert rewrite(config, plain) == (GOLDEN / "haproxy.cfg").read_text()


def test_haproxy_accepts_the_configuration(config: str, plain: Frontend, tmp_path: Path) -> None:
    file = tmp_path / "haproxy.cfg"
    file.write_text(rewrite(config, plain).replace("/run/karst-hub", str(tmp_path)))
    (tmp_path / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\n\r\n")
    done = subprocess.run([str(find_haproxy()), "-c", "-f", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("host", "bind"), [(None, "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("::", "[::]")])
def test_haproxy_listens_only_on_the_hub_s_address(config: str, plain: Frontend, host: str | None, bind: str) -> None:
    assert binds(config) == ["bind :9101", "bind 127.0.0.1:8000", "bind *:8404"]
    assert binds(rewrite(config, replace(plain, host=host))) == [f"bind {bind}:8000 proto h1"]


@pytest.mark.parametrize(("fits", "limit"), [(10, 10), (100_000, 4096)])
def test_the_limit_of_connections_is_not_above_the_one_that_fits(
    config: str, plain: Frontend, fits: int, limit: int
) -> None:
    assert f"maxconn {limit}" in lines(rewrite(config, replace(plain, max_connections=fits)))


@pytest.mark.parametrize("open_files", [256, 1024, 4096])
def test_haproxy_starts_when_few_files_may_be_open(
    config: str, plain: Frontend, tmp_path: Path, open_files: int
) -> None:
    """The real HAProxy, with the largest number of connections for this limit."""
    port = free_port()
    text = config.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("/run/karst-hub", str(tmp_path))
    text = rewrite(text, replace(plain, max_connections=connections_for(open_files)))
    file = tmp_path / "haproxy.cfg"
    file.write_text(text.replace(f"{tmp_path}/admin.sock", f"abns@{port}"))  # the folder's path may be too long
    (tmp_path / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\n\r\n")
    (tmp_path / "server-state").touch()
    shell = f'ulimit -n {open_files} && exec "$0" -db -f "$1"'
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(["/bin/sh", "-c", shell, str(find_haproxy()), str(file)], stderr=stderr)
    try:
        wait_until(lambda: listens(port) or process.poll() is not None, 30, "HAProxy")
        assert process.poll() is None, (tmp_path / "stderr").read_text()
    finally:
        process.kill()
        process.wait()


def test_other_sections_of_ray_s_configuration_stay(config: str, plain: Frontend) -> None:
    sections = {line for line in config.splitlines() if line and not line[0].isspace()}
    kept = {line for line in rewrite(config, plain).splitlines() if line and not line[0].isspace()}
    assert kept == sections - {"frontend prometheus", "listen stats"}


def test_tls_options_follow_the_address(config: str, plain: Frontend) -> None:
    tls = replace(plain, certificate='/a b/"$c".pem')
    assert binds(rewrite(config, tls)) == [
        'bind 127.0.0.1:8000 ssl crt "/a b/\\"\\$c\\".pem" ssl-min-ver TLSv1.2 alpn http/1.1 proto h1',
    ]
    both = rewrite(config, replace(plain, certificate="/c.pem", client_ca="/ca.pem"))
    assert binds(both)[0].endswith(' ca-file "/ca.pem" verify required proto h1')
    assert "http-request set-header X-Forwarded-Proto https" in lines(both)


def test_trusted_proxies_keep_their_forwarded_headers(config: str, plain: Frontend) -> None:
    assert "http-request set-header X-Forwarded-For %[src]" in lines(rewrite(config, plain))
    trusted = lines(rewrite(config, replace(plain, trusted_proxies=("10.0.0.0/8", "::1/128"))))
    assert "http-request set-header X-Forwarded-For %[src] unless { src 10.0.0.0/8 ::1/128 }" in trusted


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.section)
def test_a_configuration_without_exactly_one_match_of_a_rule_is_refused(
    config: str, plain: Frontend, rule: haproxy.Rule
) -> None:
    config = f"\n{config}"
    section = f"\n{rule.section}\n"
    assert config.count(section) == 1
    changed = [config.replace(section, f"\n{rule.section} changed\n"), config + section]
    if rule.line is not None:
        body = config.partition(section)[2]
        line = next(line for line in body.splitlines() if line.strip().startswith(rule.line))
        changed = [config.replace(section, f"{section}{line}\n"), config.replace(f"\n{line}\n", "\n    changed\n")]
    for other in changed:
        with pytest.raises(ConfigurationError, match=r"Ray's HAProxy configuration has [02] (sections|lines) "):
            rewrite(other, plain, [rule])


def test_a_bind_line_with_options_of_ray_is_refused(config: str, plain: Frontend) -> None:
    with pytest.raises(ConfigurationError, match="has 2 words after 'bind'"):
        rewrite(config.replace("bind 127.0.0.1:8000", "bind 127.0.0.1:8000 tfo"), plain)


def test_the_program_changes_the_configuration_and_becomes_haproxy(
    config: str, plain: Frontend, tmp_path: Path
) -> None:
    file = tmp_path / "haproxy.cfg"
    file.write_text(config)
    started = command(plain, "/bin/echo")
    done = subprocess.run([*started, "-db", "-f", str(file), "-sf", "7"], capture_output=True, text=True, check=True)
    assert done.stdout == f"-db -f {file} -sf 7\n"
    assert file.read_text() == rewrite(config, plain)
    again = subprocess.run([*started, "-db", "-f", str(file)], capture_output=True, text=True)
    assert again.returncode == 1
    assert "Set HUB_HAPROXY=false" in again.stderr


def test_the_program_imports_only_the_standard_library() -> None:
    code = "import json, runpy, sys; runpy.run_path(sys.argv[1]); print(json.dumps(sorted(sys.modules)))"
    source = str(haproxy.__file__)
    done = subprocess.run([sys.executable, "-I", "-c", code, source], capture_output=True, text=True, check=True)
    assert not {"hub", "ray", "pydantic", "starlette"} & set(json.loads(done.stdout))


class WaitingGateway(BaseHTTPRequestHandler):
    """Gateway that replies after `answer` is set, and counts the requests that it has."""

    protocol_version = "HTTP/1.1"
    answer = threading.Event()
    arrived = threading.Semaphore(0)

    def do_GET(self) -> None:
        self.arrived.release()
        self.answer.wait(30)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_haproxy_refuses_requests_of_one_key_over_the_limit(plain: Frontend, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), WaitingGateway) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        try:
            with (
                in_front_of(gateway.server_port, tmp_path, replace(plain, requests_per_key=5)) as port,
                ThreadPoolExecutor(12) as pool,
                httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http,
            ):
                one, other = ({"authorization": f"Bearer kh_{name}"} for name in "ab")
                calls = [pool.submit(http.get, "/", headers=one) for _ in range(9)]
                wait_until(lambda: sum(call.done() for call in calls) >= 4, 10, "four refusals")
                calls += [pool.submit(http.get, "/", headers=other), pool.submit(http.get, "/")]
                for _ in range(5 + 2):  # all others are at the gateway
                    assert WaitingGateway.arrived.acquire(timeout=10)
                refused = [call.result() for call in calls if call.done()]
                assert [r.status_code for r in refused] == [429] * 4
                detail = refused[0].json()["detail"]
                assert refused[0].json() == LimitReached(detail).problem() | {"error": detail}
                assert refused[0].headers["retry-after"] == "1"
                assert refused[0].headers["content-type"] == "application/problem+json"
                WaitingGateway.answer.set()
                assert sorted(call.result().status_code for call in calls) == [200] * 7 + [429] * 4
                assert http.get("/", headers=one).status_code == 200
        finally:
            WaitingGateway.answer.set()
            gateway.shutdown()


@pytest.mark.parametrize("size", [0, 3_000, 44_000, 2_000_000])
def test_a_gateway_notices_a_disconnect_after_a_whole_body(plain: Frontend, tmp_path: Path, size: int) -> None:
    """The body arrives in one piece or in many."""
    head = f"POST / HTTP/1.1\r\nhost: hub\r\ncontent-length: {size}\r\n\r\n".encode()
    with (
        socket.create_server(("127.0.0.1", 0)) as gateway,
        in_front_of(gateway.getsockname()[1], tmp_path, plain) as port,
    ):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(head)
            connection, _ = gateway.accept()
            connection.settimeout(10)
            client.sendall(bytes(size))
            received = connection.recv(1 << 16)
            while len(received.partition(b"\r\n\r\n")[2]) < size:
                received += connection.recv(1 << 16)
        with connection, suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def reply_to(port: int, request: bytes, timeout_s: float = 30) -> tuple[int, dict[str, str], Any]:
    """Return status, headers and JSON of HAProxy's reply to these bytes."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(timeout_s)
        client.sendall(request)
        response = HTTPResponse(client)
        response.begin()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, json.loads(response.read())


def test_a_request_that_no_gateway_answers_gets_a_problem_with_the_member_error(
    plain: Frontend, tmp_path: Path
) -> None:
    get = b"GET /v2/models/a HTTP/1.1\r\nhost: hub\r\n\r\n"
    with (
        socket.create_server(("127.0.0.1", 0)) as gateway,
        in_front_of(gateway.getsockname()[1], tmp_path, plain) as port,
    ):

        def close_at_once() -> None:
            connection, _ = gateway.accept()
            connection.recv(1 << 16)
            connection.close()

        with ThreadPoolExecutor(1) as pool:
            closing = pool.submit(close_at_once)
            replies = [reply_to(port, get)]
            closing.result()
        gateway.close()
        replies.append(reply_to(port, get))
    assert [status for status, _, _ in replies] == [502, 503]
    for status, headers, body in replies:
        assert headers["content-type"] == "application/problem+json"
        assert body["status"] == status
        assert body["error"] == body["detail"]
    assert replies[1][1]["retry-after"] == "2"
    assert replies[1][2]["type"] == "urn:karst-hub:problem:unavailable"
