"""Number of workers for a load, and the options that Serve gets."""

from types import SimpleNamespace

import pytest

from hub.cluster.autoscaling import AutoscalingContext, replica_options, workers_for_load


def context(images: list[float], batches: list[float], queued: float = 0) -> AutoscalingContext:
    metrics = {"images": dict(enumerate(images)), "batch": dict(enumerate(batches))}
    return SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=queued)


@pytest.mark.parametrize(
    ("images", "batches", "queued", "workers"),
    [
        ([], [], 0, 0),
        ([0, 0], [1, 32], 0, 0),
        ([0.01], [32], 0, 1),  # little load, but some
        ([48], [32], 0, 1),  # one batch computes, half a batch is queued
        ([49], [32], 0, 2),
        ([96, 96], [32, 32], 0, 4),
        ([6], [1], 0, 4),  # a CPU that computes one image per pass
        ([6], [32], 0, 1),
        ([], [], 3, 2),
        ([16], [16], 8, 1),
        ([16], [16], 9, 2),
        ([3], [], 0, 2),  # a worker that has not reported its batch
    ],
)
def test_number_of_workers_follows_the_load_in_passes(
    images: list[float], batches: list[float], queued: float, workers: int
) -> None:
    assert workers_for_load(context(images, batches, queued)) == (workers, {})


def test_policy_wants_no_worker_when_there_are_no_metrics() -> None:
    empty = SimpleNamespace(aggregated_metrics=None, total_queued_requests=0.0)
    assert workers_for_load(empty) == (0, {})


def test_number_of_replicas_is_fixed_when_the_bounds_are_equal() -> None:
    assert replica_options(3, 3, 10, 300, by_passes=True) == {"num_replicas": 3}


@pytest.mark.parametrize("by_passes", [False, True])
def test_replicas_scale_between_their_bounds_after_the_delays(by_passes: bool) -> None:
    config = replica_options(2, 3, 2, 7, by_passes=by_passes)["autoscaling_config"]
    assert (config.min_replicas, config.max_replicas, config.initial_replicas) == (2, 3, 2)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (2, 7)
    assert config.metrics_interval_s < config.look_back_period_s
    assert config.policy.is_default_policy_function() is not by_passes


def test_one_replica_starts_when_the_hub_scales_to_zero() -> None:
    config = replica_options(0, 1, 10, 300, by_passes=True)["autoscaling_config"]
    assert (config.min_replicas, config.max_replicas, config.initial_replicas) == (0, 1, 1)
