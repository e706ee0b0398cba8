"""Python client for a hub: typed replies, typed errors, retries, one connection pool."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx

from ..dataset_schemas import TrainingInfo
from ..errors import HubError, NotFound
from . import admin_endpoints, dataset_endpoints, endpoints
from .jobs import endpoints as training_endpoints
from .jobs import usage as usage_endpoints
from .jobs.waiting import PAUSE_S, TrainingCall
from .retries import RetrySchedule
from .transport import (
    CHUNK_BYTES,
    BaseClient,
    Call,
    CallSeries,
    PagedCall,
    atomic_file,
    documented_by,
    without_traceback,
)

Part = TypeVar("Part")
Reply = TypeVar("Reply")
P = ParamSpec("P")


@dataclass
class _Pool:
    """The connections of one process, and whether `close` was called."""

    http: httpx.Client
    closed: threading.Event = field(default_factory=threading.Event)


def _single(endpoint: Callable[P, Call[Reply]]) -> Callable[Concatenate["Client", P], Reply]:
    @documented_by(endpoint)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        return self._send(endpoint(*args, **kwargs))

    return method


def _paged(endpoint: Callable[P, PagedCall[Reply]]) -> Callable[Concatenate["Client", P], Reply]:
    @documented_by(endpoint)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        call = endpoint(*args, **kwargs)
        pages = [self._send(call.first)]
        while (following := call.following(pages[-1])) is not None:
            pages.append(self._send(following))
        return call.join(pages)

    return method


def _series(endpoint: Callable[P, CallSeries[Any, Any, Reply]]) -> Callable[Concatenate["Client", P], Reply]:
    @documented_by(endpoint)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        return self._send_series(endpoint(*args, **kwargs))

    return method


def _training(endpoint: Callable[P, TrainingCall]) -> Callable[Concatenate["Client", P], TrainingInfo]:
    @documented_by(endpoint)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> TrainingInfo:
        call = endpoint(*args, **kwargs)
        training = self._send(call.first)
        with call.bar() as show:
            while (following := call.following(training)) is not None:
                show(training)
                self._pool().closed.wait(PAUSE_S)
                training = self._send(following)
        return call.result(training)

    return method


class _Group:
    """Methods of a client that have a name of their own, such as `client.images.add`."""

    def __init__(self, client: "Client") -> None:
        self._client = client


def _grouped(endpoint: Callable[P, Call[Reply]]) -> Callable[Concatenate[_Group, P], Reply]:
    @documented_by(endpoint)
    def method(self: _Group, /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        return self._client._send(endpoint(*args, **kwargs))

    return method


def _grouped_series(endpoint: Callable[P, CallSeries[Any, Any, Reply]]) -> Callable[Concatenate[_Group, P], Reply]:
    @documented_by(endpoint)
    def method(self: _Group, /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        return self._client._send_series(endpoint(*args, **kwargs))

    return method


class Images(_Group):
    """Methods for a task's dataset: `client.images`."""

    add = _grouped_series(dataset_endpoints.add)
    list = _grouped(dataset_endpoints.list_images)
    label = _grouped(dataset_endpoints.label)
    delete = _grouped(dataset_endpoints.delete)
    download = _grouped(dataset_endpoints.download_image)
    info = _grouped(dataset_endpoints.info)
    rename_label = _grouped(dataset_endpoints.rename_label)
    duplicates = _grouped(dataset_endpoints.duplicates)


class Client(BaseClient):
    """Client of one hub with one key. Threads may share it; a forked process gets connections of its own.

    `hub/client/endpoints.py` documents the methods. Each method raises the `HubError` class of the hub's error reply
    (see `hub.errors`), `Unavailable` if no hub answers, `OSError` if a file cannot be read or written, and
    `RuntimeError` after `close`.

    >>> with Client("http://127.0.0.1:8000", key="kh_...") as client:  # doctest: +SKIP
    ...     client.register("flowers", "flowers.safetensors")
    ...     client.classify("flowers", ["rose.jpg"]).predictions[0][0].label
    """

    tasks = _paged(endpoints.tasks)
    task = _paged(endpoints.task)
    version = _single(endpoints.version)
    register = _single(endpoints.register)
    download = _single(endpoints.download)
    set_alias = _single(endpoints.set_alias)
    roll_back = _single(endpoints.roll_back)
    delete_alias = _single(endpoints.delete_alias)
    share = _single(endpoints.share)
    change_settings = _single(endpoints.change_settings)
    delete_task = _single(endpoints.delete_task)
    delete_version = _single(endpoints.delete_version)
    classify = _series(endpoints.classify)
    classify_inputs = _series(endpoints.classify_inputs)
    classify_tasks = _single(endpoints.classify_tasks)
    create_task = _single(dataset_endpoints.create_task)
    feedback = _single(dataset_endpoints.feedback)
    review = _single(dataset_endpoints.review)
    train = _training(training_endpoints.train)
    trainings = _single(training_endpoints.trainings)
    training = _single(training_endpoints.training)
    cancel_training = _single(training_endpoints.cancel_training)
    training_report = _single(training_endpoints.training_report)
    compare = _single(training_endpoints.compare)
    task_usage = _single(usage_endpoints.task_usage)
    backtest = _single(usage_endpoints.backtest)
    backbone = _single(admin_endpoints.backbone)
    usage = _single(admin_endpoints.usage)
    audit = _single(admin_endpoints.audit)

    tenants = _paged(admin_endpoints.tenants)
    tenant = _single(admin_endpoints.tenant)
    create_tenant = _single(admin_endpoints.create_tenant)
    change_limits = _single(admin_endpoints.change_limits)
    delete_tenant = _single(admin_endpoints.delete_tenant)
    keys = _paged(admin_endpoints.keys)
    create_key = _single(admin_endpoints.create_key)
    create_token = _single(admin_endpoints.create_token)
    revoke_key = _single(admin_endpoints.revoke_key)
    admin_keys = _paged(admin_endpoints.admin_keys)
    create_admin_key = _single(admin_endpoints.create_admin_key)
    revoke_admin_key = _single(admin_endpoints.revoke_admin_key)
    export_tenant = _single(admin_endpoints.export_tenant)
    import_tenant = _single(admin_endpoints.import_tenant)
    ready = _single(admin_endpoints.ready)
    status = _single(admin_endpoints.status)
    all_trainings = _single(admin_endpoints.all_trainings)
    gc = _single(admin_endpoints.gc)

    @property
    def images(self) -> Images:
        """The images of tasks' datasets."""
        return Images(self)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections of this process.

        Calls of other threads are not retried; later calls raise `RuntimeError`.
        """
        pool = self._pool()
        pool.closed.set()
        pool.http.close()

    def _open(self) -> None:
        self._pools: dict[int, _Pool] = {}
        self._pool()

    def _pool(self) -> "_Pool":
        """Return the connections of this process, by its id.

        A forked process inherits the sockets of its parent. It must neither use them, otherwise one process would read
        the other's answers, nor close them: the parent's pool stays in the dictionary.
        """
        process = os.getpid()
        pool = self._pools.get(process)
        if pool is None:
            hooks = {"response": [self._on_response] if self._on_response is not None else []}
            made = _Pool(httpx.Client(event_hooks=hooks, **self._http_options))
            if any(other.closed.is_set() for other in list(self._pools.values())):  # closed before the fork
                made.closed.set()
                made.http.close()
            pool = self._pools.setdefault(process, made)
            if pool is not made:  # another thread was first
                made.http.close()
        return pool

    def _send(self, call: Call[Reply], cancelled: threading.Event | None = None) -> Reply:
        """Send a call, and retry it as `RetrySchedule` allows, unless it is cancelled or the client is closed."""
        cancelled = cancelled or self._pool().closed
        schedule = RetrySchedule(self._retry_s)
        while True:
            try:
                return self._attempt(call)
            except HubError as error:
                if schedule.attempts and call.method == "DELETE" and isinstance(error, NotFound):
                    return call.parse(b"")  # an earlier attempt has deleted it, and its reply was lost
                pause = schedule.pause_s(error, idempotent=call.idempotent)
                if pause is None or cancelled.wait(pause):
                    raise

    def _attempt(self, call: Call[Reply]) -> Reply:
        content: bytes | Iterator[bytes] | None = call.content if call.upload is None else _chunks(call.upload)
        http = self._pool().http
        try:
            with http.stream(content=content, **call.options()) as response:
                if call.download is None or not response.is_success:
                    response.read()
                    return self._parse(call, response)
                with atomic_file(call.download) as file:
                    for chunk in response.iter_bytes():
                        file.write(chunk)
                return call.parse(b"")
        except httpx.RequestError as error:
            raise self._connection_error(error) from without_traceback(error)
        except RuntimeError as error:
            if http.is_closed:
                raise self._closed_error() from error
            raise

    def _send_series(self, series: CallSeries[Any, Part, Reply]) -> Reply:
        """Send the calls of a series concurrently. The first error cancels the others and is raised."""
        parts: list[Part] = []
        calls = series.calls(self._call_bytes, parts)
        pending: deque[Future[Part]] = deque()
        cancelled = threading.Event()
        with series.progress_bar() as advance, ThreadPoolExecutor(self._in_flight) as pool:

            def send(call: Call[Part], items: int) -> Part:
                part = self._send(call, cancelled)
                advance(items)
                return part

            try:
                parts.append(send(*next(calls)))
                for call in calls:
                    if len(pending) == self._in_flight:
                        parts.append(pending.popleft().result())
                    pending.append(pool.submit(send, *call))
                while pending:
                    parts.append(pending.popleft().result())
            except BaseException:
                cancelled.set()
                for future in pending:
                    future.cancel()
                raise
        return series.join(parts)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
