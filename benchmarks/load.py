"""Load generator with little CPU time of its own: HTTP/1.1 on plain sockets, one thread, one selector.

Requests are bytes that exist before the run. While calls are pending, the generator reads only the status and the
length of a reply. This takes 0.1 to 0.2 ms of CPU time per request (`over_http` reports it). A call with `hub.Client`
(httpx, multipart) takes about 1.5 ms longer than one over such a socket.
"""

import re
import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import cycle
from statistics import quantiles
from typing import NamedTuple

Address = tuple[str, int]
CONNECT_S = 10.0
REPLY_S = 120.0
TICK_S = 0.002  # least time between wake-ups of an open loop; requests that become due meanwhile go out together
LOST = 0  # status of a request whose connection ended before its reply
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Reply(NamedTuple):
    """A complete reply; `at` is time.perf_counter()."""

    status: int
    ms: float
    at: float
    head: bytes
    body: bytes

    def header(self, name: str) -> str:
        """Return the value of a header.

        Raises:
            RuntimeError: the reply has no such header.
        """
        found = re.search(rf"\r\n{name}: *([^\r]*)", self.head.decode("latin-1"), re.IGNORECASE)
        if found is None:
            raise RuntimeError(f"no header {name} in {self.head!r} {self.body[:200]!r}")
        return found[1]


class Connection:
    """One keep-alive connection with at most one pending request."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._open()

    def _open(self) -> None:
        self.socket = socket.create_connection(self._address, CONNECT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(REPLY_S)
        self._received = b""

    def send(self, request: bytes) -> None:
        if self.socket.fileno() < 0:
            self._open()
        self._sent = time.perf_counter()
        try:
            self.socket.sendall(request)
        except ConnectionError:  # the server closed it since its last reply
            self.close()
            self._open()
            self.socket.sendall(request)

    def receive(self) -> Reply | None:
        """Return the reply when it is complete, None before. Close the socket if the server closed it."""
        try:
            received = self.socket.recv(1 << 16)
        except ConnectionError:
            received = b""
        self._received += received
        head, found, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head) if found else None
        if received and (length is None or len(body) < int(length[1])):
            return None
        if not received or b"\r\nconnection: close" in head.lower():
            self.close()
        self._received = b""
        now = time.perf_counter()
        return Reply(int(head[9:12]) if found else LOST, 1e3 * (now - self._sent), now, head, body)

    def call(self, request: bytes) -> Reply:
        """Send a request and wait for the reply."""
        self.send(request)
        while (reply := self.receive()) is None:
            pass
        return reply

    def close(self) -> None:
        self.socket.close()


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """Build a request; `content_type` is the header content-type, and so on."""
    lines = [f"{method} {path} HTTP/1.1", "host: hub", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def closed_loop(address: Address, requests: Sequence[bytes], callers: int, seconds: float) -> list[Reply]:
    """Run a closed loop: `callers` send their next request after their last reply, cycling through `requests`.

    Returns:
        The replies in the order of their arrival. The last `callers` of them arrived after the end.
    """
    turns = cycle(requests)
    replies: list[Reply] = []
    end = time.perf_counter() + seconds
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(callers):
            connection = stack.enter_context(closing(Connection(address)))
            connection.send(next(turns))
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        while selector.get_map():
            for reply, connection in _receive(selector, REPLY_S):
                replies.append(reply)
                if reply.at < end:
                    connection.send(next(turns))
                    selector.register(connection.socket, selectors.EVENT_READ, connection)
    return replies


def open_loop(address: Address, message: bytes, rate: float, seconds: float, most_open: int) -> Mapping[str, int]:
    """Send `rate` requests per second independent of the replies, over as many connections as necessary.

    Returns:
        Count per status; `unsent` counts the times at which all `most_open` connections were pending.
    """
    counts: Counter[str] = Counter()
    idle: list[Connection] = []
    start, turns = time.perf_counter(), 0
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        while (now := time.perf_counter()) < start + seconds:
            for _ in range(int((now - start) * rate) - turns):
                turns += 1
                if not idle and len(selector.get_map()) >= most_open:
                    counts["unsent"] += 1
                    continue
                connection = idle.pop() if idle else stack.enter_context(closing(Connection(address)))
                connection.send(message)
                selector.register(connection.socket, selectors.EVENT_READ, connection)
            for reply, connection in _receive(selector, max(1 / rate, TICK_S)):
                counts[str(reply.status)] += 1
                idle.append(connection)
    return dict(counts)


def _receive(selector: selectors.BaseSelector, timeout_s: float) -> Iterator[tuple[Reply, Connection]]:
    """Yield the replies that are complete now."""
    for key, _ in selector.select(timeout_s):
        if (reply := key.data.receive()) is not None:
            selector.unregister(key.fileobj)
            yield reply, key.data


def ok(reply: Reply) -> Reply:
    """Return the reply.

    Raises:
        RuntimeError: its status is not 200.
    """
    if reply.status != 200:
        raise RuntimeError(f"HTTP {reply.status}: {reply.body[:500]!r}")
    return reply


def rate(replies: Sequence[Reply], callers: int) -> float:
    """Return the replies per second while all callers were active."""
    counted = [ok(reply) for reply in replies[callers - 1 : -callers]]
    if len(counted) < 2:
        raise RuntimeError(f"{len(replies)} replies are too few for a rate: give it more seconds")
    return (len(counted) - 1) / (counted[-1].at - counted[0].at)


def rate_of_passes(replies: Sequence[Reply]) -> float:
    """Return the images per second between the ends of forward passes; a pass's replies arrive together."""
    passes: dict[tuple[str, str], list[float]] = {}
    for reply in map(ok, replies):
        compute = reply.header("server-timing").rpartition("compute;dur=")[2]
        passes.setdefault((compute, reply.header("x-batch-images")), []).append(reply.at)
    ends = sorted((max(at), len(at)) for (_, images), at in passes.items() if len(at) == int(images))[2:]
    if len(ends) < 2:
        raise RuntimeError(f"{len(passes)} passes are too few for a rate: give it more seconds")
    return sum(images for _, images in ends[1:]) / (ends[-1][0] - ends[0][0])


def p95(replies: Sequence[Reply]) -> float:
    """Return the p95 in milliseconds. A refused or lost call counts as the client's timeout."""
    ms = [reply.ms if reply.status == 200 else 1e3 * REPLY_S for reply in replies]
    return quantiles(ms, n=20, method="inclusive")[-1] if len(ms) > 1 else ms[0]
