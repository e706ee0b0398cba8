"""Metrics of gateways and workers: names, labels, bounds, and the limit on label values.

Ray's exporter adds `ray_` before a name, `_total` to a counter's name, and `_bucket`, `_sum` and `_count` to a
histogram's. Ray computes a histogram's sum from its buckets, so `_sum` is an approximation. One recording costs about
3 microseconds. This module does not import Ray: the caller passes the metric types in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
OTHER = "other"  # label value of all names beyond a limit


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: without the exporter's prefix and suffixes.
        bounds: upper bounds of a histogram's buckets.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = SECONDS

    def exported_names(self) -> tuple[str, ...]:
        """Return the names that Prometheus scrapes."""
        suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
        return tuple(f"ray_{self.name}{suffix}" for suffix in suffixes[self.kind])


GATEWAY = (
    Metric("karst_requests", "counter", "answered requests", ("tenant", "status")),
    Metric("karst_errors", "counter", "refused and failed requests, by problem type", ("tenant", "type")),
    Metric("karst_limits_hit", "counter", "requests refused by a limit of the tenant", ("tenant", "limit")),
    Metric("karst_images", "counter", "classified images", ("tenant", "task")),
    Metric("karst_images_unknown", "counter", "classified images that are unknown to their task", ("tenant", "task")),
    Metric("karst_images_typical", "counter", "classified images with a typicality", ("tenant", "task")),
    Metric("karst_typicality", "counter", "sum of the typicality of these images", ("tenant", "task")),
    Metric("karst_usage_lost", "counter", "answers that a task's usage does not count"),
    Metric("karst_images_kept", "counter", "classified images to keep: kept, known, refused or dropped", ("end",)),
    Metric("karst_changes_refused", "gauge", "1 while changes are refused because Redis may evict keys"),
    Metric("karst_request_seconds", "histogram", "classification, from first byte to answer", ("tenant",)),
    Metric("karst_load_seconds", "histogram", "wait of a classification for its adapter", ("tenant",)),
    Metric("karst_queue_seconds", "histogram", "wait of a classification for its forward pass", ("tenant",)),
    Metric("karst_compute_seconds", "histogram", "forward pass of a classification", ("tenant",)),
)
WORKER = (
    Metric("karst_batch_images", "histogram", "images per forward pass", bounds=SIZES),
    Metric("karst_batch_tasks", "histogram", "adapters per forward pass", bounds=SIZES),
    Metric("karst_batch_wait_seconds", "histogram", "longest wait of a pass's images"),
    Metric("karst_batch_seconds", "histogram", "forward pass"),
    Metric("karst_batch_busy_seconds", "counter", "seconds of forward passes"),
    Metric("karst_images_waiting", "gauge", "images queued for a forward pass"),
    Metric("karst_slots", "gauge", "bank slots"),
    Metric("karst_slots_used", "gauge", "bank slots with an adapter"),
    Metric("karst_host_bytes", "gauge", "host memory in use by adapters, in bytes"),
    Metric("karst_host_limit_bytes", "gauge", "host memory for adapters, in bytes"),
    Metric("karst_adapter_hits", "counter", "calls whose adapter was in its slot"),
    Metric("karst_adapter_loads", "counter", "adapters loaded into a slot"),
    Metric("karst_adapter_load_seconds", "counter", "seconds of these loads"),
    Metric("karst_adapter_store_reads", "counter", "adapter files read from the store"),
    Metric("karst_adapter_evictions", "counter", "adapters evicted from a slot"),
    Metric("karst_adapter_failures", "counter", "failed loads"),
)
ALL = (*GATEWAY, *WORKER)


class Counter(Protocol):
    """A number that only grows."""

    def inc(self, value: float = ..., tags: dict[str, str] = ...) -> None:
        """Add a positive number to the series with these labels."""

    def start(self, tags: dict[str, str] = ...) -> None:
        """Export the series with these labels at 0; otherwise it is absent until its first event."""


class Gauge(Protocol):
    """A number that changes in both directions."""

    def set(self, value: float, tags: dict[str, str] = ...) -> None:
        """Replace the number of the series with these labels."""


class Histogram(Protocol):
    """Counts of observations by bucket."""

    def observe(self, value: float, tags: dict[str, str] = ...) -> None:
        """Add an observation to the series with these labels."""


class MetricTypes(NamedTuple):
    """Constructors of a metrics library: each takes name, description and `tag_keys`; `histogram` also `boundaries`."""

    counter: Callable[..., Counter]
    gauge: Callable[..., Gauge]
    histogram: Callable[..., Histogram]


class Instruments(NamedTuple):
    """The metrics of one list, by name."""

    counters: Mapping[str, Counter]
    gauges: Mapping[str, Gauge]
    histograms: Mapping[str, Histogram]


def make_instruments(metrics: Sequence[Metric], types: MetricTypes) -> Instruments:
    """Create the metrics of a list."""
    of_kind = {kind: [m for m in metrics if m.kind == kind] for kind in ("counter", "gauge", "histogram")}
    return Instruments(
        {m.name: types.counter(m.name, m.description, tag_keys=m.labels) for m in of_kind["counter"]},
        {m.name: types.gauge(m.name, m.description, tag_keys=m.labels) for m in of_kind["gauge"]},
        {
            m.name: types.histogram(m.name, m.description, tag_keys=m.labels, boundaries=list(m.bounds))
            for m in of_kind["histogram"]
        },
    )


class BoundedLabel:
    """A label with a limited number of values; further names share the value `other`.

    The first half of the values goes to the first names. The second half goes to names with at least `MIN_SHARE` of
    the recent count of all unnamed names. A name keeps its value for good, because a counter series must not lose its
    meaning. Misra and Gries' summary (1982) counts the unnamed names in `SUMMARY_SIZE` counters: no name with a share
    above 1 / `SUMMARY_SIZE` is missed.
    """

    SUMMARY_SIZE = 200
    MIN_SHARE = 0.01
    HALF_AFTER = 10_000  # unnamed counts; all counts are then halved, so that old ones fade

    def __init__(self, limit: int) -> None:
        """
        Args:
            limit: largest number of values, `other` not counted.
        """
        self._limit = limit
        self._named: set[str] = set()
        self._summary: dict[str, int] = {}
        self._unnamed_total = 0

    def value(self, name: str, count: int = 1) -> str:
        """Return the label value for a name, and add `count` events of it."""
        if name in self._named:
            return name
        if len(self._named) < self._limit // 2 or self._is_frequent(name, count):
            self._named.add(name)
            return name
        return OTHER

    def _is_frequent(self, name: str, count: int) -> bool:
        if len(self._named) >= self._limit:
            return False
        self._unnamed_total += count
        self._add_to_summary(name, count)
        if self._unnamed_total >= self.HALF_AFTER:
            self._unnamed_total //= 2
            self._summary = {other: n // 2 for other, n in self._summary.items() if n > 1}
        if self._unnamed_total < self.HALF_AFTER // 10:  # too few events for a share
            return False
        if self._summary.get(name, 0) < self.MIN_SHARE * self._unnamed_total:
            return False
        del self._summary[name]
        return True

    def _add_to_summary(self, name: str, count: int) -> None:
        if name in self._summary or len(self._summary) < self.SUMMARY_SIZE:
            self._summary[name] = self._summary.get(name, 0) + count
            return
        smallest = min(count, min(self._summary.values()))
        self._summary = {other: n - smallest for other, n in self._summary.items() if n > smallest}
        if count > smallest:
            self._summary[name] = count - smallest
