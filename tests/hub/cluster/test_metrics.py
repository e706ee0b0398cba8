"""Metrics: what is recorded when, labels of a bounded number, and dashboards and alerts that use only what there is."""

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from hub.observability.request_context import RequestContext
from hub.worker.adapter_cache import Counts

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, at import

DEPLOY = Path(__file__).parents[3] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "karst-hub.json"
RULES = DEPLOY / "prometheus" / "rules.yaml"
CONFIGS = [DEPLOY / "prometheus" / name for name in ("prometheus.yml", "cluster.yml")]
WORDS = {"by", "without", "on", "ignoring", "and", "or", "unless", "bool", "offset"}
OURS = {"tenant", "status", "type", "limit", "task", "le"}
SERVES = {"deployment", "replica", "application"}  # that Ray Serve adds


class Recorded:
    """In place of Ray's metrics: what was recorded, by name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple, list[float]] = {}

    def make(self, name, _what, tag_keys=(), boundaries=None):
        def record(value, tags=None):
            assert set(tags or {}) == set(tag_keys), name
            assert value >= 0
            self.values.setdefault((name, *(tags or {}).values()), []).append(value)

        return SimpleNamespace(inc=record, set=record, observe=record)

    def sums(self) -> dict[tuple, float]:
        return {name: sum(values) for name, values in self.values.items()}


@pytest.fixture
def recorded(monkeypatch) -> Recorded:
    from hub.cluster import metrics as telemetry

    recorded = Recorded()
    monkeypatch.setattr(telemetry, "MAKE", dict.fromkeys(telemetry.MAKE, recorded.make))
    return recorded


def test_a_classification_is_counted_and_timed(recorded) -> None:
    from hub.cluster.metrics import GatewayMetrics

    meter = GatewayMetrics()
    times = {"load": 0.1, "queue": 0.2, "compute": 0.3}
    meter.record(RequestContext("r", "acme", images={"digits": 3, "other:shapes": 1}, times_s=times), 200, 0.7)
    assert recorded.sums() == {
        ("karst_requests", "acme", "2xx"): 1,
        ("karst_images", "acme", "digits"): 3,
        ("karst_images", "acme", "other:shapes"): 1,
        ("karst_request_seconds", "acme"): 0.7,
        ("karst_load_seconds", "acme"): 0.1,
        ("karst_queue_seconds", "acme"): 0.2,
        ("karst_compute_seconds", "acme"): 0.3,
    }


def test_a_refusal_is_counted_by_its_type_and_limit(recorded) -> None:
    from hub.cluster.metrics import GatewayMetrics

    meter = GatewayMetrics()
    meter.record(RequestContext("r", "acme", error="limit-reached", limit="images_per_second"), 429, 0.1)
    meter.record(RequestContext("r", error="unauthenticated"), 401, 0.1)
    meter.record(RequestContext("r"), 499, 0.1)
    meter.record(RequestContext("r", "acme"), 204, 0.1)
    assert recorded.sums() == {
        ("karst_requests", "acme", "4xx"): 1,
        ("karst_errors", "acme", "limit-reached"): 1,
        ("karst_limits_hit", "acme", "images_per_second"): 1,
        ("karst_requests", "none", "4xx"): 2,
        ("karst_errors", "none", "unauthenticated"): 1,
        ("karst_errors", "none", "http-499"): 1,
        ("karst_requests", "acme", "2xx"): 1,
    }


def test_labels_are_bounded_however_many_tenants_and_tasks_come(recorded) -> None:
    from hub.cluster.metrics import NAMED_TASKS, NAMED_TENANTS, GatewayMetrics

    meter = GatewayMetrics()
    for i in range(5000):
        meter.record(RequestContext("r", f"t{i}", images={f"task{i}": 1}), 200, 0.1)
    tenants = {name[1] for name in recorded.values if name[0] == "karst_requests"}
    pairs = {name[1:] for name in recorded.values if name[0] == "karst_images"}
    assert len(tenants) <= NAMED_TENANTS + 1
    assert len(pairs) <= NAMED_TASKS + NAMED_TENANTS + 1
    assert sum(sum(v) for name, v in recorded.values.items() if name[0] == "karst_images") == 5000


def test_a_large_name_that_comes_late_gets_its_place_and_keeps_it() -> None:
    from hub.cluster.metrics import OTHER, Names

    names = Names(10)
    first = [names.label(f"first{i}") for i in range(5)]
    assert first == [f"first{i}" for i in range(5)]
    labels: Counter[str] = Counter()
    for i in range(100_000):
        labels[names.label("large") if i % 20 == 0 else names.label(f"small{i}")] += 1
    assert labels["large"] > 0.9 * 5000
    assert set(labels) == {"large", OTHER}
    assert [names.label(f"first{i}") for i in range(5)] == first


def test_no_more_than_all_places_are_given() -> None:
    from hub.cluster.metrics import OTHER, Names

    names = Names(4)
    given = {names.label(f"n{i % 50}", 100) for i in range(10_000)} - {OTHER}
    assert len(given) == 4
    assert len(names._unnamed) <= Names.COUNTERS


def test_a_worker_tells_passes_and_tiers(recorded) -> None:
    from hub.cluster.metrics import WorkerMetrics

    tiers = SimpleNamespace(resident=3, host_bytes=99, counts=Counts(hits=7, loads=2, load_s=0.5))
    meter = WorkerMetrics(tiers, slots=8, host_limit_bytes=1000, waiting=lambda: 4)  # type: ignore[arg-type]
    meter.note(6, 2, 20.0, 50.0)
    meter.refresh()
    tiers.counts.hits = 10
    meter.refresh()
    found = recorded.values
    assert found["karst_adapter_hits",] == [7, 3]
    assert found["karst_adapter_loads",] == [2]
    assert found["karst_adapter_load_seconds",] == [0.5]
    assert ("karst_adapter_evictions",) not in found
    assert found["karst_slots",] == [8]
    assert found["karst_slots_used",] == [3, 3]
    assert found["karst_images_waiting",] == [4, 4]
    assert found["karst_batch_images",] == [6]
    assert found["karst_batch_seconds",] == [0.05]
    assert found["karst_batch_wait_seconds",] == [0.02]


def test_rays_own_metrics_take_them() -> None:
    from hub.cluster.metrics import GatewayMetrics, WorkerMetrics

    tiers = SimpleNamespace(resident=3, host_bytes=99, counts=Counts(hits=7, loads=2, load_s=0.5))
    worker = WorkerMetrics(tiers, slots=8, host_limit_bytes=1000, waiting=lambda: 4)  # type: ignore[arg-type]
    worker.note(1, 1, 0.0, 0.0)
    worker.refresh()
    meter = GatewayMetrics()
    meter.record(RequestContext("r", "acme", images={"digits": 1}, times_s={"load": 0.0}), 200, 0.1)
    meter.record(RequestContext("r", error="limit-reached", limit="waiting"), 429, 0.1)


def names_in(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Every metric in a PromQL expression, with the labels that it is chosen or grouped by."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    grouped = {w for group in re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", bare) for w in re.findall(r"\w+", group)}
    bare = re.sub(r"\b(?:by|without)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\[[^\]]*\]", " ", bare)
    for name, matchers in re.findall(r"\b([a-zA-Z_:][\w:]*)\b(?!\s*\()\s*(\{[^}]*\})?", re.sub(r"\$\w+", "1", bare)):
        inside = any(name in group for group in re.findall(r"\{([^}]*)\}", bare))
        if name not in WORDS and not inside:
            yield name, grouped | set(re.findall(r"(\w+)\s*[=!]", matchers))


def test_the_reader_of_expressions_finds_names_and_labels() -> None:
    found = dict(names_in('sum by (le, a) (rate(x_bucket{b=~"$c",d!="y_z"}[$__rate_interval])) / vector(0) > z'))
    assert found == {"x_bucket": {"le", "a", "b", "d"}, "z": {"le", "a"}}
    assert list(names_in("histogram_quantile(0.99, sum by (le) (rate(m_bucket[5m]))) > 2")) == [("m_bucket", {"le"})]


def dashboard_expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = [v["definition"] for v in dashboard["templating"]["list"]]
    asked = [re.fullmatch(r"label_values\((\w+), (\w+)\)", v) for v in variables]
    assert all(asked)
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])] + [
        f"sum by ({m[2]}) ({m[1]})" for m in asked if m
    ]


def alert_expressions() -> list[str]:
    return [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("expressions", [dashboard_expressions, alert_expressions])
def test_dashboard_and_alerts_use_only_what_is_exported(expressions) -> None:
    from hub.cluster.metrics import GATEWAY, WORKER

    exported = {name: metric for metric in (*GATEWAY, *WORKER) for name in metric.exported()}
    used = [pair for expression in expressions() for pair in names_in(expression)]
    assert {name for name, _ in used} <= set(exported)
    for name, labels in used:
        own = set(exported[name].labels) | ({"le"} if name.endswith("_bucket") else set())
        assert labels - SERVES <= own, name


def test_the_dashboard_shows_every_metric() -> None:
    from hub.cluster.metrics import GATEWAY, WORKER

    shown = {name for expression in dashboard_expressions() for name, _ in names_in(expression)}
    assert [m.name for m in (*GATEWAY, *WORKER) if not shown & set(m.exported())] == []


def test_dashboard_and_alerts_are_whole() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] for panel in panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    used = {t["datasource"]["uid"] for panel in panels for t in panel.get("targets", [])}
    assert used == {source["uid"]}
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description"}
    for config in CONFIGS:
        assert yaml.safe_load(config.read_text())["rule_files"] == [RULES.name]


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian's package `prometheus`) is not installed"
)
def test_promtool_takes_them(tmp_path) -> None:
    rules = tmp_path / "dashboard.yaml"
    variables = {"$__rate_interval": "5m", "$tenant": ".*"}
    recorded = []
    for i, expression in enumerate(dashboard_expressions()):
        for name, value in variables.items():
            expression = expression.replace(name, value)
        recorded.append({"record": f"panel_{i}", "expr": expression})
    rules.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    for arguments in (["rules", str(RULES), str(rules)], ["config", *map(str, CONFIGS)]):
        done = subprocess.run(["promtool", "check", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
