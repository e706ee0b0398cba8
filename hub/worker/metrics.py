"""Metrics of one worker: forward passes, the queue, slots and host memory."""

from ..admin_schemas import WorkerStatus
from ..observability.metrics import WORKER, MetricTypes, make_instruments

COUNTERS = {  # metric -> field of `WorkerStatus`: a total since the worker started
    "karst_adapter_hits": "hits",
    "karst_adapter_loads": "loads",
    "karst_adapter_load_seconds": "load_s",
    "karst_adapter_evictions": "evictions",
    "karst_adapter_failures": "failures",
}
GAUGES = {
    "karst_images_waiting": "waiting",
    "karst_slots": "slots",
    "karst_slots_used": "slots_used",
    "karst_host_bytes": "host_bytes",
    "karst_host_limit_bytes": "host_limit_bytes",
}


class WorkerMetrics:
    """Recorder of a worker's metrics. Ray Serve adds the replica's own labels."""

    def __init__(self, types: MetricTypes) -> None:
        """Create the metrics. In a Serve replica, because Serve adds the labels of the replica that creates them."""
        self._counters, self._gauges, self._histograms = make_instruments(WORKER, types)
        self._recorded = dict.fromkeys((*COUNTERS, "karst_adapter_store_reads"), 0.0)
        for counter in self._counters.values():
            counter.start()

    def record_pass(self, images: int, adapters: int, queue_ms: float, compute_ms: float) -> None:
        """Record a forward pass.

        Args:
            queue_ms: the longest wait of its images.
        """
        self._histograms["karst_batch_images"].observe(images)
        self._histograms["karst_batch_tasks"].observe(adapters)
        self._histograms["karst_batch_wait_seconds"].observe(queue_ms / 1000)
        self._histograms["karst_batch_seconds"].observe(compute_ms / 1000)
        self._counters["karst_batch_busy_seconds"].inc(max(1e-9, compute_ms / 1000))  # Ray refuses an increase of 0

    def record_status(self, status: WorkerStatus, store_reads: int) -> None:
        """Set the gauges, and raise the counters to the worker's totals.

        Args:
            store_reads: adapter files that the worker read from the store since it started.
        """
        for name, field in GAUGES.items():
            self._gauges[name].set(getattr(status, field))
        totals = {name: float(getattr(status, field)) for name, field in COUNTERS.items()}
        for name, total in (totals | {"karst_adapter_store_reads": float(store_reads)}).items():
            if total > self._recorded[name]:
                self._counters[name].inc(total - self._recorded[name])
                self._recorded[name] = total
