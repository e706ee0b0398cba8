"""The shared hub against hostile connections: slow clients, headers that Ray reads, processes without Ray's token."""

import socket
import threading
from pathlib import Path

import httpx

from tests.support.hub_process import descendants, environment_of

from .conftest import SharedHub

LOOPBACK = "127.0.0.1"
# Serve reads these of its own callers; a client must not steer it with them.
STEERING = ("x-request-timeout-seconds", "x-request-id", "serve_multiplexed_model_id", "x-session-id")


def head(path: str, key: str, *more: str) -> bytes:
    """Return the beginning of a POST request."""
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: hub", f"Authorization: Bearer {key}", *more, ""]).encode()


def test_headers_of_clients_do_not_steer_ray(hub: SharedHub) -> None:
    with httpx.Client(base_url=hub.url, timeout=60) as http:
        for name in STEERING:
            for value in (b"0.000001", b"\xff"):
                sent = [(b"authorization", f"Bearer {hub.key}".encode()), (name.encode(), value)]
                answer = http.get("/v1/tasks", headers=sent)
                assert answer.status_code == 200, (name, answer.text)
        assert http.get("/healthz", headers={"a": "x" * 16_384}).status_code == 400


def test_slow_clients_get_408(hub: SharedHub) -> None:
    """One client stops within the head, one within the body; both at once, since each takes ten seconds."""
    answers: dict[str, bytes] = {}
    port = httpx.URL(hub.url).port
    assert port is not None

    def call(name: str, *parts: bytes) -> None:
        with socket.create_connection((LOOPBACK, port), timeout=60) as connection:
            for part in parts:
                connection.sendall(part)
            answers[name] = connection.recv(65536)
            while not answers[name].rstrip().endswith((b"}", b">")):
                answers[name] += connection.recv(65536) or b"}"

    body = head("/v1/tasks/x/classify", hub.key, "Content-Length: 1000", "")
    calls = {"head": (head("/v1/classify", hub.key),), "body": (body, b"abc")}
    threads = [threading.Thread(target=call, args=(name, *parts)) for name, parts in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers["head"].startswith(b"HTTP/1.1 408 ")
    assert answers["body"].startswith(b"HTTP/1.1 408 ")
    assert b"10 s" in answers["body"]


def test_every_process_of_ray_needs_its_token(hub: SharedHub) -> None:
    found = [environment_of(pid) for pid in descendants(hub.served.process.pid)]
    environments = [environment for environment in found if "RAY_SERVE_ENABLE_HA_PROXY" in environment]
    assert len(environments) >= 5  # at least Ray's two servers, the controller, a gateway and a worker
    assert {environment.get("RAY_AUTH_MODE") for environment in environments} == {"token"}
    [token] = {Path(environment["RAY_AUTH_TOKEN_PATH"]) for environment in environments}
    assert token.stat().st_mode & 0o077 == 0
    assert token.parent.stat().st_mode & 0o077 == 0
    assert len(token.read_text()) == 64
