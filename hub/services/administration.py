"""What owners and admins do with whole tenants: limits, keys, audit, moving to another hub, collecting old files."""

from collections.abc import AsyncIterable

from ..registry.audit import Actor, AuditLog
from ..registry.cache import RegistryCache
from ..registry.keys import KeyRegistry
from ..registry.status import StatusBoard
from ..registry.tasks import TaskRegistry
from ..registry.tenants import TenantRegistry
from ..schemas import AuditPage, Collected, HubStatus, LimitsChange, TaskList, TenantInfo
from ..storage.store import OffLoop, Store
from .garbage_collection import collect
from .registration import Changes
from .tenant_archive import Export, export_tenant, import_tenant


class Administration:
    """Changes of tenants, each heard at once by this gateway and in a moment by the others."""

    def __init__(
        self,
        *,
        registry: TaskRegistry,
        tenants: TenantRegistry,
        keys: KeyRegistry,
        audit: AuditLog,
        status: StatusBoard,
        cache: RegistryCache,
        store: Store,
        changes: Changes,
        off_loop: OffLoop,
        max_adapter_bytes: int,
    ) -> None:
        self.tenants = tenants
        self.keys = keys
        self._audit = audit
        self._status = status
        self._registry = registry
        self._cache = cache
        self._store = store
        self._changes = changes
        self._off_loop = off_loop
        self._max_adapter_bytes = max_adapter_bytes

    async def change_limits(self, by: Actor, tenant: str, limits: LimitsChange) -> TenantInfo:
        info = await self.tenants.change_limits(by, tenant, limits)
        self._cache.invalidate_tenant(tenant)
        return info

    async def delete(self, by: Actor, tenant: str) -> None:
        await self.tenants.delete(by, tenant)
        self._cache.invalidate_tenant(tenant)

    async def revoke(self, by: Actor, tenant: str, id: str) -> None:
        await self.keys.revoke(by, tenant, id)
        self._cache.invalidate_key(id)

    async def status(self) -> HubStatus:
        """What workers and tenants do at this moment."""
        return await self._status.read(self.tenants)

    async def audit(self, tenant: str | None, after: str, count: int, *, admins: bool = False) -> AuditPage:
        """Changes in a tenant, or in the whole hub (None), all or only those of admins.

        Raises:
            NotFound: no such tenant.
        """
        if tenant is not None:
            await self.tenants.get(tenant)
        return await self._audit.read(tenant, after, count, admins=admins)

    async def export(self, tenant: str) -> Export:
        """
        Raises:
            NotFound: no such tenant.
            Unavailable: the store lacks a file.
        """
        info = await self.tenants.get(tenant)
        return await export_tenant(self._registry, self._store, self._off_loop, info)

    async def restore(self, by: Actor, tenant: str, tar: AsyncIterable[bytes]) -> TaskList:
        """Make the tasks of an exported tenant, all or none; raises what `import_tenant` raises, and NotFound."""
        info = await self.tenants.get(tenant)
        tasks = await import_tenant(
            self._registry,
            self._store,
            self._off_loop,
            self._changes.check,
            by,
            info,
            tar,
            self._max_adapter_bytes,
        )
        self._cache.invalidate_tenant(tenant)
        return TaskList(tasks=[task.summary() for task in tasks])

    async def collect(self, by: Actor, older_than_s: float) -> Collected:
        """Remove files that no version holds."""
        await self._audit.append(by.entry("", "store.collect.begin", older_than_s=older_than_s))
        done = await collect(self._registry, self._store, self._off_loop, older_than_s)
        await self._audit.append(by.entry("", "store.collect", removed=done.removed, bytes=done.bytes))
        return done
