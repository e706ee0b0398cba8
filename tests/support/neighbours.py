"""One tenant's attack beside another tenant's calls, over HTTP and a real hub.

The attack runs in a process of its own: in the test's process its threads would delay the measured calls.

    python -m tests.support.neighbours URL FOLDER THREADS [CERTIFICATE]

sends the requests in FOLDER over and over from this many threads, until its standard input ends.
"""

import http.client
import json
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.connections import connect

TIMEOUT_S = 90.0
# Largest ratio of 95th percentiles that a test accepts: without the defences it was 12 to 2,000, with them at most 2.9
# on a quiet machine (docs/security.md). The goal is 3; other programs on the machine decide over a factor of two.
MOST_SLOWER = 6.0  # of the best of several comparisons; twice as much for a single one
SETTLE_S = 1.0  # from the attack's start to the first measured call


@dataclass(frozen=True)
class Front:
    """The front proxy of a hub.

    Attributes:
        certificate: file of the certificate that clients trust; None: the front proxy speaks no TLS.
    """

    url: str
    certificate: Path | None = None

    @cached_property
    def tls(self) -> ssl.SSLContext | None:
        """Trusted certificate of the clients; None without TLS."""
        return None if self.certificate is None else ssl.create_default_context(cafile=str(self.certificate))

    def connect(self) -> socket.socket:
        """Open a connection."""
        connection = connect(self.url, self.tls)
        connection.settimeout(TIMEOUT_S)
        return connection


@dataclass(frozen=True)
class Request:
    """One HTTP request.

    Attributes:
        headers: further lines of the head, as bytes on the wire; a name may repeat.
    """

    method: str
    path: str
    key: str | None = None
    body: bytes = b""
    content_type: str | None = None
    headers: Sequence[tuple[str, str]] = ()

    def raw(self, host: str) -> bytes:
        """Return the request's bytes on the wire."""
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(self.body)}"]
        if self.key is not None:
            lines.append(f"Authorization: Bearer {self.key}")
        if self.content_type is not None:
            lines.append(f"Content-Type: {self.content_type}")
        lines += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + self.body


@dataclass(frozen=True)
class Reply:
    """The reply to a `Request`."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Calls:
    """The calls of one measurement."""

    times_ms: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def p95_ms(self) -> float:
        """95th percentile of the calls' times; the largest of fewer than twenty calls."""
        ordered = sorted(self.times_ms)
        return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]

    def __str__(self) -> str:
        return f"{len(self.times_ms)} calls, p95 {self.p95_ms:.0f} ms, {len(self.failed)} failed {self.failed[:2]}"


@dataclass
class Compared:
    """A victim's calls alone, and beside the attack."""

    alone: Calls
    beside: Calls
    replies: Counter[int]  # status of the attack's replies; 0 for a closed connection
    largest_reply_bytes: int

    @property
    def slower(self) -> float:
        """Ratio of both 95th percentiles."""
        return self.beside.p95_ms / self.alone.p95_ms

    def __str__(self) -> str:
        return f"alone: {self.alone}; beside the attack: {self.beside}; attack: {dict(self.replies)}"


def send(front: Front, request: Request, connection: socket.socket | None = None) -> Reply:
    """Send a request on a new connection, or on this one, and return the reply."""
    own = connection or front.connect()
    try:
        own.sendall(request.raw(urlsplit(front.url).netloc))
        with http.client.HTTPResponse(own, method=request.method) as response:
            response.begin()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, headers, response.read())
    finally:
        if connection is None:
            own.close()


def compare(
    front: Front,
    victims: Mapping[str, Request],
    attack: Sequence[Request],
    *,
    at_once: int,
    seconds: float = 6.0,
) -> dict[str, Compared]:
    """Send each victim's request one after another, first alone, then beside the attack.

    Args:
        attack: requests of the attacker, sent over and over in this order by each of its threads.
        at_once: number of the attacker's threads.
        seconds: time of each of the two measurements. A call that has begun is awaited.
    """
    alone = {name: _measure(front, {name: request}, seconds / len(victims))[name] for name, request in victims.items()}
    with attacking(front, attack, at_once=at_once) as outcome:
        time.sleep(SETTLE_S)
        beside = _measure(front, victims, seconds)
    return {name: Compared(alone[name], beside[name], outcome.replies, outcome.largest_reply_bytes) for name in victims}


@dataclass
class Outcome:
    """Replies that the attacker got; complete when the attack has ended."""

    replies: Counter[int] = field(default_factory=Counter)
    largest_reply_bytes: int = 0


@contextmanager
def attacking(front: Front, requests: Sequence[Request], *, at_once: int) -> Iterator[Outcome]:
    """Send these requests over and over from a process of its own while the context lasts."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        for number, request in enumerate(requests):
            Path(folder, f"{number:06}").write_bytes(request.raw(urlsplit(front.url).netloc))
        command = [sys.executable, "-m", __name__, front.url, folder, str(at_once)]
        command += [] if front.certificate is None else [str(front.certificate)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as attacker:
            assert attacker.stdin is not None
            assert attacker.stdout is not None
            assert attacker.stdout.readline() == "ready\n"
            try:
                yield outcome
            finally:
                attacker.stdin.close()
                found = json.loads(attacker.stdout.read())
                outcome.replies.update({int(status): count for status, count in found["replies"].items()})
                outcome.largest_reply_bytes = found["largest"]


def _measure(front: Front, victims: Mapping[str, Request], seconds: float) -> dict[str, Calls]:
    found = {name: Calls() for name in victims}
    end = time.monotonic() + seconds

    def call(request: Request, calls: Calls) -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                reply = send(front, request)
                if reply.status >= 400:
                    calls.failed.append(f"{reply.status} {reply.body[:120]!r}")
            except (OSError, http.client.HTTPException) as error:
                calls.failed.append(repr(error))
            calls.times_ms.append(1000 * (time.monotonic() - began))

    threads = [threading.Thread(target=call, args=(request, found[name])) for name, request in victims.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _attack(front: Front, folder: Path, threads: int) -> None:
    requests = [file.read_bytes() for file in sorted(folder.iterdir())]
    replies: Counter[int] = Counter()
    sizes = [0]
    ended = threading.Event()

    def send_all(offset: int) -> None:
        number = offset
        while not ended.is_set():
            raw, number = requests[number % len(requests)], number + 1
            try:
                with front.connect() as connection:
                    connection.sendall(raw)
                    response = http.client.HTTPResponse(connection)
                    response.begin()
                    sizes[0] = max(sizes[0], len(response.read()))
                    replies[response.status] += 1
            except (OSError, http.client.HTTPException):
                replies[0] += 1
                ended.wait(0.01)

    for offset in range(threads):
        threading.Thread(target=send_all, args=(offset,), daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    ended.set()
    print(json.dumps({"replies": replies, "largest": sizes[0]}), flush=True)


if __name__ == "__main__":
    _attack(Front(sys.argv[1], *map(Path, sys.argv[4:])), Path(sys.argv[2]), int(sys.argv[3]))
