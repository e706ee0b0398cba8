"""Uses of Ray that other modules must not depend on."""

from ..observability.metrics import MetricTypes


def ray_metrics() -> MetricTypes:
    """Return the metric types of Ray Serve. Serve adds the labels of the replica that creates a metric."""
    from ray.serve import metrics

    return MetricTypes(metrics.Counter, metrics.Gauge, metrics.Histogram)
