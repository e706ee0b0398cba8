"""The connection to Redis: key names, connection pool, typed replies, errors of the hub.

A Lua script may access keys that it reads from other keys. So the registry is one Redis with its replicas, and Redis
Cluster is not supported. All keys start with `karst:`. Names of tenants and tasks contain no colon.

    tenants                     hash    tenant -> JSON {created, limits}
    identity                    string  random id of this registry; the store has a copy (`storage/store.OWNER`)
    layout                      string  `2` once every version has a summary; absent before
    keys                        hash    id of an API key -> JSON of a `KeyRecord`
    admins                      set     ids of admin keys
    used                        hash    id of an API key -> its last use, in seconds since 1970
    published                   zset    `tenant:task` of each task that all tenants may use; all scores are 0
    public                      set     the same, as an older hub has written it; read once into `published`
    digests                     hash    digest -> number of versions that refer to the file
    orphans                     hash    digest of a file that no version refers to -> tenant that it counts against
    collection                  string  exists until the next garbage collection may begin; the collecting gateway
    gc:{digest}                 string  exists while a garbage collection may remove the file
    events, events:access       stream  tenant, kind (task, key, tenant) and name of each change; of keys and tenants
    audit                       stream  tenant and JSON of each change
    audit:admins                stream  the same for changes by admins only
    login:{sha256 of a code}    string  JSON {tenant, admin} of an unused login link; expires
    workers                     hash    worker -> JSON of a `WorkerStatus`
    workers:at                  zset    worker -> time of its last report, in seconds since 1970 by Redis' clock
    active                      zset    tenant -> its last request within an hour, in seconds since 1970
    busy                        zset    digest -> last use by a worker, in seconds since 1970
    t:{tenant}:tasks            set     names of the tenant's tasks
    t:{tenant}:numbers          hash    task -> its last version number; outlives the task, so no number is used twice
    t:{tenant}:floor            string  highest number in `numbers` of names that were dropped there
    t:{tenant}:shares           hash    tenant -> number of tasks that are shared with it; the field `` has the sum
    t:{tenant}:changes          hash    left, at: token bucket of changes
    t:{tenant}:task:{task}      hash    see `models`
    t:{tenant}:bytes            string  size of all versions' files, in bytes
    t:{tenant}:orphans          hash    digest -> size in bytes:time from which a collection may remove the file
    t:{tenant}:deleted          string  size of all orphans, in bytes
    t:{tenant}:registry         string  bytes of the tenant's tasks in this registry, as their fields `b` count them
    t:{tenant}:staged:{id}      hash    versions of a task that an import is about to create; expires
    t:{tenant}:keys             set     ids of the tenant's API keys
    t:{tenant}:shared           set     `tenant:task` of each task that another tenant shares with this tenant by name
    t:{tenant}:audit            stream  JSON of each change
    t:{tenant}:rate, :flight, :settled  see `admission/rate_limits`; hashes
    t:{tenant}:counts           hash    requests, images, refused
    t:{tenant}:usage_bytes      string  size of all records in `data:{task}:usage`, in bytes
    usage-calls:{gateway}       string  number of the gateway's last call that added counts; expires
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.connection import Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ...admission.quotas import AUDIT_ENTRIES, CHANGES_PER_MINUTE
from ...errors import LimitReached, Unauthenticated, Unavailable
from ...urls import check_redis_url
from .errors import NotPrimary, explain
from .primary import CONNECTIONS, Failovers
from .scripts import ChangeReply, LuaScript

logger = logging.getLogger(__name__)

T = TypeVar("T")
MAX_CONNECTIONS = 64  # per process; further commands wait for a free connection
POOL_TIMEOUT_S = 2
CONNECT_TIMEOUT_S = 2
SOCKET_TIMEOUT_S = 5
PROBE_INTERVAL_S = 0.25
PING_TIMEOUT_S = 1.0
READ_TIMEOUT_S = 1.0  # for a read that a request waits for
# Retries after an answer of a server that is not the primary: 0.75 s in all, the time of a short failover.
RETRIES, FIRST_PAUSE_S, LONGEST_PAUSE_S = 4, 0.05, 0.4
CHANGES_RETRY_S = 2  # the time of twenty changes
LOG_INTERVAL_S = 30.0  # between two log lines with the same reason
# Errors of a command whose connection may be sound: no reply in time, or no free connection in time.
SLOW = (TimeoutError, RedisTimeoutError)


class RegistryConnection:
    """A connection pool to the registry's Redis. Every method raises `Unavailable` if Redis does not answer.

    After a lost connection, commands fail at once until a probe succeeds. Otherwise each request would wait for the
    timeout of a Redis that hangs. A command without a reply in time fails alone: the command may be large, or this
    process may be busy. A ping then decides whether Redis hangs. The log has Redis's own words and the remedy; a client
    sees neither.
    """

    def __init__(self, url: str, *, quiet: bool = False, audit_days: int | None = None, patience: float = 1) -> None:
        """Prepare the pool. The first command connects.

        Args:
            quiet: log nothing, because the caller shows every error itself.
            audit_days: changes remove older audit entries; None: they remove none for their age.
            patience: factor of every time limit, for machines whose processes stand still for seconds.

        Raises:
            ValueError: the URL cannot name a Redis server; the message has no password.
        """
        check_redis_url(url)
        self._url = url
        self._audit_s = None if audit_days is None else audit_days * 86_400
        self._patience = patience
        self._failovers = Failovers()
        options: dict[str, Any] = {
            "decode_responses": True,
            "socket_timeout": SOCKET_TIMEOUT_S * patience,
            "socket_connect_timeout": CONNECT_TIMEOUT_S * patience,
            "failovers": self._failovers,
            **parse_url(url),
        }
        options["connection_class"] = CONNECTIONS[options.get("connection_class", Connection)]
        pause = ExponentialBackoff(cap=LONGEST_PAUSE_S, base=FIRST_PAUSE_S / 2)
        retry = Retry(pause, RETRIES, (NotPrimary,))
        self.redis = Redis.from_pool(
            BlockingConnectionPool(
                max_connections=MAX_CONNECTIONS, timeout=POOL_TIMEOUT_S * patience, retry=retry, **options
            )
        )
        # For change events and probes; otherwise many requests could take all connections from them. It does not retry:
        # the reader of change events must know that it lost its server.
        self.dedicated = Redis.from_pool(ConnectionPool(**options))
        self._scripts: dict[str, AsyncScript] = {}
        self._probe: asyncio.Task[None] | None = None
        self._ping: asyncio.Task[None] | None = None
        self._refusal: str | None = None
        self._quiet = quiet
        self._logged: tuple[str, float] = ("", 0.0)

    @property
    def refusal(self) -> str | None:
        """Why the hub refuses every change now, with the remedy, for an operator; None if it accepts changes."""
        return self._refusal

    def refuse_changes(self, reason: str | None) -> None:
        """Refuse every change until a call with None, because Redis could lose it. The log has the reason."""
        if reason is not None:
            self._log(reason)
        elif self._refusal is not None:
            logger.warning("registry: Redis keeps every key again, so the hub accepts changes again")
        self._refusal = reason

    def drop_connections(self) -> None:
        """Replace each connection before its next command. The new ones look the address up again."""
        self._failovers.count += 1

    async def execute(self, command: Awaitable[T], *, timeout_s: float | None = None, dedicated: bool = False) -> T:
        """Await a command of `redis` or `dedicated`, or a pipeline's `execute`, and return its reply.

        Args:
            timeout_s: shorter than the socket timeout; times `patience`.
            dedicated: the command belongs to `dedicated`; it runs even while a probe waits for Redis.
        """
        if self._probe is not None and not dedicated:
            if asyncio.iscoroutine(command):
                command.close()  # otherwise Python warns that it was never awaited
            raise Unavailable("The registry (Redis) does not answer. Retry later.")
        try:
            with cancellations_kept():
                async with asyncio.timeout(None if timeout_s is None else timeout_s * self._patience):
                    return await command
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            self._log(explain(error, self._url))
            if isinstance(error, ResponseError) or (isinstance(error, NotPrimary) and error.allows_reads):
                message = "The registry (Redis) refused a command. The hub's log has the reason. Retry later."
                raise Unavailable(message) from error
            if not dedicated:
                self._suspect(error)
            raise Unavailable("The registry (Redis) does not answer. Retry later.") from error

    async def evaluate(self, text: str, *arguments: str | float, timeout_s: float | None = None) -> object:
        """Run a Lua script with these arguments as ARGV. Redis gets its text once, then only its SHA-1."""
        script = self._scripts.get(text)
        if script is None:
            script = self._scripts[text] = self.redis.register_script(text)
        return await self.execute(script(args=arguments), timeout_s=timeout_s)

    async def call(self, script: LuaScript, function: str, *, timeout_s: float | None = None, **argument: Any) -> str:
        """Call a function of a script with one JSON object. Return its reply, a JSON text."""
        return as_text(await self.evaluate(script.text, function, json.dumps(argument), timeout_s=timeout_s))

    async def change(
        self, script: LuaScript, function: str, *, texts: Sequence[str] = (), **argument: Any
    ) -> ChangeReply:
        """Call a function that changes the registry completely or not at all.

        Args:
            texts: further arguments, as ARGV[3] and so on. Redis does not parse them, so they may be long.

        Raises:
            Unauthenticated: the caller's key was revoked while the request was in flight.
            LimitReached: the tenant made too many changes within a minute.
            Unavailable: Redis does not answer, or it could lose the change.
        """
        if self._refusal is not None:
            self._log(self._refusal)
            raise Unavailable("The registry (Redis) accepts no changes now. The hub's log has the reason. Retry later.")
        limits = {"max_changes": CHANGES_PER_MINUTE, "max_audit": AUDIT_ENTRIES, "audit_s": self._audit_s}
        text = as_text(await self.evaluate(script.text, function, json.dumps(argument | limits), *texts))
        reply = ChangeReply.model_validate_json(text)
        if reply.outcome == "revoked":
            raise Unauthenticated("The API key was revoked while the request was in flight. Use another key.")
        if reply.limit == "changes_per_minute":
            message = f"this tenant made {reply.maximum} changes within a minute, its limit; make fewer, or wait"
            raise LimitReached.at(reply.limit, message, retry_after_s=CHANGES_RETRY_S)
        return reply

    async def close(self) -> None:
        """Stop the probe and the ping, and close every connection."""
        tasks = [task for task in (self._ping, self._probe) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)  # otherwise they could open a connection after this call
        await self.redis.aclose()
        await self.dedicated.aclose()

    def _suspect(self, error: RedisError | OSError) -> None:
        """Fail commands at once from now on if the connection is lost; ping if only a reply is missing."""
        if self._probe is not None:
            return
        if not isinstance(error, SLOW) and not isinstance(error.__cause__, SLOW):
            self._probe = asyncio.create_task(self._probe_until_available())
        elif self._ping is None:
            self._ping = asyncio.create_task(self._ping_redis())

    async def _ping_redis(self) -> None:
        try:
            # Twice: the first ping may come late because this process was busy.
            answers = await self._answers() or await self._answers()
            if not answers and self._probe is None:
                self._probe = asyncio.create_task(self._probe_until_available())
        finally:
            self._ping = None

    async def _probe_until_available(self) -> None:
        try:
            while not await self._answers():
                await asyncio.sleep(PROBE_INTERVAL_S)
        finally:
            self._probe = None

    async def _answers(self) -> bool:
        """Return whether Redis answers within the time limit of a ping, on a connection that no request uses."""
        try:
            with cancellations_kept():
                async with asyncio.timeout(PING_TIMEOUT_S * self._patience):
                    # A read: Redis answers others, such as PING, also while it loads its data.
                    await self.dedicated.exists("karst:tenants")
            return True
        except ResponseError:  # it answers, and the next command shows its refusal
            return True
        except (RedisError, OSError):
            return False

    def _log(self, reason: str) -> None:
        """Log a reason once, and once more every 30 s while it lasts."""
        last, logged_at = self._logged
        now = time.monotonic()
        if not self._quiet and (reason != last or now - logged_at > LOG_INTERVAL_S):
            self._logged = reason, now
            logger.error("registry: %s", reason)


def reason_of(error: Unavailable, url: str) -> str:
    """Return why the registry did not do a command, and the remedy, for the operator alone."""
    return error.detail if error.__cause__ is None else explain(error.__cause__, url)


@contextmanager
def cancellations_kept() -> Iterator[None]:
    """Raise `CancelledError` at the end if the current task was cancelled meanwhile and the exception got lost.

    redis-py 8.1.0 on Python 3.11 drops about one in sixteen cancellations at random moments. Without this, a request
    whose client has gone, or an endless loop, would then run on for ever.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


def tenant_key(tenant: str, name: str) -> str:
    """Return the name of one of a tenant's keys."""
    return f"karst:t:{tenant}:{name}"


def as_text(reply: object) -> str:
    """Return a reply that is a text. With `decode_responses` redis-py returns str and never bytes."""
    if not isinstance(reply, str):
        raise TypeError(f"Redis returned {type(reply).__name__}, not a text")
    return reply


def as_optional_text(reply: object) -> str | None:
    """Return a reply that is a text or nothing."""
    return None if reply is None else as_text(reply)


def as_integer(reply: object) -> int:
    """Return a reply that is an integer, or a boolean that encodes one."""
    if not isinstance(reply, int):
        raise TypeError(f"Redis returned {type(reply).__name__}, not an integer")
    return int(reply)


def as_texts(reply: object) -> list[str]:
    """Return a reply that is a list or a set of texts."""
    if not isinstance(reply, list | set):
        raise TypeError(f"Redis returned {type(reply).__name__}, not a list or a set")
    return [as_text(value) for value in reply]


def as_texts_of(reply: object) -> list[list[str]]:
    """Return a reply that is a list of lists of texts."""
    if not isinstance(reply, list):
        raise TypeError(f"Redis returned {type(reply).__name__}, not a list")
    return [as_texts(entry) for entry in reply]


def as_optional_texts(reply: object) -> list[str | None]:
    """Return a reply that is a list of texts or nothing, such as that of HMGET."""
    if not isinstance(reply, list):
        raise TypeError(f"Redis returned {type(reply).__name__}, not a list")
    return [as_optional_text(value) for value in reply]


def as_hash(reply: object) -> dict[str, str]:
    """Return a reply that is a hash."""
    if not isinstance(reply, dict):
        raise TypeError(f"Redis returned {type(reply).__name__}, not a hash")
    return {as_text(name): as_text(value) for name, value in reply.items()}


def as_entries(reply: object) -> list[tuple[str, dict[str, str]]]:
    """Return a reply that is a list of a stream's entries: (id, fields)."""
    if not isinstance(reply, list):
        raise TypeError(f"Redis returned {type(reply).__name__}, not a list")
    return [(as_text(id), as_hash(fields)) for id, fields in reply]
