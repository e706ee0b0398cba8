"""Metrics of a worker, through Ray's own exporter (`ray.serve.metrics`; names begin with `ray_karst_`)."""

from ray.serve import metrics

from .tiers import Tiers

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
SIZES: list[float] = [1, 2, 4, 8, 16, 32, 64, 128, 256]


class WorkerMetrics:
    """Passes and tiers of one worker; Serve adds the replica's own tags."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._images = metrics.Histogram("karst_batch_images", "images in a forward pass", boundaries=SIZES)
        self._tasks = metrics.Histogram("karst_batch_tasks", "adapters in a forward pass", boundaries=SIZES)
        self._queue = metrics.Histogram(
            "karst_queue_seconds", "longest wait of an image for its forward pass", boundaries=SECONDS
        )
        self._compute = metrics.Histogram("karst_compute_seconds", "a forward pass", boundaries=SECONDS)
        self._slots = metrics.Gauge("karst_slots_used", "bank slots that hold an adapter")
        self._host_bytes = metrics.Gauge("karst_host_bytes", "adapters in host memory, in bytes")
        self._counters = {
            name: metrics.Counter(f"karst_adapter_{name}", what)
            for name, what in {
                "hits": "requests that met their adapter in its slot",
                "loads": "adapters brought into a slot",
                "load_s": "seconds that those loads took",
                "store_reads": "adapter files read from the store",
                "evictions": "adapters that gave up their slot",
                "failures": "loads that failed",
            }.items()
        }
        self._told = dict.fromkeys(self._counters, 0.0)

    def note(self, images: int, tasks: int, queue_ms: float, compute_ms: float) -> None:
        """One forward pass is over; what the tiers did since the last one is told with it."""
        self._images.observe(images)
        self._tasks.observe(tasks)
        self._queue.observe(queue_ms / 1000)
        self._compute.observe(compute_ms / 1000)
        self._slots.set(self._tiers.resident)
        self._host_bytes.set(self._tiers.host_bytes)
        for name, counter in self._counters.items():
            total = getattr(self._tiers.counts, name)
            if total > self._told[name]:
                counter.inc(total - self._told[name])
                self._told[name] = total
