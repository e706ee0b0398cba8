"""What the simulated cluster is made of: times, traffic, what comes out; and what is known of them on paper."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray


def zipf(count: int, exponent: float) -> NDArray[np.float64]:
    """The share of each of `count` adapters, most popular first."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def digests(count: int, seed: int = 1) -> NDArray[np.uint64]:
    """Of each adapter, a number that looks random."""
    return np.random.default_rng(seed).integers(1, 2**64 - 1, count, dtype=np.uint64)


def lru_hit_rate(stream: Sequence[int], slots: int, skip: int = 0) -> float:
    """Counted one by one; the first `skip` only fill the slots."""
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
    """Che's approximation (Che, Tung and Wang, 2002): an adapter stays for a constant time after its last use."""
    low, high = 0.0, 1.0
    while (1 - np.exp(-weights * high)).sum() < slots:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-weights * middle)).sum() < slots else (low, middle)
    return float((weights * (1 - np.exp(-weights * high))).sum())


def in_line(times: NDArray[np.float64], service_s: float, servers: int) -> NDArray[np.float64]:
    """When calls that come at `times` (in order) leave a line with so many servers of a constant service time.

    With equal service times the calls leave in order, so call k has the server of call k - servers.
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
    """What things take on the modelled machines, in seconds, and how much fits.

    A pass over n images takes max(least_pass_s, pass_s + n image_s). With `cores`, gateway, passes and loads share so
    many cores by turns, as on one machine, and a long pass has `threads`; without, each worker has a device of its own.
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
    gateway_s: float = 0.0  # CPU time a call
    gateways: int = 1  # cores that gateways have together; for nothing where `cores` is given
    wire_s: float = 0.0  # of a call that no CPU is busy with
    cores: float | None = None
    threads: int = 1
    threads_from_s: float = 0.02  # a shorter pass has one thread, as `batch_tuner` finds best beside gateways
    start_s: float = 20.0  # a worker from the decision to its first call

    def forward_s(self, images: int) -> float:
        return max(self.least_pass_s, self.pass_s + images * self.image_s)

    @property
    def most_per_s(self) -> float:
        """Images a second in full passes."""
        return self.batch_size / self.forward_s(self.batch_size)


@dataclass(frozen=True)
class Traffic:
    """An open loop: calls at `times`, in order, for `adapters`."""

    times: NDArray[np.float64]
    adapters: NDArray[np.int64]


@dataclass(frozen=True)
class Callers:
    """A closed loop: each caller sends its next call `pause_s` after its last answer, until `seconds` are over."""

    count: int
    adapters: Sequence[int]  # of the calls in turn, over again
    seconds: float
    pause_s: float = 0.0


@dataclass(frozen=True)
class Scaling:
    """Serve's autoscaling, its delays included, by one of two signals.

    passes: as `hub.scaling`: images that wait or compute, over the images of a full pass; `target` of it a worker.
    work: images a second, with what waits spread over `DRAIN_S`, over what a worker can do; `target` of it a worker.
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
    """What came of it, without the calls that only warmed up."""

    calls: int
    hit_rate: float  # calls that met their adapter in a slot
    host_loads: int
    store_loads: int
    store_loads_per_s: float
    mean_ms: float
    p50_ms: float
    p99_ms: float
    per_second: float
    imbalance: float  # images of the busiest worker / mean
    utilisation: float  # share of the time that a worker computes, mean
    images_a_pass: float
    spilled: float  # calls that went to no owner of their adapter
    workers: list[tuple[float, int]] = field(default_factory=list)  # (second, how many) at each change
    sent_s: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False)
    took_s: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False)
