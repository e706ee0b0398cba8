"""What a running hub tells of itself: Ray's metrics page, log lines, request ids, traces, and `karst-hub top`."""

import ipaddress
import json
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points
from pathlib import Path

import httpx
import pytest

from adapters import load_backbone
from hub.client.client import Client
from hub.errors import NotFound
from hub.local.hub import free_port
from tests.support.hub_process import KARST_HUB, Served, command, descendants, listening_sockets, serve
from tests.support.models import png, random_adapter

pytestmark = [pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore")]
SCRAPE_S = 60  # Ray's nodes report every 10 s
HAS_OTLP = bool(entry_points(group="opentelemetry_traces_exporter", name="otlp_proto_http"))
# Names that only a failure, or a larger store, brings up.
RARE = {"karst_limits_hit", "karst_adapter_evictions", "karst_adapter_failures"}


@dataclass
class Collector:
    """Takes spans as an OpenTelemetry collector does."""

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)

    def spans(self) -> list:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        sent = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [span for x in sent for r in x.resource_spans for scope in r.scope_spans for span in scope.spans]


@pytest.fixture(scope="module")
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
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        found.url = f"http://127.0.0.1:{server.server_port}"
        yield found
        server.shutdown()
        thread.join()


@dataclass(frozen=True)
class Watched:
    hub: Served
    metrics_url: str


@pytest.fixture(scope="module")
def watched(tmp_path_factory, collector) -> Iterator[Watched]:
    port = free_port()
    settings = {"HUB_METRICS_PORT": str(port), "HUB_LOG_LEVEL": "debug", "HUB_SLOTS": "2"}
    if HAS_OTLP:
        settings |= {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }
    hub = serve(tmp_path_factory.mktemp("home"), free_port(), **settings)
    yield Watched(hub, f"http://127.0.0.1:{port}/metrics")
    hub.stop()


@pytest.fixture(scope="module")
def used(watched) -> Watched:
    """The hub after three classifications and a refusal."""
    with Client(watched.hub.url, watched.hub.key) as client:
        client.register("digits", random_adapter(load_backbone("demo"), classes=4).data)
        for _ in range(3):
            client.classify("digits", [png(0), png(1)])
        with pytest.raises(NotFound):
            client.classify("absent", [png(0)])
    return watched


def test_only_replicas_listen_beyond_loopback(used) -> None:
    """And only on one port each, which takes nobody without Ray's token (`test_tls`); see docs/security.md."""
    open_to_all: Counter[str] = Counter()
    for pid in descendants(used.hub.process.pid):
        for text, _port in listening_sockets([pid]):
            address = ipaddress.ip_address(text)
            if not (getattr(address, "ipv4_mapped", None) or address).is_loopback:
                open_to_all[command(pid)] += 1
    assert open_to_all
    assert all("ServeReplica" in name and n == 1 for name, n in open_to_all.items()), open_to_all


def test_every_metric_is_on_rays_page(used) -> None:
    from hub.observability.metrics import ALL

    wanted = {name for m in ALL if m.name not in RARE for name in m.exported_names()}
    until = time.monotonic() + SCRAPE_S
    while True:
        page = httpx.get(used.metrics_url).text
        missing = wanted - set(re.findall(r"^(ray_karst_\w+)\{", page, re.MULTILINE))
        images = total(page, "ray_karst_images_total", tenant="default", task="digits")
        if not missing and images == 6:
            break
        assert time.monotonic() < until, (missing, images)
        time.sleep(1)
    known = {name for m in ALL for name in m.exported_names()}
    assert set(re.findall(r"^(ray_karst_\w+)\{", page, re.MULTILINE)) <= known
    assert total(page, "ray_karst_errors_total", type="not-found") == 1
    assert total(page, "ray_karst_request_seconds_count", tenant="default") == 3
    assert total(page, "ray_karst_adapter_loads_total", deployment="worker", application="karst-hub") == 1
    assert total(page, "ray_karst_slots", deployment="worker") == 2
    assert 'le="0.05"' in page


def total(page: str, name: str, **labels: str) -> float:
    """The sum of a metric's series that have these labels."""
    found = re.findall(rf"^{name}\{{(.*)\}} (\S+)$", page, re.MULTILINE)
    return sum(float(value) for has, value in found if all(f'{k}="{v}"' in has for k, v in labels.items()))


@pytest.mark.parametrize("given", ["mine-1", None])
def test_a_request_id_comes_back_once(used, given) -> None:
    headers = {"authorization": f"Bearer {used.hub.key}"} | ({"x-request-id": given} if given else {})
    for path in ("/v1/tasks", "/v1/tasks/absent"):
        answer = httpx.get(used.hub.url + path, headers=headers)
        (back,) = answer.headers.get_list("x-request-id")
        assert back == given if given else back


def test_gateway_and_worker_log_the_same_request(used) -> None:
    """Of three tasks one has no slot: the worker loads it for the request that asks."""
    session = re.search(r'SessionName="([^"]+)"', httpx.get(used.metrics_url).text)
    assert session
    backbone = load_backbone("demo")
    cold, *others = (random_adapter(backbone, seed=9 + i, classes=3) for i in range(3))
    with Client(used.hub.url, used.hub.key) as client:
        client.register("cold", cold.data)
        for i, other in enumerate(others):
            client.register(f"other{i}", other.data)
            client.classify(f"other{i}", [png(0)])
    headers = {"authorization": f"Bearer {used.hub.key}", "x-request-id": "request-of-mine"}
    answer = httpx.post(f"{used.hub.url}/v1/tasks/cold/classify", content=png(0), headers=headers)
    assert answer.status_code == 200
    until = time.monotonic() + SCRAPE_S  # a request's line is written after its answer
    while {"hub.requests", "hub.worker.adapter_cache"} - (found := written(session[1], "request-of-mine")).keys():
        assert time.monotonic() < until, found
        time.sleep(0.2)
    for line in found.values():
        assert (line["tenant"], line["task"], line["digest"]) == ("default", "cold", cold.digest)
    assert (found["hub.requests"]["version"], found["hub.requests"]["status"]) == (1, 200)
    logs = Path("/tmp/ray", session[1], "logs").rglob("*")
    said = "".join(path.read_text(errors="replace") for path in logs if path.is_file())
    assert used.hub.key not in said
    assert used.hub.admin_key not in said


def written(session: str, request_id: str) -> dict[str, dict]:
    """What the hub's loggers wrote for a request in any process of the session, by logger."""
    files = Path("/tmp/ray", session, "logs").glob("worker-*.err")
    lines = [line for path in files for line in path.read_text().splitlines() if line.endswith("}")]
    read = [json.loads(line) for line in lines if line.startswith('{"time"')]
    return {line["logger"]: line for line in read if line.get("request_id") == request_id}


def test_top_shows_it(used) -> None:
    def top(*arguments: str) -> str:
        command = [str(KARST_HUB), "top", "--url", used.hub.url, "--key", str(used.hub.admin_key), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    until = time.monotonic() + SCRAPE_S
    while True:
        status = json.loads(top("--json"))
        if status["workers"] and status["tenants"]:
            break
        assert time.monotonic() < until, status
        time.sleep(0.5)
    (worker,) = status["workers"]
    assert worker["loads"] >= 1
    assert worker["slots"] == 2
    assert status["tenants"][0]["tenant"] == "default"
    assert worker["worker"].split("/")[0] in top("--once")


@pytest.mark.skipif(not HAS_OTLP, reason="karst-hub[otel] is not installed")
def test_a_trace_goes_from_the_gateway_to_the_pass(used, collector) -> None:
    trace = "5" * 32
    headers = {"authorization": f"Bearer {used.hub.key}", "traceparent": f"00-{trace}-{'6' * 16}-01"}
    answer = httpx.post(f"{used.hub.url}/v1/tasks/digits/classify", content=png(0), headers=headers)
    assert answer.status_code == 200
    until = time.monotonic() + SCRAPE_S
    wanted = {"request", "decode", "worker", "load", "queue", "pass"}
    while wanted - (found := {s.name: s for s in collector.spans() if s.trace_id.hex() == trace}).keys():
        assert time.monotonic() < until, set(found)
        time.sleep(0.2)
    assert found["worker"].parent_span_id == found["request"].span_id
    for name in ("load", "queue", "pass"):
        assert found[name].parent_span_id == found["worker"].span_id
