"""Which workers own an adapter, and which of them gets its next call. Pure functions; no Ray.

Every adapter has two owners, found by rendezvous hashing (Thaler and Ravishankar, 1998): each worker gets a number from
its name and the digest, and the largest two own. All gateways find the same two without talking to each other, and a
worker that comes or goes changes the owners of the adapters that it owns, and of no others.

Ownership alone makes hot spots: the busiest of 10,000 tasks has a tenth of all calls. So an owner has room only while
it has fewer calls than `BOUND` times the mean (consistent hashing with bounded loads: Mirrokni, Thorup and
Zadimoghaddam, 2018). Where no owner has room, the least busy worker of all takes the call, and the adapter becomes warm
there too. `SHORT` calls are never too many, nor is a batch, which a worker computes in one pass: spreading them would
gain nothing and cost warmth. `benchmarks/routing.py` and `benchmarks/cluster_sim.py` measure all this against Serve's
own routers. A call of many images counts as one: Serve knows the lengths of queues in calls.
"""

import hashlib
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Worker = TypeVar("Worker", bound=Hashable)

OWNERS = 2
BOUND = 1.25
SHORT = 3
WARM = ":warm"  # behind a call's digest: only to a worker that is known to hold it, if there is one
REMEMBERED = 100_000  # adapters whose owners are remembered


class Owners(Generic[Worker]):
    """The owners of every adapter, among a fixed set of workers."""

    def __init__(self, workers: Mapping[Worker, str], owners: int = OWNERS) -> None:
        """
        Args:
            workers: each with its name; the name alone decides what it owns.
            owners: how many an adapter has.
        """
        self.workers = frozenset(workers)
        self._order = list(workers)
        self._seeds = np.array([_number(name) for name in workers.values()], np.uint64)
        self._owners = owners
        self._known: dict[str, tuple[Worker, ...]] = {}

    def of(self, digest: str) -> tuple[Worker, ...]:
        """The adapter's owners, first one first; fewer than `owners` where there are fewer workers."""
        if (found := self._known.get(digest)) is None:
            scores = _mixed(self._seeds ^ np.uint64(_number(digest)))
            best = np.argsort(scores)[::-1][: self._owners]
            if len(self._known) >= REMEMBERED:
                self._known.clear()  # they are found again in microseconds
            found = self._known[digest] = tuple(self._order[i] for i in best)
        return found


def room(total: int, workers: int, batch: int = 1) -> int:
    """How many calls a worker may have, its next one included, while all workers together have `total`."""
    return max(SHORT, batch, math.ceil(BOUND * (total + 1) / workers))


def ranked(
    owners: Sequence[Worker], loads: Mapping[Worker, int], resident: Collection[Worker] = (), batch: int = 1
) -> list[Worker]:
    """Whom to ask for a call, best first.

    First the owners with room: those that hold the adapter, the shorter queue first; then those that would have to
    load it, the first owner first unless the other has fewer passes to do, so that there are not soon two copies of
    each. Then the least busy worker of all, and last the owners without room, in case that all before refuse.

    Args:
        owners: of the call's adapter.
        loads: calls at each worker; all workers, and at least one.
        resident: workers that are known to hold the adapter.
        batch: images that a worker takes in a pass.
    """
    most = room(sum(loads.values()), len(loads), batch)
    free = [owner for owner in owners if loads[owner] < most]
    free.sort(key=lambda owner: (0, loads[owner]) if owner in resident else (1, loads[owner] // batch))  # stable
    least = min(loads, key=lambda worker: (loads[worker], worker not in resident))
    return list(dict.fromkeys([*free, least, *owners]))


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result depends on every bit of x: the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
