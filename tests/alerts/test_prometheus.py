"""Prometheus with the rules of deploy/ at a running hub: ten healthy minutes without an alert, then two faults."""

import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from adapters import Backbone, load_backbone
from hub.client.client import Client
from hub.errors import HubError
from hub.local.ports import free_port
from tests.support.dashboards import DEPLOY, RULES, alert_expressions, dashboard_expressions, names_in
from tests.support.hub_process import Served, serve
from tests.support.models import png, random_adapter, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus (Debian's package `prometheus`) is not installed"
    ),
]
HEALTHY_S = 600.0
SCRAPE_S = 10  # Ray's nodes report every 10 s
FIRST_REPORTS_S = 60.0
TASKS = 3


@dataclass
class Prometheus:
    """A Prometheus server that scrapes one hub."""

    url: str
    process: subprocess.Popen[str]
    rules: Path

    def query(self, path: str, **parameters: str | float) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        return {series["metric"]["alertname"] for series in self.query("query", query='ALERTS{alertstate="firing"}')}

    def hurry(self) -> None:
        """Shorten the rules' times, so that a fault need not last ten minutes."""
        rules = re.sub(r"for: \w+", "for: 10s", RULES.read_text())
        self.rules.write_text(re.sub(r"\[\d+m\]", "[40s]", rules))
        self.process.send_signal(signal.SIGHUP)


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Run Prometheus with the configuration of deploy/, but one static target."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"]["evaluation_interval"] = "10s"
    (scrape,) = config["scrape_configs"]
    del scrape["dns_sd_configs"]
    scrape["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    rules = folder / RULES.name
    rules.write_text(RULES.read_text())
    port = free_port()
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/-/ready"), 60, lambda: process.poll())
            yield Prometheus(f"http://127.0.0.1:{port}", process, rules)
        finally:
            process.terminate()


def answers(url: str) -> bool:
    """Return whether this page answers with success. Prometheus takes calls, and refuses them, before it is ready."""
    with suppress(httpx.TransportError):
        return httpx.get(url, timeout=30).is_success
    return False


@contextmanager
def traffic(served: Served) -> Iterator[list[str]]:
    """Classify one image a second with each task in turn; yield the list of failed calls."""
    failed: list[str] = []
    stop = threading.Event()

    def run() -> None:
        with Client(served.url, served.key or "", retry_s=0) as client:
            turn = 0
            while not stop.wait(1):
                turn += 1
                try:
                    client.classify(f"task{turn % TASKS}", [png(turn % 7)])
                except HubError as error:
                    failed.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield failed
    finally:
        stop.set()
        thread.join()


def test_healthy_hub_raises_no_alert_in_ten_minutes_and_faults_raise_theirs(tmp_path: Path) -> None:
    """The hub has as many slots as tasks and no host memory for adapters, so further tasks are read from the store."""
    metrics_port = free_port()
    settings = {"HUB_METRICS_PORT": str(metrics_port), "HUB_SLOTS": str(TASKS), "HUB_HOST_CACHE_BYTES": "0"}
    served = serve(tmp_path / "home", free_port(), **settings)
    try:
        backbone = load_backbone("demo")
        with Client(served.url, served.key or "") as client:
            for i in range(TASKS):
                client.register(f"task{i}", random_adapter(backbone, seed=i, classes=4).data)
        (tmp_path / "prometheus").mkdir()
        with prometheus(tmp_path / "prometheus", f"127.0.0.1:{metrics_port}") as server:
            with traffic(served) as failed:
                check_health(server)
                assert failed == []
                server.hurry()
                check_lost_files(server, served, tmp_path / "home", backbone)
            served.stop()
            wait_until(lambda: "KarstHubNoMetrics" in server.firing(), 120, server.firing)
    finally:
        if served.process.poll() is None:
            served.stop()


def check_health(server: Prometheus) -> None:
    """Wait ten minutes; then every metric that dashboard and rules name was there throughout, and no alert fired."""
    used = {name for text in dashboard_expressions() + alert_expressions() for name, _ in names_in(text)}

    def present() -> set[str]:
        series = server.query("query", query='count by (__name__) ({__name__=~"ray_karst_.*"})')
        return used - {found["metric"]["__name__"] for found in series}

    wait_until(lambda: not present(), FIRST_REPORTS_S, present)
    start = time.time()
    while time.time() < start + HEALTHY_S:
        assert server.process.poll() is None, server.process.stdout
        time.sleep(SCRAPE_S)
        assert server.firing() == set()
    steps = {"start": start, "end": start + HEALTHY_S, "step": SCRAPE_S}
    query = 'count by (__name__) ({__name__=~"ray_karst_.*"})'
    found = {s["metric"]["__name__"]: len(s["values"]) for s in server.query("query_range", query=query, **steps)}
    wanted = int(HEALTHY_S / SCRAPE_S) + 1
    assert {name: found.get(name, 0) for name in used if found.get(name, 0) < wanted} == {}
    assert server.query("query_range", query='ALERTS{alertstate="firing"}', **steps) == []


def check_lost_files(server: Prometheus, served: Served, home: Path, backbone: Backbone) -> None:
    """Remove adapter files behind the hub's back; the alert for failed loads fires, and that for lost metrics not."""
    with Client(served.url, served.key or "", retry_s=0) as client:
        lost = [random_adapter(backbone, seed=50 + i, classes=4) for i in range(2 * TASKS)]
        for i, adapter in enumerate(lost):
            client.register(f"lost{i}", adapter.data)
        for file in (home / "store").rglob("*"):
            if file.is_file() and any(adapter.digest in str(file) for adapter in lost):
                file.unlink()

        def fires() -> bool:
            for i in range(len(lost)):
                with suppress(HubError):
                    client.classify(f"lost{i}", [png(0)])
            return "KarstHubLoadsFail" in server.firing()

        wait_until(fires, 180, server.firing)
        assert "KarstHubNoMetrics" not in server.firing()
