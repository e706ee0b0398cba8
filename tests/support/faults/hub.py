"""Faults of a hub on one machine, and their effects on callers.

`test_faults_*` check the limits; `benchmarks/faults.py` runs the same for longer.
"""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters import Backbone
from hub.admin_schemas import LimitsChange
from hub.client.client import Client
from hub.errors import HubError, Unavailable
from hub.local.ports import free_port
from tests.support.faults.load import Load, RedisServer, Report, StoreServer, Tasks, replicas
from tests.support.hub_process import GATEWAY_PORTS, Served, listening_sockets, serve
from tests.support.models import png, wait_until

TASKS = 6
WRITERS = 50
PLENTY = LimitsChange(requests_per_second=10_000, images_per_second=10_000)
USUAL = LimitsChange(requests_per_second=400, images_per_second=400)


@dataclass
class Hub:
    """A hub with two workers and two gateways; its registry and store can be broken."""

    served: Served
    key: str
    admin_key: str
    redis: RedisServer
    store: StoreServer
    tasks: Tasks
    backbone: Backbone
    seeds: int = 1000

    def client(self, retry_s: float = 0.0) -> Client:
        return Client(self.served.url, self.key, retry_s=retry_s)

    def load(self, **options: object) -> Load:
        return Load(self.served.url, self.key, self.tasks, **options)  # type: ignore[arg-type]

    def replicas(self, deployment: str) -> list[int]:
        return replicas(self.served.process.pid, deployment)

    def more_tasks(self, count: int, prefix: str) -> Tasks:
        """Return adapters that the hub has never loaded."""
        self.seeds += count
        return Tasks(self.backbone, count, prefix, self.seeds)

    def open_gateways(self) -> set[int]:
        """Return the gateways that HTTP can reach."""
        return {
            pid
            for pid in self.replicas("gateway")
            if any(port in GATEWAY_PORTS for _, port in listening_sockets([pid]))
        }

    def logged(self, deployment: str) -> str:
        """Return the text of the log files that the replicas of a deployment have open."""
        open_files = {
            Path(os.readlink(link)) for pid in self.replicas(deployment) for link in Path(f"/proc/{pid}/fd").iterdir()
        }
        return "".join(p.read_text(errors="replace") for p in open_files if p.name.startswith("worker-"))


@contextmanager
def broken_hub(folder: Path, backbone: Backbone) -> Iterator[Hub]:
    """A hub to be broken, with its tasks registered and warm; stops what is left of it."""
    for name in ("home", "redis", "store"):
        (folder / name).mkdir()
    redis, store = RedisServer(folder / "redis"), StoreServer(folder / "store")
    served = None
    try:
        redis.start()
        store.start()
        settings = {"HUB_MIN_WORKERS": "2", "HUB_MAX_WORKERS": "2", "HUB_SLOTS": "64"}
        settings |= {"HUB_MIN_GATEWAYS": "2", "HUB_MAX_GATEWAYS": "2"}
        settings |= {"HUB_REDIS_URL": redis.url, "HUB_STORE_URL": store.url}
        served = serve(folder / "home", free_port(), **settings)
        assert served.key is not None
        assert served.admin_key is not None
        hub = Hub(served, served.key, served.admin_key, redis, store, Tasks(backbone, TASKS), backbone)
        with Client(served.url, hub.admin_key) as admin:
            admin.change_limits("default", PLENTY)
        with hub.client() as client:
            hub.tasks.register(client)
        warm_up(hub)
        yield hub
    finally:
        if served is not None and served.process.poll() is None:
            redis.send(signal.SIGCONT)
            served.stop()
        store.end()
        redis.end()


def warm_up(hub: Hub) -> None:
    """Wait until every worker and gateway knows its tasks."""
    with hub.load(retry_s=30) as load:
        load.wait_for(60)
    assert load.failures() == []
    assert load.wrong == []


def kill_worker(hub: Hub, capacity_s: float = 120) -> Report:
    """kill -9 of one of two worker replicas."""
    with hub.load(callers=6) as load:
        load.wait_for(60)
        before = load.workers()
        at = time.monotonic()
        victim = hub.replicas("worker")[0]
        os.kill(victim, signal.SIGKILL)
        load.wait_for(100)
        back_s = load.wait_for_capacity(at, before, capacity_s)
        load.wait_for(40)
    report = load.report(at)
    report.capacity_s = back_s
    report.notes = {"workers before": len(before), "failures": load.failures()[:3]}
    return report


def kill_gateway(hub: Hub, capacity_s: float = 120) -> tuple[Report, Report]:
    """kill -9 of one of two gateway replicas: what callers saw that try once, and those that try again."""
    with hub.load(callers=3) as once, hub.load(callers=3, retry_s=30) as again:
        once.wait_for(40)
        again.wait_for(40)
        before = hub.replicas("gateway")
        at = time.monotonic()
        os.kill(before[0], signal.SIGKILL)
        once.wait_for(60)
        again.wait_for(60)
        wait_until(lambda: len(hub.open_gateways() - {before[0]}) == len(before), capacity_s, "a new gateway")
        back_s = round(time.monotonic() - at, 2)
        once.wait_for(40)
        again.wait_for(40)
    reports = once.report(at), again.report(at)
    for load, report in zip((once, again), reports, strict=True):
        report.capacity_s = back_s
        report.notes = {"failures": load.failures()[:3]}
    return reports


def stop_registry(hub: Hub, seconds: float) -> Report:
    """SIGSTOP to Redis, so that it takes calls and answers none; SIGCONT after some seconds."""
    with Client(hub.served.url, hub.admin_key) as admin:  # so few that gateways often ask Redis for more
        admin.change_limits("default", USUAL)
    new = hub.more_tasks(1, f"stopped{hub.seeds}")
    name, adapter = next(iter(new.adapters.items()))
    with hub.load() as load, hub.client() as client:
        # A change of limits clears gateways' caches of the tenant; each call fills the cache of one gateway.
        load.wait_for(300)
        at = time.monotonic()
        hub.redis.send(signal.SIGSTOP)
        try:
            refused: list[tuple[Unavailable, float]] = []
            while time.monotonic() < at + seconds:
                refusal = _refused(client, name, adapter.data)
                assert refusal is not None, "a change was made without the registry"
                refused.append(refusal)
        finally:
            hub.redis.send(signal.SIGCONT)
        up = time.monotonic()
        report = load.report(at)
        wait_until(lambda: _refused(client, name, adapter.data) is None, 30, "a change")
        changes_s = time.monotonic() - up
        load.wait_for(30)
        assert client.classify(name, [png(0)]).digest == adapter.digest
    with Client(hub.served.url, hub.admin_key, retry_s=30) as admin:
        admin.change_limits("default", PLENTY)
    report.failed = load.report(at).failed
    report.wrong = len(load.wrong)
    report.slowest_s = load.report(at).slowest_s
    report.notes = {
        "changes refused": len(refused),
        "Retry-After, s": sorted({error.retry_after_s for error, _ in refused}),
        "slowest refusal, s": round(max(took for _, took in refused), 2),
        "changes taken again after, s": round(changes_s, 2),
        "failures": load.failures()[:3],
    }
    return report


def kill_registry(hub: Hub, away_s: float) -> Report:
    """kill -9 of Redis while 50 callers register; it starts again after some seconds, from its append-only file."""
    base = hub.more_tasks(WRITERS, f"killed{hub.seeds}")
    registered: list[str] = []
    kept: list[tuple[str, int]] = []
    refused: list[HubError] = []
    ended = False

    def write(name: str) -> None:
        with hub.client() as client, hub.client(retry_s=60) as patient:
            registered.append(patient.register(name, base.adapters[name].data).task)
            aliases = 0
            while not ended:
                aliases += 1
                try:
                    client.set_alias(name, f"alias-{aliases}", 1)
                    kept.append((name, aliases))
                except HubError as error:
                    refused.append(error)
                    time.sleep(0.1)

    with hub.load() as load, ThreadPoolExecutor(WRITERS) as pool:
        load.wait_for(30)
        jobs = [pool.submit(write, name) for name in base.adapters]
        try:
            wait_until(lambda: len(registered) == WRITERS and len(kept) > 2 * WRITERS, 90, "changes")
            at = time.monotonic()
            hub.redis.send(signal.SIGKILL)
            time.sleep(away_s)
            hub.redis.start()
            there = len(kept)
            up = time.monotonic()
            wait_until(lambda: len(kept) > there + 20, 60, "changes")
            changes_s = time.monotonic() - up
        finally:
            ended = True
        for job in jobs:
            job.result()
        load.wait_for(30)
        report = load.report(at)
    with hub.client(retry_s=30) as client:
        there_now = {name: client.task(name).aliases for name in base.adapters}
        lost = [f"{name} alias-{n}" for name, n in kept if f"alias-{n}" not in there_now[name]]
        for name in base.adapters:
            client.delete_task(name)
    report.notes = {
        "writers": WRITERS,
        "changes answered with success": len(kept) + WRITERS,
        "of these lost": len(lost),
        "changes refused": len(refused),
        "kinds": sorted({type(error).__name__ for error in refused}),
        "Retry-After, s": sorted({error.retry_after_s or 0 for error in refused}),
        "changes taken again after, s": round(changes_s, 2),
        "failures": load.failures()[:3],
    }
    return report


def break_store(hub: Hub, how: str, seconds: float) -> Report:
    """The store away (`away`), damaged (`corrupt`) or slow (`slowly SECONDS`): warm tasks, and a cold one."""
    cold = hub.more_tasks(1, f"cold{hub.seeds}")
    name, adapter = next(iter(cold.adapters.items()))
    with hub.load() as load, hub.client() as client:
        load.wait_for(30)
        hub.store.behave("corrupt")  # so that no worker can load the task when it is registered
        client.register(name, adapter.data)
        at = time.monotonic()
        if how == "away":
            hub.store.end()
        else:
            hub.store.behave(how)
        refused: list[HubError] = []
        answered = 0
        while time.monotonic() < at + seconds:
            try:
                answer = client.classify(name, [png(0)], top_k=1)
                answered += 1
                assert answer.predictions[0][0].label == cold.right[name, 0]
            except HubError as error:
                refused.append(error)
                time.sleep(0.2)
        report = load.report(at)
        if how == "away":
            hub.store.start()
        hub.store.behave("well")
        up = time.monotonic()
        wait_until(lambda: _classifies(client, name), 90, "the cold task")
        cold_s = time.monotonic() - up
        load.wait_for(20)
    report.wrong = len(load.wrong)
    said = [line for line in hub.logged("worker").splitlines() if adapter.digest[:12] in line]
    report.notes = {
        "cold task answered": answered,
        "cold task refused": len(refused),
        "kinds": sorted({type(error).__name__ for error in refused}),
        "details": sorted({error.detail for error in refused}),
        "cold task answers again after, s": round(cold_s, 2),
        "log": said[:1],
        "failures": load.failures()[:3],
    }
    return report


def terminate(hub: Hub) -> Report:
    """SIGTERM to `karst-hub serve` under load; what was accepted is answered, and no process stays."""
    with hub.load(callers=8) as load:
        load.wait_for(60)
        at = time.monotonic()
        hub.served.stop()  # fails where a process is left
        took_s = time.monotonic() - at
    report = load.report(at)
    report.notes = {"stopped after, s": round(took_s, 2), "failures": sorted(set(load.failures()))[:5]}
    return report


def _refused(client: Client, name: str, data: bytes) -> tuple[Unavailable, float] | None:
    """How a change is refused, and after how many seconds; None if it is made."""
    began = time.monotonic()
    try:
        client.register(name, data)
    except Unavailable as error:
        took_s = time.monotonic() - began
        time.sleep(0.2)
        return error, took_s
    return None


def _classifies(client: Client, name: str) -> bool:
    try:
        client.classify(name, [png(0)])
    except Unavailable:
        time.sleep(0.2)
        return False
    return True
