"""A hub on the network: TLS, what it listens on, who it says has called, and slow callers. By HAProxy and without."""

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hub.local.hub import free_port
from tests.support.hub_process import GATEWAY_PORTS, Served, descendants, listening_sockets, serve
from tests.support.models import wait_until
from tests.support.tls import certificate

pytestmark = pytest.mark.timeout(400)
HOST = "localhost"


@pytest.fixture(scope="module")
def pems(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = certificate(HOST)
    (folder / "cert.pem").write_bytes(cert)
    (folder / "key.pem").write_bytes(key)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def tls(pems) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=pems[0])


@pytest.fixture(scope="module")
def served(tmp_path_factory, pems) -> Iterator[Served]:
    settings = {"HUB_TLS_CERT": str(pems[0]), "HUB_TLS_KEY": str(pems[1]), "HUB_HOST": "0.0.0.0"}
    hub = serve(tmp_path_factory.mktemp("home"), free_port(), **settings)
    yield hub
    hub.stop()


def client(hub: Served, tls: ssl.SSLContext, host: str = HOST) -> httpx.Client:
    return httpx.Client(base_url=f"https://{host}:{httpx.URL(hub.url).port}", verify=tls, timeout=60)


def head(path: str, key: str, *more: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", f"Host: {HOST}", f"Authorization: Bearer {key}", *more, ""]).encode()


def test_the_hub_speaks_tls_and_nothing_else(served, tls) -> None:
    assert served.url.startswith("https://")
    with client(served, tls) as http:
        answer = http.get("/healthz")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        assert answer.headers["strict-transport-security"].startswith("max-age=")
        assert "server" not in answer.headers
    with pytest.raises(httpx.HTTPError):
        httpx.get(served.url.replace("https", "http").replace("0.0.0.0", HOST) + "/healthz")
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.get(served.url.replace("0.0.0.0", HOST) + "/healthz")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection((HOST, httpx.URL(served.url).port)) as raw, pytest.raises(ssl.SSLError):
        old.wrap_socket(raw)


def test_only_the_front_is_open_to_the_network(served) -> None:
    """Of HAProxy and of the gateways behind it. Ray's own ports ask for a token: docs/security.md."""
    everything = descendants(served.process.pid)
    proxies = [pid for pid in everything if Path(f"/proc/{pid}/comm").read_text() == "haproxy\n"]
    assert proxies
    front = httpx.URL(served.url).port
    assert {port: address for address, port in listening_sockets(proxies)} == {front: "0.0.0.0"}
    gateways = {port: address for address, port in listening_sockets(everything) if port in GATEWAY_PORTS}
    assert gateways
    assert {*gateways.values()} == {"127.0.0.1"}


def test_the_audit_has_the_address_that_connected(served, tls) -> None:
    address = _own_address()
    lie = {"x-forwarded-for": "203.0.113.9", "forwarded": "for=203.0.113.9", "x-real-ip": "203.0.113.9"}
    admin = {"authorization": f"Bearer {served.admin_key}"}
    unnamed = ssl.create_default_context(cadata=ssl.DER_cert_to_PEM_cert(tls.get_ca_certs(binary_form=True)[0]))
    unnamed.check_hostname = False  # the certificate is for a name
    with client(served, unnamed, address) as http:
        http.post("/v1/tenants", json={"tenant": "a"}, headers=admin | lie).raise_for_status()
        entries = http.get("/v1/audit", params={"count": 1000}, headers=admin).json()["entries"]
    assert [e["address"] for e in entries if (e["action"], e["tenant"]) == ("tenant.create", "a")] == [address]


def test_headers_do_not_steer_ray(served, tls) -> None:
    with client(served, tls) as http:
        for name in ("x-request-timeout-seconds", "x-request-id", "serve_multiplexed_model_id", "x-session-id"):
            for value in (b"0.000001", b"\xff"):
                answer = http.get("/v1/tasks", headers=[("authorization", f"Bearer {served.key}"), (name, value)])
                assert answer.status_code == 200, (name, answer.text)
        assert http.get("/healthz", headers={"a": "x" * 16_384}).status_code == 400


def test_slow_callers_are_cut_off(served, tls) -> None:
    """A head that drips, a body that stops; at the same time, since each takes its ten seconds."""
    answers: dict[str, bytes] = {}

    def call(name: str, *parts: bytes) -> None:
        raw = socket.create_connection((HOST, httpx.URL(served.url).port), timeout=60)
        with tls.wrap_socket(raw, server_hostname=HOST) as connection:
            for part in parts:
                connection.sendall(part)
                time.sleep(0.2)
            answers[name] = connection.recv(65536)
            while not answers[name].rstrip().endswith((b"}", b">")):
                answers[name] += connection.recv(65536) or b"}"

    key = str(served.key)
    body = head("/v1/tasks/x/classify", key, "Content-Length: 1000", "")
    calls = {"head": (head("/v1/classify", key),), "body": (body, b"abc")}
    threads = [threading.Thread(target=call, args=(name, *parts)) for name, parts in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers["head"].startswith(b"HTTP/1.1 408 ")
    assert answers["body"].startswith(b"HTTP/1.1 408 ")
    assert b"nothing came for 10 s" in answers["body"]


def test_nobody_joins_ray_without_its_token(served) -> None:
    def environments() -> list[dict[str, str]]:
        return [_environment(pid) for pid in descendants(served.process.pid)]

    def modes() -> set[str | None]:
        return {e.get("RAY_AUTH_MODE") for e in environments() if "RAY_SERVE_ENABLE_HA_PROXY" in e}

    # A process that gives itself a name writes over its environment for a moment.
    wait_until(lambda: modes() == {"token"}, 5, lambda: f"all of Ray with its token, not {modes()}")
    [token] = {Path(e["RAY_AUTH_TOKEN_PATH"]) for e in environments() if "RAY_AUTH_TOKEN_PATH" in e}
    assert token.stat().st_mode & 0o077 == 0
    assert token.parent.stat().st_mode & 0o077 == 0
    assert len(token.read_text()) == 64
    for secret in token.parent.glob("*.pem"):
        assert secret.stat().st_mode & 0o077 == 0


def test_the_stock_proxy_has_tls_too(tmp_path, pems, tls) -> None:
    settings = {"HUB_TLS_CERT": str(pems[0]), "HUB_TLS_KEY": str(pems[1]), "HUB_HAPROXY": "false"}
    hub = serve(tmp_path, free_port(), **settings)
    try:
        with client(hub, tls) as http:
            headers = [("authorization", f"Bearer {hub.key}"), ("x-request-timeout-seconds", b"\xff")]
            assert http.get("/v1/tasks", headers=headers).json() == {"tasks": []}
            admin = {"authorization": f"Bearer {hub.admin_key}", "x-forwarded-for": "203.0.113.9"}
            http.post("/v1/tenants", json={"tenant": "a"}, headers=admin).raise_for_status()
            entries = http.get("/v1/audit", params={"count": 1000}, headers=admin).json()["entries"]
            assert "203.0.113.9" not in {e["address"] for e in entries}
            assert "127.0.0.1" in {e["address"] for e in entries}
    finally:
        hub.stop()


def _own_address() -> str:
    """This machine's address in its network; the loopback one where it has no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def _environment(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)
