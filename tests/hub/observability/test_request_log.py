"""Request ids, the end of each request in metrics and logs, and the context of a real hub's requests."""

import asyncio
import json
import logging
import uuid
from collections.abc import Iterator

import pytest
from starlette.types import Message, Receive, Scope, Send

from adapters import Adapter
from hub.observability import request_context
from hub.observability.log_format import JsonFormatter
from hub.observability.request_context import RequestContext
from hub.observability.request_log import RequestLogMiddleware
from tests.support.hub_app import Hub
from tests.support.models import png

ID_HEADER = (b"x-request-id", b"r-1")


class Recorder:
    """`RequestMetrics` that keeps id, tenant and status of each request."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, int]] = []

    def record(self, context: RequestContext, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.requests.append((context.request_id, context.tenant, status))

    def record_kept(self, end: str, images: int) -> None:
        raise AssertionError("the middleware keeps no images")

    def record_lost_usage(self, images: int) -> None:
        raise AssertionError("the middleware counts no answers")

    def record_registry(self, refuses_changes: bool) -> None:
        raise AssertionError("the middleware knows no registry")


async def reply_503(_scope: Scope, _receive: Receive, send: Send) -> None:
    request_context.note_tenant("acme")
    await send({"type": "http.response.start", "status": 503, "headers": [(b"a", b"b")]})


async def fail(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise RuntimeError("failed")


async def be_cancelled(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise asyncio.CancelledError


def call(app: RequestLogMiddleware, *headers: tuple[bytes, bytes]) -> list[Message]:
    """Send one request through the middleware and return the messages of the reply."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": list(headers), "query_string": b""}
    asyncio.run(app(scope, receive, send))
    return sent


def test_metrics_get_the_status_of_each_request() -> None:
    metrics = Recorder()
    call(RequestLogMiddleware(reply_503, metrics), ID_HEADER)
    with pytest.raises(RuntimeError):
        call(RequestLogMiddleware(fail, metrics), ID_HEADER)
    with pytest.raises(asyncio.CancelledError):
        call(RequestLogMiddleware(be_cancelled, metrics), ID_HEADER)
    assert metrics.requests == [("r-1", "acme", 503), ("r-1", "", 500), ("r-1", "", 499)]
    assert request_context.log_fields() == {}


def test_a_status_of_500_or_above_has_a_warning_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hub.requests"):
        call(RequestLogMiddleware(reply_503), ID_HEADER)
    [record] = caplog.records
    assert record.getMessage() == "GET /x"
    assert json.loads(JsonFormatter().format(record))["status"] == 503


def test_the_id_is_not_added_when_the_server_returns_it() -> None:
    sent = call(RequestLogMiddleware(reply_503, server_returns_id=True), ID_HEADER)
    assert sent[0]["headers"] == [(b"a", b"b")]


@pytest.mark.parametrize("given", ["a", "x" * 128, "0b5e-77:~!", "0d2a6b0e-4c3f-4a52-9d7e-6f8a1b2c3d4e"])
def test_a_valid_id_is_returned(given: str) -> None:
    sent = call(RequestLogMiddleware(reply_503), (b"x-request-id", given.encode()))
    assert sent[0]["headers"] == [(b"a", b"b"), (b"x-request-id", given.encode())]


@pytest.mark.parametrize("given", [None, "", "x" * 129, "with space", "tab\t", "caf\u00e9"])
def test_an_invalid_id_is_replaced_by_a_uuid(given: str | None) -> None:
    headers = [] if given is None else [(b"x-request-id", given.encode())]
    [_, (name, value)] = call(RequestLogMiddleware(reply_503), *headers)[0]["headers"]
    assert name == b"x-request-id"
    assert str(uuid.UUID(value.decode())) == value.decode()


def test_every_reply_of_the_hub_has_one_id(hub: Hub) -> None:
    for path, status in (("/healthz", 200), ("/v1/tasks/absent", 404), ("/nowhere", 404)):
        reply = hub.http.get(path, headers={"x-request-id": "r-1"})
        assert reply.status_code == status
        assert reply.headers.get_list("x-request-id") == ["r-1"]


@pytest.fixture
def request_lines() -> Iterator[list[dict[str, object]]]:
    """The JSON lines of the logger `hub.requests`, formatted while the request's context is current."""
    lines: list[dict[str, object]] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonFormatter().format(record)))

    logger, keeper = logging.getLogger("hub.requests"), Keeper()
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(keeper)
    yield lines
    logger.removeHandler(keeper)
    logger.setLevel(level)


def test_the_line_of_a_request_has_its_task_or_its_error(
    hub: Hub, adapters: list[Adapter], request_lines: list[dict[str, object]]
) -> None:
    hub.http.post("/v1/tasks/digits/versions", content=adapters[0].data)
    request_lines.clear()
    hub.http.post("/v1/tasks/digits/classify", content=png(0), headers={"x-request-id": "one"})
    hub.http.post("/v1/tasks/absent/classify", content=png(0), headers={"x-request-id": "two"})
    one, two = request_lines
    assert (one["request_id"], one["tenant"], one["task"], one["version"]) == ("one", "default", "digits", 1)
    assert (one["digest"], one["status"]) == (adapters[0].digest, 200)
    assert (two["request_id"], two["status"], two["error_type"]) == ("two", 404, "not-found")
    assert "task" not in two
