"""A worker's rates: over one interval each, for a bounded number of tasks."""

from hub.worker.stats import MAX_COUNTED_TASKS, MAX_REPORTED_TASKS, WorkerStats


def test_rates_cover_the_time_since_the_last_report() -> None:
    now_s = 0.0
    stats = WorkerStats(lambda: now_s)
    for images, adapters in ((4, 2), (8, 4)):
        stats.record_pass(images, adapters)
    stats.record_call("acme", "digits", 9)
    stats.record_call("acme", "shapes", 3)
    now_s = 2.0
    rates = stats.next_interval()
    assert (rates.images_per_second, rates.images_per_pass, rates.adapters_per_pass) == (6.0, 6.0, 3.0)
    assert [(t.tenant, t.task, t.images_per_second) for t in rates.tasks] == [
        ("acme", "digits", 4.5),
        ("acme", "shapes", 1.5),
    ]
    now_s = 4.0
    assert stats.next_interval() == (0.0, 0.0, 0.0, [])


def test_the_number_of_counted_tasks_is_bounded() -> None:
    now_s = 0.0
    stats = WorkerStats(lambda: now_s)
    for i in range(2 * MAX_COUNTED_TASKS):
        stats.record_call("t", f"task{i}", 1)
    stats.record_call("t", "task0", 1)
    stats.record_call("t", f"task{MAX_COUNTED_TASKS}", 100)  # beyond the limit, so not counted by task
    now_s = 1.0
    tasks = stats.next_interval().tasks
    assert len(tasks) == MAX_REPORTED_TASKS
    assert (tasks[0].task, tasks[0].images_per_second) == ("task0", 2.0)
