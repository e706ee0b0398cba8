"""Requests by name: `X-Request-Id`, what is known of the request that runs, and log lines that say it.

The outermost layer of a gateway's application makes an `Asked` for every request; whoever learns more of it (its
tenant, its task) notes that here. A worker gets the `CallOrigin` with the call. So each log line tells for whom
it was written. No Ray, no HTTP framework.
"""

import json
import logging
import re
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, NamedTuple, Protocol

from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..worker_api import CallOrigin
from . import tracing

Format = Literal["json", "text"]
Level = Literal["debug", "info", "warning", "error"]

HEADER = b"x-request-id"
USABLE = re.compile(rb"[\x21-\x7e]{1,128}")
GONE = 499  # of a request whose client went away before there was an answer
SECRETS = re.compile(r"kh_[\w-]{8,}|(?<=://)[^/\s@]+:[^/\s@]*(?=@)|(?<=earer )\S+")
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127)}
SEVERAL = "several"  # the task of a request that asks several

logger = logging.getLogger("hub.requests")


@dataclass(slots=True)
class Asked:
    """A request under way, and what is known of it so far; one object, seen by all that works on the request."""

    request_id: str
    tenant: str = ""
    task: str = ""
    version: int | None = None
    digest: str = ""
    images: dict[str, int] = field(default_factory=dict)  # answered ones, by task
    times_s: dict[str, float] = field(default_factory=dict)  # load, queue, compute
    error: str = ""  # code of the problem that was answered
    limit: str = ""  # the tenant's limit that was reached


class About(NamedTuple):
    """The adapter that the running code works for."""

    task: str = ""
    version: int | None = None
    digest: str = ""


class Meter(Protocol):
    """Whoever counts requests: `telemetry.GatewayMetrics`."""

    def answered(self, asked: Asked, status: int, seconds: float) -> None:
        """A request is over."""


_asked: ContextVar[Asked | None] = ContextVar("karst_hub_asked", default=None)
_about: ContextVar[About] = ContextVar("karst_hub_about", default=About())  # noqa: B039 (a tuple)


def current() -> Asked | None:
    """The request that the running code works for."""
    return _asked.get()


def note_tenant(tenant: str) -> None:
    """The request's key was checked."""
    if asked := _asked.get():
        asked.tenant = tenant


def note_task(task: str, version: int, digest: str) -> None:
    """What follows here, in this asyncio task, is for one version of a task."""
    _about.set(About(task, version, digest))
    asked = _asked.get()
    if asked is None or asked.task == task:
        return
    if asked.task:
        asked.task, asked.version, asked.digest = SEVERAL, None, ""
    else:
        asked.task, asked.version, asked.digest = task, version, digest


def note_answers(task: str, images: int) -> None:
    """Images of a task were classified."""
    if asked := _asked.get():
        asked.images[task] = asked.images.get(task, 0) + images


def note_times(**times_s: float) -> None:
    """How long the answer's parts took: load, queue, compute."""
    if asked := _asked.get():
        asked.times_s = times_s


def note_error(code: str, field_name: str = "") -> None:
    """The request is refused. A limit of the tenant's is named by the field; one without a name is about waiting."""
    if asked := _asked.get():
        asked.error = code
        if code == "limit-reached":
            asked.limit = field_name or "waiting"


def origin() -> CallOrigin:
    """What a call to a worker takes along."""
    asked = _asked.get()
    return CallOrigin(asked.request_id if asked else "", _about.get().task, tracing.traceparent())


@contextmanager
def within(origin: CallOrigin, tenant: str, digest: str) -> Iterator[None]:
    """A worker's work for a call that came from there."""
    was_asked = _asked.set(Asked(origin.request_id, tenant, origin.task, None, digest))
    was_about = _about.set(About(origin.task, None, digest))
    try:
        yield
    finally:
        _about.reset(was_about)
        _asked.reset(was_asked)


def start(format: Format, level: Level) -> None:
    """Let the hub's and the library's loggers write to stderr in this process; again is no harm."""
    lines: logging.Formatter = JsonLines() if format == "json" else TextLines()
    for name in ("hub", "adapters"):
        ours = logging.getLogger(name)
        ours.setLevel(level.upper())
        for handler in [h for h in ours.handlers if isinstance(h.formatter, JsonLines | TextLines)]:
            ours.removeHandler(handler)
        handler = logging.StreamHandler(sys.__stderr__)  # in a replica `sys.stderr` is Serve's own logger
        handler.setFormatter(lines)
        ours.addHandler(handler)


def _known() -> dict[str, str | int]:
    """What is known of the request and the adapter here; nothing that is empty."""
    asked, about = _asked.get(), _about.get()
    found: dict[str, str | int | None] = {}
    if asked is not None:
        found = {"request_id": asked.request_id, "tenant": asked.tenant}
        found |= {"task": asked.task, "version": asked.version, "digest": asked.digest}
    if about.task or about.digest:  # narrower than what the whole request is about
        found |= about._asdict()
    return {name: value for name, value in found.items() if value}


class JsonLines(logging.Formatter):
    """A JSON object a line: time (RFC 3339, UTC), level, logger, message, what is known of the request; `error` is a
    traceback. Keys and passwords are masked."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": masked(record.getMessage()),
            **_known(),
            **getattr(record, "known", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = masked("".join(traceback.format_exception(*record.exc_info)))
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """The same for people: `time LEVEL logger: message (request_id=..., tenant=...)`, then a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        known = _known() | getattr(record, "known", {})
        about = " ".join(f"{name}={value}" for name, value in known.items())
        # Without control characters: what a client sent must not write lines of its own.
        message = masked(record.getMessage()).translate(CONTROLS)
        line = f"{_time(record)} {record.levelname} {record.name}: {message}" + (f" ({about})" if about else "")
        if record.exc_info and record.exc_info[0] is not None:
            line += "\n" + masked("".join(traceback.format_exception(*record.exc_info))).rstrip()
        return line


def masked(text: str) -> str:
    """Without API keys, and without the passwords of URLs."""
    return SECRETS.sub("***", text)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def watch(api: Starlette, meter: Meter | None = None, *, id_is_returned: bool = False) -> None:
    """Put `Requests` around the whole application, its edge included; call this after all that adds a layer."""
    build = api.build_middleware_stack

    def stack() -> ASGIApp:
        return Requests(build(), meter, id_is_returned=id_is_returned)

    api.build_middleware_stack = stack  # type: ignore[method-assign]


class Requests:
    """ASGI middleware: gives every request its id and its `Asked`, and tells at its end how it went.

    A request's line is written for answers of 500 and above at level warning, for all others at level debug.
    """

    def __init__(self, app: ASGIApp, meter: Meter | None = None, *, id_is_returned: bool = False) -> None:
        """
        Args:
            id_is_returned: the server below gives every request an id and returns it, as Ray Serve does.
        """
        self._app = app
        self._meter = meter
        self._id_is_returned = id_is_returned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(HEADER, b"")
        asked = Asked(given.decode() if USABLE.fullmatch(given) else str(uuid.uuid4()))
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not self._id_is_returned:
                    message = {**message, "headers": [*message.get("headers", ()), (HEADER, asked.request_id.encode())]}
            await send(message)

        token = _asked.set(asked)
        began = time.perf_counter()
        try:
            with tracing.request(headers.get(b"traceparent", b""), scope["method"]) as span:
                try:
                    await self._app(scope, receive, noted)
                except BaseException as error:
                    status = status or (500 if isinstance(error, Exception) else GONE)
                    raise
                finally:
                    status = status or GONE
                    if span is not None:
                        tracing.describe(span, _route(scope), status, asked)
        finally:
            self._end(scope, asked, status, time.perf_counter() - began)
            _asked.reset(token)

    def _end(self, scope: Scope, asked: Asked, status: int, seconds: float) -> None:
        if self._meter is not None:
            self._meter.answered(asked, status, seconds)
        level = logging.WARNING if status >= 500 else logging.DEBUG
        if logger.isEnabledFor(level):
            known = {"status": status, "ms": round(seconds * 1000, 1), "error_type": asked.error}
            extra = {"known": {name: value for name, value in known.items() if value != ""}}
            logger.log(level, "%s %s", scope["method"], scope["path"], extra=extra)


def _route(scope: Scope) -> str:
    """The route's pattern, such as `/v1/tasks/{task}/classify`; "" where no route was met."""
    return getattr(scope.get("route"), "path", "")
