"""A worker's metrics: each pass is recorded, and totals become increases of counters."""

from hub.admin_schemas import WorkerStatus
from hub.observability.metrics import WORKER
from hub.worker.metrics import WorkerMetrics
from tests.support.metrics import Recorder


def make_status(**changes: float) -> WorkerStatus:
    fields = {
        "worker": "node/1", "uptime_s": 1.0, "device": "cpu", "slots": 8, "slots_used": 3, "host_bytes": 99,
        "host_limit_bytes": 1000, "waiting": 4, "images_per_second": 0.0, "images_per_pass": 0.0,
        "adapters_per_pass": 0.0, "tasks": [], "hits": 7, "loads": 2, "load_s": 0.5, "evictions": 0, "failures": 0,
    }  # fmt: skip
    return WorkerStatus.model_validate(fields | changes)


def test_a_pass_is_recorded_in_seconds() -> None:
    recorder = Recorder()
    WorkerMetrics(recorder.types()).record_pass(6, 2, 20.0, 50.0)
    assert recorder.values == {
        ("karst_batch_images",): [6],
        ("karst_batch_tasks",): [2],
        ("karst_batch_wait_seconds",): [0.02],
        ("karst_batch_seconds",): [0.05],
        ("karst_batch_busy_seconds",): [0.05],
    }


def test_totals_become_increases_when_a_status_is_recorded_again() -> None:
    recorder = Recorder()
    metrics = WorkerMetrics(recorder.types())
    metrics.record_status(make_status(), store_reads=2)
    metrics.record_status(make_status(hits=10, waiting=1), store_reads=2)
    assert recorder.values == {
        ("karst_adapter_hits",): [7, 3],
        ("karst_adapter_loads",): [2],
        ("karst_adapter_load_seconds",): [0.5],
        ("karst_adapter_store_reads",): [2],
        ("karst_slots",): [8, 8],
        ("karst_slots_used",): [3, 3],
        ("karst_host_bytes",): [99, 99],
        ("karst_host_limit_bytes",): [1000, 1000],
        ("karst_images_waiting",): [4, 1],
    }


def test_every_metric_of_a_worker_is_recorded() -> None:
    recorder = Recorder()
    metrics = WorkerMetrics(recorder.types())
    metrics.record_pass(1, 1, 0.0, 0.0)
    metrics.record_status(make_status(evictions=1, failures=1), store_reads=1)
    assert {name for (name,) in recorder.values} == {metric.name for metric in WORKER}
