"""Tasks, versions and aliases in Redis.

Every change is one atomic script. It publishes a change event that names the task, and it leaves an audit entry.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..admission.quotas import DELETED_FILES, SHARED_WITH_ONE, SHARES
from ..errors import Conflict, HubError, InvalidRequest, LimitReached, Unavailable
from ..schemas import LATEST, Sharing, TaskSettings, VersionInfo
from .audit import Actor
from .models import (
    DEFAULT_SETTINGS,
    NOT_SHARED,
    NOTHING_LIVE,
    Live,
    Task,
    label_difference,
    parse_task,
    setting_texts,
    task_fields,
    task_not_found,
    version_body,
)
from .redis.connection import READ_TIMEOUT_S, RegistryConnection, as_hash, as_optional_text, as_texts, tenant_key
from .redis.scripts import TASKS, ChangeReply
from .tenants import tenant_not_found

PUBLIC = "karst:public"
MAX_ALIASES = 100  # per task
MAX_ALIAS_HISTORY = 20  # former targets kept per alias
MAX_SHARED_TASKS = 1000  # tasks of other tenants in a tenant's list
CLAIM_S = 60  # how long a garbage collection claims a file that it removes


class LatestMovedError(Exception):
    """Another change has moved the alias `latest` since the caller read it; read it again."""


class TaskRegistry:
    """Reads and atomic changes of tasks. Every method raises `Unavailable` if Redis does not answer.

    Every change raises `Unauthenticated` if the actor's key was revoked in the meantime.
    """

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection
        self._redis = connection.redis

    async def register(
        self,
        by: Actor,
        tenant: str,
        task: str,
        version: VersionInfo,
        aliases: Sequence[str],
        source: str | None = None,
        settings: TaskSettings = DEFAULT_SETTINGS,
        live: Live | None = None,
    ) -> tuple[VersionInfo, bool]:
        """Add a version and move the aliases to it, or find the one with this digest; change settings; in one step.

        A known version moves no alias.

        Args:
            version: its number is ignored; the registry assigns one.
            live: what the caller found behind `latest`, where it depends on that.
            source: the file's origin without secrets, for the audit; None: the client sent the file.
            settings: the members to change; the task keeps the others.

        Returns:
            The stored version, and whether it is new.

        Raises:
            LatestMovedError: `latest` no longer points at `live`; nothing was changed.
            InvalidAdapter: labels and metrics are too long.
            NotFound: the tenant does not exist.
            LimitReached: the limit of tasks, versions per task, stored bytes or aliases.
            Unavailable: a garbage collection removes the file of this digest; nothing was changed.
        """
        details = {"task": task, "digest": version.digest, "aliases": list(aliases)} | settings.given()
        if source is not None:
            details["source"] = source
        reply = await self._connection.change(
            TASKS,
            "register",
            tenant=tenant,
            task=task,
            entry=by.entry(tenant, "version.register", **details),
            digest=version.digest,
            version=version_body(version),
            size_bytes=version.size_bytes,
            aliases=list(aliases),
            max_aliases=MAX_ALIASES,
            max_history=MAX_ALIAS_HISTORY,
            max_orphans=DELETED_FILES,
            settings=setting_texts(settings),
            latest=None if live is None else live.targets,
        )
        if reply.outcome == "latest_moved":
            raise LatestMovedError
        if reply.outcome != "done":
            raise _refusal(reply, tenant)
        return VersionInfo(version=reply.number, **json.loads(reply.text)), reply.created

    async def live(self, tenant: str, task: str) -> Live:
        """Return the version behind the alias `latest`; the task need not exist."""
        command = self._redis.hget(_task_key(tenant, task), f"a:{LATEST}")
        targets = as_optional_text(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
        if targets is None:
            return NOTHING_LIVE
        number = max(map(int, json.loads(targets)))
        command = self._redis.hget(_task_key(tenant, task), f"v:{number}")
        text = as_optional_text(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
        return Live(targets, VersionInfo(version=number, **json.loads(text)) if text is not None else None)

    async def check_quota(
        self, by: Actor, tenant: str, task: str, digest: str, size_bytes: int, *, reserve_s: int = 0
    ) -> bool:
        """Check whether a version could be registered, before its file is stored. Raise the errors of `register`.

        Args:
            reserve_s: if not 0, the caller is about to store the file. Its bytes then count against the tenant even if
                no version follows, and no collection removes the file for so long.

        Returns:
            Whether the version is new.
        """
        reply = await self._connection.change(
            TASKS,
            "check_quota",
            tenant=tenant,
            task=task,
            entry=by.entry(tenant, "version.register"),
            digest=digest,
            size_bytes=size_bytes,
            aliases=[],
            max_aliases=MAX_ALIASES,
            max_orphans=DELETED_FILES,
            reserve_s=reserve_s,
        )
        if reply.outcome != "done":
            raise _refusal(reply, tenant)
        return reply.created

    async def task(self, tenant: str, task: str) -> Task:
        """Return a task of a tenant.

        Raises:
            NotFound: the task does not exist.
        """
        command = self._redis.hgetall(_task_key(tenant, task))
        fields = as_hash(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
        if not fields:
            raise task_not_found(task)
        return parse_task(task, fields)

    async def tasks(self, tenant: str) -> list[Task]:
        """Return all tasks of a tenant, by name."""
        names = as_texts(await self._connection.execute(self._redis.smembers(tenant_key(tenant, "tasks"))))
        return [task for _, task in await self._read([(tenant, name) for name in sorted(names)])]

    async def shared_with(self, tenant: str) -> list[tuple[str, Task]]:
        """Return the tasks that other tenants share with this tenant: (owner, task)."""
        command = self._redis.sunion([PUBLIC, tenant_key(tenant, "shared")])
        names = [name.partition(":") for name in as_texts(await self._connection.execute(command))]
        foreign = sorted((owner, task) for owner, _, task in names if owner != tenant)[:MAX_SHARED_TASKS]
        return [(owner, task) for owner, task in await self._read(foreign) if task.is_shared_with(tenant)]

    async def is_shared(self, owner: str, task: str, tenant: str) -> bool:
        """Return whether a task is shared with another tenant.

        The work does not depend on the task: it may be absent, private, or shared with a thousand other tenants.
        """
        name = f"{owner}:{task}"
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.sismember(PUBLIC, name)
        pipeline.sismember(tenant_key(tenant, "shared"), name)
        public, named = await self._connection.execute(pipeline.execute(), timeout_s=READ_TIMEOUT_S)
        return bool(public) or bool(named)

    async def share(self, by: Actor, tenant: str, task: str, sharing: Sharing) -> Task:
        """Replace a task's sharing and return the task.

        Raises:
            NotFound: the task does not exist.
            InvalidRequest: a named tenant does not exist.
            LimitReached: the tenant's limit of shares.
        """
        details = {"public": sharing.public, "tenants": sharing.tenants[:20], "count": len(sharing.tenants)}
        entry = by.entry(tenant, "task.share", task=task, sharing=details)
        names = list(dict.fromkeys(sharing.tenants))
        body = Sharing(public=sharing.public, tenants=names).model_dump_json()
        reply = await self._change(
            "share", tenant, task, entry, sharing=body, max_shares=SHARES, max_with_one=SHARED_WITH_ONE
        )
        if reply.outcome == "no_tenants":
            more = f" and {len(reply.names) - 5} more" if len(reply.names) > 5 else ""
            message = f"there is no tenant {', '.join(map(repr, reply.names[:5]))}{more}; name tenants that exist"
            raise InvalidRequest.at("tenants", message)
        if reply.outcome == "limit":
            raise _refusal(reply, tenant)
        return await self.task(tenant, task)

    async def change_settings(self, by: Actor, tenant: str, task: str, settings: TaskSettings) -> Task:
        """Change settings of a task and return the task.

        Args:
            settings: the members to change; the task keeps the others.

        Raises:
            NotFound: the task does not exist.
        """
        entry = by.entry(tenant, "task.settings", task=task, **settings.given())
        await self._change("change_settings", tenant, task, entry, settings=setting_texts(settings))
        return await self.task(tenant, task)

    async def set_alias(self, by: Actor, tenant: str, task: str, alias: str, targets: Mapping[int, int]) -> Task:
        """Point an alias at versions and return the task.

        Args:
            targets: version number -> weight.

        Raises:
            NotFound: the task does not exist.
            InvalidRequest: a version does not exist.
            Conflict: several versions with different labels.
            LimitReached: the task has the maximum number of aliases.
        """
        if len(targets) > 1:
            await self._require_equal_labels(tenant, task, targets)
        weights = {str(number): targets[number] for number in sorted(targets)}
        await self._change(
            "set_alias",
            tenant,
            task,
            by.entry(tenant, "alias.set", task=task, alias=alias, targets=weights),
            alias=alias,
            targets=json.dumps(weights, separators=(",", ":")),
            numbers=list(weights),
            max_aliases=MAX_ALIASES,
            max_history=MAX_ALIAS_HISTORY,
        )
        return await self.task(tenant, task)

    async def _require_equal_labels(self, tenant: str, task: str, targets: Mapping[int, int]) -> None:
        """Refuse a canary between versions with different labels: a client would get other labels at random.

        Raises:
            Conflict: the labels differ.
        """
        versions = (await self.task(tenant, task)).versions
        known = [versions[number] for number in sorted(targets) if number in versions]
        for first, second in itertools.pairwise(known):
            if difference := label_difference(first.labels, second.labels):
                message = f"versions {first.version} and {second.version} have different labels ({difference}); "
                raise Conflict.at("weights", message + "a canary needs versions with equal labels")

    async def roll_back(self, by: Actor, tenant: str, task: str, alias: str) -> Task:
        """Point an alias at its former targets and return the task. A second call goes back one more step.

        Raises:
            NotFound: the task or the alias does not exist.
            Conflict: no former targets still exist.
        """
        entry = by.entry(tenant, "alias.roll-back", task=task, alias=alias)
        (await self.task(tenant, task)).targets(alias)
        reply = await self._change("roll_back", tenant, task, entry, alias=alias)
        if reply.outcome == "no_history":
            message = f"Alias {alias!r} of task {task!r} has no former target that still exists. Set the alias instead."
            raise Conflict(message)
        return await self.task(tenant, task)

    async def delete_alias(self, by: Actor, tenant: str, task: str, alias: str) -> None:
        """Delete an alias.

        Raises:
            NotFound: the task or the alias does not exist.
            Conflict: the alias is `latest`, which every task has.
        """
        (await self.task(tenant, task)).targets(alias)
        if alias == LATEST:
            raise Conflict(f"Cannot delete alias {LATEST!r}, which every task has. Move it, or delete the task.")
        entry = by.entry(tenant, "alias.delete", task=task, alias=alias)
        await self._change("delete_alias", tenant, task, entry, alias=alias)

    async def delete_task(self, by: Actor, tenant: str, task: str) -> None:
        """Delete a task with its versions and aliases.

        Raises:
            NotFound: the task does not exist.
        """
        await self._change("delete", tenant, task, by.entry(tenant, "task.delete", task=task))

    async def delete_version(self, by: Actor, tenant: str, task: str, number: int) -> None:
        """Delete a version.

        Raises:
            NotFound: the task or the version does not exist.
            Conflict: an alias points at the version.
        """
        (await self.task(tenant, task)).version(number)
        entry = by.entry(tenant, "version.delete", task=task, version=number)
        reply = await self._change("delete_version", tenant, task, entry, number=str(number))
        if reply.outcome == "alias_in_use":
            raise Conflict(
                f"Cannot delete: alias {reply.names[0]!r} of task {task!r} points at version {number}. "
                "Move the alias to another version first, or delete the task."
            )

    async def dump(self, tenant: str) -> list[Task]:
        """Return all tasks with all that `restore` needs."""
        command = self._redis.hgetall(tenant_key(tenant, "numbers"))
        numbers = as_hash(await self._connection.execute(command))
        return [replace(task, last_number=int(numbers.get(task.name, 0))) for task in await self.tasks(tenant)]

    async def restore(self, by: Actor, tenant: str, tasks: Sequence[Task]) -> None:
        """Create tasks from a dump, all of them or none.

        Raises:
            NotFound: the tenant does not exist.
            Conflict: some of the tasks exist.
            LimitReached: the limit of tasks, versions per task or stored bytes.
            Unavailable: a garbage collection removes one of the files.
        """
        body = [
            {
                "name": task.name,
                "last_number": max([task.last_number, *task.versions]),
                "fields": task_fields(task),
                "versions": [{"digest": v.digest, "size_bytes": v.size_bytes} for v in task.versions.values()],
                "sharing": task.sharing.model_dump_json(),
            }
            for task in tasks
        ]
        shared = [task.name for task in tasks if task.sharing != NOT_SHARED]
        entry = by.entry(tenant, "tenant.import", tasks=[task.name for task in tasks][:100], shared=shared[:100])
        reply = await self._connection.change(TASKS, "restore", tenant=tenant, entry=entry, tasks=body)
        if reply.outcome == "exists":
            raise Conflict(f"Cannot replace existing tasks: {', '.join(reply.names)}. Delete them first.")
        if reply.outcome != "done":
            raise _refusal(reply, tenant)

    async def claim_orphan(self, digest: str) -> bool:
        """Claim a file for removal, unless a version refers to it. Return whether the claim succeeded.

        No version can refer to the file until the claim expires after a minute, which is longer than a removal takes.
        """
        reply = await self._connection.change(TASKS, "claim_orphan", digest=digest, duration_s=CLAIM_S)
        return reply.outcome == "done"

    async def _read(self, names: Sequence[tuple[str, str]]) -> list[tuple[str, Task]]:
        """Return tasks by (tenant, name), each with its tenant, without those deleted in the meantime."""
        pipeline = self._redis.pipeline(transaction=False)
        for tenant, name in names:
            pipeline.hgetall(_task_key(tenant, name))
        replies = [as_hash(reply) for reply in await self._connection.execute(pipeline.execute())]
        return [(tenant, parse_task(n, fields)) for (tenant, n), fields in zip(names, replies, strict=True) if fields]

    async def _change(self, function: str, tenant: str, task: str, entry: str, **argument: Any) -> ChangeReply:
        """Call a function of `lua/tasks.lua`. Raise its errors, except those of one function only."""
        reply = await self._connection.change(TASKS, function, tenant=tenant, task=task, entry=entry, **argument)
        match reply.outcome:
            case "absent":
                raise task_not_found(task)
            case "no_version":
                raise InvalidRequest.at("version", f"task {task!r} has no version {reply.names[0]}")
            case "aliases_full":
                raise _refusal(reply, tenant)
        return reply


def _refusal(reply: ChangeReply, tenant: str) -> HubError:
    match reply.outcome:
        case "limit":
            if reply.limit == "deleted_files":
                message = f"too many deleted files wait for their removal (limit {reply.maximum}); retry later"
                return LimitReached.at(reply.limit, message, retry_after_s=60)
            nouns = {"tasks": "tasks", "versions": "versions per task", "stored_bytes": "stored bytes"} | {
                "shares": "tenants in the sharing of all tasks together",
                "shared_with_one": "tasks shared with one tenant",
            }
            message = f"too many {nouns[reply.limit]} (limit {reply.maximum}); delete some or ask an admin to raise it"
            return LimitReached.at(reply.limit, message, retry_after_s=60)
        case "aliases_full":
            message = f"too many aliases of this task (limit {MAX_ALIASES}); delete some"
            return LimitReached.at("alias", message, retry_after_s=60)
        case "removing":
            return Unavailable(
                "Cannot register: the store is removing an old copy of this file. Try again.", retry_after_s=2
            )
    return tenant_not_found(tenant)


def _task_key(tenant: str, task: str) -> str:
    return tenant_key(tenant, f"task:{task}")
