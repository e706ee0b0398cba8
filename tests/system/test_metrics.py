"""Metrics, logs, request ids, traces and `karst-hub top` of a running hub."""

import ipaddress
import json
import re
from collections import Counter
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from adapters import Backbone
from hub.cli.main import app
from hub.client.client import Client
from hub.errors import NotFound
from tests.support.hub_process import command, descendants, listening_sockets
from tests.support.models import png, random_adapter, wait_until

from .conftest import HAS_OTLP, SLOTS, Collector, SharedHub

pytestmark = pytest.mark.filterwarnings("ignore")
SCRAPE_S = 60.0  # Ray's nodes report every 10 s
TENANT = "measured"
# Only a failure, or more adapters than slots, produces these.
RARE = {"karst_limits_hit", "karst_adapter_evictions", "karst_adapter_failures"}


@pytest.fixture(scope="module")
def key(hub: SharedHub, backbone: Backbone) -> str:
    """Return the key of a tenant that has made three classifications of two images and one refused call."""
    key = hub.tenant(TENANT)
    with Client(hub.url, key) as client:
        client.register("digits", random_adapter(backbone, classes=4).data)
        for _ in range(3):
            client.classify("digits", [png(0), png(1)])
        with pytest.raises(NotFound):
            client.classify("absent", [png(0)])
    return key


def headers(key: str, **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} | {name.replace("_", "-"): value for name, value in more.items()}


def total(page: str, name: str, **labels: str) -> float:
    """Return the sum of a metric's series that have these labels."""
    found = re.findall(rf"^{name}\{{(.*)\}} (\S+)$", page, re.MULTILINE)
    return sum(float(value) for has, value in found if all(f'{k}="{v}"' in has for k, v in labels.items()))


def names(page: str) -> set[str]:
    return set(re.findall(r"^(ray_karst_\w+)\{", page, re.MULTILINE))


def test_only_replicas_listen_beyond_loopback_on_one_port_each(hub: SharedHub, key: str) -> None:
    """Ray refuses connections to these ports without its token; docs/security.md."""
    open_to_all: Counter[str] = Counter()
    for pid in descendants(hub.served.process.pid):
        for text, _port in listening_sockets([pid]):
            address = ipaddress.ip_address(text)
            if not (getattr(address, "ipv4_mapped", None) or address).is_loopback:
                open_to_all[command(pid)] += 1
    assert open_to_all
    assert all("ServeReplica" in name and n == 1 for name, n in open_to_all.items()), open_to_all


def test_metrics_page_has_every_metric_with_the_tenants_numbers(hub: SharedHub, key: str) -> None:
    from hub.observability.metrics import ALL

    wanted = {name for m in ALL if m.name not in RARE for name in m.exported_names()}
    page = ""

    def complete() -> bool:
        nonlocal page
        page = httpx.get(hub.metrics_url).text
        images = total(page, "ray_karst_images_total", tenant=TENANT)  # of any task: labels are for the first 50
        return wanted <= names(page) and images == 6 and total(page, "ray_karst_errors_total", tenant=TENANT) >= 1

    wait_until(complete, SCRAPE_S, lambda: wanted - names(page))
    assert names(page) <= {name for m in ALL for name in m.exported_names()}
    assert total(page, "ray_karst_errors_total", tenant=TENANT, type="not-found") == 1
    assert total(page, "ray_karst_request_seconds_count", tenant=TENANT) == 3
    assert total(page, "ray_karst_adapter_loads_total", deployment="worker", application="karst-hub") >= 1
    assert total(page, "ray_karst_slots", deployment="worker") == SLOTS
    assert 'le="0.05"' in page


@pytest.mark.parametrize("given", ["mine-1", None])
def test_reply_has_one_request_id_and_the_clients_own_when_it_sent_one(
    hub: SharedHub, key: str, given: str | None
) -> None:
    sent = headers(key, x_request_id=given) if given else headers(key)
    for path in ("/v1/tasks", "/v1/tasks/absent"):
        (back,) = httpx.get(hub.url + path, headers=sent).headers.get_list("x-request-id")
        assert back == given if given else back


def test_gateway_and_worker_log_the_same_request(hub: SharedHub, key: str, backbone: Backbone) -> None:
    """There are more tasks than slots, so that the worker loads the adapter of the request."""
    cold, *others = (random_adapter(backbone, seed=90 + i, classes=3) for i in range(SLOTS + 1))
    with Client(hub.url, key) as client:
        client.register("cold", cold.data)
        for i, other in enumerate(others):
            client.register(f"other{i}", other.data)
            client.classify(f"other{i}", [png(0)])
    sent = headers(key, x_request_id="request-of-mine")
    answer = httpx.post(f"{hub.url}/v1/tasks/cold/classify", content=png(0), headers=sent)
    assert answer.status_code == 200
    wanted = {"hub.requests", "hub.worker.adapter_cache"}
    found: dict[str, Any] = {}

    def written() -> bool:
        nonlocal found
        found = logged(hub, "request-of-mine")
        return wanted <= found.keys()

    wait_until(written, SCRAPE_S, lambda: found)  # the gateway writes a request's line after its answer
    for line in found.values():
        assert (line["tenant"], line["task"], line["digest"]) == (TENANT, "cold", cold.digest)
    assert (found["hub.requests"]["version"], found["hub.requests"]["status"]) == (1, 200)
    logs = hub.served.logged()
    for secret in (hub.key, hub.admin_key, key):
        assert secret not in logs


def logged(hub: SharedHub, request_id: str) -> dict[str, Any]:
    """Return the line that each logger of any process wrote for a request, by logger; the hub's stderr has them all."""
    lines = [line for line in hub.served.logged().splitlines() if line.startswith('{"time"') and line.endswith("}")]
    read = [json.loads(line) for line in lines]
    return {line["logger"]: line for line in read if line.get("request_id") == request_id}


def test_top_shows_workers_and_tenants(hub: SharedHub, key: str) -> None:
    def top(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["top", "--url", hub.url, "--key", hub.admin_key, *arguments])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    status: Any = {}

    def complete() -> bool:
        nonlocal status
        status = json.loads(top("--json"))
        return bool(status["workers"]) and TENANT in {row["tenant"] for row in status["tenants"]}

    wait_until(complete, SCRAPE_S, lambda: status)
    (worker,) = status["workers"]
    assert worker["loads"] >= 1
    assert worker["slots"] == SLOTS
    assert worker["worker"].split("/")[0] in top("--once")


@pytest.mark.skipif(not HAS_OTLP, reason="karst-hub[otel] is not installed")
def test_trace_spans_the_request_from_the_gateway_to_the_batch(hub: SharedHub, key: str, collector: Collector) -> None:
    trace = "5" * 32
    sent = headers(key, traceparent=f"00-{trace}-{'6' * 16}-01")
    answer = httpx.post(f"{hub.url}/v1/tasks/digits/classify", content=png(0), headers=sent)
    assert answer.status_code == 200
    wanted = {"request", "decode", "worker", "load", "queue", "pass"}
    found: dict[str, Any] = {}

    def complete() -> bool:
        nonlocal found
        found = {s.name: s for s in collector.spans() if s.trace_id.hex() == trace}
        return wanted <= found.keys()

    wait_until(complete, SCRAPE_S, lambda: set(found))
    assert found["worker"].parent_span_id == found["request"].span_id
    for name in ("load", "queue", "pass"):
        assert found[name].parent_span_id == found["worker"].span_id
