"""The real HAProxy against clients without a key: repeated headers, slow clients, Ray's pages, headers of replies."""

import itertools
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import anyio
import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from hub.api.request_heads import UnreadBodyMiddleware
from hub.api.security_headers import SINGLE_HEADERS, security_headers
from hub.cluster import haproxy
from tests.support.asgi import listening
from tests.support.connections import connect, drip_all, raw_reply
from tests.support.haproxy import in_front_of, plain_frontend
from tests.support.models import wait_until
from tests.support.tls import certificate

LENGTH = "content-length"  # HAProxy joins equal values, and refuses different ones by itself, as for the host


async def gateway(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse requests without a key, and do not read their bodies."""
    request = Request(scope, receive)
    if "authorization" in request.headers:
        reply = Response(str(len(await request.body())))
    else:
        reply = PlainTextResponse("unknown key", 401)
    await reply(scope, receive, send)


Front = tuple[str, ssl.SSLContext | None]


@pytest.fixture(params=["http", "https"])
def front(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    """URL of HAProxy before a gateway, with a limit of one second for heads."""
    monkeypatch.setattr(haproxy, "HEAD_TIMEOUT_S", 1)
    options, tls = plain_frontend(tmp_path), None
    if request.param == "https":
        key, cert = certificate("localhost")
        (tmp_path / "both.pem").write_bytes(cert + key)
        options = replace(options, certificate=str(tmp_path / "both.pem"))
        tls = ssl.create_default_context(cadata=cert.decode())
    app = UnreadBodyMiddleware(gateway, behind_haproxy=True)
    with listening(app, has_lifespan=False) as url, in_front_of(httpx.URL(url).port or 0, tmp_path, options) as port:
        yield f"{request.param}://{'localhost' if tls else '127.0.0.1'}:{port}", tls


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nhost: hub\r\n\r\nGET /",
        b"POST / HTTP/1.1\r\nhost: hub\r\ncontent-length: 1000\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: hub\r\ntransfer-encoding: chunked\r\n\r\nfff\r\n",
        b"POST /-/healthz HTTP/1.1\r\nhost: hub\r\ncontent-length: 1000\r\n\r\n",
        b"POST /-/routes HTTP/1.1\r\nhost: hub\r\ncontent-length: 1000\r\n\r\n",
    ],
)
def test_fifty_connections_end_when_they_send_a_byte_now_and_then(front: Front, start: bytes) -> None:
    url, tls = front
    assert drip_all(url, start, count=50, seconds=15, tls=tls) == 50


def test_a_client_learns_that_the_connection_ends_when_its_body_was_not_read(
    front: Front,
) -> None:
    url, tls = front
    head, body = raw_reply(url, b"POST / HTTP/1.1\r\nhost: hub\r\ncontent-length: 1000\r\n\r\n", tls)
    assert head.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in head
    assert b"x-close-connection" not in head
    assert body == b"unknown key"


def test_a_client_reads_the_refusal_of_a_large_upload(front: Front) -> None:
    url, tls = front
    for _ in range(5):
        assert httpx.post(url, content=bytes(8_000_000), verify=tls or True).text == "unknown key"


def test_a_connection_stays_open_when_the_body_was_read(front: Front) -> None:
    url, tls = front
    with httpx.Client(base_url=url, verify=tls or True, headers={"authorization": "Bearer k"}) as http:
        for size in (0, 3, 300_000):
            reply = http.post("/", content=bytes(size))
            assert (reply.text, reply.headers.get("connection")) == (str(size), None)


@pytest.mark.parametrize("name", [name for name in SINGLE_HEADERS if name != LENGTH])
def test_a_header_with_one_value_is_refused_when_it_is_sent_twice(tmp_path: Path, name: str) -> None:
    values = ("chunked", "chunked") if name == "transfer-encoding" else ("a", "b")
    lines = "".join(f"{n}: {value}\r\n" for n, value in zip((name, name.upper()), values, strict=True))
    host = "" if name == "host" else "host: hub\r\n"
    with (
        socket.create_server(("127.0.0.1", 0)) as unused,
        in_front_of(unused.getsockname()[1], tmp_path, plain_frontend(tmp_path)) as port,
    ):
        head, body = raw_reply(f"http://127.0.0.1:{port}", f"POST / HTTP/1.1\r\n{host}{lines}\r\n".encode())
    assert head.startswith(b"HTTP/1.1 400 ")
    if b"problem+json" in head:  # HAProxy refuses some by itself
        assert name in json.loads(body)["detail"]


@pytest.mark.parametrize(
    "request_start",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)),
        b"GET / HTTP/1.1\r\nhost: a\r\nupgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings:\r\n\r\n",
    ],
    ids=["prior knowledge", "upgrade"],
)
def test_a_client_gets_no_http_2_when_it_asks_for_it(front: Front, request_start: bytes) -> None:
    url, tls = front
    head, _ = raw_reply(url, request_start, tls)
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 401 "))  # as HTTP/1.1, by HAProxy or the gateway


def test_tls_offers_http_1_alone(front: Front) -> None:
    url, tls = front
    if tls is None:
        pytest.skip("without TLS")
    tls.set_alpn_protocols(["h2", "http/1.1"])
    with connect(url, tls) as connection:
        assert isinstance(connection, ssl.SSLSocket)
        assert connection.selected_alpn_protocol() == "http/1.1"


def test_spellings_of_one_key_are_counted_together(tmp_path: Path) -> None:
    """Scheme in upper or lower case, spaces and tabs: the gateway accepts them all."""
    key = "kh_" + "k" * 40
    parts = itertools.product(("Bearer", "bEARER"), (" ", "   ", " \t"), ("", " "))
    heads = [f"{scheme}{space}{key}{end}" for scheme, space, end in parts]
    arrived = threading.Semaphore(0)
    ended = threading.Event()

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        arrived.release()
        while not ended.is_set():
            await anyio.sleep(0.01)
        await Response("ok")(scope, receive, send)

    with (
        listening(wait, has_lifespan=False) as url,
        in_front_of(httpx.URL(url).port or 0, tmp_path, replace(plain_frontend(tmp_path), requests_per_key=4)) as port,
        ThreadPoolExecutor(len(heads)) as pool,
    ):

        def call(head: str) -> int:
            request = f"GET / HTTP/1.1\r\nhost: hub\r\nauthorization: {head}\r\n\r\n".encode()
            return int(raw_reply(f"http://127.0.0.1:{port}", request)[0][9:12])

        calls = [pool.submit(call, head) for head in heads]
        for _ in range(4):
            assert arrived.acquire(timeout=10)
        wait_until(lambda: sum(c.done() for c in calls) == len(heads) - 4, 10, "refusals")
        ended.set()
        assert sorted(c.result() for c in calls) == [200] * 4 + [429] * (len(heads) - 4)


@pytest.mark.parametrize(
    "path",
    [b"/-/routes", b"/-/ROUTES", b"/%2d/routes", b"/-%2Froutes", b"http://hub/-/routes", b"/-/x", b"/-/"],
)
def test_ray_s_pages_are_hidden(front: Front, path: bytes) -> None:
    url, tls = front
    head, body = raw_reply(url, b"GET " + path + b" HTTP/1.1\r\nhost: hub\r\n\r\n", tls)
    assert head.startswith(b"HTTP/1.1 404 ")
    assert json.loads(body)["detail"] == "Not found"


def test_every_reply_has_security_headers(front: Front) -> None:
    """Also those of HAProxy itself and of Ray's pages."""
    url, tls = front
    expected = [f"{name}: {value}".encode() for name, value in security_headers(tls=False).items()]
    for request in (b"GET /-/routes", b"GET /-/healthz", b"GET /"):
        head, _ = raw_reply(url, request + b" HTTP/1.1\r\nhost: hub\r\n\r\n", tls)
        assert [line for line in expected if line not in head] == [], head
    head, _ = raw_reply(url, b"GET / HTTP/1.1\r\nhost: a\r\norigin: a\r\norigin: a\r\n\r\n", tls)
    assert [line for line in expected if line not in head] == [], head
