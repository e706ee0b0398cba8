"""Simulation of routing and autoscaling with up to 1,000 workers and a million adapters, with measured service times.

    python -m benchmarks.cluster_sim [--scenarios routing ...] [--output FILE] [--plot FILE]

`routing`   8, 64 and 1,000 workers with 1,000 adapters each, Zipf(1.0), 100 images per second per worker: the hub's
            routing beside plain consistent hashing, the less busy of two random workers, and a random worker
`gateways`  1,000 workers behind 1 to 300 gateways; each gateway knows only the queues of its own calls, with and
            without reports of the workers' adapters
`load`      64 workers from low load to overload
`memory`    64 workers with 64 to 1,024 slots and 320 to 5,100 adapters in host memory
`burst`     a tenant with a fifth of all traffic sends ten times as much for ten seconds
`coming`    a tenth of 64 workers is new and cold
`scaling`   traffic that grows fivefold within a minute; the number of workers follows waiting and running passes, as
            `hub.cluster.autoscaling`, or the arriving work (`cluster_model.Scaling`); a worker starts in 20 s (its node
            runs) or in 180 s

The gateways' and registry's service times are those of `benchmarks.capacity`. A GPU's are an assumption, see `GPU`.
`benchmarks.cluster_check` compares the same model with the real hub. docs/scaling.md has the conclusions.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .cluster_engine import Cluster
from .cluster_model import Result, Scaling, Times, Traffic, digests, zipf
from .cluster_routing import POLICIES
from .common import machine, markdown_table

RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).parent.parent / "docs" / "img" / "cluster_sim.png"
ADAPTERS_A_WORKER = 1_000
RATE = 100.0  # images per second per worker
# An A100's passes of ViT-B/16 in half precision take 4.95 ms for one image, 15.95 for 32 and 31.48 for 64 (AITemplate's
# table of PyTorch 1.12, examples/04_vit): 0.49 ms an image, and never less than 5. KARST's share is assumed to be 9 %
# of an image, as measured on a CPU for ViT-B/16 with two kernels, and to double the least, which is launches.
GPU = Times(
    pass_s=0.0,
    image_s=1.09 * 0.49e-3,
    least_pass_s=10e-3,
    batch_size=32,
    slots=64,
    host_adapters=1_275,  # 1 GiB of adapters in bfloat16 (N = 2, rank 8)
    host_load_s=1.5e-3,  # a put, measured, and the transfer from host memory to a device, assumed
    store_load_s=40e-3,  # reading and packing, measured, and 34 ms of an object store, assumed
)
RULES: tuple[tuple[Literal["passes", "work"], float, float], ...] = (
    ("passes", 1.5, 20.0),
    ("passes", 0.5, 20.0),
    ("work", 0.6, 20.0),
    ("work", 0.6, 180.0),
)
HOT_SHARE, HOT_TIMES, HOT_ADAPTERS = 0.2, 10, 50


def main() -> None:
    """Simulate, print tables, write the JSON file and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="SCENARIO")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of calls, for a try")
    parser.add_argument("--output", type=Path, default=RESULTS / "cluster_sim.json", help="other scenarios in it stay")
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args()
    times = measured(json.loads((RESULTS / "capacity.json").read_text()))
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    found |= {"machine": machine(), "times": vars(times)}
    for name in options.scenarios:
        began = time.perf_counter()
        rows = SCENARIOS[name](times, options.scale)
        found[name] = {"took_s": round(time.perf_counter() - began, 1), "rows": rows}
        print(f"{name}\n{table(rows)}\n")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if {"routing", "load", "scaling"} <= set(found):
        plot(found, options.plot)
    print(f"written to {options.output}")


def measured(constants: dict[str, Any]) -> Times:
    """Return a GPU's assumed times behind gateways as measured."""
    return replace(GPU, gateway_s=constants["gateway"]["224 pixels"]["call_of_1_image_ms"] / 1e3)


def poisson(rate: float, count: int, adapters: int, seed: int = 0) -> Traffic:
    """Return calls at random times, for adapters by Zipf(1.0); number 0 is the most popular."""
    rng = np.random.default_rng(seed)
    drawn = np.searchsorted(np.cumsum(zipf(adapters, 1.0)), rng.random(count))
    return Traffic(np.cumsum(rng.exponential(1 / rate, count)), np.minimum(drawn, adapters - 1))


def enough_gateways(times: Times, rate: float) -> Times:
    """Return the times with enough gateway cores for a utilization of 70 %."""
    return replace(times, gateways=max(1, round(rate * times.gateway_s / 0.7)))


def simulate(
    times: Times, workers: int, policy: str, traffic: Traffic, adapters: int, *, peak: float = 1.0, **more: Any
) -> Result:
    """Simulate a cluster in a steady state; the first fifth of the traffic does not count.

    Args:
        peak: gateways' capacity over the mean rate.
        more: `gateways` and `told`, as in `Router`.
    """
    seconds = float(traffic.times[-1])
    chosen = enough_gateways(times, peak * len(traffic.times) / seconds)
    cluster = Cluster(chosen, workers, policy, digests(adapters), **more)
    cluster.fill(np.arange(adapters))
    return cluster.run(traffic, warm_up_s=seconds / 5)


def row(result: Result, **what: Any) -> dict[str, Any]:
    """Return a line of a table."""
    return what | {
        "calls": result.calls,
        "hit_rate": round(result.hit_rate, 4),
        "p50_ms": round(result.p50_ms, 1),
        "p99_ms": round(result.p99_ms, 1),
        "imbalance": round(result.imbalance, 2),
        "utilisation": round(result.utilisation, 3),
        "images_a_pass": round(result.images_a_pass, 2),
        "store_loads_per_s": round(result.store_loads_per_s, 1),
        "spilled": round(result.spilled, 4),
    }


def routing(times: Times, scale: float) -> list[dict[str, Any]]:
    out = []
    for workers, calls in ((8, 100_000), (64, 200_000), (1_000, 1_000_000)):
        adapters = workers * ADAPTERS_A_WORKER
        traffic = poisson(RATE * workers, int(calls * scale), adapters)
        for policy in POLICIES:
            began = time.perf_counter()
            found = simulate(times, workers, policy, traffic, adapters)
            out.append(row(found, workers=workers, policy=policy, took_s=round(time.perf_counter() - began, 1)))
    return out


def gateways(times: Times, scale: float) -> list[dict[str, Any]]:
    workers, adapters = 1_000, 1_000 * ADAPTERS_A_WORKER
    traffic = poisson(RATE * workers, int(300_000 * scale), adapters)
    out = []
    for policy, told in (("owners by batch", True), ("owners by batch", False), ("two choices", True)):
        for count in (1, 30, 300):
            found = simulate(times, workers, policy, traffic, adapters, gateways=count, told=told)
            out.append(row(found, policy=policy, told=told, gateways=count))
    return out


def load(times: Times, scale: float) -> list[dict[str, Any]]:
    workers, adapters = 64, 64 * ADAPTERS_A_WORKER
    out = []
    for rate in (25, 50, 100, 200, 400, 800, 1_200):
        traffic = poisson(rate * workers, int(200_000 * scale), adapters)
        for policy in POLICIES[:4]:
            out.append(row(simulate(times, workers, policy, traffic, adapters), rate_a_worker=rate, policy=policy))
    return out


def memory(times: Times, scale: float) -> list[dict[str, Any]]:
    workers, adapters = 64, 64 * ADAPTERS_A_WORKER
    traffic = poisson(RATE * workers, int(200_000 * scale), adapters)
    out = []
    for slots in (64, 256, 1_024):
        for host in (320, 1_275, 5_100):
            chosen = replace(times, slots=slots, host_adapters=max(slots, host))
            found = simulate(chosen, workers, "owners by batch", traffic, adapters)
            out.append(row(found, slots=slots, host_adapters=chosen.host_adapters))
    return out


def burst(times: Times, scale: float) -> list[dict[str, Any]]:
    """Simulate a burst on evenly drawn popular adapters, and its effect on other tenants."""
    workers, adapters, seconds = 64, 64 * ADAPTERS_A_WORKER, 40 * scale
    rng = np.random.default_rng(3)
    base = poisson(RATE * workers, int(RATE * workers * seconds), adapters)
    hot = rng.integers(0, 2_000, HOT_ADAPTERS)
    extra = int(HOT_SHARE * (HOT_TIMES - 1) * RATE * workers * seconds / 4)
    at = np.concatenate([base.times, rng.uniform(seconds / 2, seconds * 3 / 4, extra)])
    asked = np.concatenate([base.adapters, hot[rng.integers(0, HOT_ADAPTERS, extra)]])
    order = at.argsort()
    traffic = Traffic(at[order], asked[order])
    out = []
    for policy in POLICIES[:4]:
        found = simulate(times, workers, policy, traffic, adapters, peak=HOT_SHARE * HOT_TIMES + 1)
        during = (found.sent_s >= seconds / 2) & (found.sent_s < seconds * 3 / 4)
        p99_ms = {
            name: round(1e3 * float(np.quantile(found.took_s[which], 0.99)), 1)
            for name, which in (("before", found.sent_s < seconds / 2), ("during", during))
        }
        out.append(
            {"policy": policy, "p99_before_ms": p99_ms["before"], "p99_during_ms": p99_ms["during"]} | row(found)
        )
    return out


def coming(times: Times, scale: float) -> list[dict[str, Any]]:
    """Simulate new, empty workers; the others keep their adapters."""
    workers, adapters = 64, 64 * ADAPTERS_A_WORKER
    new = workers // 10
    traffic = poisson(RATE * workers, int(100_000 * scale), adapters)
    out = []
    for policy in POLICIES[:4]:
        cluster = Cluster(enough_gateways(times, RATE * workers), workers, policy, digests(adapters))
        cluster.fill(np.arange(adapters))
        for worker in cluster.workers[-new:]:
            worker.slots.clear()
            worker.host.clear()
        out.append(row(cluster.run(traffic), policy=policy, new=new))
    return out


def scaling(times: Times, scale: float) -> list[dict[str, Any]]:
    """Simulate 2,000 to 10,000 images per second and back in 5 minutes; host memory of four workers holds all."""
    adapters, low, high = 4_000, 2_000 * scale, 10_000 * scale
    rng = np.random.default_rng(4)
    seconds = np.arange(300)
    rates = np.interp(seconds, [0, 60, 120, 180, 210, 300], [low, low, high, high, low, low])
    counts = rng.poisson(rates)
    at = np.sort(np.repeat(seconds, counts) + rng.random(counts.sum()))
    drawn = np.searchsorted(np.cumsum(zipf(adapters, 1.0)), rng.random(len(at)))
    out = []
    for signal, target, start_s in RULES:
        chosen = replace(enough_gateways(times, high), start_s=start_s)
        rule = Scaling(4, 200, target, signal, look_back_s=10, up_s=10, down_s=60)
        cluster = Cluster(chosen, 4, "owners by batch", digests(adapters), scaling=rule)
        cluster.fill(np.arange(adapters))
        found = cluster.run(Traffic(at, drawn))
        by_second = found.sent_s.astype(int)
        p99 = [1e3 * float(np.quantile(found.took_s[by_second == s], 0.99)) for s in range(0, 300, 5)]
        out.append(
            row(found, signal=signal, target=target, start_s=start_s)
            | {
                "most_workers": max(count for _, count in found.workers),
                "seconds_p99_above_200_ms": 5 * sum(ms > 200 for ms in p99),
                "p99_ms_each_5_s": [round(ms, 1) for ms in p99],
                "workers": found.workers,
                "images_a_second": rates.tolist(),
            }
        )
    return out


SCENARIOS: dict[str, Callable[[Times, float], list[dict[str, Any]]]] = {
    "routing": routing,
    "gateways": gateways,
    "load": load,
    "memory": memory,
    "burst": burst,
    "coming": coming,
    "scaling": scaling,
}


def table(rows: list[dict[str, Any]]) -> str:
    """Return all values that are not lists."""
    heading = [key for key, value in rows[0].items() if not isinstance(value, list)]
    return markdown_table(heading, [[str(one[key]) for key in heading] for one in rows])


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot p99 against load, the hit rates at every size, and a burst with the workers that start for it."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for policy in POLICIES[:4]:
        rows = [one for one in found["load"]["rows"] if one["policy"] == policy]
        left.plot([one["rate_a_worker"] for one in rows], [one["p99_ms"] for one in rows], marker="o", label=policy)
    left.set(xscale="log", yscale="log", xlabel="images a second a worker (64 workers)", ylabel="p99, ms")
    left.legend(fontsize=8)
    sizes = sorted({one["workers"] for one in found["routing"]["rows"]})
    for i, policy in enumerate(POLICIES):
        rows = [one for one in found["routing"]["rows"] if one["policy"] == policy]
        at = np.arange(len(sizes)) + (i - 2) * 0.16
        middle.bar(at, [100 * one["hit_rate"] for one in rows], 0.16, label=policy)
    middle.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    middle.set(xlabel="workers, 1,000 adapters each", ylabel="calls that met their adapter in a slot, %")
    middle.legend(fontsize=8, loc="upper left")
    middle.set_ylim(0, 105)
    for one in found["scaling"]["rows"]:
        at = np.arange(0, 300, 5)
        (line,) = right.plot(
            at, one["p99_ms_each_5_s"], label=f"{one['target']:g} {one['signal']}, start {one['start_s']:g} s"
        )
        steps = np.array(one["workers"])
        right.step(steps[:, 0], steps[:, 1], where="post", linestyle=":", color=line.get_color())
    right.set(yscale="log", xlabel="s", ylabel="p99, ms; dotted: workers", xlim=(0, 300))
    right.legend(fontsize=8)
    right.set_ylim(top=1e7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
