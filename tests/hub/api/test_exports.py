"""Exports of a tenant: one at a time until its client has read it, beside those of other tenants."""

import json
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from adapters import Backbone
from hub.admission.quotas import EXPORTS, EXPORTS_QUEUED
from hub.local.embedded_redis import embedded_redis
from tests.support.asgi import listening
from tests.support.hub_app import OCTETS, Hub, running
from tests.support.models import random_adapter, with_metadata

VERSIONS = 24  # more bytes than the buffers of a connection


@pytest.fixture
def large(tmp_path: Path, backbone: Backbone) -> Iterator[Hub]:
    """Run a hub with a task of 20 MB."""
    adapter = random_adapter(backbone)
    with embedded_redis(tmp_path) as url, running(url, backbone, tmp_path / "store", max_adapter_bytes=2**21) as hub:
        for i in range(VERSIONS):
            data = with_metadata(adapter, metrics=json.dumps({"notes": "m" * 450_000, "i": i}))
            reply = hub.http.post("/v1/tasks/large/versions", content=data, headers=OCTETS)
            assert reply.status_code == 201, reply.text
        yield hub


def begun(connection: socket.socket, seconds: float) -> str:
    """Return the status of a reply that begins within this time."""
    if not select.select([connection], [], [], seconds)[0]:
        return ""
    return connection.recv(12).decode()[9:]


def test_exports_of_a_tenant_wait_for_those_that_its_clients_do_not_read(large: Hub) -> None:
    other = large.key_of("other")["authorization"]
    with listening(large.another_gateway().app) as url, ExitStack() as open_connections:
        place = urlsplit(url)

        def export(tenant: str, authorization: str) -> socket.socket:
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((str(place.hostname), int(place.port or 80)))
            head = f"GET /v1/tenants/{tenant}/export HTTP/1.1\r\nHost: h\r\nAuthorization: {authorization}\r\n\r\n"
            connection.sendall(head.encode())
            return open_connections.enter_context(connection)

        own = f"Bearer {large.key}"
        first = [export("default", own) for _ in range(EXPORTS)]
        assert [begun(connection, 60) for connection in first] == ["200"] * EXPORTS
        waiting = [export("default", own) for _ in range(EXPORTS_QUEUED)]
        assert [begun(connection, 0.2) for connection in waiting] == [""] * EXPORTS_QUEUED
        assert begun(export("default", own), 60) == "429"
        assert begun(export("other", other), 60) == "200"
        assert begun(export("other", f"Bearer {large.admin_key}"), 60) == "200"
        first[0].close()
        assert [connection for connection in waiting if begun(connection, 5)]
