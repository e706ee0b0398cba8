"""One hub with everything on, that all tests of this folder share, and the same hub after a restart with TLS."""

import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from adapters import Adapter, Backbone, load_backbone
from hub.client.client import Client
from hub.local.ports import free_port
from hub.schemas import Classified, TaskList
from tests.support.hub_process import Served, serve
from tests.support.models import png, random_adapter
from tests.support.tls import certificate

HOST = "localhost"
SLOTS = 3  # fewer than adapters, so that workers load and evict
HAS_OTLP = bool(entry_points(group="opentelemetry_traces_exporter", name="otlp_proto_http"))


@dataclass
class Collector:
    """An OpenTelemetry collector that keeps the spans that it receives."""

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)

    def spans(self) -> list[Any]:
        """Return all spans received so far."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        sent = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [span for x in sent for r in x.resource_spans for scope in r.scope_spans for span in scope.spans]


@dataclass(frozen=True)
class SharedHub:
    """The shared hub: its process, the keys of tenant `default` and of the admin, its home and its metrics."""

    served: Served
    url: str
    key: str
    admin_key: str
    home: Path
    metrics_url: str

    def tenant(self, name: str) -> str:
        """Create a tenant; return the key of its owner."""
        with Client(self.url, self.admin_key) as admin:
            admin.create_tenant(name)
            return admin.create_key(name, "owner", role="owner").key


@dataclass(frozen=True)
class Restarted:
    """The shared hub before and after its restart, with TLS at Serve's stock proxy after it."""

    key: str
    admin_key: str
    served: Served
    home: Path
    tls: ssl.SSLContext
    tasks_before: TaskList
    answer_before: Classified


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        found.url = f"http://127.0.0.1:{server.server_port}"
        yield found
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[SharedHub]:
    """Start the hub as a user does, with metrics, traces and debug logs, few slots and a long wait for batches."""
    home, port = tmp_path_factory.mktemp("home"), free_port()
    settings = {
        "HUB_BATCH_WAIT_MS": "10",
        "HUB_LOG_LEVEL": "debug",
        "HUB_METRICS_PORT": str(port),
        "HUB_SLOTS": str(SLOTS),
    }
    if HAS_OTLP:
        settings |= {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }
    served = serve(home, free_port(), **settings)
    assert served.key is not None
    assert served.key.startswith("kh_")
    assert served.admin_key is not None
    yield SharedHub(served, served.url, served.key, served.admin_key, home, f"http://127.0.0.1:{port}/metrics")
    if served.process.poll() is None:
        served.stop()


@pytest.fixture(scope="session")
def pems(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the files of a certificate for `HOST` and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = certificate(HOST)
    (folder / "cert.pem").write_bytes(cert)
    (folder / "key.pem").write_bytes(key)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture(scope="session")
def tls(pems: tuple[Path, Path]) -> ssl.SSLContext:
    """Return a client's context that trusts the certificate."""
    return ssl.create_default_context(cafile=pems[0])


@pytest.fixture(scope="session")
def restarted(
    hub: SharedHub, pems: tuple[Path, Path], tls: ssl.SSLContext, adapters: list[Adapter]
) -> Iterator[Restarted]:
    """Stop the shared hub and start it again, with TLS at Serve's stock proxy.

    Tests that use this fixture run after all tests that use `hub`: tests/conftest.py orders them.
    """
    with Client(hub.url, hub.key) as client:
        client.register("kept", adapters[3].data, alias="stable")
        tasks, answer = client.tasks(), client.classify("kept", [png()], version="stable")
    hub.served.stop()
    settings = {"HUB_TLS_CERT": str(pems[0]), "HUB_TLS_KEY": str(pems[1]), "HUB_HAPROXY": "false"}
    served = serve(hub.home, free_port(), **settings)
    yield Restarted(hub.key, hub.admin_key, served, hub.home, tls, tasks, answer)
    served.stop()


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load_backbone("demo")


@pytest.fixture(scope="session")
def adapters(backbone: Backbone) -> list[Adapter]:
    """Return four adapters; adapter i has 4 + i labels `i-k`."""
    return [
        random_adapter(backbone, seed=i, classes=4 + i, labels=[f"{i}-{k}" for k in range(4 + i)]) for i in range(4)
    ]


@pytest.fixture
def client(hub: SharedHub) -> Iterator[Client]:
    with Client(hub.url, hub.key) as client:
        yield client
