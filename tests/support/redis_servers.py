"""Real redis-servers on TCP ports, and a service address whose target moves while its connections stay open."""

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from hub.local.embedded_redis import find_redis_server
from hub.local.ports import free_port

START_TIMEOUT_S = 20.0
CLUSTER_PORT = 10_000  # added to a server's port
FIRST_OF_CONNECTIONS = 32_768  # Linux' default


@dataclass(frozen=True)
class RedisServer:
    """A running redis-server, and a client of it that never retries."""

    port: int
    client: "redis.Redis"

    @property
    def url(self) -> str:
        """Its URL with database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    def follow(self, primary: "RedisServer") -> None:
        """Become a replica, and return when it has the primary's data."""
        self.client.replicaof("127.0.0.1", primary.port)
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.client.info("replication").get("master_link_status") != "up":
            assert time.monotonic() < deadline, "the replica did not reach its primary"
            time.sleep(0.05)

    def promote(self) -> None:
        """Become a primary."""
        self.client.replicaof("NO", "ONE")


def _server_port() -> int:
    """Return a free port whose cluster port is free too, and is none that Linux gives to connections.

    A server of a cluster also listens on its cluster port, 10,000 higher.
    """
    while True:
        port = free_port()
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port + CLUSTER_PORT))
            if port + CLUSTER_PORT < FIRST_OF_CONNECTIONS:
                return port


@contextmanager
def redis_server(folder: Path, *options: str, password: str | None = None, wait: bool = True) -> Iterator[RedisServer]:
    """Run a redis-server while the context lasts.

    Args:
        folder: for its data; created if missing.
        options: further options, such as `--maxmemory-policy`, `allkeys-lru`.
        password: of its default user.
        wait: return when it answers; otherwise at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, log = _server_port(), folder / "redis.log"
    command = [find_redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    if password is not None:
        command += ["--requirepass", password]
    process = subprocess.Popen([*command, "--logfile", str(log), *options])
    client = redis.Redis(port=port, password=password, decode_responses=True, retry=Retry(NoBackoff(), 0))
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while wait:
            assert process.poll() is None, log.read_text()
            try:
                client.info()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline, "redis-server did not answer"
                time.sleep(0.02)
        yield RedisServer(port, client)
    finally:
        client.close()
        process.terminate()
        process.wait(10)


@contextmanager
def two_servers(folder: Path) -> Iterator[tuple[RedisServer, RedisServer, "ServiceAddress"]]:
    """Run a primary and its replica, and an address that leads to the primary."""
    with ExitStack() as stack:
        primary, replica = (stack.enter_context(redis_server(folder / name)) for name in ("first", "second"))
        replica.follow(primary)
        yield primary, replica, stack.enter_context(service_address(primary))


def fail_over(old: RedisServer, new: RedisServer, address: "ServiceAddress") -> None:
    """Promote the replica, demote the primary, and move the address; every open connection stays open.

    The replica has all changes that were made before the call.
    """
    written = int(old.client.info("replication")["master_repl_offset"])
    deadline = time.monotonic() + START_TIMEOUT_S
    while int(new.client.info("replication")["slave_repl_offset"]) < written:
        assert time.monotonic() < deadline, "the replica did not get the last changes"
        time.sleep(0.01)
    new.promote()
    old.client.replicaof("127.0.0.1", new.port)
    address.target = new.port


class ServiceAddress:
    """A TCP address of a service. New connections go to `target`, and existing ones stay where they are."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Redis URL of the address, with database 0."""
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def close(self) -> None:
        """Close the address and its connections."""
        for end in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                self._open += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


@contextmanager
def service_address(server: RedisServer) -> Iterator[ServiceAddress]:
    """Run an address that leads to a server."""
    address = ServiceAddress(server.port)
    try:
        yield address
    finally:
        address.close()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
