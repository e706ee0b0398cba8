"""Ray's stock proxy: uvicorn with the hub's middleware and its time limit of heads, on real sockets."""

import asyncio
import threading
import time

import httpx
import pytest
import uvicorn.config
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hub.api import stock_proxy
from hub.api.security_headers import DATA_POLICY, RAY_HEADERS
from hub.api.stock_proxy import RayHeadersFilter, stock_proxy_middleware
from tests.support.asgi import listening
from tests.support.connections import connect, drip_all, raw_reply

GET = b"GET %s HTTP/1.1\r\nhost: hub\r\n\r\n"


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer without reading: the gateway's refusal of an unknown key, or Serve's own page."""
    await PlainTextResponse("refused", 401)(scope, receive, send)


async def read(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await Response(str(len(body)))(scope, receive, send)


def in_front_of(app: ASGIApp) -> ASGIApp:
    for layer in stock_proxy_middleware():  # as Ray does
        app = layer.cls(app, *layer.args, **layer.kwargs)
    return app


@pytest.fixture(autouse=True)
def one_second_for_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_proxy, "HEAD_TIMEOUT_S", 1.0)
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nhost: hub\r\na: ",
        GET % b"/" + b"GET /",
        b"POST / HTTP/1.1\r\nhost: hub\r\ncontent-length: 1000\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: hub\r\ntransfer-encoding: chunked\r\n\r\nfff\r\n",
        b"POST /-/healthz HTTP/1.1\r\nhost: hub\r\ncontent-length: 1000\r\n\r\n",
    ],
)
def test_fifty_connections_end_when_they_send_a_byte_now_and_then(start: bytes) -> None:
    with listening(in_front_of(refuse), has_lifespan=False) as url:
        assert drip_all(url, start, count=50, seconds=10) == 50


def test_a_slow_head_gets_a_problem_with_408() -> None:
    with listening(in_front_of(refuse), has_lifespan=False) as url:
        head, body = raw_reply(url, b"GET / HTTP/1.1\r\n")
    assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert DATA_POLICY.encode() in head
    assert b"within 1 s" in body


def test_a_malformed_request_gets_a_problem() -> None:
    with listening(in_front_of(refuse), has_lifespan=False) as url:
        head, body = raw_reply(url, b"nonsense\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"application/problem+json" in head
    assert body.startswith(b"{")


def test_a_connection_stays_open_for_further_requests_when_bodies_are_complete() -> None:
    with listening(in_front_of(read), has_lifespan=False) as url, httpx.Client(base_url=url) as http:
        for pause_s in (0, 1.5):  # the limit of a head does not apply between requests
            time.sleep(pause_s)
            reply = http.post("/", content=b"abc")
            assert (reply.text, reply.headers.get("connection")) == ("3", None)


def test_the_running_request_ends_when_a_client_with_two_requests_disconnects() -> None:
    """Otherwise its reply to the closed connection is an error with a traceback in the log."""
    started, ended, failed = threading.Event(), threading.Event(), []

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        started.set()
        try:
            await receive()  # the request, whose body is empty
            await receive()  # the disconnection
            await Response("ok")(scope, receive, send)
        except BaseException as error:
            failed.append(error)
            raise
        finally:
            ended.set()

    stock_proxy.end_pipelined_requests()
    with listening(wait, has_lifespan=False) as url:
        with connect(url) as connection:
            connection.sendall(GET % b"/" * 2)
            assert started.wait(10)
        assert ended.wait(10)
    assert failed == []


@pytest.mark.parametrize("path", [b"/-/routes", b"/%2d/routes", b"/-%2Froutes", b"http://hub/-/routes", b"/-/x"])
def test_ray_s_pages_are_hidden(path: bytes) -> None:
    with listening(in_front_of(read), has_lifespan=False) as url:
        head, _ = raw_reply(url, GET % path)
    assert head.startswith(b"HTTP/1.1 404 ")
    assert DATA_POLICY.encode() in head


def test_a_node_s_health_is_open_to_load_balancers() -> None:
    with listening(in_front_of(read), has_lifespan=False) as url:
        head, _ = raw_reply(url, GET % b"/-/healthz")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"nosniff" in head


def test_the_stock_proxy_removes_headers_that_ray_obeys() -> None:
    received: list[tuple[bytes, bytes]] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        received.extend(scope["headers"])

    async def receive() -> Message:
        raise AssertionError

    async def send(_message: Message) -> None:
        raise AssertionError

    headers = [(name.encode(), b"\xff") for name in (*RAY_HEADERS, "x-request-id", "x-other")]
    scope = {"type": "http", "headers": [*headers, (b"x-request-id", b"a-1")]}

    async def call() -> None:
        await RayHeadersFilter(app)(scope, receive, send)

    asyncio.run(call())
    assert received == [(b"x-other", b"\xff"), (b"x-request-id", b"a-1")]
    assert len(scope["headers"]) == len(headers) + 1  # the caller's scope is unchanged
