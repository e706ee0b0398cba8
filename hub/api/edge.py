"""The outer edge of the HTTP application: what holds for every request, whatever its route.

Security headers, CORS where it is set, and the size of request line and headers; `bodies` watches what follows them.
Not here: keys, a tenant's limits, and how large a route's body may be.
"""

import ipaddress
import json
import re
from collections.abc import Collection, Sequence
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .upload_guard import Bodies

MAX_TARGET_BYTES = 8 * 1024
MAX_HEADER_BYTES = 16 * 1024  # Ray's HAProxy lets pass a little less, its stock proxy anything
MAX_HEADERS = 100

# Time limit, model and session of a request, whether its client may leave: Ray obeys whoever sends them.
STEERING = (
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"serve_multiplexed_model_id",
    b"serve-multiplexed-model-id",
    b"x-session-id",
)
REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")  # Ray decodes it as UTF-8, and fails where it is none

HSTS = (b"strict-transport-security", b"max-age=31536000")
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# For pages (the interactive documentation, the console): scripts only as files of this hub; styles inline, too, since
# Swagger UI sets them.
PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CORS_REQUEST_HEADERS = ("authorization", "x-canary-key", "x-request-id", "inference-header-content-length")
CORS_REPLY_HEADERS = (
    "etag",
    "inference-header-content-length",
    "retry-after",
    "server-timing",
    "x-batch-images",
    "x-batch-tasks",
    "x-request-id",
    "x-worker",
)


def protect(
    api: Starlette, *, kept_bytes: int, direct: bool = False, cors_origins: Collection[str] = (), tls: bool = False
) -> None:
    """Put the edge around the whole application, its answers to unforeseen errors included.

    Args:
        kept_bytes, direct: see `Bodies`.
        cors_origins: web sites whose pages may call the hub from a browser; none: CORS is off.
        tls: whether clients come over TLS; browsers are then told to come in no other way.
    """
    build = api.build_middleware_stack

    def stack() -> ASGIApp:
        app: ASGIApp = Bodies(build(), kept_bytes=kept_bytes, direct=direct)
        if cors_origins:
            app = CORSMiddleware(
                app,
                allow_origins=cors_origins,
                allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
                allow_headers=CORS_REQUEST_HEADERS,
                expose_headers=CORS_REPLY_HEADERS,
            )
        return SecurityHeaders(app, tls=tls)

    # Built at the first request: Ray adds exception handlers of its own before that.
    api.build_middleware_stack = stack  # type: ignore[method-assign]


def client_address(request: Request) -> str:
    """Where a request comes from: the address that connected to the hub's port; "" where that is not known.

    The server below has put it there, from the connection or from what the hub's own proxy says of it
    (docs/security.md); nothing that a client sends is believed.
    """
    try:
        address = ipaddress.ip_address(request.client.host if request.client else "")
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return str(address)


class SecurityHeaders:
    """Adds security headers to every answer, where the application has not set them itself."""

    def __init__(self, app: ASGIApp, *, tls: bool = False) -> None:
        self._app = app
        self._headers = (*SECURITY_HEADERS, HSTS) if tls else SECURITY_HEADERS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", ()))
                names = {name.lower(): value for name, value in given}
                policy = PAGE if names.get(b"content-type", b"").startswith(b"text/html") else NOTHING
                wanted = (*self._headers, (b"content-security-policy", policy.encode()))
                message = {**message, "headers": given + [pair for pair in wanted if pair[0] not in names]}
            await send(message)

        if refusal := _too_long(scope):
            await refusal(scope, receive, with_headers)
        else:
            await self._app(scope, receive, with_headers)


class OwnHeaders:
    """For Ray's stock proxy: takes away the headers by which a client would steer Ray, and those that Ray cannot read.
    Before the hub's HAProxy gets a request to Ray, it has done the same (`haproxy`)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            kept = [
                (name, value)
                for name, value in scope["headers"]
                if name not in STEERING and (name != b"x-request-id" or REQUEST_ID.fullmatch(value))
            ]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)


def stock_proxy() -> list[Middleware]:
    """What Ray's stock proxy puts around itself; named by its environment, see `local.ray_environment`."""
    return [Middleware(OwnHeaders)]


def _too_long(scope: Scope) -> Response | None:
    """The answer to a request line or headers beyond all use."""
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_TARGET_BYTES:
        allowed = f"at most {MAX_TARGET_BYTES} bytes of path and query are allowed"
        return _problem(HTTPStatus.REQUEST_URI_TOO_LONG, allowed)
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        allowed = f"at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together are allowed"
        return _problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, allowed)
    return None


def _problem(status: HTTPStatus, detail: str) -> Response:
    body = {"type": "about:blank", "title": status.phrase, "status": status, "detail": detail}
    return Response(json.dumps(body), status, {"connection": "close"}, "application/problem+json")
