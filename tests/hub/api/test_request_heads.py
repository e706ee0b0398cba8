"""Limits of a request's line and headers, and connections whose body was not read."""

import time
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from hub.api.request_heads import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_TARGET_BYTES,
    HeaderLimitsMiddleware,
    UnreadBodyMiddleware,
)
from hub.api.security_headers import SINGLE_HEADERS
from tests.support.asgi import listening
from tests.support.connections import drip_all, raw_reply


@pytest.mark.parametrize(
    ("status", "options", "detail"),
    [
        (414, {"params": {"a": "x" * MAX_TARGET_BYTES}}, "(limit 8192)"),
        (431, {"headers": {"a": "x" * MAX_HEADER_BYTES}}, "(limit 16384)"),
        (431, {"headers": {f"a{i}": "" for i in range(MAX_HEADERS)}}, "(limit 100)"),
    ],
)
def test_a_request_is_refused_when_its_line_or_headers_are_too_large(
    status: int, options: dict[str, Any], detail: str
) -> None:
    http = TestClient(HeaderLimitsMiddleware(PlainTextResponse("ok")))
    for path in ("/", "/v2"):
        reply = http.get(path, **options)
        assert reply.status_code == status
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.headers["connection"] == "close"
        assert reply.json()["status"] == status
        assert reply.json()["type"] == "about:blank"
        assert detail in reply.json()["detail"]
        assert ("error" in reply.json()) == (path == "/v2")


def test_a_request_passes_when_its_line_and_headers_are_within_limits() -> None:
    http = TestClient(HeaderLimitsMiddleware(PlainTextResponse("ok")))
    assert http.get("/", params={"a": "x" * 4000}, headers={"b": "x" * 8000}).status_code == 200


@pytest.mark.parametrize("name", SINGLE_HEADERS)
def test_a_header_with_one_value_is_refused_when_it_is_sent_twice(name: str) -> None:
    http = TestClient(HeaderLimitsMiddleware(PlainTextResponse("ok")))
    reply = http.get("/", headers=[(name, "1"), (name.upper(), "2")])
    assert reply.status_code == 400
    assert reply.headers["connection"] == "close"
    assert reply.json()["detail"].startswith(f"{name}: is sent ")
    assert reply.json()["detail"].endswith(" times; send it once")


def test_a_header_with_a_list_may_be_sent_twice() -> None:
    http = TestClient(HeaderLimitsMiddleware(PlainTextResponse("ok")))
    assert http.get("/", headers=[("accept", "a/b"), ("accept", "c/d")]).status_code == 200


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("unknown key", 401)(scope, receive, send)


async def read(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await Response(str(len(body)))(scope, receive, send)


@pytest.mark.parametrize("framing", [b"content-length: 1000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\nfff\r\n"])
def test_fifty_connections_end_when_they_drip_a_body_that_was_refused(framing: bytes) -> None:
    start = b"POST / HTTP/1.1\r\nhost: hub\r\n" + framing
    with listening(UnreadBodyMiddleware(refuse, linger_s=0.2), has_lifespan=False) as url:
        assert drip_all(url, start, count=50, seconds=10) == 50


def test_a_refusal_is_sent_at_once_and_names_the_end_of_the_connection() -> None:
    with listening(UnreadBodyMiddleware(refuse, linger_s=3), has_lifespan=False) as url:
        began = time.monotonic()
        head, body = raw_reply(url, b"POST / HTTP/1.1\r\nhost: hub\r\ncontent-length: 1000\r\n\r\n")
        assert time.monotonic() - began < 3
    assert b"connection: close" in head.lower()
    assert body == b"unknown key"


def test_a_client_reads_the_refusal_of_a_large_upload() -> None:
    with listening(UnreadBodyMiddleware(refuse), has_lifespan=False) as url:
        for _ in range(5):
            assert httpx.post(url, content=bytes(8_000_000)).text == "unknown key"


def test_a_connection_stays_open_when_the_body_was_read() -> None:
    with listening(UnreadBodyMiddleware(read), has_lifespan=False) as url, httpx.Client(base_url=url) as http:
        for size in (0, 3, 300_000):
            reply = http.post("/", content=bytes(size))
            assert (reply.text, reply.headers.get("connection")) == (str(size), None)


def test_haproxy_is_asked_to_close_when_a_gateway_is_behind_it() -> None:
    with listening(UnreadBodyMiddleware(refuse, behind_haproxy=True), has_lifespan=False) as url:
        assert httpx.post(url, content=b"abc").headers["x-close-connection"] == "close"
