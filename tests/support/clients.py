"""Helpers for tests of the Python clients: both clients by the same calls, and a server with prepared answers."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hub import AsyncClient, Client

Answer = tuple[int, dict[str, str], bytes]
DROP: Answer = (0, {}, b"")  # the connection ends without an answer


class Blocking:
    """An `AsyncClient` whose methods are called like a `Client`'s."""

    def __init__(self, url: str, key: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(url, key, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **kwargs: self._runner.run(method(*args, **kwargs))

    def __enter__(self) -> "Blocking":
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()


KINDS: list[Callable[..., Any]] = [Client, Blocking]


@dataclass
class Told:
    """A server that gives these answers in order, repeats the last, and records the requests."""

    answers: list[Answer]
    paths: list[str] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    connections: int = 0
    url: str = ""

    def answer(self, path: str, headers: Any, body: bytes) -> Answer:
        self.times.append(time.monotonic())
        self.paths.append(path)
        self.headers.append(headers)
        self.bodies.append(body)
        return self.answers[min(len(self.paths), len(self.answers)) - 1]


@contextmanager
def server(*answers: Answer, wait_s: float = 0.0, late_s: float = 0.0) -> Iterator[Told]:
    """
    Args:
        wait_s: before each answer.
        late_s: before it listens at all.
    """
    told = Told(list(answers))
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            told.connections += 1
            super().setup()

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, headers, reply = told.answer(self.path, self.headers, body)
            ended.wait(wait_s)
            if status == 0:
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in ({"content-length": str(len(reply))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply)
            self.close_connection = int(headers.get("content-length", len(reply))) != len(reply)

        do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that has gone away is nothing to tell of."""

    http = Server(("127.0.0.1", 0), Handler, bind_and_activate=False)
    http.server_bind()
    told.url = f"http://127.0.0.1:{http.server_port}"

    def serve() -> None:
        ended.wait(late_s)
        http.server_activate()
        http.serve_forever(poll_interval=0.01)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield told
    finally:
        ended.set()
        http.shutdown()
        thread.join()
        http.server_close()
