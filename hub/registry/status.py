"""The hub's current state: each worker reports its status every two seconds, and an admin reads all of it in one call.

A report expires after ten seconds. So the state covers any number of nodes and needs only HTTP and an admin key.
Prometheus metrics are the place for history.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from ..admin_schemas import ErrorCount, HubStatus, TaskRate, TenantStatus, WorkerStatus
from .redis.connection import RegistryConnection, as_hash, as_optional_texts, as_texts
from .redis.scripts import STATUS
from .tenants import TenantRegistry

REPORT_EXPIRY_S = 10
MAX_TASKS = 20  # in the hub's list of the busiest tasks
MAX_TENANTS = 100  # in the hub's list of active tenants, the latest first
ACTIVE_S = 60  # a tenant is active for so long after a request
MAX_RECENT_DIGESTS = 10_000
ERROR_MINUTES = 60  # minutes whose errors count, this minute included


class StatusBoard:
    """Reports of workers, and errors of gateways. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection
        self._redis = connection.redis

    async def report(self, status: WorkerStatus) -> None:
        """Store a worker's status and delete expired reports."""
        body = status.model_dump_json()
        await self._connection.call(STATUS, "report", worker=status.worker, report=body, expiry_s=REPORT_EXPIRY_S)

    async def workers(self) -> list[WorkerStatus]:
        """Return every worker with an unexpired report, by name."""
        oldest = await self._now_s() - REPORT_EXPIRY_S
        command = self._redis.zrangebyscore("karst:workers:at", f"({oldest}", "+inf")
        names = as_texts(await self._connection.execute(command))
        if not names:
            return []
        reports = as_optional_texts(await self._connection.execute(self._redis.hmget("karst:workers", names)))
        # A worker of a newer hub may report more fields.
        workers = [WorkerStatus.model_validate_json(text, extra="ignore") for text in reports if text is not None]
        return sorted(workers, key=lambda worker: worker.worker)

    async def read(self, tenants: TenantRegistry) -> HubStatus:
        """Return workers, the busiest tasks, and the tenants of the last minute."""
        workers = await self.workers()
        oldest = await self._now_s() - ACTIVE_S
        command = self._redis.zrevrangebyscore("karst:active", "+inf", oldest, start=0, num=MAX_TENANTS)
        names = as_texts(await self._connection.execute(command))
        active = [
            TenantStatus(tenant=name, images_in_flight=images, counted=counted)
            for name, (images, counted) in zip(names, await tenants.activity(names), strict=True)
            if counted is not None
        ]
        refusal = self._connection.refusal
        return HubStatus(
            workers=workers,
            tasks=busiest_tasks(workers),
            tenants=active,
            errors=await self.errors(),
            changes_refused=refusal,
        )

    async def count_errors(self, errors: Mapping[tuple[int, str], int]) -> None:
        """Add errors of this minute.

        Args:
            errors: (HTTP status, kind) -> number; kinds come from the hub, never from clients.
        """
        named = {f"{status} {kind}": number for (status, kind), number in errors.items()}
        await self._connection.call(STATUS, "count_errors", errors=named, expiry_s=60 * (ERROR_MINUTES + 1))

    async def errors(self) -> list[ErrorCount]:
        """Return the errors of the last hour, the most frequent kind first."""
        now = await self._now_s() // 60
        minutes = range(now - ERROR_MINUTES + 1, now + 1)
        pipeline = self._redis.pipeline(transaction=False)
        for minute in minutes:
            pipeline.hgetall(f"karst:errors:{minute}")
        counts, last = Counter[str](), dict[str, int]()
        for minute, found in zip(minutes, await self._connection.execute(pipeline.execute()), strict=True):
            for name, number in as_hash(found).items():
                counts[name] += int(number)
                last[name] = minute
        return [
            ErrorCount(
                status=int(name.partition(" ")[0]),
                kind=name.partition(" ")[2],
                count=number,
                last=datetime.fromtimestamp(60 * last[name], UTC).isoformat(),
            )
            for name, number in counts.most_common()
        ]

    async def recent_digests(self, limit: int) -> list[str]:
        """Return the digests of adapters that workers used, the latest first."""
        return as_texts(await self._connection.execute(self._redis.zrange("karst:busy", 0, limit - 1, desc=True)))

    async def record_digests(self, digests: Iterable[str], now_s: float) -> None:
        """Store that a worker used these adapters, at a time in seconds since 1970."""
        if times := dict.fromkeys(digests, now_s):
            await self._connection.execute(self._redis.zadd("karst:busy", times, gt=True))
            command = self._redis.zremrangebyrank("karst:busy", 0, -MAX_RECENT_DIGESTS - 1)
            await self._connection.execute(command)

    async def _now_s(self) -> int:
        """Return the time by Redis' clock, which all nodes share, in seconds since 1970."""
        seconds, _ = await self._connection.execute(self._redis.time())
        return seconds


def busiest_tasks(workers: Sequence[WorkerStatus]) -> list[TaskRate]:
    """Return the tasks with the most images per second over all workers, the busiest first."""
    rates: defaultdict[tuple[str, str], float] = defaultdict(float)
    for worker in workers:
        for task in worker.tasks:
            rates[task.tenant, task.task] += task.images_per_second
    busiest = sorted(rates.items(), key=lambda item: item[1], reverse=True)[:MAX_TASKS]
    return [TaskRate(tenant=tenant, task=task, images_per_second=rate) for (tenant, task), rate in busiest]
