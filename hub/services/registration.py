"""Changes in a caller's own tenant: register adapters, move aliases, change and delete tasks. No HTTP, no Ray."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from adapters import Adapter, AdapterError, BankLimits

from ..admission.authentication import Caller
from ..admission.quotas import SOURCE_DOWNLOADS, SOURCE_DOWNLOADS_QUEUED, UPLOADS, UPLOADS_QUEUED
from ..admission.refused_uploads import RefusedUploads
from ..concurrency import TenantConcurrencyLimit, TenantThreads, run_blocking
from ..errors import Conflict, InvalidAdapter, InvalidRequest, LimitReached
from ..registry.cache import RegistryCache
from ..registry.models import DEFAULT_SETTINGS, Task
from ..registry.tasks import TaskRegistry
from ..registry.versions import LatestMovedError, Live, label_difference
from ..schemas import LATEST, MAX_PAGE, LiveVersion, Registered, Sharing, SourceBody, TaskSettings, VersionInfo
from ..storage.remote_sources import RemoteSources
from ..storage.store import Store
from ..worker_api import invalid_adapter
from .adapter_texts import check_texts
from .archives.tenant_archive import version_fields
from .classification import ClassificationService
from .garbage_collection import Collector

RESERVE_S = 300  # from the check of the quota to the new version; more than the store takes for a file
REFUSAL_DELAY_S = 1.0


class RegistrationService:
    """Changes that a caller may make in its own tenant, and reads of its own adapter files.

    Every method raises `NotFound` if the caller's tenant does not own the task.
    """

    def __init__(
        self,
        *,
        registry: TaskRegistry,
        cache: RegistryCache,
        store: Store,
        sources: RemoteSources,
        classification: ClassificationService,
        collector: Collector,
        store_threads: TenantThreads,
        parse_threads: TenantThreads,
        source_threads: TenantThreads,
        max_adapter_bytes: int,
    ) -> None:
        """
        Args:
            store_threads: thread pool for calls to the store.
            parse_threads: thread pool for checks of adapter files.
            source_threads: thread pool for downloads, which may take minutes.
            max_adapter_bytes: size limit of one adapter file.
        """
        self._registry = registry
        self._cache = cache
        self._store = store
        self._sources = sources
        self._classification = classification
        self._collector = collector
        self._store_threads = store_threads
        self._parse_threads = parse_threads
        self._source_threads = source_threads
        self._refused = RefusedUploads()
        self._max_adapter_bytes = max_adapter_bytes
        self._uploads = TenantConcurrencyLimit(UPLOADS, UPLOADS + UPLOADS_QUEUED)
        self._downloads = TenantConcurrencyLimit(SOURCE_DOWNLOADS, SOURCE_DOWNLOADS + SOURCE_DOWNLOADS_QUEUED)
        self._background: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def upload(self, caller: Caller) -> AsyncIterator[None]:
        """Wait for one of the tenant's uploads, and hold it while a file is read and registered.

        A refusal holds it for a second. Otherwise a client that ignores `Retry-After` could send hundreds a second.

        Raises:
            LimitReached: too many uploads of the tenant are queued, or too many of its files were refused.
        """
        async with self._uploads.acquire(caller.tenant):
            try:
                self._refused.require(caller.tenant)
            except LimitReached:
                await asyncio.sleep(REFUSAL_DELAY_S)
                raise
            yield

    async def register(
        self,
        caller: Caller,
        name: str,
        data: bytes,
        alias: str | None,
        settings: TaskSettings = DEFAULT_SETTINGS,
        source: str | None = None,
        *,
        stage: bool = False,
        labels_may_change: bool = False,
        training: tuple[str, str] | None = None,
    ) -> tuple[Registered, bool]:
        """Check an adapter file, store it and add it to a task as a version.

        A new version becomes `latest`. Equal bytes give the same version, and move no alias.

        Args:
            alias: further alias that a new version gets.
            stage: whether `latest` stays where it is. The first version of a task becomes `latest` in any case.
            labels_may_change: whether the labels may differ from those of the version behind `latest`.
            settings: settings of the task to change in the same step, also if the version is known.
            source: reference that the hub read the file from, for the audit; None if the client sent the file.
            training: the job that made the version, and the token of its gateway; "" for a training in a request.

        Returns:
            The version, and whether it is new.

        Raises:
            InvalidAdapter: the file breaks the format or does not fit the backbone.
            LimitReached: the tenant's limit of tasks, of versions per task, of stored bytes, of registry bytes or of
                refused uploads.
            Conflict: the labels differ from those of the version behind `latest`.
            InsufficientStorage: the disk of the store is nearly full.
            Unavailable: the store, the registry or the workers are unavailable; the hub has registered nothing.
            TrainingEndedError: the gateway no longer has the job.
        """
        task = caller.own_task(name)
        if stage and alias == LATEST:
            raise InvalidRequest.at("stage", f"a staged version does not become {LATEST!r}; omit stage or alias")
        pool = self._store_threads.of(caller.tenant)
        adapter = await self._checked_upload(caller.tenant, data)
        registered = datetime.now(UTC).isoformat(timespec="milliseconds")
        version = VersionInfo(version=0, registered=registered, **version_fields(adapter))  # the registry numbers it
        # Before the put: otherwise a reached limit or an unavailable registry would leave an orphan in the store.
        is_new = await self._check_quota(caller, task, version)
        further = [] if alias in (None, LATEST) else [alias]
        compared = None if labels_may_change else version
        live = await self._live(caller.tenant, task, compared if is_new else None)
        if is_new:  # last of all: a refused file counts for nothing
            await run_blocking(pool, self._store.require_space, len(data))
            await self._check_quota(caller, task, version, reserve_s=RESERVE_S)
        await run_blocking(pool, self._store.put, adapter.digest, data)
        while True:
            # A task without `latest` could not be called by most clients, so its first version always gets it.
            aliases = further if stage and live.version is not None else [LATEST, *further]
            try:
                kept, created = await self._registry.register(
                    caller, caller.tenant, task, version, aliases, source, settings, live, training
                )
                break
            except LatestMovedError:  # by another registration since `live` was read
                live = await self._live(caller.tenant, task, compared)
        # From now on no collection removes the file. One may have, if another tenant's last version of it was deleted.
        if created and await run_blocking(pool, self._store.find, adapter.digest) is None:
            await run_blocking(pool, self._store.put, adapter.digest, data)
        self._cache.invalidate_task(caller.tenant, task)
        prefetch = asyncio.create_task(self._classification.prefetch(adapter.digest))
        self._background.add(prefetch)  # otherwise the task could be garbage-collected: the loop holds weak references
        prefetch.add_done_callback(self._background.discard)
        reply = Registered(
            task=task,
            **kept.model_dump(),
            moved=aliases if created else [],
            accuracy=kept.measured_accuracy(),
            previous=_live_version(live.version),
            **settings.given(),
        )
        return reply, created

    async def register_source(
        self,
        caller: Caller,
        name: str,
        body: SourceBody,
        alias: str | None,
        settings: TaskSettings = DEFAULT_SETTINGS,
        *,
        stage: bool = False,
        labels_may_change: bool = False,
    ) -> tuple[Registered, bool]:
        """Download an adapter file from an allowed source and register it.

        Raises:
            InvalidRequest: the source is not allowed or not found, or its sha256 is not `body.digest`.
            HubError: any error of `register`.
        """
        caller.own_task(name)
        async with self._downloads.acquire(caller.tenant):
            data, digest = await run_blocking(self._source_threads.of(caller.tenant), self._fetch, body.source)
        if body.digest not in (None, digest):
            # The message omits the actual digest: it would identify a file that the caller may not be allowed to read.
            raise InvalidRequest.at("digest", "the file at the source has a different sha256")
        source = self._sources.canonical(body.source)
        return await self.register(
            caller, name, data, alias, settings, source, stage=stage, labels_may_change=labels_may_change
        )

    async def file(
        self, caller: Caller, name: str, reference: str, canary: str | None = None
    ) -> tuple[int, str, bytes]:
        """Return number, digest and adapter file of a version of the caller's own task.

        Args:
            reference: a version number or an alias.
            canary: key of the caller's choice. If an alias has several versions, equal keys give equal versions.
        """
        caller.own_task(name)
        task, number = await self._classification.find(caller, name, reference, canary)
        digest = task.digests[number]
        data = await run_blocking(self._store_threads.of(caller.tenant), self._store.get, digest)
        return number, digest, data

    async def put(self, caller: Caller, name: str, settings: TaskSettings) -> tuple[str, bool]:
        """Change settings of a task; omitted ones keep their values. Create a task that does not exist.

        Returns:
            The task as the JSON of `TaskInfo`, and whether it is new.
        """
        task, created = await self._registry.put(caller, caller.tenant, caller.own_task(name), settings)
        return await self._changed(caller, task), created

    async def set_alias(self, caller: Caller, name: str, alias: str, targets: dict[int, int]) -> str:
        """Point an alias at versions: version number -> weight."""
        task = caller.own_task(name)
        return await self._changed(caller, await self._registry.set_alias(caller, caller.tenant, task, alias, targets))

    async def roll_back(self, caller: Caller, name: str, alias: str) -> str:
        """Point an alias at its previous targets."""
        task = caller.own_task(name)
        return await self._changed(caller, await self._registry.roll_back(caller, caller.tenant, task, alias))

    async def delete_alias(self, caller: Caller, name: str, alias: str) -> None:
        """Delete an alias."""
        task = caller.own_task(name)
        await self._registry.delete_alias(caller, caller.tenant, task, alias)
        self._cache.invalidate_task(caller.tenant, task)

    async def share(self, caller: Caller, name: str, sharing: Sharing) -> str:
        """Replace the list of tenants that may use a task."""
        task = caller.own_task(name)
        return await self._changed(caller, await self._registry.share(caller, caller.tenant, task, sharing))

    async def delete_task(self, caller: Caller, name: str) -> None:
        """Delete a task with its versions and aliases."""
        task = caller.own_task(name)
        await self._registry.delete_task(caller, caller.tenant, task)
        self._cache.invalidate_task(caller.tenant, task)

    async def delete_version(self, caller: Caller, name: str, number: int) -> None:
        """Delete a version.

        Raises:
            Conflict: an alias points at the version.
        """
        task = caller.own_task(name)
        await self._registry.delete_version(caller, caller.tenant, task, number)
        self._cache.invalidate_task(caller.tenant, task)

    async def check(self, tenant: str, data: bytes) -> Adapter:
        """Parse an adapter file and check that the workers can serve it, when it is the tenant's turn.

        Raises:
            InvalidAdapter: the file breaks the format or does not fit the backbone.
            Unavailable: no worker has loaded its backbone yet.
        """
        return await run_blocking(
            self._parse_threads.of(tenant), self._check, await self._classification.limits(), data
        )

    async def _checked_upload(self, tenant: str, data: bytes) -> Adapter:
        """Check a client's file. Raises the errors of `check`, and `LimitReached` after too many refused files."""
        limits = await self._classification.limits()

        def check() -> Adapter:
            self._refused.require(tenant)  # in the tenant's turn: queued files see the refusals of those before them
            try:
                return self._check(limits, data)
            except InvalidAdapter:
                self._refused.count(tenant)
                raise

        return await run_blocking(self._parse_threads.of(tenant), check)

    def _fetch(self, source: str) -> tuple[bytes, str]:
        data = self._sources.fetch(source)
        return data, hashlib.sha256(data).hexdigest()

    async def _check_quota(self, caller: Caller, task: str, version: VersionInfo, reserve_s: int = 0) -> bool:
        """Return whether a version is new. Where deleted files fill the tenant's quota, remove them first."""
        try:
            return await self._registry.check_quota(caller, caller.tenant, task, version, reserve_s=reserve_s)
        except LimitReached as error:
            is_storage = any(problem.field in ("stored_bytes", "deleted_files") for problem in error.errors)
            if not is_storage or not await self._collector.make_room(caller.tenant, version.size_bytes):
                raise
        return await self._registry.check_quota(caller, caller.tenant, task, version, reserve_s=reserve_s)

    async def _live(self, tenant: str, task: str, new: VersionInfo | None) -> Live:
        """Return what `latest` points at, and compare its labels with those of a new version, if there is one.

        Raises:
            Conflict: the labels differ.
        """
        live = await self._registry.live(tenant, task)
        if new is not None and live.version is not None:
            _require_equal_labels(live.version, new)
        return live

    async def _changed(self, caller: Caller, task: Task) -> str:
        """Return a changed task with the first page of its versions, as the JSON of `TaskInfo`."""
        self._cache.invalidate_task(caller.tenant, task.name)
        return await self._classification.describe(caller, task.name, task, MAX_PAGE)

    def _check(self, limits: BankLimits, data: bytes) -> Adapter:
        try:
            adapter = Adapter.read(data, max_bytes=self._max_adapter_bytes, max_tensors=limits.max_tensors)
            limits.check(adapter)
            check_texts(adapter)
        except AdapterError as error:
            raise invalid_adapter(error) from error
        return adapter


def _require_equal_labels(live: VersionInfo, new: VersionInfo) -> None:
    """Refuse labels that clients of `latest` do not expect.

    Raises:
        Conflict: the labels differ.
    """
    if difference := label_difference(live.labels, new.labels):
        message = f"differ from those of version {live.version}, which {LATEST!r} points at ({difference}); "
        raise Conflict.at("labels", message + "to register the version nevertheless, set labels=changed")


def _live_version(version: VersionInfo | None) -> LiveVersion | None:
    return None if version is None else LiveVersion(version=version.version, accuracy=version.measured_accuracy())
