"""Autoscaling of workers and gateways: Serve's own, with a policy of the hub for workers.

Serve's stock policy counts calls (`target_ongoing_requests`), which suits gateways. It does not suit workers:

- a call has 1 to 64 images, so ten calls may fill ten forward passes or part of one;
- a worker takes 1 image per pass on a CPU and dozens on a GPU;
- a call whose adapter is not in memory waits for the store, and a second worker would wait as long.

So a worker reports its images, queued and in flight, without those that wait for the store, and the size of its largest
pass. The quotient is the worker's load in passes.
"""

import math
from typing import Any, Protocol

from .ray_compat import autoscaling_config

TARGET_PASSES = 1.5  # per worker: with Poisson traffic the load of a worker that computes 70 % of the time
TARGET_GATEWAY_REQUESTS = 64  # concurrent requests per gateway, those that wait for a worker included
MIN_REPORT_S, MAX_REPORT_S = 0.5, 10.0  # interval of a replica's reports to Serve's controller


class AutoscalingContext(Protocol):
    """The part of Serve's `AutoscalingContext` that the policy reads."""

    aggregated_metrics: dict[str, dict[Any, float]] | None
    total_queued_requests: float


def workers_for_load(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Return the number of workers for the current load, before bounds and delays: Serve's policy function.

    A call that waits at a gateway because there is no worker counts as one image.
    """
    metrics = context.aggregated_metrics or {}
    batches = metrics.get("batch", {})
    passes = sum(images / max(1.0, batches.get(worker, 1.0)) for worker, images in metrics.get("images", {}).items())
    largest = max([1.0, *batches.values()])
    return math.ceil((passes + context.total_queued_requests / largest) / TARGET_PASSES - 1e-9), {}


def replica_options(
    minimum: int, maximum: int, up_s: float, down_s: float, *, by_passes: bool = False
) -> dict[str, Any]:
    """Return the options of a Serve deployment that set its number of replicas.

    Args:
        minimum: least number of replicas.
        maximum: largest number of replicas.
        up_s: seconds of overload before replicas start. The load is averaged over the same time.
        down_s: seconds of underload before replicas stop, the last one included if `minimum` is 0.
        by_passes: scale by `workers_for_load`, not by concurrent requests.
    """
    if minimum == maximum:
        return {"num_replicas": minimum}
    report_s = min(max(up_s / 5, MIN_REPORT_S), MAX_REPORT_S)
    policy: dict[str, Any] = {"policy_function": workers_for_load}
    config = autoscaling_config(
        min_replicas=minimum,
        initial_replicas=max(1, minimum),  # so that a backbone that cannot be loaded fails the start
        max_replicas=maximum,
        target_ongoing_requests=TARGET_GATEWAY_REQUESTS,
        upscale_delay_s=up_s,
        downscale_delay_s=down_s,
        metrics_interval_s=report_s,
        look_back_period_s=max(up_s, 2 * report_s),
        **({"policy": policy} if by_passes else {}),
    )
    return {"autoscaling_config": config}
