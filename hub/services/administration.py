"""Management of whole tenants by owners and admins: limits, keys, audit, export and import, garbage collection."""

from collections.abc import AsyncIterable
from functools import partial

from ..admin_schemas import AuditPage, Collected, HubStatus, HubTrainingList, KeyList, LimitsChange, TenantInfo
from ..admission.authentication import Caller
from ..concurrency import TenantReads, TenantThreads
from ..registry.audit import Actor, AuditLog
from ..registry.cache import RegistryCache
from ..registry.datasets.trainings import TrainingRegistry
from ..registry.keys import KeyRegistry
from ..registry.status import StatusBoard
from ..registry.tasks import TaskRegistry
from ..registry.tenants import TenantRegistry
from ..schemas import TaskList
from ..storage.store import Store
from .archives.dataset_archive import DatasetArchive
from .archives.tenant_archive import Export, export_tenant, import_tenant
from .garbage_collection import Collector
from .registration import RegistrationService


class AdministrationService:
    """Changes of tenants. This gateway applies each change at once; change events tell the other gateways."""

    def __init__(
        self,
        *,
        registry: TaskRegistry,
        tenants: TenantRegistry,
        keys: KeyRegistry,
        audit: AuditLog,
        status: StatusBoard,
        trainings: TrainingRegistry,
        collector: Collector,
        cache: RegistryCache,
        store: Store,
        registration: RegistrationService,
        datasets: DatasetArchive,
        reads: TenantReads,
        threads: TenantThreads,
        max_adapter_bytes: int,
        min_free_bytes: int,
    ) -> None:
        """
        Args:
            reads: turns of reads of the registry.
            threads: thread pool for calls to the store and for files.
            max_adapter_bytes: size limit of one adapter file in an import.
            min_free_bytes: bytes that an import leaves free on the disk of temporary files.
        """
        self.tenants = tenants
        self.keys = keys
        self._audit = audit
        self._status = status
        self._trainings = trainings
        self._collector = collector
        self._registry = registry
        self._cache = cache
        self._store = store
        self._registration = registration
        self._datasets = datasets
        self._reads = reads
        self._threads = threads
        self._max_adapter_bytes = max_adapter_bytes
        self._min_free_bytes = min_free_bytes

    async def change_limits(self, by: Actor, tenant: str, limits: LimitsChange) -> TenantInfo:
        """Change some of a tenant's limits and return all of them.

        Raises:
            NotFound: no such tenant.
        """
        info = await self.tenants.change_limits(by, tenant, limits)
        self._cache.invalidate_tenant(tenant)
        return info

    async def delete(self, by: Actor, tenant: str) -> None:
        """Delete a tenant with its tasks and keys.

        Raises:
            NotFound: no such tenant.
        """
        await self.tenants.delete(by, tenant)
        self._cache.invalidate_tenant(tenant)

    async def revoke(self, by: Actor, tenant: str, id: str) -> None:
        """Revoke a key of a tenant, or an admin key (tenant `''`).

        Raises:
            NotFound: no such key.
            Conflict: the key is the last admin key without an expiry date.
        """
        await self.keys.revoke(by, tenant, id)
        self._cache.invalidate_key(id)

    async def status(self) -> HubStatus:
        """Return the current load of workers and tenants, and the errors of the last hour."""
        return await self._status.read(self.tenants)

    async def trainings(self) -> HubTrainingList:
        """Return the trainings of all tenants: running, queued, and the last ended ones."""
        return await self._trainings.of_hub()

    async def key_page(self, by: Caller, tenant: str, limit: int, after: str) -> KeyList:
        """Return a page of a tenant's keys, or of the admin keys (`''`).

        Raises:
            NotFound: no such tenant.
        """
        async with self._reads.turn(by.tenant):
            return await self.keys.page(tenant, limit, after)

    async def audit(
        self,
        by: Caller,
        tenant: str | None,
        after: str,
        count: int,
        *,
        admins: bool = False,
        newest_first: bool = False,
    ) -> AuditPage:
        """Return changes in a tenant, or in the whole hub (None): all changes, or only those of admins.

        Raises:
            NotFound: no such tenant.
        """
        if tenant is not None:
            await self.tenants.get(tenant)
        return await self._audit.read(tenant, after, count, admins=admins, newest_first=newest_first, reader=by.tenant)

    async def export(self, tenant: str, *, datasets: bool = True) -> Export:
        """Return a tenant as a tar stream, with or without the images of its datasets.

        Raises:
            NotFound: no such tenant.
            Unavailable: the store lacks a file.
        """
        info = await self.tenants.get(tenant)
        archive = self._datasets if datasets else None
        return await export_tenant(self._registry, self._reads, self._store, self._threads.of(tenant), info, archive)

    async def restore(self, by: Actor, tenant: str, tar: AsyncIterable[bytes], *, datasets: bool = True) -> TaskList:
        """Create the tasks of an exported tenant, all or none, with or without their datasets.

        Raises:
            NotFound: no such tenant.
            HubError: any error of `import_tenant`.
        """
        info = await self.tenants.get(tenant)
        tasks = await import_tenant(
            self._registry,
            self._store,
            self._threads.of(tenant),
            partial(self._registration.check, tenant),
            by,
            info,
            tar,
            self._max_adapter_bytes,
            self._min_free_bytes,
            self._datasets if datasets else None,
        )
        self._cache.invalidate_tenant(tenant)
        return TaskList(tasks=[task.summary() for task in tasks])

    async def collect_garbage(self, by: Actor, older_than_s: float) -> Collected:
        """Remove files that no version holds; the audit records start and result.

        Raises:
            Conflict: the registry may have lost keys; nothing was removed.
        """
        await self._audit.append(by.entry("", "store.collect.begin", older_than_s=older_than_s))
        done = await self._collector.collect(older_than_s)
        await self._audit.append(by.entry("", "store.collect", removed=done.removed, bytes=done.bytes))
        return done
