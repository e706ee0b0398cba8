"""Python client for asyncio, with the methods of `Client` as coroutines."""

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
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


def _single(endpoint: Callable[P, Call[Reply]]) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, Reply]]:
    @documented_by(endpoint)
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        return await self._send(endpoint(*args, **kwargs))

    return method


def _paged(
    endpoint: Callable[P, PagedCall[Reply]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, Reply]]:
    @documented_by(endpoint)
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        call = endpoint(*args, **kwargs)
        pages = [await self._send(call.first)]
        while (following := call.following(pages[-1])) is not None:
            pages.append(await self._send(following))
        return call.join(pages)

    return method


def _series(
    endpoint: Callable[P, CallSeries[Any, Any, Reply]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, Reply]]:
    @documented_by(endpoint)
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        return await self._send_series(endpoint(*args, **kwargs))

    return method


def _training(
    endpoint: Callable[P, TrainingCall],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, TrainingInfo]]:
    @documented_by(endpoint)
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> TrainingInfo:
        call = endpoint(*args, **kwargs)
        training = await self._send(call.first)
        with call.bar() as show:
            while (following := call.following(training)) is not None:
                show(training)
                await asyncio.sleep(PAUSE_S)
                training = await self._send(following)
        return call.result(training)

    return method


class _Group:
    """Methods of a client that have a name of their own, such as `client.images.add`."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client


def _grouped(endpoint: Callable[P, Call[Reply]]) -> Callable[Concatenate[_Group, P], Coroutine[Any, Any, Reply]]:
    @documented_by(endpoint)
    async def method(self: _Group, /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        return await self._client._send(endpoint(*args, **kwargs))

    return method


def _grouped_series(
    endpoint: Callable[P, CallSeries[Any, Any, Reply]],
) -> Callable[Concatenate[_Group, P], Coroutine[Any, Any, Reply]]:
    @documented_by(endpoint)
    async def method(self: _Group, /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        return await self._client._send_series(endpoint(*args, **kwargs))

    return method


class AsyncImages(_Group):
    """Methods for a task's dataset: `client.images`."""

    add = _grouped_series(dataset_endpoints.add)
    list = _grouped(dataset_endpoints.list_images)
    label = _grouped(dataset_endpoints.label)
    delete = _grouped(dataset_endpoints.delete)
    download = _grouped(dataset_endpoints.download_image)
    info = _grouped(dataset_endpoints.info)
    rename_label = _grouped(dataset_endpoints.rename_label)
    duplicates = _grouped(dataset_endpoints.duplicates)


class AsyncClient(BaseClient):
    """Client of one hub with one key for asyncio. Methods and errors are those of `Client`.

    Each event loop, such as that of a second `asyncio.run`, and each forked process gets connections of its own.

    >>> async with AsyncClient("http://127.0.0.1:8000", key="kh_...") as client:  # doctest: +SKIP
    ...     (await client.classify("flowers", ["rose.jpg"])).predictions[0][0].label
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
    def images(self) -> AsyncImages:
        """The images of tasks' datasets."""
        return AsyncImages(self)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections of this event loop. Later calls raise `RuntimeError`."""
        self._closed = True
        await self._pool().aclose()

    def _open(self) -> None:
        self._closed = False
        self._pools: dict[tuple[int, asyncio.AbstractEventLoop], httpx.AsyncClient] = {}
        self._new_pool()  # the errors of the options are raised now, not at the first call

    def _new_pool(self) -> httpx.AsyncClient:
        async def hook(response: httpx.Response) -> None:
            if self._on_response is not None:
                self._on_response(response)

        return httpx.AsyncClient(event_hooks={"response": [hook]}, **self._http_options)

    def _pool(self) -> httpx.AsyncClient:
        """Return the connections of this process and event loop.

        A connection belongs to the loop that opened it. Those of a closed loop are dropped; nothing can close them
        properly. Those that a forked process inherits are neither used nor closed.
        """
        key = os.getpid(), asyncio.get_running_loop()
        if key not in self._pools:
            self._pools = {known: pool for known, pool in self._pools.items() if not known[1].is_closed()}
            self._pools[key] = self._new_pool()
        return self._pools[key]

    async def _send(self, call: Call[Reply]) -> Reply:
        """Send a call, and retry it as `RetrySchedule` allows."""
        schedule = RetrySchedule(self._retry_s)
        while True:
            try:
                return await self._attempt(call)
            except HubError as error:
                if schedule.attempts and call.method == "DELETE" and isinstance(error, NotFound):
                    return call.parse(b"")  # an earlier attempt has deleted it, and its reply was lost
                pause = schedule.pause_s(error, idempotent=call.idempotent)
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    async def _attempt(self, call: Call[Reply]) -> Reply:
        content: bytes | AsyncIterator[bytes] | None = call.content if call.upload is None else _chunks(call.upload)
        if self._closed:
            raise self._closed_error()
        http = self._pool()
        try:
            async with http.stream(content=content, **call.options()) as response:
                if call.download is None or not response.is_success:
                    await response.aread()
                    return self._parse(call, response)
                with atomic_file(call.download) as file:
                    async for chunk in response.aiter_bytes():
                        await asyncio.to_thread(file.write, chunk)
                return call.parse(b"")
        except httpx.RequestError as error:
            raise self._connection_error(error) from without_traceback(error)
        except RuntimeError as error:
            if http.is_closed:
                raise self._closed_error() from error
            raise

    async def _send_series(self, series: CallSeries[Any, Part, Reply]) -> Reply:
        """Send the calls of a series concurrently. The first error cancels the others and is raised."""
        parts: list[Part] = []
        calls = series.calls(self._call_bytes, parts)
        pending: deque[asyncio.Task[Part]] = deque()
        with series.progress_bar() as advance:

            async def send(call: Call[Part], items: int) -> Part:
                part = await self._send(call)
                advance(items)
                return part

            try:
                # In a thread: `next` reads files and encodes images, which would block the event loop.
                while (call := await asyncio.to_thread(lambda: next(calls, None))) is not None:
                    if len(pending) == self._in_flight:
                        parts.append(await pending.popleft())
                    pending.append(asyncio.create_task(send(*call)))
                    if not parts:
                        parts.append(await pending.popleft())
                while pending:
                    parts.append(await pending.popleft())
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)
        return series.join(parts)


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk
