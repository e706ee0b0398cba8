"""uvicorn, as gateways and as Ray's stock proxy: the end of its requests; the proxy's middleware and limits.

The subclasses of uvicorn's protocol were checked on uvicorn 0.54. `tests/hub/api/test_stock_proxy.py` fails when the
name of a method changes.
"""

import asyncio
import re
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .problems import status_response
from .request_heads import HeaderLimitsMiddleware, UnreadBodyMiddleware
from .security_headers import (
    RAY_HEADERS,
    RAY_REQUEST_ID,
    SecurityHeadersMiddleware,
    security_headers,
)

HEAD_TIMEOUT_S = 10.0  # as HAProxy's
RAY_PAGES = "/-/"
HEALTH_PATH = "/-/healthz"  # for load balancers


def stock_proxy_middleware() -> list[Middleware]:
    """Return the middleware of Ray's stock proxy, and limit the time of its requests' heads.

    The list is innermost first: Ray wraps its proxy in one after another.

    Ray calls this function in the proxy's process, before it starts uvicorn. Its path is in Ray's environment.
    """
    _use(TimedProtocol)
    return [
        Middleware(RayHeadersFilter),
        Middleware(RayPagesFilter),
        Middleware(HeaderLimitsMiddleware),
        Middleware(SecurityHeadersMiddleware),
        Middleware(UnreadBodyMiddleware, linger_s=0),  # uvicorn reads on by itself, and Ray takes all that it reads
    ]


def end_pipelined_requests() -> None:
    """Make uvicorn in this process end the running request when a client with several requests disconnects."""
    _use(PipeliningProtocol)


def _use(protocol: type[HttpToolsProtocol]) -> None:
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{protocol.__name__}"


class RayPagesFilter:
    """ASGI middleware that hides Ray's pages below `/-/`, except a node's health."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = unquote(str(scope.get("path", "")))
        if scope["type"] == "http" and path.startswith(RAY_PAGES) and path != HEALTH_PATH:
            await status_response(HTTPStatus.NOT_FOUND, "Not found", scope)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class RayHeadersFilter:
    """ASGI middleware for Ray's stock proxy that removes `RAY_HEADERS` and any request id that Ray cannot decode."""

    _removed = frozenset(name.encode() for name in RAY_HEADERS)
    _request_id = re.compile(RAY_REQUEST_ID.encode())

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = [(name, value) for name, value in scope["headers"] if self._keeps(name, value)]
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)

    def _keeps(self, name: bytes, value: bytes) -> bool:
        if name == b"x-request-id":
            return self._request_id.fullmatch(value) is not None
        return name not in self._removed


class PipeliningProtocol(HttpToolsProtocol):
    """uvicorn's protocol that ends the running request of a closed connection.

    A client may send further requests before the first reply. uvicorn then tells only the last one that the client has
    disconnected: the running one computed on, and its reply to the closed connection was an error with a traceback in
    the log.
    """

    _running: RequestResponseCycle | None = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the running request, and then the last one as uvicorn does."""
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)


class TimedProtocol(PipeliningProtocol):
    """uvicorn's protocol with a time limit of a request's head, and problems in place of uvicorn's own texts.

    uvicorn has no such limit: a client that sends a byte now and then would keep its connection for ever.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read from the client. The first byte after a complete request begins the next head."""
        is_idle = self.timeout_keep_alive_task is not None
        if is_idle:
            self._await_head()
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._end_wait()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, f"{msg} Send HTTP/1.1.")

    def _await_head(self) -> None:
        self._end_wait()
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _end_wait(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if not self.transport.is_closing():
            detail = f"The request's line and headers did not arrive within {HEAD_TIMEOUT_S:g} s."
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, detail)

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        reply = status_response(status, detail, {"type": "http", "path": ""}, {"connection": "close"})
        own = {name.decode(): value.decode() for name, value in reply.raw_headers}
        headers = own | security_headers(tls=self.scheme == "https")
        lines = [f"HTTP/1.1 {int(status)} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + bytes(reply.body))
        self.transport.close()
