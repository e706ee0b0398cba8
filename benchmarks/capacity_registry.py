"""Redis's part of `benchmarks.capacity`: operations, events and their fan-out, memory per task."""

import asyncio
import hashlib
import json
import multiprocessing
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import numpy as np
import redis

from hub.admin_schemas import LimitsChange, TenantInfo
from hub.admission.rate_limits import NAMES
from hub.local.embedded_redis import embedded_redis
from hub.registry.audit import OPERATOR
from hub.registry.events import EventLog
from hub.registry.redis.connection import RegistryConnection
from hub.registry.redis.scripts import LEASES
from hub.registry.status import StatusBoard
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry
from hub.schemas import LATEST, VersionInfo

TENANT = "capacity"
NO_LIMITS = LimitsChange(
    requests_per_second=1e6, images_per_second=1e7, images_in_flight=10**6, tasks=10**6, stored_bytes=10**14
)
AT_ONCE = 32
FOLLOWERS = (1, 10, 100)
GATEWAYS = (1, 10, 100, 300)  # calls of the same tenant within ten seconds
PACED, FAST = 60, 1_000  # changes one at a time, and at full speed
TASKS = (10, 100, 1_000, 10_000, 100_000)


@dataclass(frozen=True)
class Server:
    """A real redis-server of its own."""

    url: str
    ask: Any  # redis.Redis

    def cpu_s(self) -> float:
        """Return the CPU time of the thread that runs commands; it cannot use a second core."""
        info = self.ask.info("cpu")
        names = ("used_cpu_user_main_thread", "used_cpu_sys_main_thread")
        return sum(info.get(name, info[name.removesuffix("_main_thread")]) for name in names)


@contextmanager
def server() -> Iterator[Server]:
    """Start Redis with one tenant whose limits are above every load."""
    with tempfile.TemporaryDirectory() as home, embedded_redis(Path(home)) as url:
        client = redis.Redis.from_url(url, decode_responses=True)
        run(url, lambda database: TenantRegistry(database).create(OPERATOR, TENANT, NO_LIMITS))
        try:
            yield Server(url, client)
        finally:
            client.close()


def run(url: str, use: Callable[[RegistryConnection], Awaitable[Any]]) -> Any:
    """Run `use(database)` on an event loop of its own."""

    async def within() -> Any:
        database = RegistryConnection(url)
        try:
            return await use(database)
        finally:
            await database.close()

    return asyncio.run(within())


def version(number: int, classes: int = 10) -> VersionInfo:
    """Return an adapter's registry entry, a different one per number, as large as those of the demo's tasks."""
    return VersionInfo(
        version=0,
        digest=hashlib.sha256(str(number).encode()).hexdigest(),
        labels=[f"class {i}" for i in range(classes)],
        backbone="demo",
        fingerprint="0" * 64,
        config={"kernels": 2, "rank": 8, "factor": 8, "gain": None, "rescale": "channel"},
        preprocess={"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
        | {"crop_pct": 1.0, "crop_mode": "center"},
        metrics=None,
        size_bytes=144_584,
        registered="2026-01-01T00:00:00+00:00",
    )


async def register(registry: TaskRegistry, first: int, count: int, classes: int = 10, at_once: int = AT_ONCE) -> None:
    """Create new tasks."""
    numbers = iter(range(first, first + count))

    async def some() -> None:
        for i in numbers:
            await registry.register(OPERATOR, TENANT, f"task-{i}", version(i, classes), [LATEST])

    await asyncio.gather(*(some() for _ in range(at_once)))


def registry() -> dict[str, Any]:
    """Measure each kind of operation, by `AT_ONCE` callers on one loop, which takes most of the wall time."""

    def timed(server: Server, count: int, work: Callable[[RegistryConnection], Awaitable[Any]]) -> dict[str, float]:
        before, began = server.cpu_s(), time.perf_counter()
        run(server.url, work)
        seconds, cpu_s = time.perf_counter() - began, server.cpu_s() - before
        return {"per_second": count / seconds, "redis_cpu_us": 1e6 * cpu_s / count}

    async def repeat(count: int, call: Callable[[int], Awaitable[Any]]) -> None:
        numbers = iter(range(count))

        async def some() -> None:
            for i in numbers:
                await call(i)

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))

    out: dict[str, Any] = {}
    with server() as one:
        n = 5_000
        out["register, fsync always"] = timed(one, n, lambda db: register(TaskRegistry(db), 0, n))
        one.ask.config_set("appendfsync", "everysec")
        made = run(one.url, lambda db: TenantRegistry(db).get(TENANT)).created
        out["register, fsync every second"] = timed(one, n, lambda db: register(TaskRegistry(db), n, n))
        works: dict[str, Callable[[RegistryConnection], Callable[[int], Awaitable[Any]]]] = {
            "read a task": lambda db: lambda i: TaskRegistry(db).task(TENANT, f"task-{i}"),
            "move an alias": lambda db: (
                lambda i: TaskRegistry(db).set_alias(OPERATOR, TENANT, f"task-{i}", "x", {1: 1})
            ),
            "settle a tenant's counts": lambda db: (
                lambda i: db.evaluate(
                    LEASES.text, "settle", _settlement(TENANT, made, f"gateway{i % 300}", batch=i + 1, permits=8)
                )
            ),
            "note 64 busy adapters": lambda db: (
                lambda i: StatusBoard(db).record_digests([f"{i * 64 + k:064d}" for k in range(64)], time.time())
            ),
        }
        for gateways in GATEWAYS:
            taker = run(one.url, lambda db, name=f"of-{gateways}": TenantRegistry(db).create(OPERATOR, name, NO_LIMITS))
            works[f"take a lot of a limit, {gateways} gateways"] = _takes(taker, gateways)
        for name, work in works.items():
            count = n // 5 if "busy" in name else n
            out[name] = timed(one, count, lambda db, work=work, count=count: repeat(count, work(db)))
    return out


COUNTS = "requests:1", "images:1"


def _takes(of: TenantInfo, gateways: int) -> Callable[[RegistryConnection], Callable[[int], Awaitable[Any]]]:
    """Take tokens and permits of a tenant for each gateway in turn."""
    limits = NO_LIMITS.model_dump()
    lot = {"requests": 1, "images": 0, "permits": 0}
    argument = {
        "limits": {name: limits[name] for name in NAMES},
        "needed": lot,
        "wanted": lot,
        "permits": 0,
        "in_flight": 0,
        "tenant": of.tenant,
        "created": of.created,
        "expiry_ms": 10_000,
    }
    return lambda db: lambda i: db.evaluate(LEASES.text, "take", json.dumps(argument | {"gateway": f"{i % gateways}"}))


def _settlement(tenant: str, created: str, gateway: str, *, batch: int, permits: int) -> str:
    argument = {"permits": permits, "in_flight": 0, "batch": batch, "counts": {"requests": 1, "images": 1}}
    return json.dumps(argument | {"tenant": tenant, "created": created, "gateway": gateway, "expiry_ms": 10_000})


def events() -> dict[str, Any]:
    """Measure changes one at a time, 20 per second, and then at full speed, while gateways follow."""
    out: dict[str, Any] = {}
    for followers in FOLLOWERS:
        with server() as one, follower(one.url, followers) as pipe:
            one.ask.config_set("appendfsync", "everysec")  # otherwise the figures would include a slow disk
            before = one.cpu_s()
            issued = run(one.url, lambda db: _paced(TaskRegistry(db), PACED, 0.05))
            heard = _heard(pipe, PACED)
            cpu_s, before = one.cpu_s() - before, one.cpu_s()
            began = time.perf_counter()
            run(one.url, lambda db: register(TaskRegistry(db), PACED, FAST))
            seconds = _heard(pipe, FAST)[-1] - began
            ms = [1e3 * (at - since) for at, since in zip(heard, issued, strict=True)]
            out[f"{followers} followers"] = {
                "until_all_heard_ms": {"p50": statistics.median(ms), "p95": float(np.quantile(ms, 0.95))},
                "one_at_a_time_redis_cpu_us": 1e6 * cpu_s / PACED,
                "flood_changes_per_second": FAST / seconds,
                "flood_redis_cpu_us": 1e6 * (one.cpu_s() - before) / FAST,
            }
    counts = np.array(FOLLOWERS, float)
    for kind in ("one_at_a_time", "flood"):
        cpu = [out[f"{n} followers"][f"{kind}_redis_cpu_us"] for n in FOLLOWERS]
        slope, base = np.polyfit(counts, cpu, 1)
        out[f"{kind}_redis_cpu_us"] = {"a_change": float(base), "a_follower_and_change": float(slope)}
    return out


async def _paced(registry: TaskRegistry, count: int, pause_s: float) -> list[float]:
    issued = []
    for i in range(count):
        issued.append(time.perf_counter())
        await registry.register(OPERATOR, TENANT, f"task-{i}", version(i), [LATEST])
        await asyncio.sleep(pause_s)
    return issued


@contextmanager
def follower(url: str, count: int) -> Iterator[Pipe]:
    """Start a process in which several gateways' tasks follow; it reports when all have received an event."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_follow, args=(url, count, theirs), daemon=True)
    process.start()
    theirs.close()
    ours.recv()
    try:
        yield ours
    finally:
        process.terminate()
        process.join()


def _heard(pipe: Pipe, count: int) -> list[float]:
    pipe.send(count)
    return pipe.recv()


def _follow(url: str, count: int, pipe: Pipe) -> None:
    async def main() -> None:
        seen: dict[str, int] = {}
        done: list[float] = []
        databases = [RegistryConnection(url) for _ in range(count)]

        async def one(log: EventLog) -> None:
            last = {stream: span.newest for stream, span in (await log.spans()).items()}
            started.append(None)
            while True:
                for event in await log.read(last, 2000):
                    last[event.stream] = event.id
                    seen[event.id] = seen.get(event.id, 0) + 1
                    if seen[event.id] == count:
                        done.append(time.perf_counter())  # CLOCK_MONOTONIC is the same in every process

        started: list[None] = []
        tasks = [asyncio.create_task(one(EventLog(database))) for database in databases]
        while len(started) < count:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        pipe.send("ready")
        while True:
            wanted = await asyncio.to_thread(pipe.recv)
            while len(done) < wanted:
                await asyncio.sleep(0.005)
                for task in tasks:
                    if task.done():
                        task.result()
            pipe.send(done[:wanted])
            del done[:wanted]

    with suppress(EOFError):  # the parent closed the pipe
        asyncio.run(main())


def memory() -> dict[str, Any]:
    """Measure Redis with a growing number of tasks, without the streams of events and audit, which are bounded."""
    out: dict[str, Any] = {}
    with server() as one:
        one.ask.config_set("appendfsync", "no")
        empty, there = one.ask.info("memory")["used_memory"], 0
        for count in TASKS:
            run(one.url, lambda db, there=there, count=count: register(TaskRegistry(db), there, count - there))
            there = count
            streams = sum(one.ask.memory_usage(key, samples=0) for key in one.ask.scan_iter("karst:*", _type="stream"))
            used = one.ask.info("memory")["used_memory"] - empty
            out[f"{count} tasks"] = {
                "redis_bytes_a_task": (used - streams) / count,
                "streams_bytes": streams,
                "used_bytes": used,
            }
        tracemalloc.start()
        cached = run(one.url, lambda db: _read(TaskRegistry(db), 1_000))
        out["gateway_cache_bytes_a_task"] = tracemalloc.get_traced_memory()[0] / len(cached)
        tracemalloc.stop()
    with server() as one:
        before = one.ask.info("memory")["used_memory"]
        run(one.url, lambda db: register(TaskRegistry(db), 0, 200, classes=1_000))
        streams = sum(one.ask.memory_usage(key, samples=0) for key in one.ask.scan_iter("karst:*", _type="stream"))
        out["redis_bytes_a_task, 1000 labels"] = (one.ask.info("memory")["used_memory"] - before - streams) / 200
    return out


async def _read(registry: TaskRegistry, count: int) -> list[Any]:
    return [await registry.task(TENANT, f"task-{i}") for i in range(count)]
