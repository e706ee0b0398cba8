"""Context of the request that the running code works for: its id, tenant, task, version, and outcome.

The gateway's outermost middleware creates a `RequestContext` for each request. Authentication, services and routes add
facts with the `note_*` functions. A worker receives a `CallOrigin` with each call and restores the context from it.
Log lines, metrics and traces read the context. No Ray, no HTTP framework.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from . import tracing

SEVERAL_TASKS = "several"  # task of a request that names more than one
QUEUE_LIMIT = "waiting"  # label of a 429 that names no field: too many of the tenant's calls or images are queued


@dataclass(slots=True)
class RequestContext:
    """Facts about one request. All code that works on the request shares the object."""

    request_id: str
    tenant: str = ""
    task: str = ""
    version: int | None = None
    digest: str = ""
    images: dict[str, int] = field(default_factory=dict)  # classified images by task
    unknown: dict[str, int] = field(default_factory=dict)  # those below the task's `unknown_below`
    typicality: dict[str, tuple[int, float]] = field(default_factory=dict)  # images with a typicality, and its sum
    times_s: dict[str, float] = field(default_factory=dict)  # decode, load, queue, compute
    error: str = ""  # code of the problem in the reply
    limit: str = ""  # the tenant's limit that caused a 429


class CallOrigin(NamedTuple):
    """Request behind a call to a worker: for log lines, traces and the list of busy tasks."""

    request_id: str = ""
    task: str = ""
    traceparent: str = ""  # W3C trace context; "" where the request is not traced


class AdapterContext(NamedTuple):
    """Adapter that the running asyncio task works for."""

    task: str = ""
    version: int | None = None
    digest: str = ""


_request: ContextVar[RequestContext | None] = ContextVar("karst_hub_request", default=None)
_adapter: ContextVar[AdapterContext] = ContextVar("karst_hub_adapter", default=AdapterContext())  # noqa: B039 (a tuple)


@contextmanager
def use(context: RequestContext) -> Iterator[None]:
    """Make a context the current one inside the `with` block."""
    request, adapter = _request.set(context), _adapter.set(AdapterContext())
    try:
        yield
    finally:
        _adapter.reset(adapter)
        _request.reset(request)


@contextmanager
def use_origin(origin: CallOrigin, tenant: str, digest: str) -> Iterator[None]:
    """Restore the context of a gateway's request inside a worker's call."""
    with use(RequestContext(origin.request_id, tenant, origin.task, None, digest)):
        yield


def note_tenant(tenant: str) -> None:
    """Record the tenant of the request's key."""
    if context := _request.get():
        context.tenant = tenant


def tenant() -> str:
    """Return the tenant of the request's key; '' if it is unknown."""
    context = _request.get()
    return context.tenant if context else ""


def note_task(task: str, version: int, digest: str) -> None:
    """Record the version of a task that this asyncio task works for from now on."""
    _adapter.set(AdapterContext(task, version, digest))
    context = _request.get()
    if context is None or context.task == task:
        return
    if context.task:
        context.task, context.version, context.digest = SEVERAL_TASKS, None, ""
    else:
        context.task, context.version, context.digest = task, version, digest


def note_several_tasks() -> None:
    """Record that the request, and this asyncio task from now on, works for more than one task."""
    _adapter.set(AdapterContext(SEVERAL_TASKS))
    if context := _request.get():
        context.task, context.version, context.digest = SEVERAL_TASKS, None, ""


def note_images(task: str, images: int) -> None:
    """Add classified images of a task."""
    if context := _request.get():
        context.images[task] = context.images.get(task, 0) + images


def note_answers(task: str, unknown: int, typicality: Sequence[float]) -> None:
    """Add the answers to images of a task: the number of unknown ones, and the typicality of all that have one."""
    context = _request.get()
    if context is None:
        return
    if unknown:
        context.unknown[task] = context.unknown.get(task, 0) + unknown
    if typicality:
        images, total = context.typicality.get(task, (0, 0.0))
        context.typicality[task] = images + len(typicality), total + sum(typicality)


def note_times(**times_s: float) -> None:
    """Record the seconds of parts of the request: decode, load, queue, compute."""
    if context := _request.get():
        context.times_s |= times_s


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Record the seconds of a part of the request: those inside of the `with` block."""
    started_s = time.perf_counter()
    yield
    note_times(**{part: time.perf_counter() - started_s})


def time_s(part: str) -> float | None:
    """Return the recorded seconds of a part of the request."""
    context = _request.get()
    return context.times_s.get(part) if context else None


def note_error(code: str, field_name: str = "") -> None:
    """Record the problem of the reply.

    Args:
        field_name: the tenant's limit where the code is `limit-reached`; "" for a full queue.
    """
    if context := _request.get():
        context.error = code
        if code == "limit-reached":
            context.limit = field_name or QUEUE_LIMIT


def call_origin() -> CallOrigin:
    """Return the origin that the gateway sends with a call to a worker."""
    context = _request.get()
    return CallOrigin(context.request_id if context else "", _adapter.get().task, tracing.traceparent())


def log_fields() -> dict[str, str | int]:
    """Return the context as members of a log line, without empty ones.

    Inside of an asyncio task that works for one adapter, the adapter's task, version and digest replace the request's.
    """
    context, adapter = _request.get(), _adapter.get()
    fields: dict[str, str | int | None] = {}
    if context is not None:
        fields = {"request_id": context.request_id, "tenant": context.tenant}
        fields |= {"task": context.task, "version": context.version, "digest": context.digest}
    if adapter.task or adapter.digest:
        fields |= adapter._asdict()
    return {name: value for name, value in fields.items() if value}
