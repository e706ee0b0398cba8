"""Clients that do not read their replies: how much of a gateway's memory one tenant can hold."""

import contextlib
import io
import json
import socket
import ssl
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from hub.admission.quotas import LARGE_REPLIES
from tests.support.neighbours import Request, send

from .conftest import AttackedHub, Victim

pytestmark = pytest.mark.slow
CONNECTIONS = 64
MAX_GATEWAYS = 2
TASK = "/v1/tasks/photos"


def large_file() -> bytes:
    """Return an image file of 9 MB."""
    pixels = np.random.default_rng(1).integers(0, 255, (1700, 1700, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def has_begun(connection: socket.socket) -> bool:
    """Return whether a reply has begun. Tickets of a TLS session also make a socket readable."""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except (BlockingIOError, ssl.SSLWantReadError):
        return False


def test_few_files_are_in_memory_when_64_clients_of_a_tenant_do_not_read_them(hub: AttackedHub, victim: Victim) -> None:
    if not hub.has_haproxy:
        pytest.skip("Ray's stock proxy reads whole replies into its own memory, nginx into files")
    key = hub.tenant()
    assert send(hub.front, Request("PUT", TASK, key, b"{}", "application/json")).status == 201
    added = send(hub.front, Request("POST", f"{TASK}/images?label=x", key, large_file(), "image/bmp"))
    digest = json.loads(added.body)["added"][0]["digest"]
    request = Request("GET", f"{TASK}/images/{digest}", key)
    with contextlib.ExitStack() as connections:
        waiting: list[socket.socket] = []
        for _ in range(CONNECTIONS):
            connection = connections.enter_context(hub.front.connect())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request.raw(urlsplit(hub.front.url).netloc))
            waiting.append(connection)
        time.sleep(3)
        begun = [connection for connection in waiting if has_begun(connection)]
        print(f"{len(begun)} of {CONNECTIONS} replies have begun")
        assert 1 <= len(begun) <= MAX_GATEWAYS * LARGE_REPLIES
        assert send(hub.front, victim.classify).status == 200
    end = time.monotonic() + 60
    while send(hub.front, request).status != 200:  # the closed connections hold no place any more
        assert time.monotonic() < end
