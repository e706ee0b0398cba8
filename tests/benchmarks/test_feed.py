"""The tables of docs/scaling.md are those that `benchmarks.feed` prints of its committed result."""

import json
from pathlib import Path

from benchmarks.feed import BACKBONES, FORMS, IMAGES, OUTPUT, needs, table

SCALING = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_tables_of_the_docs_are_those_of_the_result() -> None:
    result, text = json.loads(OUTPUT.read_text()), SCALING.read_text()
    assert table(result["rows"]) in text
    assert needs(result) in text


def test_the_result_has_every_row_with_all_forms() -> None:
    result = json.loads(OUTPUT.read_text())
    assert result["machine"]["date"]
    rows = [(row["backbone"], row["images"]) for row in result["rows"]]
    assert rows == [(name, images) for name in BACKBONES for images in IMAGES]
    for row in result["rows"]:
        for found in (row[form] for form in FORMS):
            both = 1 / (1 / found["gateway_core"]["median"] + 1 / found["worker_core"]["median"])
            assert abs(found["core"]["median"] / both - 1) < 0.2  # medians of rounds
