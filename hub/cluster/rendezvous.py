"""Rendezvous hashing with bounded loads: the workers of an adapter, and their order for its next call. No Ray.

Every adapter has two owners, found by rendezvous hashing (Thaler and Ravishankar, 1998): a hash of the worker's name
and the digest gives each worker a score, and the two highest scores own the adapter. All gateways find the same owners
without communication. A worker that starts or stops changes the owners of the adapters that it owns, and of no others.

Ownership alone creates hot spots: the busiest of 10,000 tasks has a tenth of all calls. So an owner is full when it has
`LOAD_FACTOR` times the mean number of calls (consistent hashing with bounded loads: Mirrokni, Thorup and Zadimoghaddam,
2018). If all owners are full, the least loaded worker takes the call and loads the adapter. A worker with fewer than
`MIN_CAPACITY` calls or less than one batch is never full: spreading such short queues saves no time and loads adapters
twice. `benchmarks/routing.py` and `benchmarks/cluster_sim.py` compare these rules with Serve's own routers. A call of
many images counts as one, because Serve measures queues in calls.
"""

import hashlib
import math
import random
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from ..worker_api import ROUTING_DIGEST_CHARS

Worker = TypeVar("Worker", bound=Hashable)

OWNERS_PER_ADAPTER = 2
LOAD_FACTOR = 1.25
MIN_CAPACITY = 3  # calls
RESIDENT_ONLY = ":resident"  # suffix of a routing key: only workers that report the adapter, if there are any
CACHED_DIGESTS = 100_000  # adapters whose owners are cached
SAMPLED_WORKERS = 32  # workers that a call considers beside the owners; all workers, up to this number


@dataclass(frozen=True)
class WorkerReport:
    """State of a worker that routing depends on.

    Attributes:
        name: the worker's name; it alone decides which adapters the worker owns.
        digests: first characters of the resident adapters' digests.
        batch: images in the worker's largest forward pass; None before the first report.
    """

    name: str
    digests: frozenset[str] = frozenset()
    batch: int | None = None


class RendezvousHash(Generic[Worker]):
    """Owners of every adapter among a fixed set of workers."""

    def __init__(self, workers: Mapping[Worker, str], owners: int = OWNERS_PER_ADAPTER) -> None:
        """
        Args:
            workers: each worker with its name; the name alone decides what it owns.
            owners: number of owners of an adapter.
        """
        self.workers = frozenset(workers)
        self._order = list(workers)
        self._seeds = np.array([hash64(name) for name in workers.values()], np.uint64)
        self._owners = owners
        self._cache: LRUCache[str, tuple[Worker, ...]] = LRUCache(CACHED_DIGESTS)

    def owners(self, digest: str) -> tuple[Worker, ...]:
        """Return the adapter's owners, highest score first; fewer than `owners` if there are fewer workers."""
        if (found := self._cache.get(digest)) is None:
            scores = mix64(self._seeds ^ np.uint64(hash64(digest)))
            best = np.argsort(scores)[::-1][: self._owners]
            found = self._cache[digest] = tuple(self._order[i] for i in best)
        return found


class RoutingTable(Generic[Worker]):
    """Latest reports of all workers, and the order of workers for a call."""

    def __init__(self, digest_chars: int) -> None:
        """
        Args:
            digest_chars: number of characters of a digest that workers report.
        """
        self._digest_chars = digest_chars
        self._hash: RendezvousHash[Worker] = RendezvousHash({})
        self._reports: Mapping[Worker, WorkerReport] = {}
        self._batch = 1

    def update(self, reports: Mapping[Worker, WorkerReport]) -> None:
        """Replace the reports of all workers."""
        if self._hash.workers != reports.keys():
            self._hash = RendezvousHash({worker: report.name for worker, report in reports.items()})
        self._reports = reports
        self._batch = min((r.batch for r in reports.values() if r.batch is not None), default=1)

    def route(
        self, key: str, candidates: Collection[Worker], queue_length: Callable[[Worker], int]
    ) -> list[list[Worker]]:
        """Return groups of workers to offer a call to, best group first.

        Args:
            key: digest of the call's adapter, with the suffix `RESIDENT_ONLY` after an owner failed to load it.
            candidates: workers that take calls now, at least one.
            queue_length: number of calls at a worker.
        """
        digest = key.removesuffix(RESIDENT_ONLY)
        if digest != key and (holders := [worker for worker in candidates if self._holds(worker, digest)]):
            return [holders]
        # An owner that is no candidate has just died.
        owners = [owner for owner in self._hash.owners(digest) if owner in candidates]
        considered = dict.fromkeys(candidates)
        if len(considered) > SAMPLED_WORKERS:
            considered = dict.fromkeys([*owners, *random.sample(list(considered), SAMPLED_WORKERS)])
        loads = {worker: queue_length(worker) for worker in considered}
        resident = {worker for worker in considered if self._holds(worker, digest)}
        best = rank_workers(owners, loads, resident, self._batch)
        return [*([worker] for worker in best), [worker for worker in considered if worker not in best]]

    def _holds(self, worker: Worker, digest: str) -> bool:
        report = self._reports.get(worker)
        return report is not None and digest[: self._digest_chars] in report.digests


class KnownWorkers:
    """Running workers of the deployment that a process calls, as its router last heard of them."""

    def __init__(self) -> None:
        self.names: Collection[str] = ()
        self.table: RoutingTable[str] = RoutingTable(ROUTING_DIGEST_CHARS)

    def update(self, reports: Collection[WorkerReport]) -> None:
        """Replace the workers and their reports."""
        found = {report.name: report for report in reports}
        self.table.update(found)
        self.names = found.keys()

    def choose(self, key: str, load: Callable[[str], int], without: Collection[str] = ()) -> str | None:
        """Return the best worker for a call; None if there is none.

        Args:
            key, load: as in `RoutingTable.route`.
            without: workers that get no calls.
        """
        candidates = [name for name in self.names if name not in without] if without else self.names
        if not candidates:
            return None
        best = self.table.route(key, candidates, load)[0]
        return best[0] if len(best) == 1 else min(best, key=load)


_KNOWN_WORKERS = KnownWorkers()


def known_workers() -> KnownWorkers:
    """Return the workers that this process knows.

    Serve creates the router of a process itself, from a copy of the router's module, so the router can only call this.
    """
    return _KNOWN_WORKERS


def load_bound(total: int, workers: int, batch: int = 1) -> int:
    """Return the largest number of calls at a worker, the next one included, when all workers have `total` calls."""
    return max(MIN_CAPACITY, batch, math.ceil(LOAD_FACTOR * (total + 1) / workers))


def rank_workers(
    owners: Sequence[Worker], loads: Mapping[Worker, int], resident: Collection[Worker] = (), batch: int = 1
) -> list[Worker]:
    """Return the workers for a call, best first.

    The order is: owners below the load bound that hold the adapter, shortest queue first; owners below the bound that
    must load it, the first owner first unless another has fewer batches queued (otherwise both owners would soon hold
    every adapter); the least loaded worker; the full owners, in case all others refuse.

    Args:
        owners: owners of the call's adapter.
        loads: calls at each worker; at least one worker.
        resident: workers that report the adapter.
        batch: images in a forward pass of a worker.
    """
    bound = load_bound(sum(loads.values()), len(loads), batch)
    free = [owner for owner in owners if loads[owner] < bound]
    free.sort(key=lambda owner: (0, loads[owner]) if owner in resident else (1, loads[owner] // batch))  # stable
    least = min(loads, key=lambda worker: (loads[worker], worker not in resident))
    return list(dict.fromkeys([*free, least, *owners]))


def hash64(name: str) -> int:
    """Return a hash of 64 bits (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of uint64 numbers of any shape with the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
