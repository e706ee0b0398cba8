"""A Python client for a hub: typed replies, typed errors, retries, one connection pool."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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


def _one(describe: Callable[P, Call[Reply]]) -> Callable[Concatenate["Client", P], Reply]:
    @described_by(describe)
    def method(self: "Client", *args: P.args, **kwargs: P.kwargs) -> Reply:
        return self._send(describe(*args, **kwargs))

    return method


def _many(describe: Callable[P, Many[Any, Any, Reply]]) -> Callable[Concatenate["Client", P], Reply]:
    @described_by(describe)
    def method(self: "Client", *args: P.args, **kwargs: P.kwargs) -> Reply:
        return self._send_many(describe(*args, **kwargs))

    return method


class Client(Base):
    """Talks to one hub with one key; may be used by many threads at once.

    Every method raises the `HubError` kind that the hub answered with (`hub.errors`), `Unavailable` where no hub
    answers, `OSError` for a file that cannot be read or written, and `RuntimeError` once the client is closed. The
    methods are described in `hub/client/endpoints.py`.

    >>> with Client("http://127.0.0.1:8000", key="kh_...") as client:  # doctest: +SKIP
    ...     client.register("flowers", "flowers.safetensors")
    ...     client.classify("flowers", ["rose.jpg"]).predictions[0][0].label
    """

    _http: httpx.Client

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

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls of other threads are not tried again, later ones are a `RuntimeError`."""
        self._closed.set()
        self._http.close()

    def _connect(self, on_response: Callable[[httpx.Response], None] | None, **options: Any) -> None:
        self._closed = threading.Event()
        self._http = httpx.Client(event_hooks={"response": [on_response] if on_response is not None else []}, **options)

    def _send(self, call: Call[Reply], unwanted: threading.Event | None = None) -> Reply:
        """Send a call, again where that is safe and may help, until it is unwanted."""
        unwanted = unwanted or self._closed
        until_s = time.monotonic() + self._retry_s
        tries = 0
        while True:
            try:
                return self._try(call)
            except HubError as error:
                if tries and call.method == "DELETE" and isinstance(error, NotFound):
                    return call.read(b"")  # the try whose answer was lost has done it
                tries += 1
                left_s = until_s - time.monotonic()
                pause = pause_s(error, repeatable=call.repeatable, tries=tries, left_s=left_s)
                if pause is None or unwanted.wait(pause):
                    raise

    def _try(self, call: Call[Reply]) -> Reply:
        content: bytes | Iterator[bytes] | None = call.content if call.upload is None else _chunks(call.upload)
        try:
            with self._http.stream(content=content, **call.options()) as response:
                if call.to is None or not response.is_success:
                    response.read()
                    return self._answer(call, response)
                with whole_file(call.to) as file:
                    for chunk in response.iter_bytes():
                        file.write(chunk)
                return call.read(b"")
        except httpx.RequestError as error:
            raise self._lost(error) from bare(error)
        except RuntimeError as error:
            if self._http.is_closed:
                raise self._ended() from error
            raise

    def _send_many(self, many: Many[Any, Part, Reply]) -> Reply:
        """Send calls, several at once; the first failure ends the others and is raised."""
        parts: list[Part] = []
        to_send = many.calls(self._call_bytes, parts)
        waiting: deque[Future[Part]] = deque()
        unwanted = threading.Event()
        with many.bar() as answered, ThreadPoolExecutor(self._in_flight) as pool:

            def send(call: Call[Part], items: int) -> Part:
                part = self._send(call, unwanted)
                answered(items)
                return part

            try:
                parts.append(send(*next(to_send)))
                for call in to_send:
                    if len(waiting) == self._in_flight:
                        parts.append(waiting.popleft().result())
                    waiting.append(pool.submit(send, *call))
                while waiting:
                    parts.append(waiting.popleft().result())
            except BaseException:
                unwanted.set()
                for future in waiting:
                    future.cancel()
                raise
        return many.join(parts)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
