"""Simulation of routers: Serve's and ours under the same Zipf traffic.

    python -m benchmarks.routing                      # seconds on a core; a table, and benchmarks/results/routing.json

Ours is the production code: `rank_workers` over `RendezvousHash` of `hub.cluster.rendezvous`. Serve's consistent
hashing is Ray's own class, which returns its ranking. Serve's default (the shorter of two random queues) is three lines
here.

A worker serves one call after another, in one unit of time each. It holds its adapters in slots and evicts the least
recently used. A cold call waits for its load beside the other calls, and a worker loads one adapter after another. Each
gateway knows of a worker's queue what Serve's gateways know: the worker's report at this gateway's last call, minus
this gateway's calls that ended since. Workers report their resident adapters every `STATS` units. Times are in units of
a call's service time.
"""

import argparse
import heapq
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from benchmarks.common import machine, markdown_table
from hub.cluster.rendezvous import RendezvousHash, rank_workers

RESULTS = Path(__file__).parent / "results" / "routing.json"
CALLS, ADAPTERS, SLOTS, GATEWAYS = 30_000, 10_000, 64, 2
LOAD = 0.5  # time to load an adapter, in service times
STATS = 500.0
USE = 0.7  # share of all workers' time, if the calls are spread evenly
WORKERS = (1, 2, 4, 8)
ZIPF = 1.0

Loads = Mapping[str, int]
Choose = Callable[[str, Loads, Mapping[str, frozenset[str]]], str]


@dataclass
class _Worker:
    """One worker: when it is free, its slots with the time at which each adapter is loaded, and its report."""

    free: float
    loader: float
    slots: "OrderedDict[str, float]" = field(default_factory=OrderedDict)
    served: int = 0
    since: float = 0.0


@dataclass(frozen=True)
class Figures:
    """A router's figures; times in service times."""

    router: str
    workers: int
    churn: bool
    hits: float  # share of calls whose adapter was in a slot
    median: float  # from a call's arrival to its answer
    p99: float
    imbalance: float  # calls of the busiest worker over the mean, per time in service


class OursRouter:
    """`hub.cluster.rendezvous`, as the request router calls it."""

    name = "two owners, bounded load (ours)"

    def change(self, workers: list[str]) -> None:
        self._hash = RendezvousHash({worker: worker for worker in workers})

    def choose(self, digest: str, loads: Loads, resident: Mapping[str, frozenset[str]]) -> str:
        holders = {worker for worker in loads if digest in resident[worker]}
        return rank_workers(self._hash.owners(digest), loads, holders)[0]


class HashRouter:
    """Serve's `ConsistentHashRouter`: the first worker of its ranking, others only if a worker refuses."""

    name = "consistent hashing (Serve)"

    def change(self, workers: list[str]) -> None:
        self._router = ConsistentHashRouter.__new__(ConsistentHashRouter)
        self._router._deployment_id = DeploymentID("worker")
        self._router._num_virtual_nodes, self._router._num_fallback_replicas = 100, 2
        self._router._rebuild_ring(frozenset(ReplicaID(worker, DeploymentID("worker")) for worker in workers))

    def choose(self, digest: str, loads: Loads, resident: Mapping[str, frozenset[str]]) -> str:
        return self._router._lookup_ranked_replicas(digest)[0].unique_id


class RandomRouter:
    """Serve's default: the shorter queue of two random workers."""

    name = "two at random (Serve's default)"

    def change(self, workers: list[str]) -> None:
        self._random = random.Random(0)

    def choose(self, digest: str, loads: Loads, resident: Mapping[str, frozenset[str]]) -> str:
        two = self._random.sample(list(loads), min(2, len(loads)))
        return min(two, key=lambda worker: loads[worker])


Router = OursRouter | HashRouter | RandomRouter


def simulate(router: Router, count: int, *, churn: bool = False, calls: int = CALLS, seed: int = 0) -> Figures:
    """Simulate Poisson traffic, Zipf over adapters; with `churn` a worker leaves after 1/3, a cold one joins at 2/3."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / (USE * count), calls)).tolist()
    weights = 1 / np.arange(1, ADAPTERS + 1) ** ZIPF
    digests = [f"{i:064x}" for i in rng.choice(ADAPTERS, calls, p=weights / weights.sum())]
    gateways = rng.integers(0, GATEWAYS, calls).tolist()
    events = [(times[-1] / 3, "go"), (times[-1] * 2 / 3, "come")] if churn and count > 1 else []

    workers = {f"worker {i}": _Worker(0.0, 0.0) for i in range(count)}
    here = list(workers)
    queue = dict.fromkeys(workers, 0)
    known = [dict(queue) for _ in range(GATEWAYS)]  # of each gateway
    resident: dict[str, frozenset[str]] = dict.fromkeys(workers, frozenset())
    router.change(here)
    ends: list[tuple[float, str, int]] = []
    took, hits, told, left = [], 0, 0.0, {}
    for now, digest, gateway in zip(times, digests, gateways, strict=True):
        while ends and ends[0][0] <= now:
            _, name, of = heapq.heappop(ends)
            queue[name] -= 1
            if name in known[of]:
                known[of][name] = max(0, known[of][name] - 1)
        while events and now > events[0][0]:
            if events.pop(0)[1] == "go":
                name = here.pop()
                left[name] = now
                for view in known:
                    del view[name]
            else:
                name = "new worker"
                here.append(name)
                workers[name] = _Worker(now, now, since=now)
                queue[name] = 0
                resident[name] = frozenset()
                for view in known:
                    view[name] = 0
            router.change(here)
        if now >= told:
            resident |= {name: frozenset(workers[name].slots) for name in here}
            told = now + STATS
        name = router.choose(digest, known[gateway], resident)
        worker = workers[name]
        queue[name] += 1
        known[gateway][name] = queue[name]
        worker.served += 1
        if digest in worker.slots:
            hits += 1
            worker.slots.move_to_end(digest)
        else:
            worker.loader = worker.slots[digest] = max(now, worker.loader) + LOAD
            if len(worker.slots) > SLOTS:
                worker.slots.popitem(last=False)
        worker.free = max(now, worker.free, worker.slots[digest]) + 1
        took.append(worker.free - now)
        heapq.heappush(ends, (worker.free, name, gateway))
    rates = [w.served / (left.get(name, now) - w.since) for name, w in workers.items()]
    median, p99 = np.percentile(took, [50, 99])
    busiest = max(rates) / (sum(w.served for w in workers.values()) / now / count)
    return Figures(router.name, count, churn, hits / calls, float(median), float(p99), busiest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--calls", type=int, default=CALLS)
    chosen = parser.parse_args()
    cases = [(count, False) for count in WORKERS] + [(WORKERS[-1], True)]
    found = [
        simulate(router(), count, churn=churn, calls=chosen.calls)
        for count, churn in cases
        for router in (HashRouter, RandomRouter, OursRouter)
    ]
    body = {"machine": machine(), "calls": chosen.calls, "figures": [asdict(figures) for figures in found]}
    chosen.output.write_text(json.dumps(body, indent=1) + "\n")
    print(
        markdown_table(
            ("workers", "router", "hits", "median", "p99", "busiest / mean"),
            [
                (
                    f"{f.workers}{', one goes, one comes' if f.churn else ''}",
                    f.router,
                    f"{f.hits:.1%}",
                    f"{f.median:.1f}",
                    f"{f.p99:.1f}",
                    f"{f.imbalance:.2f}",
                )
                for f in found
            ],
        )
    )


if __name__ == "__main__":
    main()
