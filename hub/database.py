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
    t:{tenant}:counts           hash    requests, images, refused
"""

from collections.abc import Awaitable
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from .errors import Unavailable

T = TypeVar("T")
PREFIX = "karst:"
KEPT_EVENTS = 100_000
KEPT_AUDIT = 100_000  # of a tenant, and of the whole hub

# What every change ends with. entry: the audit's JSON.
_CHANGED = """
local function changed(tenant, kind, name, entry)
  redis.call('XADD', 'karst:events', 'MAXLEN', '~', EVENTS, '*', 'tenant', tenant, 'kind', kind, 'name', name)
  redis.call('XADD', 'karst:audit', 'MAXLEN', '~', AUDIT, '*', 'tenant', tenant, 'entry', entry)
  if tenant ~= '' then
    redis.call('XADD', 'karst:t:' .. tenant .. ':audit', 'MAXLEN', '~', AUDIT, '*', 'tenant', tenant, 'entry', entry)
  end
end
""".replace("EVENTS", str(KEPT_EVENTS)).replace("AUDIT", str(KEPT_AUDIT))


class Database:
    """Calls to Redis; every method raises `Unavailable` where it does not answer."""

    def __init__(self, url: str) -> None:
        """Connects when first asked. Its time limits bound every call; `Registry.events` waits below them."""
        # Any: with `decode_responses` all that comes back is str, which redis-py's types do not know.
        self.redis: Any = Redis.from_url(url, decode_responses=True, socket_timeout=5, socket_connect_timeout=2)
        self._scripts: dict[str, Any] = {}

    async def do(self, call: Awaitable[T]) -> T:
        """The answer to a command of `redis`, or to a pipeline's `execute`."""
        try:
            return await call
        except (RedisError, OSError) as error:
            raise Unavailable(f"the registry does not answer: {type(error).__name__}") from error

    async def change(self, script: str, *args: Any) -> Any:
        """Run a script of `registry` or `tenants`: all of it or nothing. It sees `args` as ARGV, and `changed`."""
        return await self.run(_CHANGED + script, *args)

    async def run(self, script: str, *args: Any) -> Any:
        """Run a script that changes nothing that is remembered elsewhere."""
        known = self._scripts.setdefault(script, self.redis.register_script(script))  # sent once, then named by hash
        return await self.do(known(args=args))

    async def note(self, entry: str) -> None:
        """An audit entry of the hub's own, for what is no change of the registry."""
        await self.do(self.redis.xadd("karst:audit", {"tenant": "", "entry": entry}, maxlen=KEPT_AUDIT))

    async def ping(self) -> None:
        """
        Raises:
            Unavailable: Redis does not answer.
        """
        await self.do(self.redis.ping())

    async def close(self) -> None:
        await self.redis.aclose()
