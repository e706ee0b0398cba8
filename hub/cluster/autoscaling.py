"""How many workers and gateways there should be: Serve's autoscaling, with a policy of ours for the workers.

Serve's stock policy counts calls (`target_ongoing_requests`), and for gateways that is right. For workers it falls
short, in both directions: a call has 1 to 64 images, so ten calls may be ten passes or none that is full; a worker
takes 1 image a pass on a CPU and dozens on a GPU; and a call whose adapter is cold is parked until the store has sent
its file, which a second worker would wait for just as long. So a worker tells what it has in passes:
images queued and in flight, those parked for the store left out, over the images of its largest pass. One image in ten
of a batch is a tenth of a pass, and a worker with one pass computing and half a pass waiting is well used: `PASSES`.
"""

import math
import warnings
from typing import Any, Protocol

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

PASSES = 1.5  # a worker's load: with Poisson traffic one that computes for 70 % of the time has so much
GATEWAY_CALLS = 64  # at once in a gateway, those that wait for a worker included
SHORTEST_S, LONGEST_S = 0.5, 10.0  # between two reports of a replica to the controller


class Load(Protocol):
    """What the policy reads of Serve's `AutoscalingContext`."""

    aggregated_metrics: dict[str, dict[Any, float]] | None
    total_queued_requests: float


def by_passes(context: Load) -> tuple[float, dict[str, Any]]:
    """Serve's policy function for workers: how many there should be, before bounds and delays.

    Calls that wait at gateways, because there is no worker yet, count as an image each.
    """
    metrics = context.aggregated_metrics or {}
    batches = metrics.get("batch", {})
    passes = sum(images / max(1.0, batches.get(worker, 1.0)) for worker, images in metrics.get("images", {}).items())
    largest = max([1.0, *batches.values()])
    return math.ceil((passes + context.total_queued_requests / largest) / PASSES - 1e-9), {}


def scale(
    least: int, most: int, up_s: float, down_s: float, *, calls: float = GATEWAY_CALLS, passes: bool = False
) -> dict[str, Any]:
    """Options of a Serve deployment that has `least` to `most` replicas.

    Args:
        up_s: how long there must be too few before more start. The load is the mean over as long.
        down_s: how long there must be too many before some stop, the last one too where `least` is 0.
        calls: at once at a replica, by Serve's own policy.
        passes: by `by_passes` instead.
    """
    if least == most:
        return {"num_replicas": least}
    report_s = min(max(up_s / 5, SHORTEST_S), LONGEST_S)
    with warnings.catch_warnings():
        # Serve says that an environment variable will replace `metrics_interval_s`; so far nothing reads that.
        warnings.simplefilter("ignore", DeprecationWarning)
        config = AutoscalingConfig(
            min_replicas=least,
            # One even where none need stay: a backbone that cannot be loaded shows at the start.
            initial_replicas=max(1, least),
            max_replicas=most,
            target_ongoing_requests=calls,
            upscale_delay_s=up_s,
            downscale_delay_s=down_s,
            metrics_interval_s=report_s,
            look_back_period_s=max(up_s, 2 * report_s),
            **({"policy": AutoscalingPolicy(policy_function=by_passes)} if passes else {}),
        )
    return {"autoscaling_config": config}
