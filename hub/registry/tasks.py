"""The truth about tasks, versions and aliases, in Redis. Every change is one script: all of it or nothing.

A change tells an event, which names the task, and leaves an entry in the audit.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import Conflict, InvalidRequest, LimitReached, NotFound, Unauthenticated, Unavailable
from ..schemas import LATEST, Sharing, VersionInfo
from . import scripts
from .audit import Actor
from .connection import QUICK_S, Database
from .models import NOT_SHARED, Task, parse_task, task_fields, task_not_found, version_body

KEPT_BUSY = 10_000
MOST_SHARED = 1000  # tasks of others in a tenant's list
COLLECTED_S = 60  # the longest that the store may take to remove a file


@dataclass(frozen=True)
class Event:
    """A change: what kind of thing (task, key, tenant), whose, its name, and where it stands in the stream."""

    id: str
    tenant: str
    kind: str
    name: str


class Registry:
    """Reads and atomic changes of tasks; every method may raise `Unavailable` where Redis does not answer."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._redis = database.redis

    async def register(
        self,
        by: Actor,
        tenant: str,
        task: str,
        version: VersionInfo,
        aliases: Sequence[str],
        source: str | None = None,
    ) -> tuple[VersionInfo, bool]:
        """Add a version, or find the one with this digest, and move the aliases to it, in one step.

        Args:
            version: its number is ignored; the registry gives it.
            source: where the hub has the file from, without secrets, for the audit; None: it was sent.

        Returns:
            The version as it is kept, and whether it is new.

        Raises:
            LimitReached: of tasks, of versions a task, or of stored bytes.
            Unavailable: the store's file of this digest is being removed; nothing was changed.
        """
        body = version_body(version)
        told = {"task": task, "digest": version.digest, "aliases": list(aliases)}
        if source is not None:
            told["source"] = source
        entry = by.entry(tenant, "version.register", **told)
        done = await self._db.change(
            scripts.REGISTER, tenant, task, entry, version.digest, body, version.size_bytes, *aliases
        )
        if isinstance(done[0], str):
            raise _refused(done)
        return VersionInfo(version=done[0], **json.loads(done[2])), bool(done[1])

    async def must_have_room(self, by: Actor, tenant: str, task: str, digest: str, size_bytes: int) -> None:
        """Whether a version could be registered, before its file is kept; raises what `register` raises."""
        entry = by.entry(tenant, "version.register")
        done = await self._db.change(scripts.ROOM, tenant, task, entry, digest, "", size_bytes)
        if done[0] != "room":
            raise _refused(done)

    async def task(self, tenant: str, task: str) -> Task:
        """
        Raises:
            NotFound: the tenant has no such task.
        """
        fields = await self._db.do(self._redis.hgetall(_task(tenant, task)), within_s=QUICK_S)
        if not fields:
            raise task_not_found(task)
        return parse_task(task, fields)

    async def tasks(self, tenant: str) -> list[Task]:
        """All tasks of a tenant, by name."""
        names = sorted(await self._db.do(self._redis.smembers(f"karst:t:{tenant}:tasks")))
        return [task for _, task in await self._read([(tenant, name) for name in names])]

    async def shared_with(self, tenant: str) -> list[tuple[str, Task]]:
        """The tasks that others share with a tenant, each with its owner."""
        named = await self._db.do(self._redis.sunion("karst:public", f"karst:t:{tenant}:shared"))
        places = ((owner, task) for owner, _, task in (name.partition(":") for name in named))
        pairs = sorted(place for place in places if place[0] != tenant)[:MOST_SHARED]
        return [(owner, task) for owner, task in await self._read(pairs) if task.sharing.allows(tenant)]

    async def sharing(self, tenant: str, task: str) -> Sharing:
        """With whom a task is shared; a task that is not there is shared with nobody, and takes as long to say so."""
        found = await self._db.do(self._redis.hget(_task(tenant, task), "share"), within_s=QUICK_S)
        return Sharing.model_validate_json(found) if found else NOT_SHARED

    async def share(self, by: Actor, tenant: str, task: str, sharing: Sharing) -> Task:
        """
        Raises:
            NotFound: no such task.
        """
        told = {"public": sharing.public, "tenants": sharing.tenants[:20], "count": len(sharing.tenants)}
        entry = by.entry(tenant, "task.share", task=task, sharing=told)
        await self._change_task(scripts.SHARE, tenant, task, entry, sharing.model_dump_json())
        return await self.task(tenant, task)

    async def set_alias(self, by: Actor, tenant: str, task: str, alias: str, targets: Mapping[int, int]) -> Task:
        """Point an alias at versions; returns the task as it is then.

        Raises:
            NotFound: no such task.
            InvalidRequest: a version that the task does not have.
        """
        numbers = [str(n) for n in sorted(targets)]
        body = json.dumps({n: targets[int(n)] for n in numbers}, separators=(",", ":"))
        entry = by.entry(tenant, "alias.set", task=task, alias=alias, targets=json.loads(body))
        await self._change_task(scripts.SET_ALIAS, tenant, task, entry, alias, body, *numbers)
        return await self.task(tenant, task)

    async def roll_back(self, by: Actor, tenant: str, task: str, alias: str) -> Task:
        """Point an alias at what it pointed at before; again, and it goes back one more.

        Raises:
            NotFound: no such task or alias.
            Conflict: it pointed at nothing before that is still there.
        """
        entry = by.entry(tenant, "alias.roll-back", task=task, alias=alias)
        (await self.task(tenant, task)).targets(alias)
        await self._change_task(scripts.ROLL_BACK, tenant, task, entry, alias)
        return await self.task(tenant, task)

    async def delete_alias(self, by: Actor, tenant: str, task: str, alias: str) -> None:
        """
        Raises:
            NotFound: no such task or alias.
            Conflict: `latest`, which every task has.
        """
        (await self.task(tenant, task)).targets(alias)
        if alias == LATEST:
            raise Conflict(f"every task has the alias {LATEST!r}; move it, or delete the task")
        entry = by.entry(tenant, "alias.delete", task=task, alias=alias)
        await self._change_task(scripts.DELETE_ALIAS, tenant, task, entry, alias)

    async def delete_task(self, by: Actor, tenant: str, task: str) -> None:
        """
        Raises:
            NotFound: no such task.
        """
        await self._change_task(scripts.DELETE_TASK, tenant, task, by.entry(tenant, "task.delete", task=task))

    async def delete_version(self, by: Actor, tenant: str, task: str, number: int) -> None:
        """
        Raises:
            NotFound: no such task or version.
            Conflict: an alias points at it.
        """
        (await self.task(tenant, task)).version(number)
        entry = by.entry(tenant, "version.delete", task=task, version=number)
        await self._change_task(scripts.DELETE_VERSION, tenant, task, entry, str(number))

    async def dump(self, tenant: str) -> list[Task]:
        """All tasks with what `restore` needs."""
        numbers = await self._db.do(self._redis.hgetall(f"karst:t:{tenant}:numbers"))
        return [replace(task, last_number=int(numbers.get(task.name, 0))) for task in await self.tasks(tenant)]

    async def restore(self, by: Actor, tenant: str, tasks: Sequence[Task]) -> None:
        """Make tasks as another hub had them, all or none.

        Raises:
            Conflict: some of them are there.
            LimitReached: of tasks, of versions a task, or of stored bytes.
            Unavailable: a file is being removed from the store just now.
        """
        body = [
            {
                "name": task.name,
                "last": max([task.last_number, *task.versions]),
                "fields": task_fields(task),
                "held": [{"digest": v.digest, "bytes": v.size_bytes} for v in task.versions.values()],
                "share": task.sharing.model_dump_json(),
            }
            for task in tasks
        ]
        shared = [task.name for task in tasks if task.sharing != NOT_SHARED]
        entry = by.entry(tenant, "tenant.import", tasks=[task.name for task in tasks][:100], shared=shared[:100])
        done = await self._db.change(scripts.RESTORE, tenant, entry, json.dumps(body))
        if done[0] == "there":
            raise Conflict(f"the tenant has these tasks already: {', '.join(done[1:])}; delete them first")
        if done[0] == "tenant":
            raise NotFound(f"there is no tenant {tenant!r}")
        if done[0] != "done":
            raise _refused(done)

    async def claim_orphan(self, digest: str) -> bool:
        """Whether no version holds this digest; if so none can begin to for a minute, which outlives the removal."""
        script = """
        if redis.call('HEXISTS', 'karst:digests', ARGV[1]) == 1 then return 0 end
        redis.call('SET', 'karst:gc:' .. ARGV[1], '1', 'EX', ARGV[2])
        return 1
        """
        return bool(await self._db.run(script, digest, COLLECTED_S))

    async def busy(self, limit: int) -> list[str]:
        """Digests that workers used, latest first."""
        found: list[str] = await self._db.do(self._redis.zrange("karst:busy", 0, limit - 1, desc=True))
        return found

    async def note_busy(self, digests: Iterable[str], now_s: float) -> None:
        """Workers used these at this time, in seconds since 1970."""
        if scores := dict.fromkeys(digests, now_s):
            await self._db.do(self._redis.zadd("karst:busy", scores, gt=True))
            await self._db.do(self._redis.zremrangebyrank("karst:busy", 0, -KEPT_BUSY - 1))

    async def ping(self) -> None:
        """
        Raises:
            Unavailable: Redis does not answer.
        """
        await self._db.ping()

    async def event_span(self) -> tuple[str, str]:
        """The ids of the oldest and the newest event that are kept; `0-0` where there are none."""
        oldest = await self._db.do(self._db.apart.xrange("karst:events", count=1), within_s=1, apart=True)
        newest = await self._db.do(self._db.apart.xrevrange("karst:events", count=1), within_s=1, apart=True)
        return (oldest[0][0], newest[0][0]) if oldest and newest else ("0-0", "0-0")

    async def events(self, after: str, wait_ms: int) -> list[Event]:
        """Events after an id, oldest first; waits up to `wait_ms` for the first."""
        call = self._db.apart.xread({"karst:events": after}, block=wait_ms, count=1000)
        reply = await self._db.do(call, within_s=wait_ms / 1000 + 0.5, apart=True)
        return [Event(id=id, **fields) for _, entries in reply or [] for id, fields in entries]

    async def _read(self, names: Sequence[tuple[str, str]]) -> list[tuple[str, Task]]:
        """Tasks by (tenant, name), each with its tenant; without those that went away meanwhile."""
        pipeline = self._redis.pipeline(transaction=False)
        for tenant, name in names:
            pipeline.hgetall(_task(tenant, name))
        found = await self._db.do(pipeline.execute())
        return [(tenant, parse_task(n, fields)) for (tenant, n), fields in zip(names, found, strict=True) if fields]

    async def _change_task(self, script: str, tenant: str, task: str, *args: str) -> None:
        """
        Raises:
            NotFound: no such task, or what `args` name is gone.
            Conflict, InvalidRequest: as the callers say.
        """
        done = await self._db.change(script, tenant, task, *args)
        match done:
            case ["absent"]:
                raise task_not_found(task)
            case ["version", number]:
                message = f"task {task!r} has no version {number}"
                raise InvalidRequest.at("version", message)
            case ["key"] | ["full"]:
                raise _refused(done)
            case ["nothing"]:
                raise Conflict(f"alias {args[1]!r} of task {task!r} pointed at nothing before that is still there")
            case ["alias", alias]:
                raise Conflict(
                    f"alias {alias!r} of task {task!r} points at version {args[1]}; move it to another version "
                    "first, or delete the whole task"
                )


def _refused(done: Sequence[Any]) -> Exception:
    match done:
        case ["limit", which, most]:
            named = {"tasks": "tasks", "versions": "versions a task", "stored_bytes": "stored bytes"}[which]
            message = f"the tenant's limit of {named} ({most}) is reached; delete some, or ask an admin for more"
            return LimitReached.at(which, message, retry_after_s=60)
        case ["gc"]:
            return Unavailable("the store is removing an old copy of this file; try again", retry_after_s=2)
        case ["full"]:
            message = "the task has as many aliases as it may; delete some"
            return LimitReached.at("alias", message, retry_after_s=60)
    return Unauthenticated("the key or its tenant is no more")


def _task(tenant: str, task: str) -> str:
    return f"karst:t:{tenant}:task:{task}"
