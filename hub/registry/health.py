"""Health of the registry: whether its Redis keeps every key, and whether keys are missing."""

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import Conflict, Unavailable
from .redis.connection import RegistryConnection, as_optional_text, as_text, as_texts, tenant_key
from .redis.scans import scan_hash

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 5.0
SAFE_POLICY = "noeviction"
IDENTITY = "karst:identity"
COUNTS_PER_READ = 1000
CENSUS_ATTEMPTS = 3


@dataclass(frozen=True)
class ServerFacts:
    """Facts about a Redis server, from its INFO.

    Attributes:
        run_id: random id of the server process.
        mode: `standalone`, `cluster` or `sentinel`.
        primary: `host:port` of the primary that this server replicates; None for a primary.
        policy: its maxmemory-policy; '' if unknown.
        evicted: keys that the server has evicted since its start.
    """

    run_id: str
    mode: str
    primary: str | None
    policy: str
    evicted: int

    @classmethod
    def parse(cls, info: Mapping[str, object]) -> "ServerFacts":
        """Return the facts of an INFO reply. A server that is only similar to Redis may lack some."""
        replica = info.get("role") in ("slave", "replica")
        return cls(
            run_id=str(info.get("run_id", "")),
            mode=str(info.get("redis_mode", "standalone")),
            primary=f"{info.get('master_host')}:{info.get('master_port')}" if replica else None,
            policy=str(info.get("maxmemory_policy", "")),
            evicted=int(str(info.get("evicted_keys", 0))),
        )

    def fault(self) -> str | None:
        """Return why a hub must not start with this server, and the remedy; None if it may."""
        if self.mode == "sentinel":
            return (
                "This server is a Redis Sentinel, which the hub does not support. Name one address that always leads "
                "to the primary, such as a service or a TCP proxy that follows Sentinel."
            )
        if self.mode == "cluster":
            return "This server runs in cluster mode, which the hub does not support. Use one server without it."
        if self.primary is not None:
            return (
                f"This server is a replica of {self.primary} and refuses changes. "
                "Name the primary, or an address that follows the primary."
            )
        return self.eviction()

    def eviction(self) -> str | None:
        """Return why this server may lose keys, and the remedy; None if it keeps all."""
        if self.policy in ("", SAFE_POLICY):
            return None
        return (
            f"The maxmemory-policy of this Redis is {self.policy}. With memory short it would evict tenants, API keys "
            f"and tasks. Set it to {SAFE_POLICY}: `CONFIG SET maxmemory-policy {SAFE_POLICY}` and in redis.conf, or in "
            f"the parameters of a managed Redis. Keys that it has evicted since its start: {self.evicted}."
        )


async def read_facts(connection: RegistryConnection) -> ServerFacts:
    """Return the facts about the registry's server.

    Raises:
        Unavailable: Redis does not answer, or its user may not call INFO.
    """
    return ServerFacts.parse(await connection.execute(connection.dedicated.info(), dedicated=True))


class RegistryWatch:
    """Watch of the registry's Redis while a gateway runs: a policy that evicts, a failover, another server."""

    def __init__(
        self,
        connection: RegistryConnection,
        on_other_server: Callable[[], None],
        on_check: Callable[[bool], None] | None = None,
    ) -> None:
        """
        Args:
            on_other_server: called when another Redis process answers: after a failover it may lack the last changes.
            on_check: called after each check of `run`, with whether changes are refused now.
        """
        self._connection = connection
        self._on_other_server = on_other_server
        self._on_check = on_check
        self._run_id: str | None = None

    async def run(self) -> None:
        """Check every five seconds until cancelled."""
        while True:
            try:
                await self.check()
            except Unavailable:
                pass  # the connection has logged the reason
            except Exception:
                logger.exception("the check of the registry failed")
            if self._on_check is not None:  # also without an answer: the last state holds, and metrics need a value
                self._on_check(self._connection.refusal is not None)
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def check(self) -> None:
        """Check once. Refuse changes while the policy evicts; drop connections that lead to a replica.

        Raises:
            Unavailable: Redis does not answer.
        """
        facts = await read_facts(self._connection)
        if facts.primary is not None:  # demoted while the connections stayed open
            self._connection.drop_connections()
            facts = await read_facts(self._connection)
        self._connection.refuse_changes(facts.eviction())
        if self._run_id not in (None, facts.run_id):
            self._on_other_server()
        self._run_id = facts.run_id


class RegistryIntegrity:
    """Signs that keys of the registry are missing. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection
        self._redis = connection.redis

    async def identity(self) -> str | None:
        """Return the random id of this registry; None before the first `make_identity` and after a loss of its keys."""
        return as_optional_text(await self._connection.execute(self._redis.get(IDENTITY)))

    async def make_identity(self) -> str:
        """Return the id of this registry. Make one if there is none."""
        await self._connection.execute(self._redis.set(IDENTITY, uuid.uuid4().hex, nx=True))
        return as_text(await self._connection.execute(self._redis.get(IDENTITY)))

    async def has_versions(self) -> bool:
        """Return whether a version of any tenant exists."""
        return bool(await self._connection.execute(self._redis.exists("karst:digests")))

    async def check_complete(self) -> None:
        """Check that no key was evicted, and that the versions agree with the index of their files.

        Raises:
            Conflict: keys may be missing; the message says which sign was found.
        """
        facts = await read_facts(self._connection)
        if (fault := facts.eviction()) is not None:
            raise Conflict(f"The registry may have lost keys. {fault}")
        if facts.evicted:
            raise Conflict(
                f"The registry may have lost keys: its Redis has evicted {facts.evicted} keys since its start. Restore "
                "the registry from a backup. If it lost nothing, call CONFIG RESETSTAT in Redis, and collect again."
            )
        for _ in range(CENSUS_ATTEMPTS):  # a change between two reads looks like a gap
            versions, claims = await self._count_versions(), await self._sum_of("karst:digests")
            if versions == claims:
                return
        raise Conflict(
            f"The registry has lost keys: its tasks have {versions} versions, but its index of files has {claims}. "
            "Restore the registry from a backup."
        )

    async def check_images(self) -> None:
        """Check that the index of images knows at least the images that the tenants' totals count.

        Raises:
            Conflict: keys may be missing, so images of datasets would look like garbage.
        """
        for _ in range(CENSUS_ATTEMPTS):  # a change between two reads looks like a gap
            listed = 0
            tenants = as_texts(await self._connection.execute(self._redis.hkeys("karst:tenants")))
            for tenant in tenants:
                command = self._redis.get(tenant_key(tenant, "images"))
                listed += int(as_optional_text(await self._connection.execute(command)) or 0)
            held = await self._sum_of("karst:images")
            if held >= listed:
                return
        raise Conflict(
            f"The registry has lost keys: its datasets have {listed} images, but its index of files has {held}. "
            "Restore the registry from a backup."
        )

    async def _sum_of(self, key: str) -> int:
        """Return the sum of a hash's values."""
        counts = scan_hash(self._connection, key, COUNTS_PER_READ)
        return sum([int(count) async for _, count in counts])

    async def _count_versions(self) -> int:
        """Return the number of versions of all tasks of all tenants."""
        total = 0
        for tenant in as_texts(await self._connection.execute(self._redis.hkeys("karst:tenants"))):
            members = self._redis.smembers(tenant_key(tenant, "tasks"))
            tasks = as_texts(await self._connection.execute(members))
            for start in range(0, len(tasks), COUNTS_PER_READ):
                pipeline = self._redis.pipeline(transaction=False)
                for task in tasks[start : start + COUNTS_PER_READ]:
                    pipeline.hget(tenant_key(tenant, f"task:{task}"), "n")
                total += sum(int(count or 0) for count in await self._connection.execute(pipeline.execute()))
        return total
