"""Large replies in a gateway's memory: sent in pieces, counted by tenant until the client has read them."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hub.api.limits.unread_replies import PIECE_BYTES, ReplyMemory, UnreadRepliesMiddleware
from hub.errors import LimitReached, Unavailable
from hub.observability import request_context

LARGE = 4 * PIECE_BYTES + 7
SCOPE = {"type": "http", "method": "GET", "path": "/", "headers": []}


def of_tenant(reply: ASGIApp) -> ASGIApp:
    """Return an application that answers each request as one of the tenant in its path."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request_context.note_tenant(scope["path"])
        await reply(scope, receive, send)

    return app


class Client:
    """A client that reads when the test sets `reads`, and the messages that it got."""

    def __init__(self, app: ASGIApp, tenant: str = "t") -> None:
        self.reads = asyncio.Event()
        self.messages: list[Message] = []
        self.call = asyncio.create_task(self._call(app, tenant))

    async def _call(self, app: ASGIApp, tenant: str) -> None:
        async def send(message: Message) -> None:
            self.messages.append(message)
            if message["type"] == "http.response.body":
                await self.reads.wait()

        async def receive() -> Message:
            await asyncio.Event().wait()  # the client sends no body, and stays
            raise AssertionError

        with request_context.use(request_context.RequestContext("id")):
            await app(SCOPE | {"path": tenant}, receive, send)

    @property
    def status(self) -> int:
        """Status of the reply; 0 before it begins."""
        return int(self.messages[0]["status"]) if self.messages else 0

    @property
    def body(self) -> bytes:
        """The part of the body that the client got."""
        return b"".join(message.get("body", b"") for message in self.messages[1:])


def test_a_large_reply_is_sent_in_pieces_when_the_client_has_read_those_before() -> None:
    async def main() -> None:
        memory = ReplyMemory()
        text = "x" * LARGE
        client = Client(UnreadRepliesMiddleware(of_tenant(PlainTextResponse(text)), memory=memory))
        await asyncio.sleep(0.01)
        assert (client.status, len(client.body)) == (200, PIECE_BYTES)
        assert memory.total_bytes == LARGE
        client.reads.set()
        await client.call
        assert client.body.decode() == text
        assert client.messages[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
        assert memory.total_bytes == 0

    asyncio.run(main())


def test_small_replies_and_streams_are_sent_as_they_are_and_do_not_count() -> None:
    async def parts() -> AsyncIterator[bytes]:
        for part in (b"a", b"b" * LARGE):
            yield part

    async def main() -> None:
        memory = ReplyMemory(limit_bytes=1)
        for reply, body in ((Response(b"z"), b"z"), (StreamingResponse(parts()), b"a" + b"b" * LARGE)):
            client = Client(UnreadRepliesMiddleware(of_tenant(reply), memory=memory))
            client.reads.set()
            await client.call
            assert (client.status, client.body) == (200, body)

    asyncio.run(main())


def test_a_tenant_gets_429_when_its_unread_replies_fill_its_part_and_others_get_theirs() -> None:
    async def main() -> None:
        memory = ReplyMemory(limit_bytes=4 * LARGE, tenant_limit_bytes=2 * LARGE)
        app = UnreadRepliesMiddleware(of_tenant(PlainTextResponse("x" * LARGE)), memory=memory)
        unread = [Client(app) for _ in range(2)]
        await asyncio.sleep(0.01)
        refused = Client(app)
        refused.reads.set()
        await refused.call
        assert refused.status == 429
        assert b"unread replies" in refused.body
        assert json.loads(refused.body)["status"] == 429
        others = [Client(app, "other") for _ in range(2)]
        await asyncio.sleep(0.01)
        assert [client.status for client in others] == [200, 200]
        full = Client(app, "third")
        full.reads.set()
        await full.call
        assert full.status == 503
        unread[0].call.cancel()  # the client disconnects
        await asyncio.wait((unread[0].call,))
        again = Client(app)
        await asyncio.sleep(0.01)
        assert again.status == 200
        for client in (*unread[1:], *others, again):
            client.reads.set()
            await client.call
        assert memory.total_bytes == 0

    asyncio.run(main())


def test_a_tenants_only_reply_may_exceed_its_part() -> None:
    memory = ReplyMemory(limit_bytes=100, tenant_limit_bytes=10)
    with memory.held("t", 50), pytest.raises(LimitReached), memory.held("t", 1):
        pass
    with memory.held("t", 60), pytest.raises(Unavailable), memory.held("u", 50):
        pass
    assert memory.total_bytes == 0
