"""Metrics: bounded labels, and dashboards and alerts that use only exported names and labels."""

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from hub.observability.metrics import ALL, OTHER, BoundedLabel

DEPLOY = Path(__file__).parents[3] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "karst-hub.json"
RULES = DEPLOY / "prometheus" / "rules.yaml"
CONFIGS = [DEPLOY / "prometheus" / name for name in ("prometheus.yml", "cluster.yml")]
PROMQL_WORDS = {"by", "without", "on", "ignoring", "and", "or", "unless", "bool", "offset"}
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


def names_in(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each metric of a PromQL expression, with the labels that select or group it."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    grouped = {w for group in re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", bare) for w in re.findall(r"\w+", group)}
    bare = re.sub(r"\b(?:by|without)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\[[^\]]*\]", " ", bare)
    for name, matchers in re.findall(r"\b([a-zA-Z_:][\w:]*)\b(?!\s*\()\s*(\{[^}]*\})?", re.sub(r"\$\w+", "1", bare)):
        inside = any(name in group for group in re.findall(r"\{([^}]*)\}", bare))
        if name not in PROMQL_WORDS and not inside:
            yield name, grouped | set(re.findall(r"(\w+)\s*[=!]", matchers))


def test_names_in_yields_names_and_labels() -> None:
    found = dict(names_in('sum by (le, a) (rate(x_bucket{b=~"$c",d!="y_z"}[$__rate_interval])) / vector(0) > z'))
    assert found == {"x_bucket": {"le", "a", "b", "d"}, "z": {"le", "a"}}
    assert list(names_in("histogram_quantile(0.99, sum by (le) (rate(m_bucket[5m]))) > 2")) == [("m_bucket", {"le"})]


def dashboard_expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = [v["definition"] for v in dashboard["templating"]["list"]]
    queries = [re.fullmatch(r"label_values\((\w+), (\w+)\)", v) for v in variables]
    assert all(queries)
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])] + [
        f"sum by ({m[2]}) ({m[1]})" for m in queries if m
    ]


def alert_expressions() -> list[str]:
    return [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


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
