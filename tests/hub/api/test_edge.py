"""The edge: security headers on every answer, CORS only where set, limits of headers, and bodies that come slowly."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from hub.api.edge import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_TARGET_BYTES,
    NOTHING,
    PAGE,
    STEERING,
    client_address,
    protect,
    stock_proxy,
)
from hub.api.upload_guard import DIRECT, Bodies, Held, belongs_to
from hub.errors import LimitReached, RequestTimeout, Unavailable

ALWAYS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": NOTHING,
}


def client(**options) -> TestClient:
    """An application of every kind of answer, protected."""

    async def asset(_request: Request) -> Response:
        return PlainTextResponse("x", headers={"Cache-Control": "max-age=60"})

    async def fails(_request: Request) -> Response:
        raise RuntimeError("unforeseen")

    async def echo(request: Request) -> Response:
        return JSONResponse({"bytes": len(await request.body())})

    api = Starlette(
        routes=[
            Route("/", lambda _request: HTMLResponse("<p>")),
            Route("/asset", asset),
            Route("/fails", fails),
            Route("/v1/echo", echo, methods=["POST"]),
        ],
        exception_handlers={HTTPException: lambda _request, error: JSONResponse({}, error.status_code)},
    )
    protect(api, kept_bytes=1000, **options)
    return TestClient(api, raise_server_exceptions=False)


def test_security_headers_are_on_every_answer() -> None:
    http = client()
    for answer in (http.post("/v1/echo", content=b"abc"), http.get("/nothing"), http.put("/asset"), http.get("/fails")):
        assert ALWAYS.items() <= dict(answer.headers).items(), answer
        assert "strict-transport-security" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers


def test_pages_may_load_the_hub_s_own_scripts_and_nothing_else() -> None:
    policy = client().get("/").headers["content-security-policy"]
    assert policy == PAGE
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy


def test_what_a_route_sets_itself_stays() -> None:
    headers = client().get("/asset").headers
    assert headers.get_list("cache-control") == ["max-age=60"]
    assert headers["x-content-type-options"] == "nosniff"


def test_browsers_are_told_of_tls_only_with_tls() -> None:
    assert client(tls=True).get("/").headers["strict-transport-security"] == "max-age=31536000"


def test_cors_is_off_unless_set() -> None:
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client().options("/v1/echo", headers=ask).headers
    http = client(cors_origins=("https://a.example",))
    wanted = {**ask, "access-control-request-headers": "authorization, content-type, x-canary-key"}
    allowed = http.options("/v1/echo", headers=wanted)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-credentials" not in allowed.headers
    assert http.options("/v1/echo", headers=ask | {"origin": "https://b.example"}).status_code == 400
    for method, path in (("POST", "/v1/echo"), ("GET", "/fails")):  # an error is told to the page, too
        answer = http.request(method, path, headers={"origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "retry-after" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in http.get("/", headers={"origin": "https://b.example"}).headers


def test_a_request_line_or_headers_beyond_all_use_are_refused() -> None:
    http = client()
    cases = [
        (414, {"params": {"a": "x" * MAX_TARGET_BYTES}}),
        (431, {"headers": {"a": "x" * MAX_HEADER_BYTES}}),
        (431, {"headers": {f"a{i}": "" for i in range(MAX_HEADERS)}}),
    ]
    for status, options in cases:
        answer = http.get("/", **options)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == status
        assert answer.headers["connection"] == "close"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert http.get("/", params={"a": "x" * 4000}, headers={"b": "x" * 8000}).status_code == 200


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (("192.0.2.7", 1234), "192.0.2.7"),
        (("::ffff:192.0.2.7", 1), "192.0.2.7"),
        (("2001:DB8::1", 1), "2001:db8::1"),
        (("unknown; drop table", 0), ""),
        (("testclient", 50000), ""),
        (None, ""),
    ],
)
def test_the_client_s_address(peer, address) -> None:
    headers = [(b"x-forwarded-for", b"203.0.113.9"), (b"forwarded", b"for=203.0.113.9"), (b"x-real-ip", b"203.0.113.9")]
    assert client_address(Request({"type": "http", "client": peer, "headers": headers})) == address


def test_no_client_steers_ray_through_its_stock_proxy() -> None:
    async def use() -> list[tuple[bytes, bytes]]:
        seen = []

        async def app(scope, _receive, _send) -> None:
            seen.extend(scope["headers"])

        [middleware] = stock_proxy()
        headers = [(name, b"\xff") for name in (*STEERING, b"x-request-id", b"x-other")]
        scope = {"type": "http", "headers": [*headers, (b"x-request-id", b"a-1")]}
        await middleware.cls(app, *middleware.args, **middleware.kwargs)(scope, None, None)
        assert len(scope["headers"]) == len(headers) + 1  # another's scope stays as it was
        return seen

    assert asyncio.run(use()) == [(b"x-other", b"\xff"), (b"x-request-id", b"a-1")]


# Bodies


class Server:
    """The server below the application: what a client sends, when, and the answer that it gets."""

    def __init__(self, *steps: bytes | float | None, headers: dict[str, str] | None = None) -> None:
        """`steps`: a chunk, seconds to wait, or None: the client goes away. Then the body is complete."""
        self.steps = list(steps)
        self.complete = asyncio.Event()  # the answer
        self.asked = 0
        self.messages: list[dict] = []
        names = {"transfer-encoding": "chunked"} | (headers or {})
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "raw_path": b"/",
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in names.items()],
            "state": {},
        }

    async def receive(self) -> dict:
        self.asked += 1
        while self.steps and isinstance(self.steps[0], float):
            await asyncio.sleep(self.steps.pop(0))
        if not self.steps:
            await self.complete.wait()
            return {"type": "http.disconnect"}
        step = self.steps.pop(0)
        if step is None:
            self.complete.set()
            return {"type": "http.disconnect"}
        more = any(not isinstance(s, float) for s in self.steps)
        return {"type": "http.request", "body": step, "more_body": more}

    async def send(self, message: dict) -> None:
        self.messages.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete.set()

    @property
    def status(self) -> int | None:
        return self.messages[0]["status"] if self.messages else None

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def problem(self) -> dict:
        return json.loads(self.messages[1]["body"])


Handler = Callable[[Request], Awaitable[Response]]


def bodies(handler: Handler, **options) -> Bodies:
    async def app(scope, receive, send) -> None:
        await (await handler(Request(scope, receive)))(scope, receive, send)

    times = {"idle_s": 0.1, "grace_s": 0.3, "bytes_per_s": 1000}
    return Bodies(app, **({"kept_bytes": 100, "direct": True} | times | options))


async def told(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def never(request: Request) -> Response:
    """Waits for its turn, and reads nothing."""
    belongs_to(request.scope, "tenant")
    await asyncio.Event().wait()
    raise AssertionError


async def _called(app: Bodies, server: Server) -> None:
    await app(server.scope, server.receive, server.send)


def run(server: Server, app: Bodies) -> None:
    async def within() -> None:
        async with asyncio.timeout(5):
            await app(server.scope, server.receive, server.send)
        assert app._held.total == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(within())


def test_a_body_comes_through_whole() -> None:
    chunks = [bytes([i]) * i for i in range(1, 50)]

    async def check(request: Request) -> Response:
        assert await request.body() == b"".join(chunks)
        return PlainTextResponse("ok")

    for headers in ({}, {DIRECT: "?1"}):
        server = Server(*chunks, headers=headers)
        run(server, bodies(check))
        assert server.status == 200


@pytest.mark.parametrize("handler", [told, never])
def test_a_body_that_stops_is_answered_408_wherever_the_route_stands(handler) -> None:
    server = Server(b"abc", 10.0)
    server.steps.append(b"never comes")
    run(server, bodies(handler))
    assert server.status == 408
    assert server.headers[b"connection"] == b"close"
    assert server.headers[b"content-type"] == b"application/problem+json"
    assert server.problem["type"].endswith(RequestTimeout.code)
    assert server.problem["detail"] == "the body came too slowly: nothing came for 0.1 s, after 3 bytes"


def test_a_body_that_drips_is_answered_408() -> None:
    server = Server(*([b"x", 0.05] * 100))
    start = time.monotonic()
    run(server, bodies(told))
    assert server.status == 408
    assert "less than 1000 bytes a second" in server.problem["detail"]
    assert time.monotonic() - start >= 0.3


def test_a_slow_body_at_the_least_rate_is_taken() -> None:
    server = Server(*([b"x" * 200, 0.05] * 12))  # twice as long as the grace
    run(server, bodies(told))
    assert server.messages[1]["body"] == b"2400"


def test_a_route_may_take_its_time_once_the_body_is_there() -> None:
    async def slow(request: Request) -> Response:
        await request.body()
        await asyncio.sleep(0.5)
        return PlainTextResponse("ok")

    server = Server(b"abc")
    run(server, bodies(slow))
    assert server.status == 200


def test_a_route_that_waits_does_not_count_as_a_slow_client(monkeypatch) -> None:
    monkeypatch.setattr("hub.api.upload_guard.AHEAD_BYTES", 10)

    async def later(request: Request) -> Response:
        await asyncio.sleep(0.5)
        return PlainTextResponse(str(len(await request.body())))

    server = Server(*[b"x" * 8] * 20, headers={DIRECT: "?1"})
    run(server, bodies(later))
    assert server.messages[1]["body"] == b"160"


def test_little_is_read_ahead_where_the_server_can_wait(monkeypatch) -> None:
    monkeypatch.setattr("hub.api.upload_guard.AHEAD_BYTES", 10)

    async def use() -> None:
        for headers, direct, asked in (({DIRECT: "?1"}, True, 2), ({DIRECT: "?1"}, False, 20), ({}, True, 20)):
            server = Server(*[b"x" * 8] * 19, 10.0, b"", headers=headers)
            app = bodies(never, direct=direct, idle_s=60)
            task = asyncio.create_task(_called(app, server))
            await asyncio.sleep(0.05)
            assert server.asked == asked, (headers, direct)
            task.cancel()
            await asyncio.wait((task,))
            assert task.cancelled()

    asyncio.run(use())


@pytest.mark.parametrize("headers", [{}, {DIRECT: "?1"}])
def test_nobody_works_for_a_client_that_has_gone(headers) -> None:
    ended = []

    async def works(request: Request) -> Response:
        await request.body()
        server.complete.set()  # the client goes
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)
        raise AssertionError

    async def reads(request: Request) -> Response:
        try:
            return await told(request)
        except BaseException as error:
            ended.append(type(error))
            raise

    server = Server(b"abc", headers=headers)
    run(server, bodies(works))
    assert ended == [True]
    assert server.messages == []
    for steps in ((None,), (b"abc", None), (b"abc", 0.05, b"more", None)):  # in the middle of its body
        for handler in (never, reads):
            server = Server(*steps, headers=headers)
            run(server, bodies(handler))
            assert server.messages == []
    assert ended == [True] + 3 * [asyncio.CancelledError]  # not an error that would be logged


def test_nothing_is_read_before_the_key_is_checked() -> None:
    async def refuses(_request: Request) -> Response:
        await asyncio.sleep(0.05)
        return PlainTextResponse("who are you?", 401)

    for headers in ({}, {DIRECT: "?1"}):
        server = Server(*[b"x"] * 20, headers=headers)
        run(server, bodies(refuses))
        assert (server.status, server.asked) == (401, 0)


def test_a_stream_of_answers_goes_on_after_the_body() -> None:
    async def stream(request: Request) -> Response:
        await request.body()

        async def parts():
            for _ in range(5):
                await asyncio.sleep(0.03)
                yield b"x"

        return StreamingResponse(parts())

    server = Server(b"abc")
    run(server, bodies(stream))
    assert b"".join(m.get("body", b"") for m in server.messages) == b"xxxxx"


def test_an_application_s_own_error_stays_its_own() -> None:
    async def fails(_request: Request) -> Response:
        raise RuntimeError("unforeseen")

    with pytest.raises(RuntimeError, match="unforeseen"):
        run(Server(b"abc", 0.05, b"d"), bodies(fails))


def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    async def early(request: Request) -> Response:
        belongs_to(request.scope, "tenant")

        async def parts():
            yield b"x"
            await asyncio.sleep(1)
            yield b"y"

        return StreamingResponse(parts())

    server = Server(b"abc", 10.0, b"")
    run(server, bodies(early))
    assert [m["type"] for m in server.messages] == ["http.response.start", "http.response.body"]


def test_memory_is_counted_by_tenant_and_given_back() -> None:
    held = Held(100, 60)
    held.change("a", 60)
    with pytest.raises(LimitReached, match="hold 60 bytes of memory"):
        held.change("a", 1)
    held.change("b", 40)
    with pytest.raises(Unavailable, match="memory for request bodies is full"):
        held.change("c", 1)
    held.change("a", -60)
    held.change("b", -40)
    assert (held.total, dict(held._by_tenant)) == (0, {})


def test_one_tenant_s_waiting_bodies_leave_room_for_the_others() -> None:
    async def use() -> None:
        answered: dict[str, list[int | None]] = {"crowd": [], "other": []}

        async def waits(request: Request) -> Response:
            belongs_to(request.scope, request.headers["tenant"])  # as the check of the key does
            if request.headers["tenant"] == "crowd":
                await asyncio.Event().wait()
            return await told(request)

        app = bodies(waits, held_bytes=1000, held_bytes_of_one=500, idle_s=60, grace_s=60)

        async def call(tenant: str, size: int) -> None:
            server = Server(*[b"x" * 10] * (size // 10), 60.0, b"", headers={"tenant": tenant})
            if tenant == "other":
                server = Server(*[b"x" * 10] * (size // 10), headers={"tenant": tenant})
            await app(server.scope, server.receive, server.send)
            answered[tenant].append(server.status)

        crowd = [asyncio.create_task(call("crowd", 200)) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert answered["crowd"] == [429] * 3
        await call("other", 300)
        assert answered["other"] == [200]
        assert app._held.total == 400
        for task in crowd:
            task.cancel()
        await asyncio.wait(crowd)
        assert app._held.total == 0

    asyncio.run(use())


def test_a_body_read_to_the_disk_counts_only_as_much_as_a_route_keeps() -> None:
    async def spools(request: Request) -> Response:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
        return PlainTextResponse(str(size))

    server = Server(*[b"x" * 50] * 100)
    run(server, bodies(spools, kept_bytes=100, held_bytes=6000, held_bytes_of_one=6000))
    assert server.messages[1]["body"] == b"5000"


def test_every_answer_of_the_hub_is_protected(hub) -> None:
    for method, path in (
        ("GET", "/healthz"),
        ("GET", "/v1/tasks"),
        ("GET", "/v1/tasks/nothing"),
        ("POST", "/v1/classify"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
        ("DELETE", "/v1/tasks"),
    ):
        assert ALWAYS.items() <= dict(hub.http.request(method, path).headers).items(), path
