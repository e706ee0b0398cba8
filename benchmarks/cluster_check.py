"""Comparison of the simulated cluster with the real one: the same calls, to a hub with one worker and with two.

    python -m benchmarks.cluster_check [--seconds 8] [--output FILE]

One run, `CALIBRATION`, gives the model the CPU time of a call in all processes without the passes. Passes and loads
are those of `benchmarks.capacity`. The model predicts all other runs: more or fewer callers, Zipf traffic over more
adapters than slots, two workers. The benchmark then measures these runs. Hub and callers share the cores of this
machine, and the model has the same cores. The model also loses the CPU time that other programs took meanwhile.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import psutil

from hub.client.client import Client

from . import bare, capacity
from .beside import TENANTS, Hub, hub_beside_empty
from .cluster_engine import Cluster
from .cluster_model import Callers, Times, digests, zipf
from .common import copy_of, machine, markdown_table
from .cores import busy_s, cpu_s
from .load import Reply, closed_loop, request

OUTPUT = Path(__file__).parent / "results" / "cluster_check.json"
BACKBONE, ADAPTERS, SLOTS, BATCH = "demo", 120, 16, 32
ROLES = {"ServeReplica:karst-hub:worker": "worker", "ServeReplica:karst-hub:gateway": "gateway", "haproxy": "haproxy"}
COLD_MS = 0.15  # a call whose adapter is in a slot waits 0.01 ms for it
WITHIN = {"per_second": 1.35, "p50_ms": 1.4, "p99_ms": 2.0, "hit_rate": 1.15}  # target factors


@dataclass(frozen=True)
class Scenario:
    """One run of traffic: callers in a closed loop over adapters by Zipf(1.0)."""

    workers: int
    callers: int
    adapters: int

    @property
    def name(self) -> str:
        return f"{self.workers} workers, {self.callers} callers, {self.adapters} adapters"


CALLS = ((1, 1), (4, 8), (16, 8), (8, ADAPTERS), (16, ADAPTERS))  # (callers, adapters)
SCENARIOS = tuple(Scenario(workers, *calls) for workers in (1, 2) for calls in CALLS)

CALIBRATION = Scenario(1, 16, 8)


def main() -> None:
    """Measure, predict, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each scenario")
    parser.add_argument("--capacity", type=Path, default=capacity.OUTPUT)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    constants = json.loads(options.capacity.read_text())
    measured: dict[Scenario, dict[str, float]] = {}
    found: dict[str, Any] = {"machine": machine()}
    for workers in sorted({scenario.workers for scenario in SCENARIOS}):
        with real(workers) as (hub, start_s):
            found[f"start_s, {workers} workers"] = start_s
            for scenario in (s for s in SCENARIOS if s.workers == workers):
                measured[scenario] = measure(hub, scenario, options.seconds)
    times = calibrate(measured[CALIBRATION], constants)
    found["times"] = asdict(times)
    found["scenarios"] = []
    for scenario, real_one in measured.items():
        model = predict(times, scenario, real_one["cores"], options.seconds)
        ratios = {key: model[key] / real_one[key] for key in WITHIN}
        within = {key: max(ratio, 1 / ratio) <= WITHIN[key] for key, ratio in ratios.items()}
        found["scenarios"].append(
            asdict(scenario) | {"measured": real_one, "model": model, "model_to_measured": ratios, "within": within}
        )
    found["within"] = WITHIN
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    print(f"written to {options.output}")


def table(found: dict[str, Any]) -> str:
    """Compare model and measurement of each run."""
    rows = []
    for one in found["scenarios"]:
        name = Scenario(one["workers"], one["callers"], one["adapters"]).name
        pairs = [f"{one['measured'][key]:.3g} / {one['model'][key]:.3g}" for key in WITHIN]
        rows.append([name, *pairs])
    heads = {"per_second": "images a second", "p50_ms": "p50, ms", "p99_ms": "p99, ms", "hit_rate": "hit rate"}
    return markdown_table(["measured / model", *(heads[key] for key in WITHIN)], rows)


@contextmanager
def real(workers: int) -> Iterator[tuple[Hub, float]]:
    """Run a hub with all adapters registered and each called once; yield it with the seconds of its start."""
    process = bare.Process()
    adapter = process.ask(bare.random_adapters, BACKBONE, 1)[0]
    began = time.perf_counter()
    settings = {"slots": SLOTS, "min_workers": workers, "max_workers": workers, "batch_size": BATCH}
    with hub_beside_empty(32, backbone=BACKBONE, **{key: str(value) for key, value in settings.items()}) as hub:
        start_s = time.perf_counter() - began
        original = capacity.Adapter.read(adapter)
        with Client(hub.url, hub.keys[TENANTS[0]]) as client:
            for i in range(ADAPTERS):
                client.register(f"task{i}", copy_of(original, i).data)
        closed_loop(hub.address, calls(hub, range(ADAPTERS)), 2, 4.0)
        yield hub, start_s


def calls(hub: Hub, tasks: Sequence[int]) -> list[bytes]:
    picture = bare.pictures(32, 1)[0]
    key = f"Bearer {hub.keys[TENANTS[0]]}"
    kind = "application/octet-stream"
    return [
        request("POST", f"/v1/tasks/task{i}/classify?top_k=1", picture, authorization=key, content_type=kind)
        for i in tasks
    ]


def drawn(adapters: int, count: int = 50_000) -> list[int]:
    return np.random.default_rng(5).choice(adapters, count, p=zipf(adapters, 1.0)).tolist()


def measure(hub: Hub, scenario: Scenario, seconds: float) -> dict[str, float]:
    """Return the calls' times, and the CPU time of each kind of process of the hub."""
    messages = calls(hub, drawn(scenario.adapters))
    closed_loop(hub.address, messages, scenario.callers, seconds / 4)
    before, client, everything, began = cpu_s(ROLES), time.process_time(), busy_s(), time.perf_counter()
    replies = closed_loop(hub.address, messages, scenario.callers, seconds)
    client, after = time.process_time() - client, cpu_s(ROLES)
    ours = client + sum(after.values()) - sum(before.values())
    foreign = max(0.0, busy_s() - everything - ours) / (time.perf_counter() - began)
    if wrong := [reply for reply in replies if reply.status != 200]:
        raise RuntimeError(f"{len(wrong)} calls failed: {wrong[0]}")
    counted = replies[scenario.callers - 1 : -scenario.callers]
    ms = [reply.ms for reply in counted]
    parts = [timing(reply) for reply in counted]
    return {
        "per_second": (len(counted) - 1) / (counted[-1].at - counted[0].at),
        "mean_ms": mean(ms),
        "p50_ms": median(ms),
        "p99_ms": float(np.quantile(ms, 0.99)),
        "hit_rate": mean(part["load"] < COLD_MS for part in parts),
        "cores": (psutil.cpu_count() or 1) - foreign,
        "compute_ms": median(part["compute"] for part in parts),
        "queue_ms": median(part["queue"] for part in parts),
        "images_a_pass": len(parts) / sum(1 / float(reply.header("x-batch-images")) for reply in counted),
        "client_cpu_ms": 1e3 * client / len(replies),
        **{f"{role}_cpu_ms": 1e3 * (after[role] - before[role]) / len(replies) for role in after},
    }


def timing(reply: Reply) -> dict[str, float]:
    """Return milliseconds by name, from the header `server-timing`."""
    pairs = (item.split(";dur=") for item in reply.header("server-timing").split(", "))
    return {name: float(ms) for name, ms in pairs}


def calibrate(one: dict[str, float], constants: dict[str, Any]) -> Times:
    """Return the model's times. A call spends its CPU time outside of passes before its pass."""
    demo = constants["passes"]["demo"]
    load = constants["adapters"]["demo"]["N=2 r=8"]
    pass_ms = demo["pass_ms"] / one["images_a_pass"] + demo["image_ms"]
    cpu_ms = sum(value for key, value in one.items() if key.endswith("_cpu_ms"))
    times = Times(
        pass_s=demo["pass_ms"] / 1e3,
        image_s=demo["image_ms"] / 1e3,
        batch_size=BATCH,
        slots=SLOTS,
        host_adapters=10 * ADAPTERS,
        host_load_s=load["put_cpu_ms"] / 1e3,
        store_load_s=load["read_and_pack_cpu_ms"] / 1e3,
        gateway_s=(cpu_ms - pass_ms) / 1e3,
    )
    # A worker's batch is at most the size with the least time per image (`hub.worker.batch_tuner`).
    return replace(times, batch_size=quick_batch(times))


def predict(times: Times, scenario: Scenario, cores: float, seconds: float) -> dict[str, float]:
    """Simulate the same calls. The model's workers also have all files in host memory."""
    here = replace(times, cores=cores, threads=max(1, (psutil.cpu_count() or 1) // scenario.workers))
    model = Cluster(here, scenario.workers, "owners by call", digests(ADAPTERS))
    model.fill(np.arange(scenario.adapters))
    for worker in model.workers:
        worker.host.update(dict.fromkeys(range(ADAPTERS)))
    found = model.run(Callers(scenario.callers, drawn(scenario.adapters), 3 * seconds), warm_up_s=seconds)
    return {key: getattr(found, key) for key in ("per_second", "mean_ms", "p50_ms", "p99_ms", "hit_rate")} | {
        "images_a_pass": found.images_a_pass
    }


def quick_batch(times: Times, gain: float = 1.05) -> int:
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= times.batch_size]
    rates = {size: size / times.forward_s(size) for size in sizes}
    return next(size for size, rate in rates.items() if rate * gain >= max(rates.values()))


if __name__ == "__main__":
    main()
