"""Limits of every request's head, and the end of connections whose body was not read."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import status_response
from .security_headers import CLOSE_HEADER, SINGLE_HEADERS

MAX_TARGET_BYTES = 8 * 1024
MAX_HEADER_BYTES = 16 * 1024  # Ray's HAProxy accepts slightly less, the stock proxy has no limit
MAX_HEADERS = 100
# After a reply to a request with an unread body the gateway reads on for this long, so that the client reads the reply
# before the connection ends. Otherwise a reset could overtake the reply.
LINGER_S = 2.0


class HeaderLimitsMiddleware:
    """ASGI middleware that refuses a line (414) or headers (431) over their limits, and repeated headers (400)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)


def _refusal(scope: Scope) -> Response | None:
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    target_bytes = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    header_bytes = sum(len(name) + len(value) for name, value in headers)
    if target_bytes > MAX_TARGET_BYTES:
        status = HTTPStatus.REQUEST_URI_TOO_LONG
        detail = f"Path and query have {target_bytes} bytes (limit {MAX_TARGET_BYTES})."
    elif len(headers) > MAX_HEADERS:
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        detail = f"The request has {len(headers)} headers (limit {MAX_HEADERS})."
    elif header_bytes > MAX_HEADER_BYTES:
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        detail = f"The request's headers have {header_bytes} bytes (limit {MAX_HEADER_BYTES})."
    elif repeated := _repeated(headers):
        status = HTTPStatus.BAD_REQUEST
        detail = "; ".join(f"{name}: is sent {count} times; send it once" for name, count in repeated.items())
    else:
        return None
    return status_response(status, detail, scope, {"connection": "close"})


def _repeated(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, int]:
    """Return how often the request has each header of `SINGLE_HEADERS` that it has more than once."""
    if len({name.lower() for name, _ in headers}) == len(headers):
        return {}
    counts = Counter(name.decode("latin-1").lower() for name, _ in headers)
    return {name: counts[name] for name in SINGLE_HEADERS if counts[name] > 1}


class UnreadBodyMiddleware:
    """ASGI middleware that ends the connection after a reply that began before the body was complete.

    The server would read the rest of the body as slowly as the client sends it, without a limit.
    """

    def __init__(self, app: ASGIApp, *, linger_s: float = LINGER_S, behind_haproxy: bool = False) -> None:
        """
        Args:
            linger_s: time for which the middleware reads on after the reply.
            behind_haproxy: ask HAProxy to close the client's connection too; `Connection` ends at HAProxy.
        """
        self._app = app
        self._linger_s = linger_s
        names = (b"connection", CLOSE_HEADER.encode()) if behind_haproxy else (b"connection",)
        self._headers = [(name, b"close") for name in names]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not announces_body(scope["headers"]):
            await self._app(scope, receive, send)
            return
        is_complete = closes = False
        last: Message | None = None

        async def noted_receive() -> Message:
            nonlocal is_complete
            message = await receive()
            is_complete = is_complete or not message.get("more_body", False)  # a disconnect ends the body too
            return message

        async def closing_send(message: Message) -> None:
            nonlocal closes, last
            if message["type"] == "http.response.start" and not is_complete:
                closes = True
                kept = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"connection"]
                message = {**message, "headers": kept + self._headers}
            elif closes and not message.get("more_body", False):
                last = {"type": "http.response.body", "body": b"", "more_body": False}
                message = {**message, "more_body": True}
            await send(message)

        await self._app(scope, noted_receive, closing_send)
        if last is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._linger_s):
                    while not is_complete:
                        await noted_receive()
            await send(last)


def announces_body(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Return whether a request's headers announce a body."""
    return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers)
