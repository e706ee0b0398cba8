"""Connections as bytes, for clients that do not end their requests."""

import select
import socket
import ssl
import time
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"


def connect(url: str, tls: ssl.SSLContext | None = None) -> socket.socket:
    """Open a connection to the host and port of a URL."""
    place = urlsplit(url)
    connection = socket.create_connection((place.hostname or LOOPBACK, place.port or 80), timeout=30)
    return tls.wrap_socket(connection, server_hostname=place.hostname) if tls is not None else connection


def raw_reply(url: str, request: bytes, tls: ssl.SSLContext | None = None) -> tuple[bytes, bytes]:
    """Send these bytes; return head and body of the first reply."""
    with connect(url, tls) as connection:
        connection.sendall(request)
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(65536) or b"\r\n\r\n"
        head, _, body = received.partition(b"\r\n\r\n")
        lengths = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        while lengths and len(body) < int(lengths[0]) and (more := connection.recv(65536)):
            body += more
        return head, body


def drip_all(url: str, start: bytes, *, count: int, seconds: float, tls: ssl.SSLContext | None = None) -> int:
    """Open connections that send `start` and then a byte every half second; return how many ended within the time."""
    alive = [connect(url, tls) for _ in range(count)]
    ended = 0
    deadline = time.monotonic() + seconds
    try:
        for connection in alive:
            connection.sendall(start)
            connection.setblocking(False)
        while alive and time.monotonic() < deadline:
            time.sleep(0.5)
            for connection in [c for c in alive if _has_ended(c)]:
                alive.remove(connection)
                connection.close()
                ended += 1
    finally:
        for connection in alive:
            connection.close()
    return ended


def _has_ended(connection: socket.socket) -> bool:
    """Send one byte and read what has arrived; return whether the server ended the connection."""
    try:
        while select.select([connection], [], [], 0)[0] or (
            isinstance(connection, ssl.SSLSocket) and connection.pending()
        ):
            if not connection.recv(65536):
                return True
        connection.send(b"x")
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return False
    except OSError:
        return True
    return False
