"""What a tenant changes: register adapters, move aliases, share, delete. No HTTP, no Ray: routes call it, tests too."""

import asyncio
import hashlib
from datetime import UTC, datetime

from adapters import Adapter, AdapterError, BankLimits

from ..admission.authentication import Caller
from ..concurrency import Turns
from ..errors import InvalidRequest
from ..registry.cache import RegistryCache
from ..registry.models import Task
from ..registry.tasks import TaskRegistry
from ..schemas import LATEST, Registered, Sharing, SourceBody, TaskInfo, VersionInfo
from ..storage.remote_sources import Sources
from ..storage.store import OffLoop, Store
from ..worker_api import invalid_adapter
from .classification import Service
from .tenant_archive import facts

TENANT_FETCHES = 2  # files of one tenant that a gateway fetches by reference at once; as many wait, more are refused


class Changes:
    """Every change that a caller can make in its own tenant, and its own files."""

    def __init__(
        self,
        *,
        registry: TaskRegistry,
        cache: RegistryCache,
        store: Store,
        sources: Sources,
        service: Service,
        off_loop: OffLoop,
        max_adapter_bytes: int,
    ) -> None:
        self._registry = registry
        self._cache = cache
        self._store = store
        self._sources = sources
        self._service = service
        self._off_loop = off_loop
        self._max_adapter_bytes = max_adapter_bytes
        self._fetches = Turns(TENANT_FETCHES, 2 * TENANT_FETCHES)
        self._background: set[asyncio.Task[None]] = set()

    async def register(
        self, who: Caller, name: str, data: bytes, alias: str | None, source: str | None = None
    ) -> tuple[Registered, bool]:
        """Check an adapter file, keep it and make it a version of a task; the same bytes again are the same version.

        Args:
            source: where the hub has it from, for the audit; None: it was sent.

        Returns:
            The version, and whether it is new.

        Raises:
            InvalidAdapter: the file breaks the format or does not fit the backbone.
            LimitReached: of tasks, versions a task, or stored bytes.
            Unavailable: store, registry or workers are away; nothing was registered.
        """
        task = who.own(name)
        adapter = await self.check(data)
        # A limit that is reached, or a registry that is away, shall leave no orphan in the store.
        await self._registry.check_quota(who, who.tenant, task, adapter.digest, len(data))
        await self._off_loop(self._store.put, adapter.digest, data)
        registered = datetime.now(UTC).isoformat(timespec="milliseconds")
        version = VersionInfo(version=0, registered=registered, **facts(adapter))  # the registry gives the number
        aliases = [LATEST] if alias in (None, LATEST) else [LATEST, alias]
        kept, created = await self._registry.register(who, who.tenant, task, version, aliases, source)
        self._cache.invalidate_task(who.tenant, task)
        prefetch = asyncio.create_task(self._service.prefetch(adapter.digest))
        self._background.add(prefetch)  # the loop itself keeps no task alive
        prefetch.add_done_callback(self._background.discard)
        return Registered(task=task, **kept.model_dump()), created

    async def register_source(
        self, who: Caller, name: str, body: SourceBody, alias: str | None
    ) -> tuple[Registered, bool]:
        """`register`, with a file that the hub fetches by itself.

        Raises:
            InvalidRequest: a source that is not allowed or not there, or another digest than was said.
        """
        who.own(name)
        async with self._fetches.turn(who.tenant):
            data = await asyncio.to_thread(self._sources.fetch, body.source)  # may hold its thread for a minute
        if body.digest not in (None, hashlib.sha256(data).hexdigest()):
            message = "the file at the source has another sha256"  # which one is not for everybody to know
            raise InvalidRequest.at("digest", message)
        return await self.register(who, name, data, alias, self._sources.told(body.source))

    async def file(self, who: Caller, name: str, reference: str) -> tuple[VersionInfo, bytes]:
        """A version of the caller's own with its adapter file."""
        who.own(name)
        version = await self._service.version(who, name, reference)
        return version, await self._off_loop(self._store.get, version.digest)

    async def set_alias(self, who: Caller, name: str, alias: str, targets: dict[int, int]) -> TaskInfo:
        task = who.own(name)
        return self._changed(who, await self._registry.set_alias(who, who.tenant, task, alias, targets))

    async def roll_back(self, who: Caller, name: str, alias: str) -> TaskInfo:
        return self._changed(who, await self._registry.roll_back(who, who.tenant, who.own(name), alias))

    async def delete_alias(self, who: Caller, name: str, alias: str) -> None:
        task = who.own(name)
        await self._registry.delete_alias(who, who.tenant, task, alias)
        self._cache.invalidate_task(who.tenant, task)

    async def share(self, who: Caller, name: str, sharing: Sharing) -> TaskInfo:
        return self._changed(who, await self._registry.share(who, who.tenant, who.own(name), sharing))

    async def delete_task(self, who: Caller, name: str) -> None:
        task = who.own(name)
        await self._registry.delete_task(who, who.tenant, task)
        self._cache.invalidate_task(who.tenant, task)

    async def delete_version(self, who: Caller, name: str, number: int) -> None:
        task = who.own(name)
        await self._registry.delete_version(who, who.tenant, task, number)
        self._cache.invalidate_task(who.tenant, task)

    async def check(self, data: bytes) -> Adapter:
        """An adapter file as this hub could serve it.

        Raises:
            InvalidAdapter: the file breaks the format or does not fit the backbone.
            Unavailable: no worker has its backbone yet.
        """
        return await self._off_loop(self._check, await self._service.limits(), data)

    def _changed(self, who: Caller, task: Task) -> TaskInfo:
        self._cache.invalidate_task(who.tenant, task.name)
        return task.info()

    def _check(self, limits: BankLimits, data: bytes) -> Adapter:
        try:
            adapter = Adapter.read(data, max_bytes=self._max_adapter_bytes)
            limits.check(adapter)
        except AdapterError as error:
            raise invalid_adapter(error) from error
        return adapter
