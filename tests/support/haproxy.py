"""The real HAProxy with the hub's frontend, before a gateway of the test."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hub.cluster.haproxy import Frontend, rewrite
from hub.cluster.haproxy_node import frontend
from hub.cluster.ray_compat import find_haproxy
from hub.local.ports import free_port
from hub.settings import Settings

from .models import listens, wait_until


def plain_frontend(folder: Path) -> Frontend:
    """Return the options of a hub without TLS."""
    return replace(frontend(Settings(), "127.0.0.1", folder), max_connections=100_000)


@contextmanager
def in_front_of(gateway_port: int, folder: Path, options: Frontend) -> Iterator[int]:
    """Run the real HAProxy before a gateway, and yield its port."""
    port = free_port()
    config = f"""
global
    maxconn 4096
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    option abortonclose
    option splice-request
    errorfile 502 /dev/null
    errorfile 503 /dev/null
    errorfile 504 /dev/null
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend gateways
backend gateways
    server one 127.0.0.1:{gateway_port}
listen stats
  bind *:8404
"""
    file = folder / "haproxy.cfg"
    file.write_text(rewrite(config, replace(options, host=None)))
    with subprocess.Popen([str(find_haproxy()), "-db", "-f", str(file)]) as running:
        try:
            wait_until(lambda: listens(port), 10, "HAProxy")
            yield port
        finally:
            running.terminate()
