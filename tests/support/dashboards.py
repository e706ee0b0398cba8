"""The dashboard and the alert rules of deploy/, and the metrics that they name."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "karst-hub.json"
RULES = DEPLOY / "prometheus" / "rules.yaml"
PROMQL_WORDS = {"by", "without", "on", "ignoring", "and", "or", "unless", "bool", "offset"}


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


def dashboard_expressions() -> list[str]:
    """Return the queries of all panels and of the variables."""
    dashboard = json.loads(DASHBOARD.read_text())
    variables = [v["definition"] for v in dashboard["templating"]["list"]]
    queries = [re.fullmatch(r"label_values\((\w+), (\w+)\)", v) for v in variables]
    assert all(queries)
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])] + [
        f"sum by ({m[2]}) ({m[1]})" for m in queries if m
    ]


def alert_expressions() -> list[str]:
    """Return the conditions of all alerts."""
    return [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
