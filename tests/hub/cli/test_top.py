"""Tests of the hub's status: the entries in Redis, the route `/v1/status`, and `karst-hub top`."""

import asyncio
import io
import json
import os
import pty
import sys
import termios
from itertools import count
from typing import Any

import pytest
from rich.console import Console

from adapters import Adapter
from hub.admin_schemas import (
    Counted,
    ErrorCount,
    HubStatus,
    HubTraining,
    HubTrainingList,
    TaskRate,
    TenantStatus,
    WorkerStatus,
)
from hub.cli import top
from hub.cli.top import TimedStatus, headline, key_presses, rates_of, screen
from hub.dataset_schemas import TrainingProgress
from hub.errors import Forbidden, Unavailable
from hub.registry.redis.connection import RegistryConnection
from hub.registry.status import StatusBoard, busiest_tasks
from tests.support.hub_app import Hub, bearer, in_registry
from tests.support.models import png, wait_until

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, at import


def worker(name: str = "node/1", **changes: Any) -> WorkerStatus:
    fields: dict[str, Any] = {
        "worker": name, "uptime_s": 3700.0, "device": "cpu", "slots": 64, "slots_used": 3, "host_bytes": 2 * top.MIB,
        "host_limit_bytes": 1024 * top.MIB, "waiting": 5, "images_per_second": 12.5, "images_per_pass": 4.0,
        "adapters_per_pass": 2.0, "tasks": [TaskRate(tenant="acme", task="digits", images_per_second=12.5)],
        "hits": 9, "loads": 1, "load_s": 0.05, "evictions": 0, "failures": 0,
    }  # fmt: skip
    return WorkerStatus(**(fields | changes))


def shown(now: TimedStatus, before: TimedStatus | None = None) -> str:
    printed = io.StringIO()
    Console(file=printed, width=200).print(screen(now, before))
    return printed.getvalue()


def test_workers_disappear_when_they_stop_reporting(empty_redis: str) -> None:
    async def use(database: RegistryConnection) -> None:
        board = StatusBoard(database)
        await board.report(worker("b"))
        await board.report(worker("a", waiting=1))
        await board.report(worker("a", waiting=2))
        assert [(w.worker, w.waiting) for w in await board.workers()] == [("a", 2), ("b", 5)]
        await database.redis.zadd("karst:workers:at", {"b": 1})  # long ago
        assert [w.worker for w in await board.workers()] == ["a"]
        await board.report(worker("c"))
        assert set(await database.redis.hkeys("karst:workers")) == {"a", "c"}  # the expired report is deleted

    in_registry(empty_redis, use)


def test_unknown_fields_are_ignored_when_a_newer_worker_reports(empty_redis: str) -> None:
    async def use(database: RegistryConnection) -> None:
        await StatusBoard(database).report(worker())
        text = json.dumps(json.loads(worker().model_dump_json()) | {"colour": "green"})
        await database.redis.hset("karst:workers", "node/1", text)
        assert await StatusBoard(database).workers() == [worker()]

    in_registry(empty_redis, use)


def test_busiest_adds_the_rates_of_a_task_when_two_workers_serve_it() -> None:
    rates = busiest_tasks(
        [worker("a"), worker("b", tasks=[TaskRate(tenant="acme", task="digits", images_per_second=1)])]
    )
    assert rates == [TaskRate(tenant="acme", task="digits", images_per_second=13.5)]


def test_status_route_returns_workers_tasks_and_tenants(hub: Hub, adapters: list[Adapter]) -> None:
    in_registry(hub.redis_url, lambda database: StatusBoard(database).report(worker()))
    hub.http.post("/v1/tasks/digits/versions", content=adapters[0].data)
    assert hub.http.post("/v1/tasks/digits/classify", content=png(0)).status_code == 200
    for _ in range(100):  # counts are written twice a second
        status = HubStatus.model_validate(hub.http.get("/v1/status", headers=hub.admin).json())
        if status.tenants and status.tenants[0].counted.images == 1:
            break
        asyncio.run(asyncio.sleep(0.1))
    assert status.workers == [worker()]
    assert status.tasks == worker().tasks
    assert [t.tenant for t in status.tenants] == ["default"]
    assert status.tenants[0].counted.requests >= 2


def test_status_route_refuses_the_request_when_the_key_is_not_an_admin_key(hub: Hub) -> None:
    assert hub.http.get("/v1/status").status_code == 403
    assert hub.http.get("/v1/status", headers=bearer("kh_unknown")).status_code == 401


def test_status_route_omits_a_tenant_when_it_is_deleted(hub: Hub) -> None:
    async def use(database: RegistryConnection) -> None:
        await database.redis.zadd("karst:active", {"gone": (await database.redis.time())[0]})

    in_registry(hub.redis_url, use)
    assert "gone" not in [t["tenant"] for t in hub.http.get("/v1/status", headers=hub.admin).json()["tenants"]]


def test_status_route_counts_the_errors_of_the_last_hour_by_kind(hub: Hub) -> None:
    async def use(database: RegistryConnection) -> None:
        minute = (await database.redis.time())[0] // 60
        await database.redis.hset(f"karst:errors:{minute - 59}", "429 limit-reached", 5)
        await database.redis.hset(f"karst:errors:{minute - 61}", "429 limit-reached", 1000)

    def read() -> list[ErrorCount]:
        return HubStatus.model_validate(hub.http.get("/v1/status", headers=hub.admin).json()).errors

    for _ in range(2):
        assert hub.http.get("/v1/tasks/none").status_code == 404
    assert hub.http.delete("/v1/status").status_code == 405
    assert hub.http.get("/v1/tasks").status_code == 200
    wait_until(lambda: len(read()) == 2)  # counts are written every two seconds
    in_registry(hub.redis_url, use)  # just before the reply: a minute later the first of these would be too old
    errors = read()
    counted = [(error.status, error.kind, error.count) for error in errors]
    assert counted == [(429, "limit-reached", 5), (404, "not-found", 2), (405, "http-405", 1)]
    assert errors[0].last < errors[1].last


def test_screen_shows_trainings_that_run_or_wait_and_errors() -> None:
    def training(**changes: Any) -> HubTraining:
        fields: dict[str, Any] = {"tenant": "acme", "task": "cracks", "id": "0", "recipe": "karst", "state": "queued"}
        fields |= dict.fromkeys(["started", "ended", "progress", "version", "error"])
        return HubTraining(**fields | {"created": "", "seconds": 0.0, "images": 9} | changes)

    progress = TrainingProgress(stage="KARST, step", seconds_left=61.4)
    listed = [training(state="running", progress=progress), training(), training(state="done", task="finished")]
    error = ErrorCount(kind="limit-reached", status=429, count=77, last="2026-11-29T09:41:00+00:00")
    status = HubStatus(workers=[], tasks=[], tenants=[], errors=[error])
    text = shown(TimedStatus(status, 0.0, HubTrainingList(trainings=listed, running=1, queued=12)))
    for part in ("1 running, 12 queued", "KARST, step", "61 s", "cracks", "limit-reached", "429", "77", "09:41 UTC"):
        assert part in text
    assert "finished" not in text


def test_screen_shows_workers_tasks_tenants_and_rates() -> None:
    counted = Counted(requests=100, images=400, refused=2)
    status = HubStatus(
        workers=[worker(), worker("node/2", hits=0, loads=0)],
        tasks=worker().tasks,
        tenants=[TenantStatus(tenant="acme", images_in_flight=7, counted=counted)],
    )
    assert headline(status) == "2 workers, 25.0 images/s, 10 images waiting, 6 of 128 slots in use"
    once = shown(TimedStatus(status, 10.0))
    for text in ("node/1", "node/2", "1h 1m", "3/64", "2/1024", "90.0 %", "50.0", "digits", "12.5", "acme", "400"):
        assert text in once
    later = status.model_copy(
        update={
            "tenants": [
                TenantStatus(tenant="acme", images_in_flight=7, counted=Counted(requests=120, images=460, refused=2))
            ]
        }
    )
    row = next(
        text for text in shown(TimedStatus(later, 12.0), TimedStatus(status, 10.0)).splitlines() if "460" in text
    )
    assert [cell.strip() for cell in row.split("│")[2:6]] == ["10.0", "30.0", "0.0", "7"]


def test_rates_are_empty_without_an_earlier_count_and_never_negative() -> None:
    counts = Counted(requests=1, images=1, refused=1)
    assert rates_of(counts, None, 2.0) == {}
    assert set(rates_of(counts, Counted(requests=5, images=5, refused=5), 2.0).values()) == {0.0}


def test_screen_shows_zero_workers_when_the_hub_has_none() -> None:
    assert "0 workers" in shown(TimedStatus(HubStatus(workers=[], tasks=[], tenants=[]), 0.0))


def test_top_shows_an_error_and_recovers_when_the_hub_is_unavailable() -> None:
    requests, pauses = count(), list[float]()

    def wait(seconds: float) -> bool:
        pauses.append(seconds)
        return False

    def fetch() -> HubStatus:
        request = next(requests)
        if request == 1:
            raise Unavailable("no hub answers")
        if request == 3:
            raise KeyboardInterrupt
        return HubStatus(workers=[worker()], tasks=[], tenants=[])

    printed = io.StringIO()
    console = Console(file=printed, width=200, force_terminal=True)
    top.run(fetch, console, interval_s=1.5, once=False, wait=wait, clock=lambda: 1.0)
    assert next(requests) == 4
    assert pauses == [1.5] * 3
    assert "the hub does not reply: no hub answers" in printed.getvalue()
    assert "node/1" in printed.getvalue()


def test_q_ends_the_wait_and_other_keys_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs) as terminal, os.fdopen(ours, "wb", buffering=0) as keyboard:
        monkeypatch.setattr(sys, "stdin", terminal)
        before = termios.tcgetattr(terminal)
        with key_presses() as pressed:
            keyboard.write(b"x")
            assert not pressed(0.05)
            keyboard.write(b"q")
            assert pressed(60)
        assert termios.tcgetattr(terminal) == before


@pytest.mark.parametrize("once", [True, False])
def test_top_prints_one_status_when_once_is_set_or_stdout_is_not_a_terminal(once: bool) -> None:
    printed = io.StringIO()
    console = Console(file=printed, width=200, force_terminal=once)
    statuses = iter([HubStatus(workers=[worker()], tasks=[], tenants=[])])
    top.run(lambda: next(statuses), console, interval_s=1.0, once=once)
    assert "node/1" in printed.getvalue()


def test_screen_truncates_nothing_when_the_terminal_has_80_columns() -> None:
    counted = Counted(requests=123456, images=4000000, refused=222)
    status = HubStatus(
        workers=[worker("ip-10-0-0-12/12345", device="cuda:0", uptime_s=90000.0, failures=77)],
        tasks=worker().tasks,
        tenants=[TenantStatus(tenant="acme-laboratories", images_in_flight=1024, counted=counted)],
    )
    printed = io.StringIO()
    console = Console(file=printed, width=80)
    top.run(lambda: status, console, interval_s=1.0, once=True)
    lines = printed.getvalue().splitlines()
    assert "…" not in "".join(lines)
    rows = [line.split() for line in lines if line.startswith("ip-10-0-0-12/12345")]
    assert [row[1] for row in rows] == ["cuda:0", "3/64"]
    assert rows[1][-1] == "77"
    names = [line for line in lines if line.startswith("acme-laboratories")]
    assert names[0].split()[1:] == ["-", "-", "-", "1024"]
    assert names[1].split()[1:] == ["123456", "4000000", "222"]
    assert sum("images/pass" in line and "tasks/pass" in line for line in lines) == 1


def test_top_raises_the_error_when_the_hub_refuses_the_key() -> None:
    def fetch() -> HubStatus:
        raise Forbidden("only an admin key may do this")

    with pytest.raises(Forbidden):
        top.run(fetch, Console(file=io.StringIO()), interval_s=1.0, once=False)


def test_top_says_in_a_line_of_its_own_that_changes_are_refused() -> None:
    reason = "The maxmemory-policy of this Redis is allkeys-lru."
    status = HubStatus(workers=[worker()], tasks=[], tenants=[], changes_refused=reason)
    assert f"changes are refused: {reason}" in shown(TimedStatus(status, 0.0))
    healthy = HubStatus(workers=[worker()], tasks=[], tenants=[])
    assert "refused:" not in shown(TimedStatus(healthy, 0.0))


def test_the_view_shows_the_forms_of_the_frozen_layers() -> None:
    lines = ["qkv 192x576: onednn (linear 0.20 ms, onednn 0.10 ms)"]
    status = HubStatus(workers=[worker(frozen_layers=lines)], tasks=[], tenants=[])
    assert f"frozen layers of node/1: {lines[0]}" in shown(TimedStatus(status, 1.0))
