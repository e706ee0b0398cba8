"""Requests whose length front proxy and gateway might read differently: no body becomes a request of its own."""

import re
from contextlib import suppress

import pytest

from .conftest import AttackedHub

pytestmark = pytest.mark.slow
SECOND = "GET /healthz HTTP/1.1\r\nHost: hub\r\n\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
# Headers and body. The body contains a second request, unless a reader takes the other length.
AMBIGUOUS = {
    "both lengths": (f"Content-Length: {len(SECOND) + 5}\r\n{CHUNKED}", f"0\r\n\r\n{SECOND}"),
    "both lengths, the other way": (f"Content-Length: 4\r\n{CHUNKED}", f"{len(SECOND):x}\r\n{SECOND}\r\n0\r\n\r\n"),
    "two lengths": (f"Content-Length: {len(SECOND)}\r\nContent-Length: 0\r\n", SECOND),
    "signed length": (f"Content-Length: +{len(SECOND)}\r\n", SECOND),
    "length in hexadecimal": (f"Content-Length: 0x{len(SECOND):x}\r\n", SECOND),
    "negative length": ("Content-Length: -1\r\n", SECOND),
    "length with an underscore": ("Content-Length: 1_0\r\n", SECOND),
    "folded coding": (f"Content-Length: {len(SECOND) + 5}\r\nTransfer-Encoding:\r\n chunked\r\n", f"0\r\n\r\n{SECOND}"),
    "unknown coding": (f"Content-Length: {len(SECOND)}\r\nTransfer-Encoding: xchunked\r\n", SECOND),
    "space before the colon": (
        f"Content-Length: {len(SECOND) + 5}\r\nTransfer-Encoding : chunked\r\n",
        f"0\r\n\r\n{SECOND}",
    ),
    "two codings": (f"{CHUNKED}Transfer-Encoding: identity\r\n", f"0\r\n\r\n{SECOND}"),
    "line feed in an extension": (CHUNKED, f"5;a=\nb\r\nhello\r\n0\r\n\r\n{SECOND}"),
    "size that overflows": (CHUNKED, f"FFFFFFFFFFFFFFFF1\r\nhello\r\n0\r\n\r\n{SECOND}"),
    "size with a prefix": (CHUNKED, f"0x5\r\nhello\r\n0\r\n\r\n{SECOND}"),
    "lines without a carriage return": (CHUNKED, f"5\nhello\n0\n\n{SECOND}"),
    "bare carriage return": (f"X-A: b\rContent-Length: 0\r\nContent-Length: {len(SECOND)}\r\n", SECOND),
    "zero byte": (f"X-A: b\0c\r\nContent-Length: {len(SECOND)}\r\n", SECOND),
}


def replies(hub: AttackedHub, data: bytes) -> list[int]:
    """Return the statuses of all replies on a connection, until it ends or is silent for two seconds."""
    received = b""
    with hub.front.connect() as connection:
        connection.settimeout(2)
        connection.sendall(data)
        with suppress(OSError):
            while part := connection.recv(65_536):
                received += part
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", received)]


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_body_is_no_second_request_when_its_length_is_ambiguous(hub: AttackedHub, name: str) -> None:
    headers, body = AMBIGUOUS[name]
    head = f"POST /v1/tasks/absent/classify HTTP/1.1\r\nHost: hub\r\n{headers}\r\n"
    found = replies(hub, (head + body).encode())
    assert len(found) <= 1
    assert set(found) <= {400, 401, 422}
    assert replies(hub, SECOND.encode()) == [200]
