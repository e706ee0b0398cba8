"""Routing of a simulated gateway: the hub's own rules, and the policies that the simulation compares with them.

Every policy has the information of Serve's routers. Each gateway caches queue lengths for ten seconds. An entry is the
worker's queue at this gateway's last call to it, minus this gateway's calls that ended since. Workers report the
adapters in their slots every ten seconds.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Container, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hub.cluster.rendezvous import MIN_CAPACITY, OWNERS_PER_ADAPTER, mix64, rank_workers

# owners by batch: the hub's. owners by call: the same, as if a worker computed one image a pass. ring: consistent
# hashing alone. The others know no adapters.
POLICIES = ("owners by call", "owners by batch", "ring", "two choices", "random")
RING_POINTS = 100  # points per worker, as in Serve's ConsistentHashRouter
SAMPLE = 32  # workers that the hub's router considers beside the owners
KNOWN_S = 10.0  # Serve's RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S
TOLD_S = 10.0  # Serve's request_routing_stats_period_s
AT_ONCE = 256  # adapters per search for owners


class Holder(Protocol):
    """Routing's view of a worker."""

    @property
    def slots(self) -> Container[int]: ...


class Router:
    """Routers of all gateways."""

    def __init__(
        self,
        policy: str,
        digests: NDArray[np.uint64],
        *,
        gateways: int,
        seed: int,
        batch: int = 1,
        told: bool = True,
    ) -> None:
        """Create the routers.

        Args:
            policy: one of `POLICIES`.
            digests: a pseudo-random number per adapter.
            gateways: number of gateways, each with a cache of its own; 0: they see every queue exactly.
            batch: images per pass.
            told: whether workers report their adapters to gateways.
        """
        if policy not in POLICIES:
            raise ValueError(f"policy {policy!r} is none of {', '.join(POLICIES)}")
        self.policy = policy
        self.loads: list[int] = []  # calls at each worker: parked, waiting, running
        self.spilled = 0  # calls that did not go to an owner
        self._digests = digests
        self._random = random.Random(seed)
        self._batch = batch if policy == "owners by batch" else 1
        self._choose = {"ring": self._on_ring, "two choices": self._less, "random": self._any}.get(policy, self._owner)
        self._views: list[dict[int, tuple[int, float]]] = [{} for _ in range(gateways)]
        self._told: list[Container[int]] = []
        self._told_until = -math.inf
        self._tells = told

    def join(self, active: Sequence[int], seeds: NDArray[np.uint64]) -> None:
        """Replace the set of workers.

        Args:
            active: their indices.
            seeds: a pseudo-random number per worker, constant over time.
        """
        self.active = list(active)
        self._seeds = seeds
        self._owners: dict[int, tuple[int, ...]] = {}
        self._told_until = -math.inf
        if self.policy == "ring":
            points = mix64((seeds[:, None] + np.arange(1, RING_POINTS + 1, dtype=np.uint64)).reshape(-1))
            order = points.argsort()
            self._ring = points[order].tolist()
            self._ring_workers = [self.active[i // RING_POINTS] for i in order.tolist()]

    def send(self, adapter: int, now: float, workers: Sequence[Holder]) -> tuple[int, int]:
        """Return the worker that gets a call, and the gateway that sends it."""
        gateway = int(self._random.random() * len(self._views)) if self._views else -1
        worker = self._choose(adapter, now, gateway, workers)
        self.loads[worker] += 1
        if gateway >= 0:  # the worker reports its queue when the call arrives
            self._views[gateway][worker] = self.loads[worker], now
        return worker, gateway

    def done(self, worker: int, gateway: int, now: float) -> None:
        """Record the end of a call."""
        self.loads[worker] -= 1
        if gateway >= 0:
            load, _ = self._views[gateway][worker]
            self._views[gateway][worker] = max(0, load - 1), now

    def homes(self, adapter: int) -> tuple[int, ...]:
        """Return the preferred workers of a call, best first. `two choices` and `random` have no preference."""
        if self.policy == "ring":
            return (self.ring_owner(adapter),)
        return self.owners(adapter)[: 1 if self.policy == "owners by batch" else OWNERS_PER_ADAPTER]

    def owners(self, adapter: int) -> tuple[int, ...]:
        """Return the owners by rendezvous hashing, as `hub.cluster.rendezvous.RendezvousHash` does."""
        if adapter not in self._owners:
            self.know(np.array([adapter]))
        return self._owners[adapter]

    def know(self, adapters: NDArray[np.int64]) -> None:
        """Find the owners of many adapters at once, which is faster than one by one."""
        if self.policy == "ring":
            return
        for start in range(0, len(adapters), AT_ONCE):
            some = adapters[start : start + AT_ONCE]
            scores = mix64(self._seeds[None, :] ^ self._digests[some][:, None])  # (adapters, workers)
            rows, found = np.arange(len(some)), []
            for _ in range(min(OWNERS_PER_ADAPTER, len(self.active))):
                found.append(scores.argmax(1))
                scores[rows, found[-1]] = 0
            for adapter, *best in zip(some.tolist(), *(column.tolist() for column in found), strict=True):
                self._owners[adapter] = tuple(self.active[i] for i in best)

    def ring_owner(self, adapter: int) -> int:
        """Return the worker of the next point on the ring."""
        return self._ring_workers[bisect_right(self._ring, int(self._digests[adapter])) % len(self._ring)]

    def _any(self, _adapter: int, _now: float, _gateway: int, _workers: Sequence[Holder]) -> int:
        return self.active[int(self._random.random() * len(self.active))]

    def _less(self, adapter: int, now: float, gateway: int, workers: Sequence[Holder]) -> int:
        """Return the less busy of two random workers."""
        one, other = self._any(adapter, now, gateway, workers), self._any(adapter, now, gateway, workers)
        return one if self._seen(gateway, one, now) <= self._seen(gateway, other, now) else other

    def _on_ring(self, adapter: int, _now: float, _gateway: int, _workers: Sequence[Holder]) -> int:
        return self.ring_owner(adapter)

    def _owner(self, adapter: int, now: float, gateway: int, workers: Sequence[Holder]) -> int:
        """Choose as the hub does. The method computes the owners only where a short queue makes them usable."""
        owners = self.owners(adapter)
        loads = {owner: self._seen(gateway, owner, now) for owner in owners}
        resident = {owner for owner in owners if self._holds(owner, adapter, now, workers)}
        best = min(owners, key=lambda o: (0, loads[o]) if o in resident else (1, loads[o] // self._batch))
        if loads[best] >= max(MIN_CAPACITY, self._batch):
            sample = self.active if len(self.active) <= SAMPLE else self._random.sample(self.active, SAMPLE)
            loads |= {worker: self._seen(gateway, worker, now) for worker in sample}
            resident |= {worker for worker in sample if self._holds(worker, adapter, now, workers)}
            best = rank_workers(owners, loads, resident, self._batch)[0]
            self.spilled += best not in owners
        return best

    def _seen(self, gateway: int, worker: int, now: float) -> int:
        if gateway < 0:
            return self.loads[worker]
        load, since = self._views[gateway].get(worker, (0, -math.inf))
        return load if now - since <= KNOWN_S else 0

    def _holds(self, worker: int, adapter: int, now: float, workers: Sequence[Holder]) -> bool:
        if not self._tells:
            return False
        if now >= self._told_until:
            self._told = [frozenset(w.slots) for w in workers]  # type: ignore[call-overload]
            self._told_until = now + TOLD_S
        return adapter in self._told[worker]
