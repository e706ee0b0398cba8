"""Metrics: bounded labels, and dashboards and alerts that use only exported names and labels."""

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hub.observability.metrics import ALL, OTHER, BoundedLabel
from tests.support.dashboards import DASHBOARD, DEPLOY, RULES, alert_expressions, dashboard_expressions, names_in

CONFIGS = [DEPLOY / "prometheus" / name for name in ("prometheus.yml", "cluster.yml")]
SERVE_LABELS = {"deployment", "replica", "application"}  # added by Ray Serve


def test_a_frequent_name_gets_a_label_value_when_it_comes_late() -> None:
    label = BoundedLabel(10)
    first = [label.value(f"first{i}") for i in range(5)]
    assert first == [f"first{i}" for i in range(5)]
    values: Counter[str] = Counter()
    for i in range(100_000):
        values[label.value("large") if i % 20 == 0 else label.value(f"small{i}")] += 1
    assert values["large"] > 0.9 * 5000
    assert set(values) == {"large", OTHER}
    assert [label.value(f"first{i}") for i in range(5)] == first


def test_a_label_has_no_more_values_than_its_limit() -> None:
    label = BoundedLabel(4)
    values = {label.value(f"n{i % 50}", 100) for i in range(10_000)} - {OTHER}
    assert len(values) == 4


def test_names_in_yields_names_and_labels() -> None:
    found = dict(names_in('sum by (le, a) (rate(x_bucket{b=~"$c",d!="y_z"}[$__rate_interval])) / vector(0) > z'))
    assert found == {"x_bucket": {"le", "a", "b", "d"}, "z": {"le", "a"}}
    assert list(names_in("histogram_quantile(0.99, sum by (le) (rate(m_bucket[5m]))) > 2")) == [("m_bucket", {"le"})]


@pytest.mark.parametrize("expressions", [dashboard_expressions, alert_expressions])
def test_dashboard_and_alerts_use_only_exported_names_and_labels(expressions: Callable[[], list[str]]) -> None:
    exported = {name: metric for metric in ALL for name in metric.exported_names()}
    used = [pair for expression in expressions() for pair in names_in(expression)]
    assert {name for name, _ in used} <= set(exported)
    for name, labels in used:
        own = set(exported[name].labels) | ({"le"} if name.endswith("_bucket") else set())
        assert labels - SERVE_LABELS <= own, name


def test_the_dashboard_shows_every_metric() -> None:
    shown = {name for expression in dashboard_expressions() for name, _ in names_in(expression)}
    assert [m.name for m in ALL if not shown & set(m.exported_names())] == []


def test_dashboard_and_alerts_are_complete() -> None:
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
def test_promtool_accepts_dashboard_and_alerts(tmp_path: Path) -> None:
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


HEALTHY = {
    "ray_karst_slots": "64x30",
    "ray_karst_images_waiting": "4x30",
    "ray_karst_changes_refused": "0x30",
    'ray_karst_requests_total{tenant="a", status="2xx"}': "0+600x30",
    'ray_karst_requests_total{tenant="none", status="5xx"}': "0x30",
    'ray_karst_errors_total{tenant="none", type="unavailable"}': "0x30",
    'ray_karst_limits_hit_total{tenant="a", limit="requests_per_second"}': "0+6x30",
    'ray_karst_request_seconds_bucket{tenant="a", le="1"}': "0+600x30",
    'ray_karst_request_seconds_bucket{tenant="a", le="5"}': "0+600x30",
    'ray_karst_request_seconds_bucket{tenant="a", le="+Inf"}': "0+600x30",
    'ray_karst_images_typical_total{tenant="a", task="t"}': "0+600x30",
    'ray_karst_typicality_total{tenant="a", task="t"}': "0+300x30",
    "ray_karst_adapter_hits_total": "0+600x30",
    "ray_karst_adapter_evictions_total": "0+6x30",
    "ray_karst_adapter_failures_total": "0x30",
    "ray_karst_adapter_loads_total": "0+6x30",
    "ray_karst_adapter_load_seconds_total": "0+1x30",
}  # series -> values a minute apart
FAULTS: dict[str, dict[str, str | None]] = {  # alert -> what differs; None: the series is absent
    "KarstHubNoMetrics": {"ray_karst_slots": None},
    "KarstHubChangesRefused": {"ray_karst_changes_refused": "1x30"},
    "KarstHubFailing": {'ray_karst_requests_total{tenant="none", status="5xx"}': "0+10x30"},
    "KarstHubUnavailable": {'ray_karst_errors_total{tenant="none", type="unavailable"}': "0+120x30"},
    "KarstHubSlow": {'ray_karst_request_seconds_bucket{tenant="a", le="1"}': "0+500x30"},
    "KarstHubQueues": {"ray_karst_images_waiting": "40x30"},
    "KarstHubThrashing": {"ray_karst_adapter_evictions_total": "0+300x30"},
    "KarstHubLoadsFail": {"ray_karst_adapter_failures_total": "0+6x30"},
    "KarstHubColdLoadsSlow": {"ray_karst_adapter_load_seconds_total": "0+30x30"},
    "KarstHubDrift": {'ray_karst_typicality_total{tenant="a", task="t"}': "0+180x30"},
    "KarstHubTenantAtItsLimit": {'ray_karst_limits_hit_total{tenant="a", limit="requests_per_second"}': "0+120x30"},
}


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian's package `prometheus`) is not installed"
)
def test_each_fault_raises_its_alert_and_a_healthy_hub_none(tmp_path: Path) -> None:
    rules = yaml.safe_load(RULES.read_text())
    assert set(FAULTS) == {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    cases = [
        {
            "name": alert or "healthy",
            "interval": "1m",
            "input_series": [{"series": s, "values": v} for s, v in (HEALTHY | fault).items() if v is not None],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": "29m",
                    "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else [],
                }
            ],
        }
        for alert, fault in {"": {}, **FAULTS}.items()
    ]
    file = tmp_path / "cases.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": cases}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
