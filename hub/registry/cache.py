"""What a gateway remembers of the registry, kept true by change events.

Reads of known tasks and keys need no Redis, so classification goes on while it is away. What was read while an
event came in is answered but not remembered, so nothing stale can stay. A gateway that has not heard from the
registry for five minutes honours no key any more: one of them may be revoked by now.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from ..errors import Unavailable
from ..schemas import TenantInfo
from .models import Task
from .tasks import Registry
from .tenants import KeyRecord, Tenants, key_id

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
WAIT_MS, RETRY_S = 500, 0.25  # with a reconnect still less than two seconds
MOST_TASKS, MOST_KEYS, MOST_TENANTS = 20_000, 20_000, 20_000
TRUSTED_S = 300.0


class _Remembered(Generic[K, V]):
    """The values used last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        self._values[key] = value
        if len(self._values) > self._most:
            self._values.popitem(last=False)

    def drop(self, fits: Callable[[K, V], bool]) -> None:
        for key in [key for key, value in self._values.items() if fits(key, value)]:
            del self._values[key]

    def pop(self, key: K) -> None:
        self._values.pop(key, None)

    def clear(self) -> None:
        self._values.clear()


class RegistryCache:
    """Tasks, keys and tenants by name, in memory."""

    def __init__(self, registry: Registry, tenants: Tenants) -> None:
        self._registry = registry
        self._tenants_there = tenants
        self._tasks: _Remembered[tuple[str, str], Task] = _Remembered(MOST_TASKS)
        self._keys: _Remembered[str, KeyRecord] = _Remembered(MOST_KEYS)
        self._tenants: _Remembered[str, TenantInfo] = _Remembered(MOST_TENANTS)
        self._changes = 0  # counts events; a read that spans one is not remembered
        self._following = False
        self._heard_s = time.monotonic()

    async def task(self, tenant: str, name: str) -> Task:
        """
        Raises:
            NotFound: the tenant has no such task.
            Unavailable: not known here, and the registry does not answer.
        """
        found = await self._known(self._tasks, (tenant, name), lambda: self._registry.task(tenant, name))
        return _there(found)

    def known_task(self, tenant: str, name: str) -> Task | None:
        """The task if it is remembered."""
        return self._tasks.get((tenant, name))

    async def key(self, key: str) -> KeyRecord | None:
        """The record of a key; None if the hub does not know it.

        Raises:
            Unavailable: not known here, and the registry does not answer; or it did not for too long.
        """
        if time.monotonic() - self._heard_s > TRUSTED_S:
            raise Unavailable("the registry has not answered for minutes, so that no key can be trusted")
        found = await self._known(self._keys, key_id(key), lambda: self._tenants_there.key(key))
        return found if found is not None and found.is_of(key) else None

    async def tenant(self, tenant: str) -> TenantInfo:
        """
        Raises:
            NotFound: no such tenant.
            Unavailable: not known here, and the registry does not answer.
        """
        found = await self._known(self._tenants, tenant, lambda: self._tenants_there.get(tenant))
        return _there(found)

    def forget(self, tenant: str, name: str) -> None:
        """Read this task anew next time: it was changed."""
        self._changes += 1
        self._tasks.pop((tenant, name))

    def forget_tenant(self, tenant: str) -> None:
        """Read everything of this tenant anew."""
        self._changes += 1
        self._tenants.pop(tenant)
        self._tasks.drop(lambda key, _task: key[0] == tenant)
        self._keys.drop(lambda _id, record: record.tenant == tenant)

    def forget_key(self, id: str) -> None:
        """Read this key anew next time."""
        self._changes += 1
        self._keys.pop(id)

    async def follow(self) -> None:
        """Read change events for ever; runs as a task of the gateway's own. Remembers nothing before its start."""
        last: str | None = None
        while True:
            try:
                oldest, newest = await self._registry.event_span()
                if last is None or not _order(oldest) <= _order(last) <= _order(newest):
                    self._forget_all()  # the first start, or events were missed: a lost stream, a long absence
                    last = newest
                self._following = True
                while True:
                    self._heard_s = time.monotonic()
                    for event in await self._registry.events(last, WAIT_MS):
                        self._note(event.kind, event.tenant, event.name)
                        last = event.id
            except Unavailable as error:
                logger.warning("change events: %s; known tasks are served from memory", error.detail)
            except Exception:  # whatever it is, a gateway that no longer follows must not remember
                logger.exception("change events")
                self._following, last = False, None
                self._forget_all()
            await asyncio.sleep(RETRY_S)

    def _note(self, kind: str, tenant: str, name: str) -> None:
        match kind:
            case "task":
                self.forget(tenant, name)
            case "key":
                self.forget_key(name)
            case _:
                self.forget_tenant(name)

    async def _known(self, memory: _Remembered[K, V], key: K, read: Callable[[], Awaitable[V | None]]) -> V | None:
        found = memory.get(key)
        if found is not None:
            return found
        before = self._changes
        value = await read()
        if value is not None and self._following and self._changes == before:
            memory.put(key, value)
        return value

    def _forget_all(self) -> None:
        self._changes += 1
        self._tasks.clear()
        self._keys.clear()
        self._tenants.clear()


def _there(value: V | None) -> V:
    """What the registry raises for, where it is not there."""
    assert value is not None  # noqa: S101
    return value


def _order(event_id: str) -> tuple[int, int]:
    millis, _, sequence = event_id.partition("-")
    return int(millis), int(sequence or 0)
