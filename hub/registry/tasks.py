"""Tasks, versions and aliases in Redis.

Every change is one atomic script. It publishes a change event that names the task, and it leaves an audit entry.
"""

import asyncio
import itertools
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from ..admission.quotas import DELETED_FILES, REGISTRY_BYTES, SHARED_WITH_ONE, SHARES
from ..errors import Conflict, HubError, InvalidRequest
from ..schemas import LATEST, Sharing, TaskSettings, VersionInfo
from .audit import Actor
from .datasets.entries import StagedDataset
from .models import DEFAULT_SETTINGS, NOT_SHARED, Task, WholeTask, setting_texts, task_fields, task_not_found
from .redis.connection import as_optional_text, as_texts, tenant_key
from .redis.scripts import TASKS, ChangeReply
from .task_reads import TaskReads, task_key
from .tenants import tenant_not_found
from .versions import (
    MAX_ALIASES,
    STAGED_S,
    LatestMovedError,
    Live,
    StoredVersion,
    TrainingEndedError,
    VersionSummary,
    label_difference,
    limit_refusal,
    version_body,
)

MAX_ALIAS_HISTORY = 20  # former targets kept per alias
LAYOUT, SUMMARIES_LAYOUT = "karst:layout", "2"
UPGRADE_INTERVAL_S = 10.0  # between two attempts
NO_DATASETS: Mapping[str, StagedDataset] = {}
CLAIM_S = 60  # how long a garbage collection claims a file that it removes


class TaskRegistry(TaskReads):
    """Reads and atomic changes of tasks. Every method raises `Unavailable` if Redis does not answer.

    Every change raises `Unauthenticated` if the actor's key was revoked in the meantime.
    """

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
        training: tuple[str, str] | None = None,
    ) -> tuple[VersionInfo, bool]:
        """Add a version and move the aliases to it, or find the one with this digest; change settings; in one step.

        A known version moves no alias.

        Args:
            version: its number is ignored; the registry assigns one.
            live: what the caller found behind `latest`, where it depends on that.
            source: the file's origin without secrets, for the audit; None: the client sent the file.
            settings: the members to change; the task keeps the others.
            training: the job that made the version, and the token of its gateway; "" for a training in a request.

        Returns:
            The stored version, and whether it is new.

        Raises:
            LatestMovedError: `latest` no longer points at `live`; nothing was changed.
            TrainingEndedError: the gateway no longer has the job; nothing was changed.
            InvalidAdapter: labels and metrics are too long.
            NotFound: the tenant does not exist.
            LimitReached: the limit of tasks, versions per task, stored bytes, registry bytes or aliases.
            Unavailable: a garbage collection removes the file of this digest; nothing was changed.
        """
        details = {"task": task, "digest": version.digest, "aliases": list(aliases)} | settings.given()
        if source is not None:
            details["source"] = source
        body = version_body(version)
        reply = await self._connection.change(
            TASKS,
            "register",
            texts=[body],
            tenant=tenant,
            task=task,
            entry=by.entry(tenant, "version.register", **details),
            digest=version.digest,
            summary=VersionSummary.of(version).text(),
            version_bytes=len(body.encode()),
            max_registry_bytes=REGISTRY_BYTES,
            size_bytes=version.size_bytes,
            aliases=list(aliases),
            max_aliases=MAX_ALIASES,
            max_history=MAX_ALIAS_HISTORY,
            max_orphans=DELETED_FILES,
            settings=setting_texts(settings),
            latest=None if live is None else live.targets,
            training=None if training is None else {"job": training[0], "token": training[1]},
        )
        if reply.outcome == "latest_moved":
            raise LatestMovedError
        if reply.outcome == "ended":
            raise TrainingEndedError
        if reply.outcome != "done":
            raise _refusal(reply, tenant)
        stored = version.model_copy(update={"version": reply.number})
        if not reply.created:  # its time of registration is that of the first call
            known = as_optional_text(
                await self._connection.execute(self._redis.hget(task_key(tenant, task), f"v:{reply.number}"))
            )
            stored = stored if known is None else StoredVersion(reply.number, known).info()
        return stored, reply.created

    async def check_quota(self, by: Actor, tenant: str, task: str, version: VersionInfo, *, reserve_s: int = 0) -> bool:
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
            digest=version.digest,
            size_bytes=version.size_bytes,
            version_bytes=len(version_body(version).encode()),
            max_registry_bytes=REGISTRY_BYTES,
            aliases=[],
            max_aliases=MAX_ALIASES,
            max_orphans=DELETED_FILES,
            reserve_s=reserve_s,
        )
        if reply.outcome != "done":
            raise _refusal(reply, tenant)
        return reply.created

    async def share(self, by: Actor, tenant: str, task: str, sharing: Sharing) -> Task:
        """Replace a task's sharing and return the task.

        Raises:
            NotFound: the task does not exist.
            InvalidRequest: a named tenant does not exist.
            LimitReached: the tenant's limit of shares.
        """
        details = {"public": sharing.public, "tenants": sharing.tenants, "count": len(sharing.tenants)}
        entry = by.entry(tenant, "task.share", task=task, sharing=details)
        names = list(dict.fromkeys(sharing.tenants))
        reply = await self._change(
            "share",
            tenant,
            task,
            entry,
            sharing=Sharing(public=sharing.public, tenants=names).model_dump_json(),
            max_shares=SHARES,
            max_with_one=SHARED_WITH_ONE,
            max_registry_bytes=REGISTRY_BYTES,
        )
        if reply.outcome == "no_tenants":
            more = f" and {len(reply.names) - 5} more" if len(reply.names) > 5 else ""
            message = f"there is no tenant {', '.join(map(repr, reply.names[:5]))}{more}; name tenants that exist"
            raise InvalidRequest.at("tenants", message)
        return await self.task(tenant, task)

    async def put(self, by: Actor, tenant: str, task: str, settings: TaskSettings) -> tuple[Task, bool]:
        """Change settings of a task, or create it without a version.

        Args:
            settings: the members to change; the task keeps the others.

        Returns:
            The task, and whether it is new.

        Raises:
            LimitReached: the limit of tasks or of registry bytes.
        """
        entry = by.entry(tenant, "task.settings", task=task, **settings.given())
        reply = await self._change(
            "put", tenant, task, entry, settings=setting_texts(settings), max_registry_bytes=REGISTRY_BYTES
        )
        if reply.outcome != "done":
            raise _refusal(reply, tenant)
        return await self.task(tenant, task), reply.created

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
            max_registry_bytes=REGISTRY_BYTES,
        )
        return await self.task(tenant, task)

    async def _require_equal_labels(self, tenant: str, task: str, targets: Mapping[int, int]) -> None:
        """Refuse a canary between versions with different labels: a client would get other labels at random.

        Raises:
            Conflict: the labels differ.
        """
        found = await self.task(tenant, task)
        known = [
            (await self.version(tenant, found, number)).served()
            for number in sorted(targets)
            if number in found.digests
        ]
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
        async for summaries in self.missing_summaries(tenant, task):
            await self._add_summaries(tenant, task, summaries)  # a step of its own, so that the next one is short
        await self._change("delete", tenant, task, by.entry(tenant, "task.delete", task=task))

    async def delete_version(self, by: Actor, tenant: str, task: str, number: int) -> None:
        """Delete a version.

        Raises:
            NotFound: the task or the version does not exist.
            Conflict: an alias points at the version.
        """
        found = await self.task(tenant, task)
        found.targets(str(number))
        entry = by.entry(tenant, "version.delete", task=task, version=number)
        digest = found.digests[number]
        reply = await self._change("delete_version", tenant, task, entry, number=str(number), digest=digest)
        if reply.outcome == "alias_in_use":
            raise Conflict(
                f"Cannot delete: alias {reply.names[0]!r} of task {task!r} points at version {number}. "
                "Move the alias to another version first, or delete the task."
            )

    async def restore(
        self, by: Actor, tenant: str, tasks: Sequence[WholeTask], datasets: Mapping[str, StagedDataset] = NO_DATASETS
    ) -> None:
        """Create tasks from a dump, all of them or none. The versions are written first, in short steps.

        Args:
            datasets: staged datasets by the name of their task, which get visible in the same step.

        Raises:
            NotFound: the tenant does not exist.
            Conflict: some of the tasks exist.
            LimitReached: the limit of tasks, versions per task, stored bytes or registry bytes.
            Unavailable: a garbage collection removes one of the files, or the import took too long.
        """
        import_id = secrets.token_hex(8)
        body, registry_bytes = [], 0
        for i, task in enumerate(tasks):
            fields, staged = task_fields(task), tenant_key(tenant, f"staged:{import_id}-{i}")
            body.append(
                {
                    "name": task.name,
                    "last_number": max([task.last_number, *task.versions]),
                    "staged": staged,
                    "fields": fields,
                    "versions": [{"digest": v.digest, "size_bytes": v.size_bytes} for v in task.versions.values()],
                    "sharing": task.sharing.model_dump_json(),
                }
            )
            if task.name in datasets:
                body[-1]["dataset"] = {"staged": datasets[task.name].name, "images": datasets[task.name].images}
            registry_bytes += sum(len(name) + len(text.encode()) for name, text in fields.items())
            for number, version in task.versions.items():
                text = version_body(version)
                registry_bytes += len(text.encode())
                if registry_bytes <= REGISTRY_BYTES:  # otherwise `restore` refuses
                    await self._connection.change(
                        TASKS, "stage", texts=[text], key=staged, numbers=[str(number)], expiry_s=STAGED_S
                    )
        shared = [task.name for task in tasks if task.sharing != NOT_SHARED]
        entry = by.entry(tenant, "tenant.import", tasks=[task.name for task in tasks], shared=shared)
        reply = await self._connection.change(
            TASKS,
            "restore",
            tenant=tenant,
            entry=entry,
            tasks=body,
            registry_bytes=registry_bytes,
            max_registry_bytes=REGISTRY_BYTES,
        )
        if reply.outcome == "done":
            return
        for created in body:
            await self._connection.execute(self._redis.unlink(str(created["staged"])))
        if reply.outcome == "exists":
            raise Conflict(f"Cannot replace existing tasks: {', '.join(reply.names)}. Delete them first.")
        raise _refusal(reply, tenant)

    async def upgrade(self) -> None:
        """Add the summaries of versions that an older hub has written, in short steps. Repeat until Redis answers.

        Lists and deletions also work before; they then read each of these versions whole.
        """
        while True:
            try:
                if await self._connection.execute(self._redis.get(LAYOUT)) != SUMMARIES_LAYOUT:
                    for tenant in as_texts(await self._connection.execute(self._redis.hkeys("karst:tenants"))):
                        for task in await self.task_names(tenant):
                            async for summaries in self.missing_summaries(tenant, task):
                                await self._add_summaries(tenant, task, summaries)
                    await self._connection.execute(self._redis.set(LAYOUT, SUMMARIES_LAYOUT))
                return
            except HubError:
                await asyncio.sleep(UPGRADE_INTERVAL_S)

    async def claim_orphan(self, digest: str) -> bool:
        """Claim a file for removal, unless a version refers to it. Return whether the claim succeeded.

        No version can refer to the file until the claim expires after a minute, which is longer than a removal takes.
        """
        reply = await self._connection.change(TASKS, "claim_orphan", digest=digest, duration_s=CLAIM_S)
        return reply.outcome == "done"

    async def _add_summaries(self, tenant: str, task: str, summaries: Mapping[str, str]) -> None:
        await self._connection.change(TASKS, "add_summaries", tenant=tenant, task=task, summaries=dict(summaries))

    async def _change(self, function: str, tenant: str, task: str, entry: str, **argument: Any) -> ChangeReply:
        """Call a function of `lua/tasks.lua`. Raise its errors, except those of one function only."""
        reply = await self._connection.change(TASKS, function, tenant=tenant, task=task, entry=entry, **argument)
        match reply.outcome:
            case "absent":
                raise task_not_found(task)
            case "no_version":
                raise InvalidRequest.at("version", f"task {task!r} has no version {reply.names[0]}")
            case "aliases_full" | "limit":
                raise _refusal(reply, tenant)
        return reply


def _refusal(reply: ChangeReply, tenant: str) -> HubError:
    return limit_refusal(reply) or tenant_not_found(tenant)
