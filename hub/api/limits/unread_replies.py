"""Memory of replies that clients have not read yet.

A reply of a few megabytes costs a client one small request. A server that is given it at once keeps it until the client
has read it, and a client with hundreds of connections would fill the gateway's memory.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...admission.quotas import REPLY_BYTES
from ...errors import HubError, LimitReached, Unavailable
from ...observability import request_context
from ..problems import error_response

PIECE_BYTES = 256 * 1024  # of a large reply
REPLY_MEMORY_BYTES = 1024**3  # of all tenants in one gateway


class ReplyMemory:
    """Bytes of replies of more than `PIECE_BYTES` in this gateway's memory, in total and by tenant."""

    def __init__(self, limit_bytes: int = REPLY_MEMORY_BYTES, tenant_limit_bytes: int = REPLY_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._tenant_limit_bytes = tenant_limit_bytes
        self._by_tenant: Counter[str] = Counter()
        self.total_bytes = 0

    @contextmanager
    def held(self, tenant: str, size_bytes: int) -> Iterator[None]:
        """Count a reply while it is sent. A tenant's only reply may exceed the tenant's limit.

        Raises:
            LimitReached: the tenant's replies would exceed its limit.
            Unavailable: all replies would exceed the gateway's limit.
        """
        held_bytes = self._by_tenant[tenant]
        if held_bytes and held_bytes + size_bytes > self._tenant_limit_bytes:
            raise LimitReached(
                f"The tenant's unread replies exceed {self._tenant_limit_bytes} bytes of this gateway's memory. Read "
                "the replies to other requests first."
            )
        if self.total_bytes + size_bytes > self._limit_bytes:
            raise Unavailable(f"Unread replies fill this gateway's {self._limit_bytes} bytes. Retry later.")
        self.total_bytes += size_bytes
        self._by_tenant[tenant] += size_bytes
        try:
            yield
        finally:
            self.total_bytes -= size_bytes
            self._by_tenant[tenant] -= size_bytes
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]


class UnreadRepliesMiddleware:
    """ASGI middleware that sends a large reply in pieces, each when the client has read most of those before.

    The reply counts as its tenant's until then. A reply beyond the limits is dropped, and the client gets the error.
    """

    def __init__(self, app: ASGIApp, *, memory: ReplyMemory) -> None:
        self._app = app
        self._memory = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        is_refused = False

        async def paced_send(message: Message) -> None:
            nonlocal start, is_refused
            if message["type"] == "http.response.start":
                start = message
                return
            if is_refused:
                return
            begin, start = start, None
            body = message.get("body", b"")
            if len(body) <= PIECE_BYTES:
                if begin is not None:
                    await send(begin)
                await send(message)
            elif begin is None:  # a stream, which makes one part at a time
                await send_pieces(message, send)
            else:
                try:
                    with self._memory.held(request_context.tenant(), len(body)):
                        await send(begin)
                        await send_pieces(message, send)
                except HubError as error:
                    is_refused = True
                    await error_response(error, scope)(scope, receive, send)

        await self._app(scope, receive, paced_send)


async def send_pieces(message: Message, send: Send) -> None:
    """Send a body in pieces, each when the client has read most of those before."""
    body = memoryview(message["body"])
    for at in range(0, len(body), PIECE_BYTES):
        await send({"type": message["type"], "body": bytes(body[at : at + PIECE_BYTES]), "more_body": True})
    if not message.get("more_body", False):
        await send({"type": message["type"], "body": b"", "more_body": False})  # waits for the last piece
