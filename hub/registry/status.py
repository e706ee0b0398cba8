"""What a hub does at this moment: each worker writes it down every two seconds, an admin reads it all in one call.

    workers        hash    worker -> JSON of `WorkerStatus`
    workers:at     zset    worker -> when it wrote, in seconds since 1970 by Redis' clock
    active         zset    tenant -> when a gateway last counted something for it (see `limits`)

A worker that has not written for ten seconds is gone. So this works over any number of nodes, and through HTTP with an
admin key alone; what Prometheus keeps for weeks is in `observability.metrics`.
"""

from collections import Counter
from collections.abc import Sequence

from ..schemas import HubStatus, TaskRate, TenantStatus, WorkerStatus
from .connection import Database
from .tenants import Tenants

MOST_TASKS = 20
MOST_TENANTS = 100  # the ones active last
ACTIVE_S = 60

# ARGV: worker, its JSON ('' to leave)
_TELL = """
local now = tonumber(redis.call('TIME')[1])
for _, name in ipairs(redis.call('ZRANGEBYSCORE', 'karst:workers:at', '-inf', now - LOST)) do
  redis.call('HDEL', 'karst:workers', name)
  redis.call('ZREM', 'karst:workers:at', name)
end
if ARGV[1] == '' then return redis.call('HVALS', 'karst:workers') end
if ARGV[2] == '' then
  redis.call('HDEL', 'karst:workers', ARGV[1])
  redis.call('ZREM', 'karst:workers:at', ARGV[1])
else
  redis.call('HSET', 'karst:workers', ARGV[1], ARGV[2])
  redis.call('ZADD', 'karst:workers:at', now, ARGV[1])
end
""".replace("LOST", "10")


class Board:
    """The place in Redis where workers write how they are. Every method raises `Unavailable` where it is away."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def tell(self, status: WorkerStatus) -> None:
        """This worker is so now; who has not told for ten seconds is taken off."""
        await self._db.run(_TELL, status.worker, status.model_dump_json())

    async def leave(self, worker: str) -> None:
        """This worker stops."""
        await self._db.run(_TELL, worker, "")

    async def workers(self) -> list[WorkerStatus]:
        """Every worker that is there, by name."""
        found = await self._db.run(_TELL, "", "")
        # One of another version of the hub may have more to tell.
        told = [WorkerStatus.model_validate_json(text, extra="ignore") for text in found]
        return sorted(told, key=lambda worker: worker.worker)

    async def read(self, tenants: Tenants) -> HubStatus:
        """Workers, and the tenants that did something in the last minute, at most a hundred."""
        workers = await self.workers()
        seconds, _ = await self._db.do(self._db.redis.time())
        names = await self._db.do(
            self._db.redis.zrevrangebyscore("karst:active", "+inf", seconds - ACTIVE_S, start=0, num=MOST_TENANTS)
        )
        return HubStatus(workers=workers, tasks=busiest(workers), tenants=await self._tenants(tenants, names))

    async def _tenants(self, tenants: Tenants, names: Sequence[str]) -> list[TenantStatus]:
        used = await tenants.in_use(names)
        return [
            TenantStatus(tenant=name, images_in_flight=flight, counted=counted)
            for name, (flight, counted) in zip(names, used, strict=True)
            if counted is not None
        ]


def busiest(workers: Sequence[WorkerStatus]) -> list[TaskRate]:
    """Tasks over all workers, the busiest first."""
    rates: Counter[tuple[str, str]] = Counter()
    for worker in workers:
        for task in worker.tasks:
            rates[task.tenant, task.task] += task.images_per_second  # type: ignore[assignment]
    return [TaskRate(tenant=t, task=name, images_per_second=n) for (t, name), n in rates.most_common(MOST_TASKS)]
