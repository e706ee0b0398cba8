"""ASGI middleware that gives each request an id, a context and a trace, and reports its end to logs and metrics."""

import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import request_context, tracing
from .request_context import RequestContext

REQUEST_ID_HEADER = b"x-request-id"
VALID_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
CLIENT_CLOSED_REQUEST = 499  # status in logs and metrics where the client disconnected before the reply began

logger = logging.getLogger("hub.requests")


class RequestMetrics(Protocol):
    """Metrics of a gateway."""

    def record(self, context: RequestContext, status: int, seconds: float) -> None:
        """Count a request that has ended."""

    def record_registry(self, refuses_changes: bool) -> None:
        """Record whether the gateway refuses changes because Redis may evict keys."""

    def record_kept(self, end: str, images: int) -> None:
        """Count classified images that a task's owner keeps, by their end."""

    def record_lost_usage(self, images: int) -> None:
        """Count answers that a task's usage does not count."""


class RequestLogMiddleware:
    """ASGI middleware for ids, contexts, traces, metrics and the log line of each request.

    The line has level warning for a status of 500 or above, and level debug otherwise.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: RequestMetrics | None = None,
        count: Callable[[RequestContext, int], None] | None = None,
        *,
        server_returns_id: bool = False,
    ) -> None:
        """
        Args:
            count: gets the context and the status of each request that has ended.
            server_returns_id: the server adds `x-request-id` to each reply, as Ray Serve does. Otherwise the
                middleware adds it.
        """
        self._app = app
        self._metrics = metrics
        self._count = count
        self._server_returns_id = server_returns_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(REQUEST_ID_HEADER, b"")
        context = RequestContext(given.decode() if VALID_REQUEST_ID.fullmatch(given) else str(uuid.uuid4()))
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not self._server_returns_id:
                    id_header = (REQUEST_ID_HEADER, context.request_id.encode())
                    message = {**message, "headers": [*message.get("headers", ()), id_header]}
            await send(message)

        start = time.perf_counter()
        with request_context.use(context):
            try:
                with tracing.request_span(headers.get(b"traceparent", b""), scope["method"]) as span:
                    try:
                        await self._app(scope, receive, send_with_id)
                    except BaseException as error:
                        status = status or (500 if isinstance(error, Exception) else CLIENT_CLOSED_REQUEST)
                        raise
                    finally:
                        status = status or CLIENT_CLOSED_REQUEST
                        if span is not None:
                            tracing.set_request_attributes(span, _route(scope), status, context)
            finally:
                self._report(scope, context, status, time.perf_counter() - start)

    def _report(self, scope: Scope, context: RequestContext, status: int, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.record(context, status, seconds)
        if self._count is not None:
            self._count(context, status)
        level = logging.WARNING if status >= 500 else logging.DEBUG
        if logger.isEnabledFor(level):
            fields = {"status": status, "ms": round(seconds * 1000, 1), "error_type": context.error}
            extra = {"fields": {name: value for name, value in fields.items() if value != ""}}
            logger.log(level, "%s %s", scope["method"], scope["path"], extra=extra)


def _route(scope: Scope) -> str:
    """Return the route's pattern, such as `/v1/tasks/{task}/classify`; "" if no route matched."""
    return getattr(scope.get("route"), "path", "")
