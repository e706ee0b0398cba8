"""The benchmark of the hub over HTTP, with the smallest numbers: it runs to its end and leaves every number."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.load import Reply, p95, rate_of_passes
from benchmarks.over_http import BARS, bars, spreads

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
SMALL = "--parts idle throughput first-answer tenants --calls 3 --rounds 1 --seconds 1.5 --callers 2 --greedy-open 50"


@pytest.mark.long
def test_every_part_over_http(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.over_http", *SMALL.split(), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert set(result["bars"]) == {name for name in BARS if "images a second" not in name}
    stages = "call empty healthz load queue compute bare decode client added over_empty rest"
    assert {f"{name}_ms" for name in stages.split()} <= set(result["idle"])
    assert set(result["throughput"]["per_second"]) == {"hub", "empty", "bare", "work"}
    for side in ("hub", "empty"):
        assert {"gateway", "worker", "haproxy", "caller"} <= set(result["throughput"]["cpu_ms"][side])
        assert result["throughput"]["cpu_ms"][side]["gateway"] > 0
    assert all(result["tenants"][images]["greedy_statuses"]["200"] for images in ("1 images", "16 images"))
    assert result["first-answer"]["adapter_bytes"] > 1e5
    assert all(math.isfinite(number) for _, found in spreads(result) for number in found.values())
    for name in ("call", "empty", "compute"):
        assert 0 < result["idle"][f"{name}_ms"]["median"] < 1000


def reply(at: float, images: int, compute: str, ms: float = 1.0, status: int = 200) -> Reply:
    head = f"HTTP/1.1 {status} OK\r\nx-batch-images: {images}\r\nserver-timing: queue;dur=1, compute;dur={compute}"
    return Reply(status, ms, at, head.encode(), b"")


def test_a_rate_is_taken_from_the_end_of_a_pass_to_the_end_of_another() -> None:
    passes = [(1.0, 1), (2.0, 2), (4.0, 4), (6.0, 4), (8.0, 4)]
    replies = [reply(at, n, f"{at}") for at, n in passes for _ in range(n)]
    late = [reply(9.0, 4, "9.0")]  # the others of its pass came after the end
    assert rate_of_passes(replies + late) == pytest.approx(8 / 4)


def test_refused_calls_fail_the_bar() -> None:
    calls = [reply(i, 1, "1", ms=float(i)) for i in range(1, 21)]
    assert p95(calls) == pytest.approx(19.05)
    ratio = p95([*calls, *(reply(0, 1, "1", ms=0.1, status=429) for _ in range(5))]) / p95(calls)
    name = "p95 beside a greedy tenant / alone"
    assert bars({"tenants": {"1 images": {"ratio": {"median": ratio}}}})[name]["holds"] is False
