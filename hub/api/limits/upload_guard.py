"""Limits of every request's body: speed and memory of its upload.

They hold for every route, also while a request waits in its tenant's queue: Ray's stock proxy reads a whole body into
memory at once. The size limit of a body belongs to its route (`bodies`).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...admission.quotas import BODY_BYTES, BODY_BYTES_PER_S
from ...concurrency import ActiveTenants
from ...errors import HubError, LimitReached, RequestTimeout, Unavailable
from ..problems import error_response
from ..request_heads import announces_body
from ..security_headers import DISCONNECT_HEADER

READ_AHEAD_BYTES = 1024**2
BODY_MEMORY_BYTES = 1024**3  # of all tenants in one gateway
BODY_BURST_S = 0.125  # bytes of this time are read without a pause, after a time without bodies
ROUTE_READS_S = 0.05  # after it a request has a task that reads ahead and notices a disconnected client
BODY = "karst_hub.body"  # key in the ASGI scope


@dataclass(frozen=True)
class UploadSpeed:
    """Slowest upload that the gateway accepts.

    Attributes:
        idle_s: longest pause between two chunks.
        grace_s: time before `bytes_per_s` applies.
        bytes_per_s: lowest average; a slower upload would hold its memory for too long.
    """

    idle_s: float = 10.0
    grace_s: float = 30.0
    bytes_per_s: float = 16 * 1024


SLOWEST_UPLOAD = UploadSpeed()


class BodyMemory:
    """Bytes of request bodies in this gateway's memory, in total and by tenant."""

    def __init__(self, limit_bytes: int = BODY_MEMORY_BYTES, tenant_limit_bytes: int = BODY_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._tenant_limit_bytes = tenant_limit_bytes
        self._by_tenant: Counter[str] = Counter()
        self.total_bytes = 0

    def of(self, tenant: str) -> int:
        """Return the bytes of one tenant's bodies."""
        return self._by_tenant[tenant]

    def change(self, tenant: str, by_bytes: int) -> None:
        """Add or release bytes.

        Raises:
            LimitReached: the tenant's bodies would exceed its limit; nothing changes.
            Unavailable: all bodies would exceed the gateway's limit; nothing changes.
        """
        if by_bytes > 0 and self._by_tenant[tenant] + by_bytes > self._tenant_limit_bytes:
            raise LimitReached(
                f"The tenant's unfinished request bodies exceed {self._tenant_limit_bytes} bytes of this gateway's "
                "memory. Send fewer requests at once."
            )
        if by_bytes > 0 and self.total_bytes + by_bytes > self._limit_bytes:
            raise Unavailable(f"Unfinished request bodies fill this gateway's {self._limit_bytes} bytes. Retry later.")
        self.total_bytes += by_bytes
        self._by_tenant[tenant] += by_bytes
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]


class BodyPace:
    """Rate at which a gateway reads one tenant's bodies while another tenant is active.

    Reading takes the time of the event loop, which all tenants share. Without a rate, one tenant's bodies would take
    half of it.
    """

    def __init__(
        self,
        active: ActiveTenants,
        bytes_per_s: float = BODY_BYTES_PER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._active = active
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._paid_s: dict[str, float] = {}  # time at which the tenant has paid for all bytes that were read

    def pause_s(self, tenant: str, size: int) -> float:
        """Count bytes of a tenant's body; return the time to wait before the gateway reads more of this body."""
        if not self._active.others(tenant):
            return 0.0
        now_s = self._clock()
        paid_s = max(now_s - BODY_BURST_S, self._paid_s.get(tenant, 0.0)) + size / self._bytes_per_s
        self._paid_s = {name: at_s for name, at_s in self._paid_s.items() if at_s > now_s - BODY_BURST_S}
        self._paid_s[tenant] = paid_s
        return max(0.0, paid_s - now_s)


class UploadGuardMiddleware:
    """ASGI middleware that ends a request with a slow or large upload, or with a disconnected client.

    It cancels the route wherever the route waits. Where the server cancels the request too, `CancelledError` is raised.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        memory: BodyMemory,
        pace: BodyPace,
        route_keeps_bytes: int,
        behind_haproxy: bool,
        speed: UploadSpeed = SLOWEST_UPLOAD,
        read_ahead_bytes: int = READ_AHEAD_BYTES,
    ) -> None:
        """
        Args:
            route_keeps_bytes: most bytes of a body that a route keeps in memory.
            behind_haproxy: the proxy can pause an upload, so that unread bytes stay in the network. Ray's stock proxy
                reads on and must not be believed.
            read_ahead_bytes: unread bytes at which the guard pauses an upload behind HAProxy.
        """
        self._app = app
        self._memory = memory
        self._pace = pace
        self._route_keeps_bytes = route_keeps_bytes
        self._behind_haproxy = behind_haproxy
        self._speed = speed
        self._read_ahead_bytes = read_ahead_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not announces_body(scope["headers"]):
            await self._app(scope, receive, send)
            return
        request = cast("asyncio.Task[Any]", asyncio.current_task())
        others = request.cancelling()
        started = is_over = is_cancelled = False
        ends: list[Exception | None] = []  # why the request ends early; None: the client has disconnected

        async def observed_send(message: Message) -> None:
            nonlocal started, is_over
            started = True
            is_over = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        def end(reason: Exception | None, *, cancel: bool) -> None:
            nonlocal is_cancelled
            if is_over or ends:
                return
            ends.append(reason)
            if cancel and request.cancelling() == others:  # else the server has cancelled it, and the route cleans up
                is_cancelled = request.cancel()

        pauses = self._behind_haproxy and Headers(scope=scope).get(DISCONNECT_HEADER) == "?1"
        body = _Body(
            receive,
            self._memory,
            self._pace,
            self._route_keeps_bytes,
            self._read_ahead_bytes if pauses else None,
            self._speed,
            end,
        )
        scope[BODY] = body
        timer = asyncio.get_running_loop().call_later(ROUTE_READS_S, body.start_reading)
        try:
            await self._app(scope, body.receive, observed_send)
        except HubError as error:
            ends.append(error)
        except (Exception, asyncio.CancelledError):
            if not ends:
                raise
        finally:
            is_over = True  # before the first `await`: nothing ends the request any more
            if is_cancelled:
                request.uncancel()
            timer.cancel()
            try:
                await body.stop_reading()
            finally:  # runs also if this request is cancelled a second time; otherwise its bytes would stay counted
                body.release()
        if not ends:
            return
        if request.cancelling() > others:  # the server has cancelled the request too
            raise asyncio.CancelledError
        if isinstance(ends[0], HubError):
            if not started:
                await error_response(ends[0], scope, close=True)(scope, receive, send)
        elif ends[0] is not None:
            raise ends[0]


def claim_body(scope: Scope, tenant: str) -> None:
    """Count the request's body as the tenant's from now on. Before this nothing reads ahead. Authentication calls it.

    Raises:
        LimitReached: the tenant's bodies hold as much memory as they may.
    """
    if BODY in scope:
        scope[BODY].claim(tenant)


class _Body:
    """Body of one request between server and application; its bytes count until the request ends.

    In the first `ROUTE_READS_S` the route receives the parts itself. From then on a task reads ahead of the route, and
    notices when the client disconnects: most requests end earlier and do without this task.
    """

    def __init__(
        self,
        receive: Receive,
        memory: BodyMemory,
        pace: BodyPace,
        route_keeps_bytes: int,
        read_ahead_bytes: int | None,
        speed: UploadSpeed,
        end: Callable[..., None],
    ) -> None:
        self._receive = receive
        self._memory = memory
        self._pace = pace
        self._route_keeps_bytes = route_keeps_bytes
        self._read_ahead_bytes = read_ahead_bytes  # None: the proxy holds the body in memory anyway
        self._speed = speed
        self._end = end  # ends the request early; None as the reason: the client has disconnected
        self._reader: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()  # of the route and the reader at the server's `receive`
        self._messages: asyncio.Queue[Message] = asyncio.Queue()  # that the reader has received
        self._wanted = asyncio.Event()
        self._taken = asyncio.Event()
        self._is_whole = False
        self._part_bytes = 0  # of the last part
        self._started_s = 0.0
        self._unread_bytes = self._read_bytes = 0
        self._tenant = ""  # unknown until the key is checked
        self._counted_bytes = 0

    def start_reading(self) -> None:
        """Start the task that reads ahead of the route, and that ends the request early."""
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def stop_reading(self) -> None:
        """End that task."""
        if self._reader is not None and not self._reader.done():
            self._reader.cancel()
            await asyncio.wait((self._reader,))

    async def _read(self) -> None:
        try:
            await self._read_until_disconnect()
        except Exception as error:
            self._end(error, cancel=True)
        else:
            self._end(None, cancel=True)

    async def _read_until_disconnect(self) -> None:
        """Receive the body once it is claimed, then wait until the client disconnects. Raises the errors of `_next`."""
        await self._wanted.wait()
        while not self._is_whole:
            await self._wait_for_route()
            async with self._turn:
                if self._is_whole:  # the route has received the last part meanwhile
                    continue
                message = await self._next()
            if message is None:
                return
            self._messages.put_nowait(message)
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _next(self) -> Message | None:
        """Receive the next part; None if the client has disconnected.

        Raises:
            RequestTimeout: the upload is slower than it may be.
            LimitReached, Unavailable: no memory for more of the body.
        """
        clock = asyncio.get_running_loop().time
        if pause_s := self._pace.pause_s(self._tenant, self._part_bytes):
            with self._time_not_counted():
                await asyncio.sleep(pause_s)
        received, speed = self._unread_bytes + self._read_bytes, self._speed
        idle_s = clock() + speed.idle_s
        slow_s = self._started_s + speed.grace_s + received / speed.bytes_per_s
        try:
            async with asyncio.timeout_at(min(idle_s, slow_s)):
                message = await self._receive()
        except TimeoutError:
            too_slow = f"under {speed.bytes_per_s:g} bytes per second"
            reason = f"no data for {speed.idle_s:g} s" if idle_s < slow_s else too_slow
            raise RequestTimeout(f"The request body is too slow: {reason}, after {received} bytes.") from None
        if message["type"] == "http.disconnect":
            return None
        self._is_whole = not message.get("more_body", False)
        self._part_bytes = len(message.get("body", b""))
        self._unread_bytes += self._part_bytes
        self._count()
        return message

    async def receive(self) -> Message:
        """Return the body's next part to the route.

        A disconnect is never returned: Starlette would raise an error for it, which counts and is logged as an error of
        the hub.

        Raises:
            RequestTimeout, LimitReached, Unavailable: see `_next`; while the route receives the parts itself.
            asyncio.CancelledError: the client has disconnected.
        """
        self._want()
        if self._reader is None and not self._is_whole:
            async with self._turn:
                message = await self._next()
            if message is None:
                self._end(None, cancel=False)
                raise asyncio.CancelledError
        else:
            message = await self._messages.get()
        size = len(message.get("body", b""))
        self._unread_bytes, self._read_bytes = self._unread_bytes - size, self._read_bytes + size
        self._count()
        self._taken.set()
        return message

    def claim(self, tenant: str) -> None:
        self._want()
        self.release()
        self._tenant = tenant
        self._count()

    def release(self) -> None:
        self._memory.change(self._tenant, -self._counted_bytes)
        self._counted_bytes = 0

    def _want(self) -> None:
        if not self._wanted.is_set():
            self._wanted.set()
            self._started_s = asyncio.get_running_loop().time()

    async def _wait_for_route(self) -> None:
        """Pause the upload while the route has more than `read_ahead_bytes` to read."""
        with self._time_not_counted():
            while self._read_ahead_bytes is not None and self._unread_bytes > self._read_ahead_bytes:
                self._taken.clear()
                await self._taken.wait()

    @contextmanager
    def _time_not_counted(self) -> Iterator[None]:
        """Leave the `with` block out of the upload's time, since the client does not cause its pause."""
        clock = asyncio.get_running_loop().time
        began_s = clock()
        yield
        self._started_s += clock() - began_s

    def _count(self) -> None:
        """Count unread bytes, and as many read bytes as the route may have kept."""
        size = self._unread_bytes + min(self._read_bytes, self._route_keeps_bytes)
        self._memory.change(self._tenant, size - self._counted_bytes)
        self._counted_bytes = size
