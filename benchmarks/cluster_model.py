"""Parts of the simulated cluster: service times, traffic, results, and analytic approximations."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray


def zipf(count: int, exponent: float) -> NDArray[np.float64]:
    """Return the share of each of `count` adapters, most popular first."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def digests(count: int, seed: int = 1) -> NDArray[np.uint64]:
    """Return a pseudo-random number per adapter."""
    return np.random.default_rng(seed).integers(1, 2**64 - 1, count, dtype=np.uint64)


def lru_hit_rate(stream: Sequence[int], slots: int, skip: int = 0) -> float:
    """Count hits one by one; the first `skip` calls only fill the slots."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for i, adapter in enumerate(stream):
        if adapter in held:
            held.move_to_end(adapter)
            hits += i >= skip
        else:
            held[adapter] = None
            if len(held) > slots:
                held.popitem(last=False)
    return hits / (len(stream) - skip)


def che_hit_rate(weights: NDArray[np.float64], slots: int) -> float:
    """Return Che's approximation (Che, Tung, Wang, 2002): an adapter stays for a constant time after its last use."""
    low, high = 0.0, 1.0
    while (1 - np.exp(-weights * high)).sum() < slots:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-weights * middle)).sum() < slots else (low, middle)
    return float((weights * (1 - np.exp(-weights * high))).sum())


def in_line(times: NDArray[np.float64], service_s: float, servers: int) -> NDArray[np.float64]:
    """Return the departure times of calls that arrive at `times` (sorted) at a queue with a constant service time.

    With equal service times the calls leave in order, so call k gets the server of call k - servers.
    """
    if not service_s:
        return times
    out = np.empty_like(times)
    for first in range(min(servers, len(times))):
        own = times[first::servers]
        before = service_s * np.arange(len(own))
        out[first::servers] = np.maximum.accumulate(own - before) + before + service_s
    return out


@dataclass(frozen=True)
class Times:
    """Service times on the modelled machines, in seconds, and capacities.

    A pass over n images takes max(least_pass_s, pass_s + n image_s). With `cores`, gateway, passes and loads share
    that many cores, as on one machine, and a long pass has `threads`. Without, each worker has a device of its own.
    """

    pass_s: float
    image_s: float
    least_pass_s: float = 0.0
    batch_size: int = 32
    batch_wait_s: float = 0.002
    slots: int = 64
    host_adapters: int = 1000
    host_load_s: float = 0.001
    store_load_s: float = 0.05
    loads_at_once: int = 8
    gateway_s: float = 0.0  # CPU time per call
    gateways: int = 1  # cores of all gateways together; without effect if `cores` is given
    wire_s: float = 0.0  # time of a call that uses no CPU
    cores: float | None = None
    threads: int = 1
    threads_from_s: float = 0.02  # a shorter pass has one thread, which `batch_tuner` selects beside gateways
    start_s: float = 20.0  # time from the scaling decision to a worker's first call

    def forward_s(self, images: int) -> float:
        return max(self.least_pass_s, self.pass_s + images * self.image_s)

    @property
    def most_per_s(self) -> float:
        """Return the images per second in full passes."""
        return self.batch_size / self.forward_s(self.batch_size)


@dataclass(frozen=True)
class Traffic:
    """Open loop: calls at `times`, in order, for `adapters`."""

    times: NDArray[np.float64]
    adapters: NDArray[np.int64]


@dataclass(frozen=True)
class Callers:
    """Closed loop: each caller sends its next call `pause_s` after its last response, until `seconds` have passed."""

    count: int
    adapters: Sequence[int]  # adapters of successive calls, cyclic
    seconds: float
    pause_s: float = 0.0


@dataclass(frozen=True)
class Scaling:
    """Serve's autoscaling with its delays, by one of two signals.

    passes: as in the hub: waiting and running images over those of a full pass; `target` of it per worker.
    work: images per second, plus the queue over `DRAIN_S`, over a worker's throughput; `target` of it per worker.
    """

    least: int
    most: int
    target: float
    signal: Literal["passes", "work"] = "passes"
    look_back_s: float = 30.0
    up_s: float = 30.0
    down_s: float = 600.0


@dataclass
class Result:
    """Result of a run, without the warm-up calls."""

    calls: int
    hit_rate: float  # share of calls whose adapter was in a slot
    host_loads: int
    store_loads: int
    store_loads_per_s: float
    mean_ms: float
    p50_ms: float
    p99_ms: float
    per_second: float
    imbalance: float  # images of the busiest worker / mean
    utilisation: float  # mean share of the time in which a worker computes
    images_a_pass: float
    spilled: float  # share of calls that went to a worker that does not own their adapter
    workers: list[tuple[float, int]] = field(default_factory=list)  # (second, number of workers) at each change
    sent_s: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False)
    took_s: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False)
