"""Reads of tasks. No read takes a task's hash whole: its versions may have 50 MB together.

A list or a description is read in pages of a bounded size, so Redis and the gateway serve other tenants in between.
"""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from ..errors import NotFound, Unavailable
from ..schemas import LATEST, TaskSort, TaskSummary
from .models import NO_VERSION, Task, WholeTask, parse_targets, parse_task, task_not_found, task_summary, whole_task
from .redis.connection import (
    READ_TIMEOUT_S,
    RegistryConnection,
    as_hash,
    as_integer,
    as_optional_text,
    as_texts,
    as_texts_of,
    tenant_key,
)
from .redis.scripts import READS
from .versions import NOTHING_LIVE, Live, StoredVersion, VersionSummary

PAGE_BYTES = 512 * 1024  # of stored text in one page; a page has at least one entry
TASKS_PER_READ = 50
TASKS_PER_SORT = 250  # in one step of a few milliseconds
FIELDS = ("a", "d", "n", "s", "share")  # of a task's hash, without versions, their summaries and former targets
DUMP_ATTEMPTS = 3
# Parts of a tenant's list in their order: its own tasks, those shared with it by name, and other public tasks.
PARTS = ("own", "named", "public")


class TaskOrder(NamedTuple):
    """The order of the tenant's own tasks in a list."""

    by: TaskSort = "name"
    descending: bool = False


BY_NAME = TaskOrder()


class TaskReads:
    """Reads of tasks. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection
        self._redis = connection.redis

    async def task(self, tenant: str, task: str) -> Task:
        """Return a task of a tenant.

        Raises:
            NotFound: the task does not exist.
        """
        (fields,) = await self._describe([task_key(tenant, task)], FIELDS)
        if not fields:
            raise task_not_found(task)
        return parse_task(task, fields)

    async def version(self, tenant: str, task: Task, number: int) -> StoredVersion:
        """Return a version of a task that was read before.

        Raises:
            NotFound: the version was deleted since then.
        """
        command = self._redis.hget(task_key(tenant, task.name), f"v:{number}")
        text = as_optional_text(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
        stored = StoredVersion(number, text or "")
        # A deleted tenant's numbers may be in use again.
        if text is None or not text.startswith(f'{{"digest":"{task.digests[number]}"'):
            raise NotFound.at("version", f"version {number} of task {task.name!r} was deleted")
        return stored

    async def versions(self, tenant: str, task: Task, numbers: Sequence[int]) -> list[StoredVersion]:
        """Return the first of these versions of a task, as many as a page may hold, without deleted ones."""
        arguments = {"key": task_key(tenant, task.name), "numbers": [str(n) for n in numbers], "max_bytes": PAGE_BYTES}
        texts = as_texts(await self._read("versions", **arguments)) if numbers else []
        return [StoredVersion(number, text) for number, text in zip(numbers, texts, strict=False)]

    async def live(self, tenant: str, task: str) -> Live:
        """Return the version behind the alias `latest`; the task need not exist."""
        command = self._redis.hget(task_key(tenant, task), f"a:{LATEST}")
        targets = as_optional_text(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
        if targets is None:
            return NOTHING_LIVE
        number = max(map(int, json.loads(targets)))
        command = self._redis.hget(task_key(tenant, task), f"v:{number}")
        text = as_optional_text(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
        return Live(targets, StoredVersion(number, text).info() if text is not None else None)

    async def is_shared(self, owner: str, task: str, tenant: str) -> bool:
        """Return whether a task is shared with another tenant.

        The work does not depend on the task: it may be absent, private, or shared with a thousand other tenants.
        """
        name = f"{owner}:{task}"
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.zscore("karst:published", name)
        pipeline.sismember("karst:public", name)  # of an older hub
        pipeline.sismember(tenant_key(tenant, "shared"), name)
        score, *members = await self._connection.execute(pipeline.execute(), timeout_s=READ_TIMEOUT_S)
        return score is not None or any(members)

    async def page(
        self, tenant: str, limit: int, cursor: str, is_listed: Callable[[str], bool], order: TaskOrder = BY_NAME
    ) -> tuple[list[TaskSummary], str | None]:
        """Return a page of the tasks that a tenant sees, and the cursor of the next one; None on the last page.

        The tenant's own tasks come first, then the tasks of others that are shared with it by name, then public ones;
        so no number of public tasks hides one that is shared by name.

        In another order than by name, a change between two pages may move a task from one page to the other. Redis
        sorts the tasks that changed since the last such list: all tasks for the first one, in short steps.

        Args:
            limit: number of tasks. A page may have fewer, since its size is bounded too.
            cursor: `''` for the first page.
            is_listed: whether to list a task of this name.
            order: of the own tasks; the others are in the order of their names.
        """
        part, _, after = cursor.partition(":") if cursor else (PARTS[0], "", "")
        if order != BY_NAME and part == PARTS[0]:
            while as_integer(await self._read("sort", tenant=tenant, count=TASKS_PER_SORT)):
                pass
        found: list[TaskSummary] = []
        size_bytes = 0
        for current in PARTS[PARTS.index(part) :]:
            while True:
                if len(found) == limit or size_bytes > PAGE_BYTES:
                    return found, await self._next_cursor(tenant, current, after, order)
                count = min(limit - len(found), TASKS_PER_READ)
                after, entries = await self._list(tenant, current, after, count, PAGE_BYTES - size_bytes, order)
                size_bytes += sum(len(text) for entry in entries for text in entry)
                found += [summary for entry in entries if is_listed((summary := _summary(entry)).task)]
                if after == "":
                    break
        return found, None

    async def dump(self, tenant: str) -> list[WholeTask]:
        """Return all tasks with all that `restore` needs."""
        return [task async for task in self.dumped(tenant)]

    async def dumped(self, tenant: str) -> AsyncIterator[WholeTask]:
        """Yield all tasks with all that `restore` needs. The versions of one have up to 128 MiB."""
        command = self._redis.hgetall(tenant_key(tenant, "numbers"))
        numbers = as_hash(await self._connection.execute(command))
        for name in await self.task_names(tenant):
            for _ in range(DUMP_ATTEMPTS):  # a change between two reads looks like a missing version
                (fields,) = await self._describe([task_key(tenant, name)], (*FIELDS, "h"))
                if not fields:  # deleted in the meantime
                    break
                task = parse_task(name, fields)
                texts: dict[int, str] = {}
                while len(texts) < len(task.digests):
                    page = await self.versions(tenant, task, [n for n in task.digests if n not in texts])
                    texts |= {stored.number: stored.text for stored in page}
                if all(texts.values()):
                    yield whole_task(task, fields, texts, int(numbers.get(name, 0)))
                    break
            else:
                raise Unavailable(f"Task {name!r} changes too often to be exported. Retry later.")

    async def missing_summaries(self, tenant: str, task: str) -> AsyncIterator[dict[str, str]]:
        """Yield the summaries of versions without one, which an older hub has written, in pages: number -> summary."""
        key = task_key(tenant, task)
        names = as_texts(await self._connection.execute(self._redis.hkeys(key)))
        numbers = {name[2:] for name in names if name.startswith("v:")} - {n[2:] for n in names if n.startswith("i:")}
        remaining = sorted(map(int, numbers))
        while remaining:
            arguments = {"key": key, "numbers": [str(n) for n in remaining], "max_bytes": PAGE_BYTES}
            texts = as_texts(await self._read("versions", **arguments))
            page = [StoredVersion(n, text) for n, text in zip(remaining, texts, strict=False) if text]
            yield {str(stored.number): VersionSummary.of(stored.info()).text() for stored in page}
            remaining = remaining[len(texts) :]

    async def task_names(self, tenant: str) -> list[str]:
        """Return the names of a tenant's tasks, in order."""
        return sorted(as_texts(await self._connection.execute(self._redis.smembers(tenant_key(tenant, "tasks")))))

    async def _describe(self, keys: Sequence[str], kinds: Sequence[str]) -> list[dict[str, str]]:
        replies = as_texts_of(await self._read("describe", keys=list(keys), kinds=list(kinds)))
        return [dict(zip(reply[::2], reply[1::2], strict=True)) for reply in replies]

    async def _list(
        self, tenant: str, part: str, after: str, count: int, max_bytes: int, order: TaskOrder
    ) -> tuple[str, list[list[str]]]:
        arguments: dict[str, Any] = {"tenant": tenant, "part": part, "after": after}
        if order != BY_NAME:
            arguments["order"] = {"by": order.by, "descending": order.descending}
        reply = await self._read("list", **arguments, count=count, max_bytes=max_bytes)
        if not isinstance(reply, list):
            raise TypeError(f"Redis returned {type(reply).__name__}, not a list")
        return reply[0], as_texts_of(reply[1:])

    async def _next_cursor(self, tenant: str, part: str, after: str, order: TaskOrder) -> str | None:
        """Return the cursor of the page after this name of this part; None if the list has no further task."""
        for following in PARTS[PARTS.index(part) :]:
            position, entries = await self._list(tenant, following, after, 1, 0, order)
            if entries or position:
                return f"{following}:{after}"
            after = ""
        return None

    async def _read(self, function: str, **argument: Any) -> object:
        arguments = function, json.dumps(argument)
        return await self._connection.evaluate(READS.text, *arguments, timeout_s=READ_TIMEOUT_S)


def task_key(tenant: str, task: str) -> str:
    """Return the name of a task's hash."""
    return tenant_key(tenant, f"task:{task}")


def _summary(entry: Sequence[str]) -> TaskSummary:
    """Return a task of a list from an entry of `lua/reads.lua`."""
    name, number, summary, text, *aliases = entry
    targets = {alias[2:]: parse_targets(body) for alias, body in zip(aliases[::2], aliases[1::2], strict=True)}
    if summary:
        found = VersionSummary.parse(summary)
    else:  # an older hub's version, or none
        found = VersionSummary.of(StoredVersion(int(number), text).info()) if text else NO_VERSION
    return task_summary(name, targets, found)
