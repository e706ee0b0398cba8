"""The truth about tenants, tasks, versions, aliases and keys, in Redis.

Every change is one Lua script: it happens completely or not at all, and appends an event that names the task.
Redis keys (all under `karst:`; `{tenant}` is the tenant's name):

    keys                        hash    sha256 of an API key -> JSON {tenant, role, ...}: the way from key to tenant
    events                      stream  tenant, task of each change
    busy                        zset    digests that a worker used of late -> when, in seconds since 1970
    t:{tenant}:tasks            set     names of the tasks
    t:{tenant}:numbers          hash    task -> its last version number; outlives the task, so none is given twice
    t:{tenant}:task:{task}      hash    v:N -> JSON of version N, d:DIGEST -> N, a:ALIAS -> JSON {N: weight}
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from .errors import Conflict, FieldProblem, InvalidRequest, NotFound, Unavailable
from .schemas import LATEST, TaskInfo, TaskSummary, VersionInfo

PREFIX = "karst:"
EVENTS = PREFIX + "events"
KEYS = PREFIX + "keys"
BUSY = PREFIX + "busy"
KEPT_BUSY = 10_000
KEPT_EVENTS = 100_000

# KEYS: tasks, numbers, task, events. ARGV: tenant, task, digest, version JSON without its number, aliases...
_REGISTER = """
local number = redis.call('HGET', KEYS[3], 'd:' .. ARGV[3])
local created = 0
if not number then
  created = 1
  number = redis.call('HINCRBY', KEYS[2], ARGV[2], 1)
  redis.call('SADD', KEYS[1], ARGV[2])
  redis.call('HSET', KEYS[3], 'd:' .. ARGV[3], number, 'v:' .. number, ARGV[4])
end
for i = 5, #ARGV do
  redis.call('HSET', KEYS[3], 'a:' .. ARGV[i], '{"' .. number .. '":1}')
end
redis.call('XADD', KEYS[4], 'MAXLEN', '~', KEPT, '*', 'tenant', ARGV[1], 'task', ARGV[2])
return {tonumber(number), created, redis.call('HGET', KEYS[3], 'v:' .. number)}
""".replace("KEPT", str(KEPT_EVENTS))

# KEYS: task, events. ARGV: tenant, task, alias, JSON {number: weight}, numbers...
_SET_ALIAS = """
if redis.call('EXISTS', KEYS[1]) == 0 then return -1 end
for i = 5, #ARGV do
  if redis.call('HEXISTS', KEYS[1], 'v:' .. ARGV[i]) == 0 then return tonumber(ARGV[i]) end
end
redis.call('HSET', KEYS[1], 'a:' .. ARGV[3], ARGV[4])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', KEPT, '*', 'tenant', ARGV[1], 'task', ARGV[2])
return redis.call('HGETALL', KEYS[1])
""".replace("KEPT", str(KEPT_EVENTS))

# KEYS: tasks, task, events. ARGV: tenant, task
_DELETE_TASK = """
local gone = redis.call('DEL', KEYS[2])
redis.call('SREM', KEYS[1], ARGV[2])
if gone == 1 then
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', KEPT, '*', 'tenant', ARGV[1], 'task', ARGV[2])
end
return gone
""".replace("KEPT", str(KEPT_EVENTS))

# KEYS: task, events. ARGV: tenant, task, number
_DELETE_VERSION = """
local version = redis.call('HGET', KEYS[1], 'v:' .. ARGV[3])
if not version then return 'absent' end
local fields = redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
  if string.sub(fields[i], 1, 2) == 'a:' and cjson.decode(fields[i + 1])[ARGV[3]] then
    return string.sub(fields[i], 3)
  end
end
redis.call('HDEL', KEYS[1], 'v:' .. ARGV[3], 'd:' .. cjson.decode(version)['digest'])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', KEPT, '*', 'tenant', ARGV[1], 'task', ARGV[2])
return ''
""".replace("KEPT", str(KEPT_EVENTS))


@dataclass(frozen=True)
class Task:
    """A task as the registry has it: version number -> version, alias -> {number: weight}, both in order."""

    name: str
    versions: Mapping[int, VersionInfo]
    aliases: Mapping[str, Mapping[int, int]]

    @property
    def current(self) -> VersionInfo:
        """The version that `latest` points at."""
        return self.versions[max(self.aliases.get(LATEST) or self.versions)]

    def targets(self, reference: str) -> Mapping[int, int]:
        """What a version's number or an alias stands for: number -> weight.

        Raises:
            NotFound: neither a version nor an alias of this task.
        """
        number = {str(n): n for n in self.versions}.get(reference)
        if number is not None:
            return {number: 1}
        if reference in self.aliases:
            return self.aliases[reference]
        known = [*map(str, self.versions), *self.aliases]
        message = f"task {self.name!r} has no version or alias {reference!r}; it has {', '.join(known)}"
        raise NotFound(message, [FieldProblem("version", message)])

    def version(self, number: int) -> VersionInfo:
        """
        Raises:
            NotFound: no such version.
        """
        return self.versions[next(iter(self.targets(str(number))))]

    def info(self) -> TaskInfo:
        return TaskInfo(
            task=self.name,
            labels=self.current.labels,
            versions=list(self.versions.values()),
            aliases={alias: dict(targets) for alias, targets in self.aliases.items()},
        )

    def summary(self) -> TaskSummary:
        info = self.info()
        latest = info.aliases.get(LATEST)
        return TaskSummary(
            task=self.name, latest=max(latest) if latest else None, classes=len(info.labels), aliases=info.aliases
        )


@dataclass(frozen=True)
class Event:
    """A change: which task of which tenant, and where it stands in the stream."""

    id: str
    tenant: str
    task: str


@dataclass(frozen=True)
class KeyRecord:
    """What the hub knows of an API key: never the key itself."""

    tenant: str
    role: str
    name: str
    created: str = field(default="")


class Registry:
    """Reads and atomic changes; every method may raise `Unavailable` where Redis does not answer."""

    def __init__(self, redis: "Redis") -> None:
        """Args:
        redis: an asyncio client made with `decode_responses=True`.
        """
        self._redis = redis

    async def register(
        self, tenant: str, task: str, version: VersionInfo, aliases: Sequence[str]
    ) -> tuple[VersionInfo, bool]:
        """Add a version, or find the one with this digest, and move the aliases to it, in one step.

        Args:
            version: its number is ignored; the registry gives it.

        Returns:
            The version as it is kept, and whether it is new.
        """
        body = version.model_dump_json(exclude={"version"})
        keys = [_tasks(tenant), _numbers(tenant), _task(tenant, task), EVENTS]
        number, created, kept = await self._script(_REGISTER, keys, [tenant, task, version.digest, body, *aliases])
        return VersionInfo(version=number, **json.loads(kept)), bool(created)

    async def task(self, tenant: str, task: str) -> Task:
        """
        Raises:
            NotFound: the tenant has no such task.
        """
        fields = await self._do(self._redis.hgetall(_task(tenant, task)))
        if not fields:
            raise task_not_found(task)
        return _parse(task, fields)

    async def tasks(self, tenant: str) -> list[Task]:
        """All tasks of a tenant, by name."""
        names = sorted(await self._do(self._redis.smembers(_tasks(tenant))))
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.hgetall(_task(tenant, name))
        found = await self._do(pipeline.execute())
        return [_parse(name, fields) for name, fields in zip(names, found, strict=True) if fields]

    async def set_alias(self, tenant: str, task: str, alias: str, targets: Mapping[int, int]) -> Task:
        """Point an alias at versions; returns the task as it is then.

        Raises:
            NotFound: no such task.
            InvalidRequest: a version that the task does not have.
        """
        numbers = [str(n) for n in targets]
        body = json.dumps({str(n): weight for n, weight in targets.items()})
        keys = [_task(tenant, task), EVENTS]
        done = await self._script(_SET_ALIAS, keys, [tenant, task, alias, body, *numbers])
        if done == -1:
            raise task_not_found(task)
        if isinstance(done, int):
            message = f"task {task!r} has no version {done}"
            raise InvalidRequest(message, [FieldProblem("version", message)])
        return _parse(task, dict(zip(done[::2], done[1::2], strict=True)))

    async def delete_task(self, tenant: str, task: str) -> None:
        """
        Raises:
            NotFound: no such task.
        """
        if not await self._script(_DELETE_TASK, [_tasks(tenant), _task(tenant, task), EVENTS], [tenant, task]):
            raise task_not_found(task)

    async def delete_version(self, tenant: str, task: str, number: int) -> None:
        """
        Raises:
            NotFound: no such task or version.
            Conflict: an alias points at it.
        """
        alias = await self._script(_DELETE_VERSION, [_task(tenant, task), EVENTS], [tenant, task, number])
        if alias == "absent":
            (await self.task(tenant, task)).version(number)
            raise Conflict(f"version {number} of task {task!r} was changed at the same time; look again")
        if alias:
            raise Conflict(
                f"alias {alias!r} of task {task!r} points at version {number}; move it to another version first, "
                "or delete the whole task"
            )

    async def key(self, key_hash: str) -> KeyRecord | None:
        """What is known of the key with this sha256 (hex); None if nothing is."""
        found = await self._do(self._redis.hget(KEYS, key_hash))
        return KeyRecord(**json.loads(found)) if found is not None else None

    async def add_key(self, key_hash: str, record: KeyRecord) -> None:
        await self._do(self._redis.hset(KEYS, key_hash, json.dumps(record.__dict__)))

    async def has_keys(self) -> bool:
        return bool(await self._do(self._redis.exists(KEYS)))

    async def busy(self, limit: int) -> list[str]:
        """Digests that workers used, latest first."""
        found: list[str] = await self._do(self._redis.zrange(BUSY, 0, limit - 1, desc=True))
        return found

    async def note_busy(self, digests: Iterable[str], now_s: float) -> None:
        """Workers used these at this time, in seconds since 1970."""
        if scores := dict.fromkeys(digests, now_s):
            await self._do(self._redis.zadd(BUSY, scores, gt=True))
            await self._do(self._redis.zremrangebyrank(BUSY, 0, -KEPT_BUSY - 1))

    async def ping(self) -> None:
        """
        Raises:
            Unavailable: Redis does not answer.
        """
        await self._do(self._redis.ping())

    async def event_span(self) -> tuple[str, str]:
        """The ids of the oldest and the newest event that are kept; `0-0` where there are none."""
        oldest = await self._do(self._redis.xrange(EVENTS, count=1))
        newest = await self._do(self._redis.xrevrange(EVENTS, count=1))
        return (oldest[0][0], newest[0][0]) if oldest and newest else ("0-0", "0-0")

    async def events(self, after: str, wait_ms: int) -> list[Event]:
        """Events after an id, oldest first; waits up to `wait_ms` for the first."""
        reply = await self._do(self._redis.xread({EVENTS: after}, block=wait_ms, count=1000))
        return [Event(id, f["tenant"], f["task"]) for _, entries in reply or [] for id, f in entries]

    async def close(self) -> None:
        await self._redis.aclose()

    async def _script(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        return await self._do(self._redis.eval(script, len(keys), *keys, *args))

    async def _do(self, call: Any) -> Any:
        try:
            return await call
        except (RedisError, OSError) as error:
            raise Unavailable(f"the registry does not answer: {type(error).__name__}") from error


def task_not_found(task: str) -> NotFound:
    """The one answer for a task that is not there, and for one that belongs to somebody else."""
    message = f"there is no task {task!r}"
    return NotFound(message, [FieldProblem("task", message)])


def _tasks(tenant: str) -> str:
    return f"{PREFIX}t:{tenant}:tasks"


def _numbers(tenant: str) -> str:
    return f"{PREFIX}t:{tenant}:numbers"


def _task(tenant: str, task: str) -> str:
    return f"{PREFIX}t:{tenant}:task:{task}"


def _parse(name: str, fields: Mapping[str, str]) -> Task:
    versions, aliases = {}, {}
    for key, value in fields.items():
        kind, _, rest = key.partition(":")
        if kind == "v":
            versions[int(rest)] = VersionInfo(version=int(rest), **json.loads(value))
        elif kind == "a":
            aliases[rest] = {int(n): int(weight) for n, weight in json.loads(value).items()}
    return Task(name, dict(sorted(versions.items())), dict(sorted(aliases.items())))


def connect(url: str) -> Redis:
    """An asyncio client with the time limits that the hub relies on: `events` waits below the socket's limit."""
    return Redis.from_url(url, decode_responses=True, socket_timeout=5, socket_connect_timeout=2)
