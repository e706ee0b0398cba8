"""The result of an idle hub names every process, and docs/performance.md has its section."""

import json
from pathlib import Path

import pytest

from benchmarks.idle import BARS, NAMES, OUTPUT, report

PERFORMANCE = Path(__file__).parents[2] / "docs" / "performance.md"


def test_the_result_has_every_process_of_a_hub_and_their_sums() -> None:
    result = json.loads(OUTPUT.read_text())
    assert set(result["processes"]) <= set(NAMES.values())
    for key, digits in (("core", 0.001), ("pss_mb", 1.0)):
        assert sum(own[key] for own in result["processes"].values()) == pytest.approx(result[key], abs=digits)
    assert set(result["bars"]) == set(BARS)


def test_the_section_of_the_docs_is_that_of_the_result() -> None:
    text = PERFORMANCE.read_text()
    assert all(part in text for part in report(json.loads(OUTPUT.read_text())))
