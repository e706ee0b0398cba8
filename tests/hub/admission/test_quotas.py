"""Quotas: the table for users, and the number that HAProxy repeats, are equal to the constants."""

import re
from pathlib import Path

from hub.admission import quotas

DOCS = Path(__file__).parents[3] / "docs" / "tenants.md"
CONSTANTS = {name: value for name, value in vars(quotas).items() if name.isupper()}


def documented() -> dict[str, tuple[str, bool]]:
    """Return the table of docs/tenants.md: name -> value, and whether the reply beyond it is 429."""
    section = DOCS.read_text("utf-8").partition("### Limits that no setting changes")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    return {row[0].strip("`"): (row[1], "429" in row[-1]) for row in rows[2:]}


def shown(value: int) -> str:
    """Return a number as the table has it."""
    mib, rest = divmod(value, 1024**2)
    return f"{mib} MiB" if mib and not rest else f"{value:,}"


def test_docs_have_each_quota_with_its_value_and_its_429() -> None:
    source = Path(quotas.__file__).read_text("utf-8")
    comments = dict(re.findall(r"^([A-Z_]+) = .*?# (.*)$", source, re.MULTILINE))
    expected = {
        name.lower().replace("_", " "): (shown(value), "429" in comments[name]) for name, value in CONSTANTS.items()
    }
    assert documented() == expected


def test_haproxy_accepts_as_many_requests_of_a_key_as_a_gateway_queues_for_its_tenant() -> None:
    assert quotas.KEY_CALLS == quotas.GATEWAY_CALLS + quotas.GATEWAY_CALLS_QUEUED
