"""Metrics of one gateway, recorded at the end of each request."""

from ..observability.metrics import GATEWAY, OTHER, BoundedLabel, MetricTypes, make_instruments
from ..observability.request_context import RequestContext

MAX_TENANT_LABELS = MAX_TASK_LABELS = 50
NO_TENANT = "none"  # label value of requests with an admin key or without a valid key
STARTED = {  # series that exist before their first event, so that dashboards show 0 instead of "No data"
    "karst_requests": [{"status": status} for status in ("2xx", "4xx", "5xx")],
    "karst_errors": [{"type": "unavailable"}],
    "karst_limits_hit": [{"limit": "requests_per_second"}],
    "karst_images": [{"task": "none"}],
    "karst_images_unknown": [{"task": "none"}],
    "karst_images_typical": [{"task": "none"}],
    "karst_typicality": [{"task": "none"}],
}
KEPT_ENDS = ("kept", "known", "refused", "dropped")
TIMED_PARTS = ("load", "queue", "compute")


class GatewayMetrics:
    """Counts and times of a gateway's requests. Ray Serve adds the replica's own labels."""

    def __init__(self, types: MetricTypes) -> None:
        """Create the metrics. In a Serve replica, because Serve adds the labels of the replica that creates them."""
        self._counters, self._gauges, self._histograms = make_instruments(GATEWAY, types)
        self._tenants = BoundedLabel(MAX_TENANT_LABELS)
        self._tasks = BoundedLabel(MAX_TASK_LABELS)
        for name, series in STARTED.items():
            for tags in series:
                self._counters[name].start({"tenant": NO_TENANT} | tags)
        for end in KEPT_ENDS:
            self._counters["karst_images_kept"].start({"end": end})
        self._counters["karst_usage_lost"].start({})

    def record_registry(self, refuses_changes: bool) -> None:
        """Record whether the gateway refuses changes. Ray drops a gauge that is not set again within seconds."""
        self._gauges["karst_changes_refused"].set(float(refuses_changes))

    def record_kept(self, end: str, images: int) -> None:
        """Count classified images that a task's owner keeps.

        Args:
            end: `kept`; `known` (it was there); `refused` (no room); `dropped` (a full queue or an error).
        """
        self._counters["karst_images_kept"].inc(images, {"end": end})

    def record_lost_usage(self, images: int) -> None:
        """Count answers that a task's usage does not count, because too many counts wait for Redis."""
        self._counters["karst_usage_lost"].inc(images, {})

    def record(self, context: RequestContext, status: int, seconds: float) -> None:
        """Record a request. Only successful classifications are timed.

        Args:
            status: of the HTTP answer.
            seconds: from the first byte to the answer.
        """
        tenant = self._tenants.value(context.tenant) if context.tenant else NO_TENANT
        tags = {"tenant": tenant}
        self._counters["karst_requests"].inc(1, tags | {"status": f"{status // 100}xx"})
        if status >= 400:
            self._counters["karst_errors"].inc(1, tags | {"type": context.error or f"http-{status}"})
            if context.limit:
                self._counters["karst_limits_hit"].inc(1, tags | {"limit": context.limit})
            return
        for task, images in context.images.items():
            value = self._tasks.value(f"{context.tenant}/{task}", images)
            label = OTHER if OTHER in (value, tenant) else task
            self._counters["karst_images"].inc(images, tags | {"task": label})
            if unknown := context.unknown.get(task):
                self._counters["karst_images_unknown"].inc(unknown, tags | {"task": label})
            if task in context.typicality:
                typical, total = context.typicality[task]
                self._counters["karst_images_typical"].inc(typical, tags | {"task": label})
                self._counters["karst_typicality"].inc(total, tags | {"task": label})
        if context.images:
            self._histograms["karst_request_seconds"].observe(seconds, tags)
            for part in TIMED_PARTS:
                if part in context.times_s:
                    self._histograms[f"karst_{part}_seconds"].observe(context.times_s[part], tags)
