"""One Redis: the names of its keys, scripts that change several at once, and calls that fail as the hub's errors.

Scripts name keys that they find in others, so this is one Redis (with its replicas), not a Redis Cluster.
All keys stand under `karst:`; `{tenant}` and `{task}` are names, which hold no colon:

    tenants                     hash    tenant -> JSON {created, limits}
    keys                        hash    id of an API key -> JSON {hash, tenant, role, name, created, expires}
    admins                      set     ids of admin keys
    used                        hash    id of an API key -> when it was used last, in seconds since 1970
    public                      set     `tenant:task` of each task that every tenant may use
    digests                     hash    digest -> how many versions hold it
    gc:{digest}                 string  stands while a file that nobody holds is being removed
    events                      stream  tenant, kind (task, key, tenant), name of each change
    audit                       stream  tenant, JSON of each change
    audit:admins                stream  the same of admins' changes alone, which no tenant can push out
    workers                     hash    worker -> JSON of how it is, see `status`
    workers:at                  zset    worker -> when it wrote that, in seconds since 1970
    active                      zset    tenant -> when it did something, in the last hour, in seconds since 1970
    busy                        zset    digests that a worker used of late -> when, in seconds since 1970
    t:{tenant}:tasks            set     names of the tasks
    t:{tenant}:numbers          hash    task -> its last version number; outlives the task, so none is given twice
    t:{tenant}:task:{task}      hash    see `registry`
    t:{tenant}:bytes            string  bytes of all versions
    t:{tenant}:keys             set     ids of its API keys
    t:{tenant}:shared           set     `tenant:task` of each task that others share with this tenant by name
    t:{tenant}:audit            stream  JSON of each change
    t:{tenant}:rate             hash    see `limits`
    t:{tenant}:flight           hash    see `limits`
    t:{tenant}:settled          hash    see `limits`
    t:{tenant}:counts           hash    requests, images, refused
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError, ResponseError

from ..errors import Unavailable

T = TypeVar("T")
PREFIX = "karst:"
MOST_CONNECTIONS = 64  # of one process; more calls wait for one
PROBE_S = 0.25
QUICK_S = 1.0  # for a read that a request waits for
KEPT_EVENTS = 100_000
KEPT_AUDIT = 100_000  # of a tenant, and of the whole hub

# What every change begins and ends with. entry: the audit's JSON. A key that was revoked while its request came in
# changes nothing.
_CHANGED = """
local function revoked(entry)
  local key = cjson.decode(entry)['key']
  return key ~= '' and redis.call('HEXISTS', 'karst:keys', key) == 0
end

local function changed(tenant, kind, name, entry)
  redis.call('XADD', 'karst:events', 'MAXLEN', '~', EVENTS, '*', 'tenant', tenant, 'kind', kind, 'name', name)
  redis.call('XADD', 'karst:audit', 'MAXLEN', '~', AUDIT, '*', 'tenant', tenant, 'entry', entry)
  if cjson.decode(entry)['role'] == 'admin' then
    redis.call('XADD', 'karst:audit:admins', 'MAXLEN', '~', AUDIT, '*', 'tenant', tenant, 'entry', entry)
  end
  if tenant ~= '' then
    redis.call('XADD', 'karst:t:' .. tenant .. ':audit', 'MAXLEN', '~', AUDIT, '*', 'tenant', tenant, 'entry', entry)
  end
end
""".replace("EVENTS", str(KEPT_EVENTS)).replace("AUDIT", str(KEPT_AUDIT))


class Database:
    """Calls to Redis; every method raises `Unavailable` where it does not answer.

    Once it did not, calls fail at once, and a probe asks until it answers: a Redis that hangs costs the calls that
    were under way, and no others.
    """

    def __init__(self, url: str) -> None:
        """Connects when first asked.

        Args:
            url: of Redis.
        """
        common: dict[str, Any] = {"decode_responses": True, "socket_timeout": 5, "socket_connect_timeout": 2}
        pool = BlockingConnectionPool.from_url(url, max_connections=MOST_CONNECTIONS, timeout=2, **common)
        # Any: with `decode_responses` all that comes back is str, which redis-py's types do not know.
        self.redis: Any = Redis.from_pool(pool)
        self.apart: Any = Redis.from_url(url, **common)  # events and probes: no crowd takes their connections
        self._scripts: dict[str, Any] = {}
        self._probing: asyncio.Task[None] | None = None

    async def do(self, call: Awaitable[T], *, within_s: float | None = None, apart: bool = False) -> T:
        """The answer to a command of `redis` (or of `apart`), or to a pipeline's `execute`.

        Args:
            within_s: the longest wait, shorter than the socket's.
        """
        if self._probing is not None and not apart:
            if asyncio.iscoroutine(call):
                call.close()  # else Python complains that nobody awaited it
            raise Unavailable("the registry does not answer; it is waited for")
        try:
            async with asyncio.timeout(within_s):
                return await call
        except ResponseError as error:  # it answers, and does not want this
            raise Unavailable(f"the registry refused: {type(error).__name__}") from error
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            if self._probing is None and not apart:
                self._probing = asyncio.create_task(self._probe())
            raise Unavailable(f"the registry does not answer: {type(error).__name__}") from error

    async def change(self, script: str, *args: Any) -> Any:
        """Run a script of `registry` or `tenants`: all of it or nothing. It sees `args` as ARGV, and `changed`."""
        return await self.run(_CHANGED + script, *args)

    async def run(self, script: str, *args: Any, within_s: float | None = None) -> Any:
        """Run a script that changes nothing that is remembered elsewhere."""
        known = self._scripts.get(script)
        if known is None:  # sent once, then named by its hash
            known = self._scripts[script] = self.redis.register_script(script)
        return await self.do(known(args=args), within_s=within_s)

    async def note(self, entry: str) -> None:
        """An audit entry of the hub's own, for what is no change of the registry."""
        for stream in ("karst:audit", "karst:audit:admins"):
            await self.do(self.redis.xadd(stream, {"tenant": "", "entry": entry}, maxlen=KEPT_AUDIT))

    async def ping(self) -> None:
        """
        Raises:
            Unavailable: Redis does not answer.
        """
        await self.do(self.redis.ping())

    async def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
        await self.redis.aclose()
        await self.apart.aclose()

    async def _probe(self) -> None:
        try:
            while True:
                try:
                    await self.apart.ping()
                    return  # a lost connection only: closed again within a millisecond
                except (RedisError, OSError):
                    await asyncio.sleep(PROBE_S)
        finally:
            self._probing = None
