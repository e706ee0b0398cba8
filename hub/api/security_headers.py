"""Headers that protect clients, gateways and Ray: security headers of replies, and request headers that Ray obeys."""

from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Ray obeys these headers from any client: timeout, model and session of a request, and whether a disconnect cancels it.
# Both proxies remove them: HAProxy by its rules (`hub.cluster.haproxy`), the stock proxy by `stock_proxy`.
DISCONNECT_HEADER = "x-request-disconnect-disabled"
RAY_HEADERS = (
    "x-request-timeout-seconds",
    DISCONNECT_HEADER,
    "serve_multiplexed_model_id",
    "serve-multiplexed-model-id",
    "x-session-id",
)
# Headers with one value. Of two, a proxy and the gateway could each read a different one: the front proxy would then
# count another key than the one that the gateway accepts.
SINGLE_HEADERS = (
    "access-control-request-method",
    "authorization",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "inference-header-content-length",
    "origin",
    "referer",
    "traceparent",
    "transfer-encoding",
    "user-agent",
    "x-canary-key",
    "x-forwarded-proto",
    "x-request-id",
)
REPEATED = f"A header is sent twice. Send each of these headers once: {', '.join(SINGLE_HEADERS)}."
CLOSE_HEADER = "x-close-connection"  # of a reply: HAProxy ends the client's connection too, and removes the header
RAY_REQUEST_ID = r"[A-Za-z0-9_.:-]{1,128}"  # Ray decodes `x-request-id` as UTF-8 and fails on other bytes

HSTS = (b"strict-transport-security", b"max-age=31536000")
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
DATA_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# Policy of HTML pages: scripts only from the hub's own files. Inline styles are allowed because Swagger UI sets them.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CORS_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
CORS_REQUEST_HEADERS = ("authorization", "x-canary-key", "x-request-id", "inference-header-content-length")
CORS_REPLY_HEADERS = (
    "etag",
    "inference-header-content-length",
    "retry-after",
    "server-timing",
    "x-batch-images",
    "x-batch-tasks",
    "x-request-id",
    "x-skipped-files",
    "x-worker",
)


def cors(origins: Sequence[str]) -> list[Middleware]:
    """Return the CORS middleware; nothing without origins, so that browsers refuse replies to other sites."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=CORS_METHODS,
            allow_headers=CORS_REQUEST_HEADERS,
            expose_headers=CORS_REPLY_HEADERS,
        )
    ]


def security_headers(*, tls: bool) -> dict[str, str]:
    """Return the security headers of a reply that is no page.

    Args:
        tls: clients connect over TLS. Browsers then learn to use nothing else (HSTS).
    """
    pairs = (*SECURITY_HEADERS, HSTS) if tls else SECURITY_HEADERS
    return {name.decode(): value.decode() for name, value in pairs} | {"content-security-policy": DATA_POLICY}


class SecurityHeadersMiddleware:
    """ASGI middleware that adds security headers to each reply. A header that the application has set stays."""

    def __init__(self, app: ASGIApp, *, tls: bool = False) -> None:
        """
        Args:
            tls: clients connect over TLS. Browsers then learn to use nothing else (HSTS).
        """
        self._app = app
        self._headers = (*SECURITY_HEADERS, HSTS) if tls else SECURITY_HEADERS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = list(message.get("headers", ()))
                values = {name.lower(): value for name, value in present}
                is_page = values.get(b"content-type", b"").startswith(b"text/html")
                policy = (PAGE_POLICY if is_page else DATA_POLICY).encode()
                added = (*self._headers, (b"content-security-policy", policy))
                message = {**message, "headers": present + [pair for pair in added if pair[0] not in values]}
            await send(message)

        await self._app(scope, receive, send_with_headers)
