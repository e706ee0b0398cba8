"""`make bench`: the plan before the start, and one part alone."""

import subprocess
import sys
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.__main__ import DEFAULT, PARTS, plan

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_plan_tells_minutes_and_end_of_each_part() -> None:
    lines = plan(["mixed_batch", "rate_limits"], datetime(2026, 1, 1, 10, 0))
    total = PARTS["mixed_batch"].minutes + PARTS["rate_limits"].minutes
    assert lines[0] == f"About {total} minutes on two idle cores, until 10:{total:02}:"
    assert [line.split()[:2] for line in lines[1:3]] == [
        [name, str(PARTS[name].minutes)] for name in ("mixed_batch", "rate_limits")
    ]
    assert "over_http" in lines[3]


def test_bench_runs_the_default_parts_when_none_is_named() -> None:
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:-1]] == list(DEFAULT)


def test_bench_refuses_a_part_when_no_benchmark_has_its_name() -> None:
    done = run("over_htp")
    assert done.returncode == 2
    assert "no part over_htp; choose from mixed_batch" in done.stderr


@pytest.mark.parametrize("name", PARTS)
def test_each_part_is_a_command_of_the_same_name(name: str) -> None:
    assert find_spec(f"benchmarks.{name}") is not None
