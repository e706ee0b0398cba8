"""Calls of one gateway to one worker, sent together.

A send through Serve's handle costs a gateway and a worker about a millisecond each, with one image or with many. A link
sends at once while the worker has nothing of this gateway. Calls that come meanwhile leave together: when it has
answered all calls of this gateway, or after a few tens of milliseconds. Each call keeps its own answer, error,
cancellation and retry: the worker streams the answers to a send, each as soon as it is there.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import Any
from uuid import uuid4

import ray
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from ..errors import HubError, Unavailable
from ..observability import request_context
from ..worker_api import MAX_SEND_BYTES, Answer
from .rendezvous import KnownWorkers
from .request_router import PINNED

PAUSE_S = 0.01  # between two sends to a worker that has calls of this gateway: a tenth of a core of each at most
# While the worker has more calls than wait, one of them of the same tenant, a call waits for others: for this share of
# the time that an answer takes. The pause becomes this share of the time that decodes take, with the wait for a thread:
# the more a gateway has to do, the more calls leave together.
WAIT_SHARE = 0.25
LONGEST_WAIT_S = 0.025
REPORT_S = 10.0  # a worker's own count of calls is used for this long
DEAD_S = 5.0  # a worker whose call failed gets no calls for this long; Serve's controller needs about as long

Answers = list[Answer] | HubError


class WorkerDied(Unavailable):
    """The worker died during the call."""


@contextmanager
def hub_errors() -> Iterator[None]:
    """Raise Ray's and Serve's errors of a call to a worker as errors of the hub.

    Raises:
        WorkerDied: another worker may repeat the call.
        Unavailable: no worker takes the call.
        HubError: the error that the worker raised.
    """
    try:
        yield
    except HubError:
        raise
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HubError):
            raise error.cause from error
        raise
    except BackPressureError as error:
        raise Unavailable("The request queues of the workers are full. Try again later.") from error
    except (ReplicaUnavailableError, ray.exceptions.RayActorError) as error:
        raise WorkerDied("The workers that had the request died. Try again.", retry_after_s=5) from error
    except (TimeoutError, DeploymentUnavailableError) as error:
        detail = "No worker answers; one may still be loading its backbone. Try again later."
        raise Unavailable(detail, retry_after_s=5) from error


@dataclass(eq=False)
class _Call:
    """A call that waits for its send, or for its answer."""

    id: str
    tenant: str
    arguments: Sequence[object]
    size_bytes: int
    answer: "asyncio.Future[Answers]"
    send: "_Send | None" = None


@dataclass(eq=False)
class _Send:
    """Calls that left together."""

    calls: dict[str, _Call]  # without an answer
    at_s: float = field(default_factory=time.monotonic)
    response: Any = None  # Serve's; its `cancel` ends all calls

    @property
    def is_over(self) -> bool:
        """Whether no call waits for its answer."""
        return all(call.answer.done() for call in self.calls.values())

    def cancel(self) -> None:
        """Let the worker drop all calls."""
        if self.response is not None:
            self.response.cancel()


@dataclass
class _Report:
    """Calls of other gateways at a worker, from its last answer."""

    calls: int = 0
    at_s: float = field(default_factory=time.monotonic)


class WorkerLink:
    """Calls of this gateway to one worker."""

    def __init__(self, name: str, handle: DeploymentHandle[Any], died: Callable[[str], None]) -> None:
        """
        Args:
            name: of the worker, which alone gets the calls while it runs.
            handle: of all workers.
            died: called with the name when the worker has died during a call.
        """
        pinned = handle.options(session_id=PINNED + name)
        self._name = name
        self._one = pinned.answer
        self._many = pinned.options(stream=True).answer_together
        self._forget = pinned.forget
        self._died = died
        self._ids = (f"{uuid4().hex[:12]}-{i}" for i in count())
        self._waiting: dict[str, deque[_Call]] = {}  # by tenant
        self._sends: set[_Send] = set()  # without all of their answers
        self._cancelled: list[str] = []  # calls that the worker may drop
        self._report = _Report()
        self._sent_at_s = 0.0
        self._decode_s = 0.0  # of a call, moving average
        self._answer_s = 0.0  # from a send to an answer, moving average
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0  # of the timer
        self._is_due = False  # the waiting calls leave in this round of the event loop
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def load(self) -> int:
        """Number of calls at the worker: those of this gateway, and those of others as the worker reported them."""
        own = self._calls_there + self._calls_waiting
        return own + (self._report.calls if time.monotonic() - self._report.at_s < REPORT_S else 0)

    @property
    def _calls_there(self) -> int:
        return sum(len(send.calls) for send in self._sends)

    @property
    def _calls_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def is_idle(self) -> bool:
        """Whether the link has no call."""
        return not self._sends and not self._waiting

    async def call(self, tenant: str, arguments: Sequence[object], size_bytes: int) -> Answers:
        """Return a call's answer, or the error that the worker returned as a value.

        Args:
            tenant: tenants take turns at the places of a send.
            arguments: of `Worker.answer`.
            size_bytes: of the pixels.

        Raises:
            HubError: as `hub_errors`, and any error of the worker's code.
        """
        call = _Call(next(self._ids), tenant, arguments, size_bytes, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(tenant, deque()).append(call)
        under_way = [one for send in self._sends for one in send.calls.values() if not one.answer.done()]
        is_alone = all(one.tenant != tenant for one in under_way)
        # Otherwise a worker that has answered all calls would compute the next one alone, and all others after it.
        has_little = len(under_way) <= self._calls_waiting
        self._decode_s += ((request_context.time_s("decode") or 0.0) - self._decode_s) / 4
        pause_s = PAUSE_S if is_alone else max(PAUSE_S, min(WAIT_SHARE * self._decode_s, LONGEST_WAIT_S))
        wait_s = 0.0 if is_alone or has_little else min(WAIT_SHARE * self._answer_s, LONGEST_WAIT_S)
        self._plan(wait_s, pause_s)
        try:
            return await call.answer
        except asyncio.CancelledError:  # the client disconnected: the worker drops images that still wait
            self._cancel(call)
            raise

    def _plan(self, wait_s: float = inf, pause_s: float = 0.0) -> None:
        """Send the waiting calls: at once if the worker has nothing of this gateway, else after `wait_s` at most.

        Args:
            pause_s: least time since the last send, while the worker has calls of this gateway.
        """
        if not self._waiting or self._is_due:
            return
        now_s, due_s = time.monotonic(), 0.0
        if self._calls_there:
            due_s = max(now_s + wait_s, self._sent_at_s + pause_s)
        if self._timer is not None:
            if self._due_s <= due_s:
                return
            self._timer.cancel()
        self._due_s = due_s
        # In a context of its own: Serve would cancel the send with the HTTP request whose context it has.
        loop, context = asyncio.get_running_loop(), Context()
        if due_s > now_s:
            self._timer = loop.call_later(due_s - now_s, self._flush, context=context)
        else:  # after all calls that become ready in this round of the event loop
            self._is_due = True
            loop.call_soon(self._flush, context=context)

    def _flush(self) -> None:
        self._timer, self._is_due = None, False
        self._sent_at_s = time.monotonic()
        while self._waiting:
            send = _Send({})
            for call in self._take():
                call.send = send
                send.calls[call.id] = call
            self._sends.add(send)
            self._start(self._run(send))

    def _take(self) -> Iterator[_Call]:
        """Yield the calls of one send, in turns by tenant, as long as their pixels fit into it."""
        room = MAX_SEND_BYTES
        while self._waiting:
            tenant, queue = next(iter(self._waiting.items()))
            if queue[0].size_bytes > room and room < MAX_SEND_BYTES:
                return
            call = queue.popleft()
            room -= call.size_bytes
            del self._waiting[tenant]
            if queue:
                self._waiting[tenant] = queue  # behind all others
            yield call

    def _start(self, step: Any) -> None:
        task = asyncio.get_running_loop().create_task(step)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, send: _Send) -> None:
        try:
            if send.is_over:
                return
            with hub_errors():
                if len(send.calls) == 1:
                    await self._run_one(send)
                else:
                    await self._run_together(send)
        except asyncio.CancelledError:
            self._fail(send, WorkerDied("The gateway stops. Try again.", retry_after_s=5))
        except Exception as error:
            if isinstance(error, WorkerDied):
                self._died(self._name)
            self._fail(send, error)
        finally:
            self._sends.discard(send)
            self._plan()

    async def _run_one(self, send: _Send) -> None:
        (call,) = send.calls.values()
        send.response = self._one.remote(*call.arguments)
        answer = await send.response
        self._note_time(send)
        if not call.answer.done():
            call.answer.set_result(answer)

    async def _run_together(self, send: _Send) -> None:
        send.response = self._many.remote({call.id: call.arguments for call in send.calls.values()})
        async for calls_here, answers in send.response:
            self._note_time(send)
            for id, answer in answers.items():
                call = send.calls.pop(id)
                if call.answer.done():
                    continue
                if isinstance(answer, HubError | list):
                    call.answer.set_result(answer)
                else:
                    call.answer.set_exception(answer)
            self._report = _Report(max(0, calls_here - self._calls_there))
            self._plan()
        if not send.is_over:
            raise WorkerDied("The worker stopped before it had answered. Try again.", retry_after_s=5)

    def _note_time(self, send: _Send) -> None:
        self._answer_s += (time.monotonic() - send.at_s - self._answer_s) / 4

    def _fail(self, send: _Send, error: Exception) -> None:
        for call in send.calls.values():
            if not call.answer.done():
                call.answer.set_exception(error)

    def _cancel(self, call: _Call) -> None:
        if call.send is None:
            queue = self._waiting.get(call.tenant)
            if queue is not None and call in queue:
                queue.remove(call)
                if not queue:
                    del self._waiting[call.tenant]
        elif call.send.is_over:
            call.send.cancel()
        elif call.id in call.send.calls:
            self._cancelled.append(call.id)
            if len(self._cancelled) == 1:
                asyncio.get_running_loop().call_soon(self._send_cancelled, context=Context())

    def _send_cancelled(self) -> None:
        self._start(self._forget_calls())

    async def _forget_calls(self) -> None:
        ids, self._cancelled = self._cancelled, []
        try:
            with hub_errors():
                await self._forget.remote(ids)
        except HubError:  # the worker's answers are dropped here in any case
            pass


class WorkerLinks:
    """The links of a gateway, one for each worker that it calls."""

    def __init__(self, handle: DeploymentHandle[Any], workers: KnownWorkers) -> None:
        self._handle = handle
        self._workers = workers
        self._links: dict[str, WorkerLink] = {}
        self._dead_until_s: dict[str, float] = {}

    def choose(self, key: str) -> WorkerLink | None:
        """Return the link to the worker for a call; None while this gateway knows no worker.

        Args:
            key: as in `RoutingTable.route`.
        """
        now_s = time.monotonic()
        self._dead_until_s = {name: until_s for name, until_s in self._dead_until_s.items() if until_s > now_s}
        name = self._workers.choose(key, self._load, self._dead_until_s)
        if name is None:
            return None
        if name not in self._links:
            gone = [known for known, link in self._links.items() if link.is_idle and known not in self._workers.names]
            for known in gone:
                del self._links[known]
            self._links[name] = WorkerLink(name, self._handle, self._note_dead)
        return self._links[name]

    def _load(self, name: str) -> int:
        link = self._links.get(name)
        return 0 if link is None else link.load

    def _note_dead(self, name: str) -> None:
        self._dead_until_s[name] = time.monotonic() + DEAD_S
