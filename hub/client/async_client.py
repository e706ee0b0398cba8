"""The Python client for asyncio: `hub.client.Client`, every method awaited."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx

from ..errors import HubError, NotFound
from . import endpoints as calls
from .retries import pause_s
from .transport import CHUNK_BYTES, Base, Call, Many, bare, described_by, whole_file

Part = TypeVar("Part")
Reply = TypeVar("Reply")
P = ParamSpec("P")


def _one(describe: Callable[P, Call[Reply]]) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, Reply]]:
    @described_by(describe)
    async def method(self: "AsyncClient", *args: P.args, **kwargs: P.kwargs) -> Reply:
        return await self._send(describe(*args, **kwargs))

    return method


def _many(
    describe: Callable[P, Many[Any, Any, Reply]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, Reply]]:
    @described_by(describe)
    async def method(self: "AsyncClient", *args: P.args, **kwargs: P.kwargs) -> Reply:
        return await self._send_many(describe(*args, **kwargs))

    return method


class AsyncClient(Base):
    """Talks to one hub with one key, on one event loop; its methods and errors are those of `Client`.

    >>> async with AsyncClient("http://127.0.0.1:8000", key="kh_...") as client:  # doctest: +SKIP
    ...     (await client.classify("flowers", ["rose.jpg"])).predictions[0][0].label
    """

    _http: httpx.AsyncClient

    tasks = _one(calls.tasks)
    task = _one(calls.task)
    version = _one(calls.version)
    register = _one(calls.register)
    download = _one(calls.download)
    set_alias = _one(calls.set_alias)
    roll_back = _one(calls.roll_back)
    delete_alias = _one(calls.delete_alias)
    share = _one(calls.share)
    delete_task = _one(calls.delete_task)
    delete_version = _one(calls.delete_version)
    classify = _many(calls.classify)
    classify_inputs = _many(calls.classify_inputs)
    usage = _one(calls.usage)
    audit = _one(calls.audit)

    tenants = _one(calls.tenants)
    tenant = _one(calls.tenant)
    create_tenant = _one(calls.create_tenant)
    change_limits = _one(calls.change_limits)
    delete_tenant = _one(calls.delete_tenant)
    keys = _one(calls.keys)
    create_key = _one(calls.create_key)
    revoke_key = _one(calls.revoke_key)
    admin_keys = _one(calls.admin_keys)
    create_admin_key = _one(calls.create_admin_key)
    revoke_admin_key = _one(calls.revoke_admin_key)
    export_tenant = _one(calls.export_tenant)
    import_tenant = _one(calls.import_tenant)
    status = _one(calls.status)
    gc = _one(calls.gc)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections; every call after this is a `RuntimeError`."""
        await self._http.aclose()

    def _connect(self, on_response: Callable[[httpx.Response], None] | None, **options: Any) -> None:
        async def hook(response: httpx.Response) -> None:
            if on_response is not None:
                on_response(response)

        self._http = httpx.AsyncClient(event_hooks={"response": [hook]}, **options)

    async def _send(self, call: Call[Reply]) -> Reply:
        """Send a call, again where that is safe and may help."""
        until_s = time.monotonic() + self._retry_s
        tries = 0
        while True:
            try:
                return await self._try(call)
            except HubError as error:
                if tries and call.method == "DELETE" and isinstance(error, NotFound):
                    return call.read(b"")  # the try whose answer was lost has done it
                tries += 1
                left_s = until_s - time.monotonic()
                pause = pause_s(error, repeatable=call.repeatable, tries=tries, left_s=left_s)
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    async def _try(self, call: Call[Reply]) -> Reply:
        content: bytes | AsyncIterator[bytes] | None = call.content if call.upload is None else _chunks(call.upload)
        try:
            async with self._http.stream(content=content, **call.options()) as response:
                if call.to is None or not response.is_success:
                    await response.aread()
                    return self._answer(call, response)
                with whole_file(call.to) as file:
                    async for chunk in response.aiter_bytes():
                        await asyncio.to_thread(file.write, chunk)
                return call.read(b"")
        except httpx.RequestError as error:
            raise self._lost(error) from bare(error)
        except RuntimeError as error:
            if self._http.is_closed:
                raise self._ended() from error
            raise

    async def _send_many(self, many: Many[Any, Part, Reply]) -> Reply:
        """Send calls, several at once; the first failure ends the others and is raised."""
        parts: list[Part] = []
        to_send = many.calls(self._call_bytes, parts)
        waiting: deque[asyncio.Task[Part]] = deque()
        with many.bar() as answered:

            async def send(call: Call[Part], items: int) -> Part:
                part = await self._send(call)
                answered(items)
                return part

            try:
                # In a thread: images are read from files and encoded as calls are made of them.
                while (call := await asyncio.to_thread(lambda: next(to_send, None))) is not None:
                    if len(waiting) == self._in_flight:
                        parts.append(await waiting.popleft())
                    waiting.append(asyncio.create_task(send(*call)))
                    if not parts:
                        parts.append(await waiting.popleft())
                while waiting:
                    parts.append(await waiting.popleft())
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
        return many.join(parts)


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk
