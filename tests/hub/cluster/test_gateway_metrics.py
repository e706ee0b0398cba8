"""A gateway's metrics: requests, refusals and times, with a bounded number of labels."""

import pytest

from hub.cluster.gateway_metrics import MAX_TASK_LABELS, MAX_TENANT_LABELS, GatewayMetrics
from hub.cluster.ray_compat import ray_metrics
from hub.observability.metrics import ALL, make_instruments
from hub.observability.request_context import RequestContext
from hub.worker.metrics import WorkerMetrics
from tests.support.metrics import Recorder


def test_a_classification_is_counted_and_timed() -> None:
    recorder = Recorder()
    metrics = GatewayMetrics(recorder.types())
    times = {"load": 0.1, "queue": 0.2, "compute": 0.3}
    metrics.record(RequestContext("r", "acme", images={"digits": 3, "other:shapes": 1}, times_s=times), 200, 0.7)
    assert recorder.sums() == {
        ("karst_requests", "acme", "2xx"): 1,
        ("karst_images", "acme", "digits"): 3,
        ("karst_images", "acme", "other:shapes"): 1,
        ("karst_request_seconds", "acme"): 0.7,
        ("karst_load_seconds", "acme"): 0.1,
        ("karst_queue_seconds", "acme"): 0.2,
        ("karst_compute_seconds", "acme"): 0.3,
    }


def test_refused_changes_are_a_gauge_that_every_check_sets_again() -> None:
    recorder = Recorder()
    metrics = GatewayMetrics(recorder.types())
    for refuses in (False, True, True, False):
        metrics.record_registry(refuses)
    assert recorder.values == {("karst_changes_refused",): [0, 1, 1, 0]}


def test_unknown_images_are_counted_with_the_label_of_their_task() -> None:
    recorder = Recorder()
    metrics = GatewayMetrics(recorder.types())
    for i in range(MAX_TASK_LABELS + 1):
        metrics.record(RequestContext("r", "acme", images={f"t{i}": 3}, unknown={f"t{i}": 2}), 200, 0.1)
    counted = {key[2]: value for key, value in recorder.sums().items() if key[0] == "karst_images_unknown"}
    assert sum(counted.values()) == 2 * (MAX_TASK_LABELS + 1)
    assert counted["t0"] == 2
    assert {task for task in counted if task != "other"} < {f"t{i}" for i in range(MAX_TASK_LABELS)}
    assert counted["other"] > 2


def test_the_mean_typicality_of_a_task_is_the_ratio_of_two_counters() -> None:
    recorder = Recorder()
    metrics = GatewayMetrics(recorder.types())
    for sum_ in (1.5, 0.5):
        context = RequestContext("r", "acme", images={"digits": 4}, typicality={"digits": (4, sum_)})
        metrics.record(context, 200, 0.1)
    sums = recorder.sums()
    assert sums["karst_typicality", "acme", "digits"] / sums["karst_images_typical", "acme", "digits"] == 0.25


def test_a_refusal_is_counted_by_type_and_limit() -> None:
    recorder = Recorder()
    metrics = GatewayMetrics(recorder.types())
    metrics.record(RequestContext("r", "acme", error="limit-reached", limit="images_per_second"), 429, 0.1)
    metrics.record(RequestContext("r", error="unauthenticated"), 401, 0.1)
    metrics.record(RequestContext("r"), 499, 0.1)
    metrics.record(RequestContext("r", "acme"), 204, 0.1)
    assert recorder.sums() == {
        ("karst_requests", "acme", "4xx"): 1,
        ("karst_errors", "acme", "limit-reached"): 1,
        ("karst_limits_hit", "acme", "images_per_second"): 1,
        ("karst_requests", "none", "4xx"): 2,
        ("karst_errors", "none", "unauthenticated"): 1,
        ("karst_errors", "none", "http-499"): 1,
        ("karst_requests", "acme", "2xx"): 1,
    }


def test_every_counter_has_a_series_before_its_first_event() -> None:
    recorder = Recorder()
    GatewayMetrics(recorder.types())
    WorkerMetrics(recorder.types())
    assert {name for name, *_ in recorder.started} == {metric.name for metric in ALL if metric.kind == "counter"}


def test_labels_are_bounded_when_thousands_of_tenants_and_tasks_send_requests() -> None:
    recorder = Recorder()
    metrics = GatewayMetrics(recorder.types())
    for i in range(5000):
        metrics.record(RequestContext("r", f"t{i}", images={f"task{i}": 1}), 200, 0.1)
    tenants = {key[1] for key in recorder.values if key[0] == "karst_requests"}
    pairs = {key[1:] for key in recorder.values if key[0] == "karst_images"}
    assert len(tenants) <= MAX_TENANT_LABELS + 1
    assert len(pairs) <= MAX_TASK_LABELS + MAX_TENANT_LABELS + 1
    assert sum(sum(values) for key, values in recorder.values.items() if key[0] == "karst_images") == 5000


@pytest.mark.filterwarnings("ignore")  # Ray warns at import
def test_rays_metric_types_accept_every_metric_of_the_hub() -> None:
    instruments = make_instruments(ALL, ray_metrics())
    labels = {metric.name: dict.fromkeys(metric.labels, "x") for metric in ALL}
    for name, counter in instruments.counters.items():
        counter.start(labels[name])
        counter.inc(1.5, labels[name])
    for name, gauge in instruments.gauges.items():
        gauge.set(2, labels[name])
    for name, histogram in instruments.histograms.items():
        histogram.observe(0.0, labels[name])
