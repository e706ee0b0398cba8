"""Effect of each fault on callers: failed requests, wrong answers, seconds to recovery.

    python -m benchmarks.faults [--seconds 30] [--times 3] [--only worker,gateway,...]

The scenarios are those of `tests/system/test_faults_*.py`, for longer and several times. `tests/system/faults.py`
describes how the callers check answers. The script writes `benchmarks/results/faults.json`; docs/faults.md shows it.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters import Backbone, load_backbone
from tests.support.faults import cluster as faults_cluster
from tests.support.faults import hub as faults_hub
from tests.support.faults.load import Report

from .common import machine

RESULTS = Path(__file__).parent / "results" / "faults.json"
SLOW_STORE_S = 20  # above the 15 s for which the hub parks a call to a cold adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="how long registry and store stay broken")
    parser.add_argument("--times", type=int, default=3, help="how often each fault is made")
    parser.add_argument("--only", default="", help="names of faults, with commas")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    only = {name for name in options.only.split(",") if name}
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    before = json.loads(options.out.read_text())["faults"] if only and options.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for fault, report in run(Path(folder), load_backbone("demo"), options.seconds, options.times, only):
            found[fault].append(asdict(report))
            print(f"{fault}: {asdict(report)}", flush=True)
            body = {"machine": machine(), "seconds": options.seconds, "faults": before | found}
            options.out.write_text(json.dumps(body, indent=1) + "\n")
    if any(report["wrong"] for reports in found.values() for report in reports):
        raise SystemExit("answers were wrong")


def run(folder: Path, backbone: Backbone, seconds: float, times: int, only: set[str]) -> Iterator[tuple[str, Report]]:
    """Run the selected faults (default: all), and yield each with its callers' results."""
    on_hub: Mapping[str, Callable[[faults_hub.Hub], Report]] = {
        "worker killed": faults_hub.kill_worker,
        "registry hangs": lambda hub: faults_hub.stop_registry(hub, seconds),
        "registry killed": lambda hub: faults_hub.kill_registry(hub, seconds),
        "store away": lambda hub: faults_hub.break_store(hub, "away", seconds),
        "store damaged": lambda hub: faults_hub.break_store(hub, "corrupt", seconds),
        "store slow": lambda hub: faults_hub.break_store(hub, f"slowly {SLOW_STORE_S}", seconds),
    }
    on_cluster: Mapping[str, Callable[[faults_cluster.Cluster, int], Report]] = {
        "upgrade of settings": lambda cluster, i: faults_cluster.upgrade(cluster, slots=40 + i, batch_wait_ms=2.0 + i),
        "head killed": lambda cluster, _i: faults_cluster.kill_head(cluster, min(seconds, 20)),
    }

    def wanted(*names: str) -> list[str]:
        return [name for name in names if not only or name in only]

    if wanted(*on_hub, "gateway killed", "SIGTERM"):
        (folder / "hub").mkdir()
        with faults_hub.broken_hub(folder / "hub", backbone) as hub:
            for name in wanted(*on_hub):
                for _ in range(times):
                    yield name, on_hub[name](hub)
            if wanted("gateway killed"):
                for _ in range(times):
                    once, again = faults_hub.kill_gateway(hub)
                    yield "gateway killed, callers that try once", once
                    yield "gateway killed, callers that try again", again
            for _ in wanted("SIGTERM"):
                yield "SIGTERM", faults_hub.terminate(hub)
    if wanted(*on_cluster):
        (folder / "cluster").mkdir()
        with faults_cluster.hub_on_a_cluster(folder / "cluster", backbone) as cluster:
            for name in wanted(*on_cluster):
                for i in range(times):
                    yield name, on_cluster[name](cluster, i)
    for i in range(times if wanted("node killed") else 0):  # after the fault everything runs on one node
        (folder / f"node-{i}").mkdir()
        with faults_cluster.hub_on_a_cluster(folder / f"node-{i}", backbone) as cluster:
            yield "node killed", faults_cluster.kill_node(cluster)


if __name__ == "__main__":
    main()
