"""Request bodies on their way in: how slowly they may come, and how much memory they may hold.

This is watched for every route in one place, whether the route reads its body or still waits for its tenant's turn:
Ray's stock proxy takes all that a client sends into memory at once. How large a body may be is the route's to say.
"""

import asyncio
import json
from collections import Counter

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import HubError, LimitReached, RequestTimeout, Unavailable
from ..observability import logs

IDLE_S = 10.0  # between two chunks
GRACE_S = 30.0  # then a body must have come at
BYTES_PER_S = 16 * 1024  # on average; what is slower holds its memory for nothing
AHEAD_BYTES = 1024**2  # read before the route asks, where the server below can wait
HELD_BYTES = 1024**3  # of bodies in this gateway's memory
HELD_BYTES_OF_ONE = HELD_BYTES // 2  # of one tenant's; the others find room
BODY = "karst_hub.body"  # in a request's scope
DIRECT = "x-request-disconnect-disabled"  # "?1": Ray hands the connection on as it is; the hub's HAProxy asks for it


class Bodies:
    """ASGI middleware that ends a request whose body comes too slowly or holds too much memory, or whose client has
    gone, wherever the application stands with it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        kept_bytes: int,
        direct: bool,
        idle_s: float = IDLE_S,
        grace_s: float = GRACE_S,
        bytes_per_s: float = BYTES_PER_S,
        held_bytes: int = HELD_BYTES,
        held_bytes_of_one: int = HELD_BYTES_OF_ONE,
    ) -> None:
        """
        Args:
            kept_bytes: the most that a route keeps of a body in memory.
            direct: whether the header `DIRECT` is believed; not behind Ray's stock proxy, which reads on all the same.
            bytes_per_s: the least on average, after `grace_s`.
        """
        self._app = app
        self._kept_bytes = kept_bytes
        self._direct = direct
        self._times = (idle_s, grace_s, bytes_per_s)
        self._held = Held(held_bytes, held_bytes_of_one)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if "transfer-encoding" not in headers and headers.get("content-length", "0") == "0":
            await self._app(scope, receive, send)
            return
        started = finished = False

        async def noted(message: Message) -> None:
            nonlocal started, finished
            started = True
            finished = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        waits = self._direct and headers.get(DIRECT) == "?1"
        scope[BODY] = body = _Body(receive, self._held, self._kept_bytes, AHEAD_BYTES if waits else None)
        reading = asyncio.create_task(body.read(*self._times))
        answering = asyncio.create_task(_run(self._app, scope, body.receive, noted))
        try:
            await asyncio.wait((reading, answering), return_when=asyncio.FIRST_COMPLETED)
            if answering.done() or finished:
                await answering
            else:
                await reading  # why the body is refused; or else the client has gone, and nobody wants the answer
        except HubError as error:
            await _end(answering)
            if not started:
                await refusal(error)(scope, receive, send)
        finally:
            try:
                await _end(reading)
                await _end(answering)
            finally:  # also where this request is itself cancelled once more
                body.forget()


def belongs_to(scope: Scope, tenant: str) -> None:
    """A request's key was checked: from now on its body counts as the tenant's.

    Raises:
        LimitReached: the tenant's bodies hold as much memory as may be.
    """
    if BODY in scope:
        scope[BODY].belongs_to(tenant)


class Held:
    """Bytes of request bodies in memory, all of them and by tenant."""

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most = most
        self._most_of_one = most_of_one
        self._by_tenant: Counter[str] = Counter()
        self.total = 0

    def change(self, tenant: str, by: int) -> None:
        """
        Raises:
            LimitReached: more than one tenant may hold; nothing was changed.
            Unavailable: more than this gateway may hold; nothing was changed.
        """
        if by > 0 and self._by_tenant[tenant] + by > self._most_of_one:
            raise LimitReached(f"the tenant's request bodies hold {self._most_of_one} bytes of memory; no more may be")
        if by > 0 and self.total + by > self._most:
            raise Unavailable("this gateway's memory for request bodies is full; try again")
        self.total += by
        self._by_tenant[tenant] += by
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]


class _Body:
    """One request's body between server and application; counted from its first byte to the end of the request."""

    def __init__(self, receive: Receive, held: Held, kept_bytes: int, ahead_bytes: int | None) -> None:
        self._receive = receive
        self._held = held
        self._kept_bytes = kept_bytes
        self._ahead_bytes = ahead_bytes  # None: the server has it in memory already, so count it
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._wanted = asyncio.Event()
        self._taken = asyncio.Event()
        self._unread = self._read = 0
        self._tenant = ""  # not known yet
        self._counted = 0

    async def read(self, idle_s: float, grace_s: float, bytes_per_s: float) -> None:
        """Take the body as it comes, from when its key was checked on; then wait until the client has gone.

        Raises:
            RequestTimeout: nothing for `idle_s`, or less than `bytes_per_s` on average after the first `grace_s`.
            LimitReached, Unavailable: no memory for more of it.
        """
        clock = asyncio.get_running_loop().time
        await self._wanted.wait()
        start = clock()
        more = True
        while more:
            while self._ahead_bytes is not None and self._unread > self._ahead_bytes:
                before = clock()
                self._taken.clear()
                await self._taken.wait()
                start += clock() - before  # not the client's time
            size = self._unread + self._read
            idle, slow = clock() + idle_s, start + grace_s + size / bytes_per_s
            try:
                async with asyncio.timeout_at(min(idle, slow)):
                    message = await self._receive()
            except TimeoutError:
                what = f"nothing came for {idle_s:g} s" if idle < slow else f"less than {bytes_per_s:g} bytes a second"
                raise RequestTimeout(f"the body came too slowly: {what}, after {size} bytes") from None
            if message["type"] == "http.disconnect":
                return
            self._unread += len(message.get("body", b""))
            self._count()
            self._messages.put_nowait(message)
            more = message.get("more_body", False)
        while (message := await self._receive())["type"] != "http.disconnect":
            pass

    async def receive(self) -> Message:
        """The next part of the body. That the client has gone is not told: the route ends where it stands. Starlette
        would raise an error, which counts and is logged as the hub's own."""
        self._wanted.set()
        message = await self._messages.get()
        size = len(message.get("body", b""))
        self._unread, self._read = self._unread - size, self._read + size
        self._count()
        self._taken.set()
        return message

    def belongs_to(self, tenant: str) -> None:
        self._wanted.set()
        self.forget()
        self._tenant = tenant
        self._count()

    def forget(self) -> None:
        self._held.change(self._tenant, -self._counted)
        self._counted = 0

    def _count(self) -> None:
        """What is unread, and what a route may have kept of the rest."""
        size = self._unread + min(self._read, self._kept_bytes)
        self._held.change(self._tenant, size - self._counted)
        self._counted = size


def refusal(error: HubError) -> Response:
    """The connection ends with it: the rest of the body would have to be read before another request."""
    logs.note_error(error.code)
    headers = {"connection": "close"}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    return Response(json.dumps(error.problem()), error.status, headers, "application/problem+json")


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task that still runs, and wait for its end; how it ended is of no more interest."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()  # else asyncio complains that nobody asked
