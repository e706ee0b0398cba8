"""Metrics of gateways and workers through Ray's own exporter (`ray.serve.metrics`), and the list of their names.

Ray puts `ray_` before a name, `_total` after a counter's, `_bucket`, `_sum` and `_count` after a histogram's; from the
buckets' counts it makes a histogram anew on each node, so that `_sum` is near and not exact. Recording one costs about
3 microseconds. Labels have a bounded number of values: see `Names`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ray.serve import metrics

from ..observability.request_context import RequestContext
from ..worker.adapter_cache import Tiers

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
NAMED_TENANTS = NAMED_TASKS = 50
OTHER = "other"
NOBODY = "none"  # the tenant of a request without a good key, and of an admin's
TIMES = ("load", "queue", "compute")
MAKE: dict[str, Any] = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}


@dataclass(frozen=True)
class Metric:
    """One metric: its name before Ray adds to it, and what it tells."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    what: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = SECONDS

    def exported(self) -> tuple[str, ...]:
        """The names that Prometheus sees."""
        suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
        return tuple(f"ray_{self.name}{suffix}" for suffix in suffixes[self.kind])


GATEWAY = (
    Metric("karst_requests", "counter", "requests that were answered", ("tenant", "status")),
    Metric("karst_errors", "counter", "requests refused or failed, by the problem's type", ("tenant", "type")),
    Metric("karst_limits_hit", "counter", "requests refused for a limit of the tenant", ("tenant", "limit")),
    Metric("karst_images", "counter", "images that were classified", ("tenant", "task")),
    Metric("karst_request_seconds", "histogram", "a classification, from its first byte to its answer", ("tenant",)),
    Metric("karst_load_seconds", "histogram", "a classification's wait for its adapter", ("tenant",)),
    Metric("karst_queue_seconds", "histogram", "a classification's wait for its forward pass", ("tenant",)),
    Metric("karst_compute_seconds", "histogram", "a classification's forward pass", ("tenant",)),
)
WORKER = (
    Metric("karst_batch_images", "histogram", "images in a forward pass", bounds=SIZES),
    Metric("karst_batch_tasks", "histogram", "adapters in a forward pass", bounds=SIZES),
    Metric("karst_batch_wait_seconds", "histogram", "longest wait of a pass's images"),
    Metric("karst_batch_seconds", "histogram", "a forward pass"),
    Metric("karst_batch_busy_seconds", "counter", "seconds of forward passes"),
    Metric("karst_images_waiting", "gauge", "images that wait for a forward pass"),
    Metric("karst_slots", "gauge", "bank slots"),
    Metric("karst_slots_used", "gauge", "bank slots that hold an adapter"),
    Metric("karst_host_bytes", "gauge", "adapters in host memory, in bytes"),
    Metric("karst_host_limit_bytes", "gauge", "bytes that adapters in host memory may have"),
    Metric("karst_adapter_hits", "counter", "requests that met their adapter in its slot"),
    Metric("karst_adapter_loads", "counter", "adapters brought into a slot"),
    Metric("karst_adapter_load_seconds", "counter", "seconds that those loads took"),
    Metric("karst_adapter_store_reads", "counter", "adapter files read from the store"),
    Metric("karst_adapter_evictions", "counter", "adapters that gave up their slot"),
    Metric("karst_adapter_failures", "counter", "loads that failed"),
)
TIERS = {  # of `tiers.Counts`
    "karst_adapter_hits": "hits",
    "karst_adapter_loads": "loads",
    "karst_adapter_load_seconds": "load_s",
    "karst_adapter_store_reads": "store_reads",
    "karst_adapter_evictions": "evictions",
    "karst_adapter_failures": "failures",
}


class Names:
    """A label with at most so many values: the rest is `other`.

    Half of the places go to whoever comes first, the other half to those that turn out to be large: a name has earned
    its place when it had a hundredth of all that the unnamed had of late. A name keeps its place for good, since a
    counter that changes its label would tell nonsense. The unnamed are counted by Misra and Gries' summary: with as
    many counters as it has, none that large can escape it.
    """

    COUNTERS = 200
    SHARE = 0.01
    LATELY = 10_000

    def __init__(self, most: int) -> None:
        self._named: set[str] = set()
        self._most = most
        self._unnamed: dict[str, int] = {}
        self._seen = 0  # of the unnamed

    def label(self, name: str, count: int = 1) -> str:
        """The name, or `other`; `count` more of it were seen just now."""
        if name in self._named:
            return name
        if len(self._named) < self._most // 2 or self._earned(name, count):
            self._named.add(name)
            return name
        return OTHER

    def _earned(self, name: str, count: int) -> bool:
        if len(self._named) >= self._most:
            return False
        self._seen += count
        if name in self._unnamed or len(self._unnamed) < self.COUNTERS:
            self._unnamed[name] = self._unnamed.get(name, 0) + count
        else:
            least = min(count, min(self._unnamed.values()))
            self._unnamed = {other: n - least for other, n in self._unnamed.items() if n > least}
            if count > least:
                self._unnamed[name] = count - least
        if self._seen >= self.LATELY:
            self._seen //= 2
            self._unnamed = {other: n // 2 for other, n in self._unnamed.items() if n > 1}
        if self._seen < self.LATELY // 10 or self._unnamed.get(name, 0) < self.SHARE * self._seen:
            return False
        del self._unnamed[name]
        return True


class GatewayMetrics:
    """`RequestMetrics`: counts requests when they are over. In a Serve replica, which adds its own tags."""

    def __init__(self) -> None:
        self._counters, _, self._histograms = _made(GATEWAY)
        self._tenants = Names(NAMED_TENANTS)
        self._tasks = Names(NAMED_TASKS)

    def record(self, context: RequestContext, status: int, seconds: float) -> None:
        """A request is over; what was not a classification that succeeded is counted, and not timed."""
        tenant = self._tenants.label(context.tenant) if context.tenant else NOBODY
        tags = {"tenant": tenant}
        self._counters["karst_requests"].inc(1, tags | {"status": f"{status // 100}xx"})
        if status >= 400:
            self._counters["karst_errors"].inc(1, tags | {"type": context.error or f"http-{status}"})
            if context.limit:
                self._counters["karst_limits_hit"].inc(1, tags | {"limit": context.limit})
            return
        for task, images in context.images.items():
            named = self._tasks.label(f"{context.tenant}/{task}", images)
            label = OTHER if named == OTHER or tenant == OTHER else task
            self._counters["karst_images"].inc(images, tags | {"task": label})
        if context.images:
            self._histograms["karst_request_seconds"].observe(seconds, tags)
            for name in TIMES:
                if name in context.times_s:
                    self._histograms[f"karst_{name}_seconds"].observe(context.times_s[name], tags)


class WorkerMetrics:
    """Passes and tiers of one worker; Serve adds the replica's own tags."""

    def __init__(self, tiers: Tiers, *, slots: int, host_limit_bytes: int, waiting: Callable[[], int]) -> None:
        """
        Args:
            waiting: images that wait for a pass, at the moment that it is called.
        """
        self._tiers = tiers
        self._waiting = waiting
        self._counters, self._gauges, self._histograms = _made(WORKER)
        self._told = dict.fromkeys(TIERS, 0.0)
        self._gauges["karst_slots"].set(slots)
        self._gauges["karst_host_limit_bytes"].set(host_limit_bytes)

    def note(self, images: int, tasks: int, queue_ms: float, compute_ms: float) -> None:
        """One forward pass is over."""
        self._histograms["karst_batch_images"].observe(images)
        self._histograms["karst_batch_tasks"].observe(tasks)
        self._histograms["karst_batch_wait_seconds"].observe(queue_ms / 1000)
        self._histograms["karst_batch_seconds"].observe(compute_ms / 1000)
        self._counters["karst_batch_busy_seconds"].inc(max(1e-9, compute_ms / 1000))

    def refresh(self) -> None:
        """Tell how it is now, and what the tiers did since the last time; the worker calls this every two seconds."""
        self._gauges["karst_images_waiting"].set(self._waiting())
        self._gauges["karst_slots_used"].set(self._tiers.resident)
        self._gauges["karst_host_bytes"].set(self._tiers.host_bytes)
        for name, counted in TIERS.items():
            total = getattr(self._tiers.counts, counted)
            if total > self._told[name]:
                self._counters[name].inc(total - self._told[name])
                self._told[name] = total


def _made(
    table: Sequence[Metric],
) -> tuple[dict[str, metrics.Counter], dict[str, metrics.Gauge], dict[str, metrics.Histogram]]:
    """The table's counters, gauges and histograms."""
    by_kind: dict[str, dict[str, Any]] = {"counter": {}, "gauge": {}, "histogram": {}}
    for m in table:
        bounds = {"boundaries": list(m.bounds)} if m.kind == "histogram" else {}
        by_kind[m.kind][m.name] = MAKE[m.kind](m.name, m.what, tag_keys=m.labels, **bounds)
    return by_kind["counter"], by_kind["gauge"], by_kind["histogram"]
