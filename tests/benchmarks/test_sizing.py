"""The sizing table of docs/operate.md is the one that `benchmarks.sizing` prints of its committed result."""

import json
from pathlib import Path

from benchmarks.sizing import ARCHITECTURES, MAX_FILES, OUTPUT, STEPS, table

OPERATE = Path(__file__).parents[2] / "docs" / "operate.md"


def test_the_table_of_the_docs_is_that_of_the_result() -> None:
    found = json.loads(OUTPUT.read_text())
    assert list(found) == list(ARCHITECTURES)
    assert table(found) in OPERATE.read_text()


def test_the_result_has_every_step_with_consistent_sizes() -> None:
    for result in json.loads(OUTPUT.read_text()).values():
        assert result["machine"]["date"]
        assert list(result["steps"]) == [str(count) for count in STEPS]
        for count, step in ((int(name), step) for name, step in result["steps"].items()):
            assert step["files"] == min(count, MAX_FILES)
            assert step["store_bytes"] == count * result["adapter_file_bytes"]
            # A file's date has as many digits in all of them.
            assert abs(step["store_bytes_on_disk"] / step["files"] / result["adapter_file_bytes"] - 1) < 0.01
            assert step["slots_used"] == min(result["slots"], step["files"])
            assert step["host_bytes"] <= result["host_limit_bytes"] * 1.01
