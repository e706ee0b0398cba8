"""Limits of the speed and memory of uploads."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from hub.api.limits.upload_guard import (
    ROUTE_READS_S,
    BodyMemory,
    BodyPace,
    UploadGuardMiddleware,
    UploadSpeed,
    claim_body,
)
from hub.api.security_headers import DISCONNECT_HEADER
from hub.concurrency import ActiveTenants
from hub.errors import LimitReached, RequestTimeout, Unavailable
from tests.support import virtual_time

STOCK_PROXY: dict[str, str] = {}
HAPROXY = {DISCONNECT_HEADER: "?1"}
SPEED = UploadSpeed(idle_s=10, grace_s=30, bytes_per_s=10)
DISCONNECT = None
Handler = Callable[[Request], Awaitable[Response]]


class Server:
    """ASGI server with one client: the chunks that the client sends, when it sends them, and the reply."""

    def __init__(self, *steps: bytes | float | None, headers: dict[str, str] = STOCK_PROXY, path: str = "/") -> None:
        """
        Args:
            steps: chunks, pauses in seconds, or `DISCONNECT`. The body is complete after the last chunk.
        """
        self._steps = list(steps)
        self._ended = asyncio.Event()
        self.receives = 0
        self.messages: list[Message] = []
        names = {"transfer-encoding": "chunked"} | headers
        self.scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in names.items()],
            "state": {},
        }

    async def receive(self) -> Message:
        self.receives += 1
        while self._steps and isinstance(self._steps[0], int | float):
            await asyncio.sleep(self._steps[0])
            del self._steps[0]
        if not self._steps:
            await self._ended.wait()
            return {"type": "http.disconnect"}
        chunk = self._steps.pop(0)
        if chunk is DISCONNECT:
            self.disconnect()
            return {"type": "http.disconnect"}
        more = any(not isinstance(step, int | float) for step in self._steps)
        return {"type": "http.request", "body": chunk, "more_body": more}

    async def send(self, message: Message) -> None:
        self.messages.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.disconnect()

    def disconnect(self) -> None:
        self._ended.set()

    @property
    def status(self) -> int | None:
        return self.messages[0]["status"] if self.messages else None

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


def repeated(*steps: bytes | float, times: int) -> list[bytes | float]:
    return [*steps] * times


async def count_bytes(request: Request) -> Response:
    """Read the body and reply with its length."""
    return PlainTextResponse(str(len(await request.body())))


async def wait_forever(request: Request) -> Response:
    """Wait in the tenant's queue; read nothing."""
    claim_body(request.scope, "tenant")
    await asyncio.Event().wait()
    raise AssertionError


def guard(handler: Handler, memory: BodyMemory | None = None, **options: Any) -> UploadGuardMiddleware:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (await handler(Request(scope, receive)))(scope, receive, send)

    defaults: dict[str, Any] = {
        "pace": BodyPace(ActiveTenants()),
        "route_keeps_bytes": 100,
        "behind_haproxy": True,
        "speed": SPEED,
    }
    return UploadGuardMiddleware(app, memory=memory or BodyMemory(), **(defaults | options))


async def handle(server: Server, handler: Handler, memory: BodyMemory | None = None, **options: Any) -> float:
    """Handle one request. Return its seconds; afterwards no memory is counted and no task is left."""
    memory = memory or BodyMemory()
    loop = asyncio.get_running_loop()
    start = loop.time()
    await guard(handler, memory, **options)(server.scope, server.receive, server.send)
    assert memory.total_bytes == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return loop.time() - start


@pytest.mark.parametrize("headers", [STOCK_PROXY, HAPROXY])
def test_a_route_receives_the_whole_body(headers: dict[str, str]) -> None:
    chunks = [bytes([i]) * i for i in range(1, 50)]

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    server = Server(*chunks, headers=headers)
    virtual_time.run(handle(server, echo))
    assert (server.status, server.body) == (200, b"".join(chunks))


@pytest.mark.parametrize("handler", [count_bytes, wait_forever])
@pytest.mark.parametrize("path", ["/v1/classify", "/v2/models/a/infer"])
def test_an_upload_that_stops_gets_408_wherever_the_route_waits(handler: Handler, path: str) -> None:
    server = Server(b"abc", 1000.0, b"never received", path=path)
    assert virtual_time.run(handle(server, handler)) == pytest.approx(10, abs=2 * ROUTE_READS_S)
    assert server.status == 408
    assert server.headers[b"connection"] == b"close"
    assert server.headers[b"content-type"] == b"application/problem+json"
    problem = json.loads(server.body)
    assert problem["type"].endswith(RequestTimeout.code)
    assert problem["detail"] == "The request body is too slow: no data for 10 s, after 3 bytes."
    assert ("error" in problem) == path.startswith("/v2")


def test_an_upload_under_the_lowest_rate_gets_408_after_the_grace_time() -> None:
    server = Server(*repeated(b"x", 5.0, times=100))
    seconds = virtual_time.run(handle(server, count_bytes))
    assert server.status == 408
    assert "under 10 bytes per second" in json.loads(server.body)["detail"]
    assert 30 <= seconds < 32


def test_an_upload_at_the_lowest_rate_is_accepted() -> None:
    server = Server(*repeated(b"x" * 60, 5.0, times=12))
    assert virtual_time.run(handle(server, count_bytes)) == 55
    assert server.body == b"720"


def test_a_route_may_take_long_once_it_has_the_body() -> None:
    async def slow(request: Request) -> Response:
        await request.body()
        await asyncio.sleep(1000)
        return PlainTextResponse("ok")

    server = Server(b"abc")
    virtual_time.run(handle(server, slow))
    assert server.status == 200


def test_a_paused_upload_does_not_count_as_slow() -> None:
    async def read_later(request: Request) -> Response:
        await asyncio.sleep(1000)
        return await count_bytes(request)

    server = Server(*[b"x" * 8] * 20, headers=HAPROXY)
    virtual_time.run(handle(server, read_later, read_ahead_bytes=10))
    assert server.body == b"160"


@pytest.mark.parametrize(
    ("headers", "behind_haproxy", "receives"),
    [(HAPROXY, True, 2), (HAPROXY, False, 20), (STOCK_PROXY, True, 20)],
)
def test_an_upload_is_paused_only_behind_haproxy(headers: dict[str, str], behind_haproxy: bool, receives: int) -> None:
    async def use() -> None:
        server = Server(*[b"x" * 8] * 19, 1000.0, b"", headers=headers)
        app = guard(wait_forever, behind_haproxy=behind_haproxy, speed=UploadSpeed(idle_s=10_000), read_ahead_bytes=10)
        task = asyncio.create_task(called(app, server))
        await asyncio.sleep(1)
        assert server.receives == receives
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()

    virtual_time.run(use())


def test_a_route_keeps_the_body_that_arrives_while_the_reader_starts() -> None:
    """The route waits for the last part when the task that reads ahead takes over, and then works for a long time."""

    async def slow(request: Request) -> Response:
        body = await request.body()
        await asyncio.sleep(1000)
        return Response(body)

    for steps in ((2 * ROUTE_READS_S, b"abc"), (b"ab", 2 * ROUTE_READS_S, b"c")):
        server = Server(*steps)
        virtual_time.run(handle(server, slow))
        assert (server.status, server.body) == (200, b"abc")


@pytest.mark.parametrize(("steps", "ends"), [((b"abc", DISCONNECT), []), ((b"abc", 2.0, DISCONNECT), [True])])
def test_a_request_that_the_server_cancels_too_stays_cancelled(
    steps: tuple[bytes | float | None, ...], ends: list[bool]
) -> None:
    """Where the server is first, the route cleans up to the end though its client disconnects meanwhile."""
    ended = []

    async def slow_end(request: Request) -> Response:
        claim_body(request.scope, "tenant")
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(10)
            ended.append(True)
        raise AssertionError

    virtual_time.run(cancelled_by_server(guard(slow_end), Server(*steps)))
    assert ended == ends


@pytest.mark.parametrize("steps", [(DISCONNECT,), (b"abc", DISCONNECT), (b"abc", 1.0, DISCONNECT)])
def test_a_route_whose_client_has_disconnected_cleans_up_to_the_end(steps: tuple[bytes | float | None, ...]) -> None:
    ended = []

    async def read(request: Request) -> Response:
        try:
            return await count_bytes(request)
        finally:
            await asyncio.sleep(10 * ROUTE_READS_S)
            ended.append(True)

    virtual_time.run(handle(Server(*steps), read))
    assert ended == [True]


def test_an_error_of_a_route_whose_client_has_disconnected_is_dropped() -> None:
    """The client is gone; the server would log it as an error of the hub."""

    async def fail(request: Request) -> Response:
        try:
            return await count_bytes(request)
        finally:
            raise RuntimeError("while it cleans up")

    server = Server(b"abc", DISCONNECT)
    virtual_time.run(handle(server, fail))
    assert server.messages == []


def test_a_short_request_needs_no_task() -> None:
    """A task of its own for each request would take a twentieth of a gateway's time."""
    tasks = []

    async def work(request: Request) -> Response:
        body = await request.body()
        tasks.append(len(asyncio.all_tasks()))
        return Response(body)

    server = Server(b"abc")
    virtual_time.run(handle(server, work))
    assert (server.body, tasks) == (b"abc", [1])


@pytest.mark.parametrize("headers", [STOCK_PROXY, HAPROXY])
def test_a_route_is_cancelled_when_the_client_disconnects_after_its_upload(headers: dict[str, str]) -> None:
    cancelled = []
    server = Server(b"abc", headers=headers)

    async def work(request: Request) -> Response:
        await request.body()
        server.disconnect()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(True)
        raise AssertionError

    virtual_time.run(handle(server, work))
    assert cancelled == [True]
    assert server.messages == []


@pytest.mark.parametrize("headers", [STOCK_PROXY, HAPROXY])
@pytest.mark.parametrize(
    "steps",
    [
        *((DISCONNECT,), (b"abc", DISCONNECT), (b"abc", 1.0, b"more", DISCONNECT)),
        *((1.0, DISCONNECT), (b"abc", 1.0, DISCONNECT)),  # the route waits for a part when the reader starts
    ],
)
def test_a_route_is_cancelled_when_the_client_disconnects_during_its_upload(
    headers: dict[str, str], steps: tuple[bytes | float | None, ...]
) -> None:
    raised: list[type[BaseException]] = []

    async def read(request: Request) -> Response:
        try:
            return await count_bytes(request)
        except BaseException as error:
            raised.append(type(error))
            raise

    for handler in (wait_forever, read):
        server = Server(*steps, headers=headers)
        virtual_time.run(handle(server, handler))
        assert server.messages == []
    assert raised == [asyncio.CancelledError]  # Starlette's own error would be logged as the hub's


@pytest.mark.parametrize("headers", [STOCK_PROXY, HAPROXY])
def test_a_body_is_not_received_before_the_key_is_checked(headers: dict[str, str]) -> None:
    async def refuse(_request: Request) -> Response:
        await asyncio.sleep(1)
        return PlainTextResponse("unknown key", 401)

    server = Server(*[b"x"] * 20, headers=headers)
    virtual_time.run(handle(server, refuse))
    assert (server.status, server.receives) == (401, 0)


def test_a_streamed_reply_goes_on_after_the_upload() -> None:
    async def stream(request: Request) -> Response:
        await request.body()

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(5):
                await asyncio.sleep(100)
                yield b"x"

        return StreamingResponse(parts())

    server = Server(b"abc")
    virtual_time.run(handle(server, stream))
    assert server.body == b"xxxxx"


def test_an_error_of_the_application_is_raised() -> None:
    async def fail(_request: Request) -> Response:
        raise RuntimeError("unexpected")

    with pytest.raises(RuntimeError, match="unexpected"):
        virtual_time.run(handle(Server(b"abc", 1.0, b"d"), fail))


def test_a_slow_upload_gets_no_second_reply_when_the_reply_has_begun() -> None:
    async def reply_early(request: Request) -> Response:
        claim_body(request.scope, "tenant")

        async def parts() -> AsyncIterator[bytes]:
            yield b"x"
            await asyncio.sleep(1000)
            yield b"y"

        return StreamingResponse(parts())

    server = Server(b"abc", 1000.0, b"")
    virtual_time.run(handle(server, reply_early))
    assert [message["type"] for message in server.messages] == ["http.response.start", "http.response.body"]


def test_bodies_of_a_tenant_are_read_at_a_rate_when_another_tenant_is_active() -> None:
    """The server has the whole body at once; the client of a body without pauses is not too slow."""

    async def seconds(active: ActiveTenants) -> float:
        async def claimed(request: Request) -> Response:
            claim_body(request.scope, "a")
            return await count_bytes(request)

        pace = BodyPace(active, bytes_per_s=1000, clock=asyncio.get_running_loop().time)
        server = Server(*[b"x" * 1000] * 60)
        found = await handle(server, claimed, pace=pace, speed=UploadSpeed(idle_s=10, grace_s=30, bytes_per_s=1000))
        assert server.body == b"60000"
        return found

    active = ActiveTenants()
    assert virtual_time.run(seconds(active)) < 0.1
    active.note("b")
    assert virtual_time.run(seconds(active)) == pytest.approx(59, abs=1)


def test_body_memory_is_limited_in_total_and_by_tenant() -> None:
    memory = BodyMemory(100, 60)
    memory.change("a", 60)
    with pytest.raises(LimitReached, match="exceed 60 bytes"):
        memory.change("a", 1)
    memory.change("b", 40)
    with pytest.raises(Unavailable, match="fill this gateway's 100 bytes"):
        memory.change("c", 1)
    assert (memory.of("a"), memory.of("b"), memory.of("c")) == (60, 40, 0)
    memory.change("a", -60)
    memory.change("b", -40)
    assert (memory.total_bytes, memory.of("a"), memory.of("b")) == (0, 0, 0)


def test_queued_bodies_of_one_tenant_leave_memory_to_other_tenants() -> None:
    async def use() -> None:
        statuses: dict[str, list[int | None]] = {"busy": [], "other": []}

        async def queue(request: Request) -> Response:
            claim_body(request.scope, request.headers["tenant"])
            if request.headers["tenant"] == "busy":
                await asyncio.Event().wait()
            return await count_bytes(request)

        memory = BodyMemory(1000, 500)
        app = guard(queue, memory, speed=UploadSpeed(idle_s=60, grace_s=60))

        async def call(tenant: str, size: int, *rest: bytes | float) -> None:
            server = Server(*[b"x" * 10] * (size // 10), *rest, headers={"tenant": tenant})
            await called(app, server)
            statuses[tenant].append(server.status)

        busy = [asyncio.create_task(call("busy", 200, 1000.0, b"")) for _ in range(5)]
        await asyncio.sleep(1)
        assert statuses["busy"] == [429] * 3
        await call("other", 300)
        assert statuses["other"] == [200]
        assert (memory.total_bytes, memory.of("busy")) == (400, 400)
        for task in busy:
            task.cancel()
        await asyncio.wait(busy)
        assert memory.total_bytes == 0

    virtual_time.run(use())


def test_a_body_that_the_route_spools_to_disk_counts_only_what_the_route_keeps() -> None:
    async def spool(request: Request) -> Response:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
        return PlainTextResponse(str(size))

    server = Server(*[b"x" * 50] * 100)
    virtual_time.run(handle(server, spool, BodyMemory(6000, 6000), route_keeps_bytes=100))
    assert server.body == b"5000"


async def called(app: UploadGuardMiddleware, server: Server) -> None:
    await app(server.scope, server.receive, server.send)


async def cancelled_by_server(app: UploadGuardMiddleware, server: Server) -> None:
    """Cancel a request after a second, and wait for its end."""
    task = asyncio.create_task(called(app, server))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
