"""What workers and tenants do now: written to Redis, read by one route, shown in a terminal."""

import asyncio
import io
import json
from itertools import count
from types import SimpleNamespace

import pytest
from rich.console import Console

from hub.cli import top
from hub.cli.top import Look, headline, rates_of, screen
from hub.client import endpoints as calls
from hub.errors import Forbidden, Unavailable
from hub.registry.status import Board, busiest
from hub.schemas import Counted, HubStatus, TaskRate, TenantStatus, WorkerStatus
from tests.support.hub_app import bearer, in_registry
from tests.support.models import png

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, at import


def worker(name: str = "node/1", **changes) -> WorkerStatus:
    fields = {
        "worker": name, "uptime_s": 3700.0, "device": "cpu", "slots": 64, "slots_used": 3, "host_bytes": 2 * top.MIB,
        "host_limit_bytes": 1024 * top.MIB, "waiting": 5, "images_per_second": 12.5, "images_per_pass": 4.0,
        "adapters_per_pass": 2.0, "tasks": [TaskRate(tenant="acme", task="digits", images_per_second=12.5)],
        "hits": 9, "loads": 1, "load_s": 0.05, "evictions": 0, "failures": 0,
    }  # fmt: skip
    return WorkerStatus(**(fields | changes))


def shown(look: Look, before: Look | None = None) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(screen(look, before))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_workers_are_there_until_they_are_silent(empty_redis) -> None:
    async def use(database):
        board = Board(database)
        await board.tell(worker("b"))
        await board.tell(worker("a", waiting=1))
        await board.tell(worker("a", waiting=2))
        assert [(w.worker, w.waiting) for w in await board.workers()] == [("a", 2), ("b", 5)]
        await database.redis.zadd("karst:workers:at", {"b": 1})  # long ago
        assert [w.worker for w in await board.workers()] == ["a"]
        assert await database.redis.hkeys("karst:workers") == ["a"]
        await board.leave("a")
        assert await board.workers() == []
        assert await database.redis.exists("karst:workers", "karst:workers:at") == 0

    in_registry(empty_redis, use)


def test_a_worker_of_a_newer_hub_is_read(empty_redis) -> None:
    async def use(database):
        text = json.dumps(json.loads(worker().model_dump_json()) | {"colour": "green"})
        await database.redis.hset("karst:workers", "node/1", text)
        assert await Board(database).workers() == [worker()]

    in_registry(empty_redis, use)


def test_a_task_on_two_workers_is_one() -> None:
    rates = busiest([worker("a"), worker("b", tasks=[TaskRate(tenant="acme", task="digits", images_per_second=1)])])
    assert rates == [TaskRate(tenant="acme", task="digits", images_per_second=13.5)]


def test_the_route_tells_workers_tasks_and_tenants(hub, adapters) -> None:
    in_registry(hub.redis_url, lambda database: Board(database).tell(worker()))
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


def test_only_an_admin_may_see_it(hub) -> None:
    assert hub.http.get("/v1/status").status_code == 403
    assert hub.http.get("/v1/status", headers=bearer("kh_unknown")).status_code == 401


def test_a_tenant_that_is_no_more_is_left_out(hub) -> None:
    async def use(database):
        await database.redis.zadd("karst:active", {"gone": (await database.redis.time())[0]})

    in_registry(hub.redis_url, use)
    assert "gone" not in [t["tenant"] for t in hub.http.get("/v1/status", headers=hub.admin).json()["tenants"]]


def test_the_screen_says_it_all() -> None:
    counted = Counted(requests=100, images=400, refused=2)
    status = HubStatus(
        workers=[worker(), worker("node/2", hits=0, loads=0)],
        tasks=worker().tasks,
        tenants=[TenantStatus(tenant="acme", images_in_flight=7, counted=counted)],
    )
    assert headline(status) == "2 workers, 25.0 images/s, 10 images waiting, 6 of 128 slots in use"
    once = shown(Look(status, 10.0))
    for text in ("node/1", "node/2", "1h 1m", "3/64", "2/1024", "90.0 %", "50.0", "digits", "12.5", "acme", "400"):
        assert text in once
    later = status.model_copy(
        update={
            "tenants": [
                TenantStatus(tenant="acme", images_in_flight=7, counted=Counted(requests=120, images=460, refused=2))
            ]
        }
    )
    row = next(text for text in shown(Look(later, 12.0), Look(status, 10.0)).splitlines() if "460" in text)
    assert [cell.strip() for cell in row.split("│")[2:6]] == ["10.0", "30.0", "0.0", "7"]


def test_rates_need_two_counts_and_are_never_below_nothing() -> None:
    counts = Counted(requests=1, images=1, refused=1)
    assert rates_of(counts, None, 2.0) == {}
    assert set(rates_of(counts, Counted(requests=5, images=5, refused=5), 2.0).values()) == {0.0}


def test_an_empty_hub_has_a_screen_too() -> None:
    assert "0 workers" in shown(Look(HubStatus(workers=[], tasks=[], tenants=[]), 0.0))


def test_a_hub_that_is_away_for_a_while_is_said(monkeypatch) -> None:
    status = HubStatus(workers=[worker()], tasks=[], tenants=[])
    turns, said = count(), []

    def ask() -> HubStatus:
        turn = next(turns)
        if turn == 1:
            raise Unavailable("no hub answers")
        if turn == 3:
            raise KeyboardInterrupt
        return status

    monkeypatch.setattr(top, "time", SimpleNamespace(sleep=lambda _s: None, monotonic=lambda: 1.0))
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    top.run(ask, console, interval_s=1.0, once=False)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert next(turns) == 4
    assert "node/1" in said


def test_one_look_is_printed() -> None:
    console = Console(file=io.StringIO(), width=200)
    top.run(lambda: HubStatus(workers=[worker()], tasks=[], tenants=[]), console, interval_s=1.0, once=True)
    assert "node/1" in console.file.getvalue()  # type: ignore[attr-defined]


def test_80_columns_have_room_for_all_of_it() -> None:
    counted = Counted(requests=123456, images=4000000, refused=222)
    status = HubStatus(
        workers=[worker("ip-10-0-0-12/12345", device="cuda:0", uptime_s=90000.0, failures=77)],
        tasks=worker().tasks,
        tenants=[TenantStatus(tenant="acme-laboratories", images_in_flight=1024, counted=counted)],
    )
    console = Console(file=io.StringIO(), width=80)
    top.run(lambda: status, console, interval_s=1.0, once=True)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "…" not in "".join(lines)
    rows = [line.split() for line in lines if line.startswith("ip-10-0-0-12/12345")]
    assert [row[1] for row in rows] == ["cuda:0", "3/64"]
    assert rows[1][-1] == "77"
    names = [line for line in lines if line.startswith("acme-laboratories")]
    assert names[0].split()[1:] == ["-", "-", "-", "1024"]
    assert names[1].split()[1:] == ["123456", "4000000", "222"]
    assert sum("images/pass" in line and "tasks/pass" in line for line in lines) == 1


def test_off_a_terminal_it_is_one_look() -> None:
    asked = iter([HubStatus(workers=[worker()], tasks=[], tenants=[])])
    console = Console(file=io.StringIO(), width=80)
    top.run(lambda: next(asked), console, interval_s=0.0, once=False)
    assert "node/1" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_key_that_may_not_is_an_error_at_once() -> None:
    def ask() -> HubStatus:
        raise Forbidden("only an admin key may do this")

    with pytest.raises(Forbidden):
        top.run(ask, Console(file=io.StringIO()), interval_s=1.0, once=False)
    assert calls.status().path == "/v1/status"
