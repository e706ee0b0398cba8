"""Tenants and their limits in Redis. Every change is one atomic script and leaves an audit entry."""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from ..admin_schemas import Counted, LimitsChange, TenantInfo, TenantLimits, TenantList, Usage, UsedNow
from ..errors import Conflict, NotFound
from .audit import Actor
from .redis.connection import (
    READ_TIMEOUT_S,
    RegistryConnection,
    as_hash,
    as_integer,
    as_optional_text,
    as_optional_texts,
    as_texts,
    tenant_key,
)
from .redis.scripts import TENANTS

VERSIONS_PER_STEP = 500  # of one step of the deletion of a tenant


class TenantRegistry:
    """Reads and atomic changes of tenants. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection
        self._redis = connection.redis

    async def create(self, by: Actor, tenant: str, limits: LimitsChange) -> TenantInfo:
        """Create a tenant with the default limits, changed by `limits`.

        Raises:
            Conflict: the tenant exists.
        """
        # Microseconds tell a tenant from a deleted one of the same name.
        created = datetime.now(UTC).isoformat(timespec="microseconds")
        info = TenantInfo(tenant=tenant, created=created, limits=limits.on(TenantLimits()))
        entry = by.entry(tenant, "tenant.create", limits=limits.model_dump(exclude_none=True))
        body = info.model_dump_json(exclude={"tenant"})
        reply = await self._connection.change(TENANTS, "create", tenant=tenant, entry=entry, info=body)
        if reply.outcome == "exists":
            raise Conflict.at("tenant", f"there is already a tenant {tenant!r}; choose another name")
        return info

    async def page(self, limit: int, after: str) -> TenantList:
        """Return a page of tenants by name, after the tenant of this name (`''`: from the first one)."""
        command = self._redis.hkeys("karst:tenants")
        names = sorted(name for name in as_texts(await self._connection.execute(command)) if name > after)
        shown = names[:limit]
        reply = await self._connection.execute(self._redis.hmget("karst:tenants", shown)) if shown else []
        texts = as_optional_texts(reply)
        found = [_parse_info(name, text) for name, text in zip(shown, texts, strict=True) if text is not None]
        return TenantList(tenants=found, next=shown[-1] if len(names) > limit else None)

    async def get(self, tenant: str) -> TenantInfo:
        """Return a tenant.

        Raises:
            NotFound: the tenant does not exist.
        """
        command = self._redis.hget("karst:tenants", tenant)
        text = as_optional_text(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
        if text is None:
            raise tenant_not_found(tenant)
        return _parse_info(tenant, text)

    async def change_limits(self, by: Actor, tenant: str, limits: LimitsChange) -> TenantInfo:
        """Change some limits and return the tenant.

        Raises:
            NotFound: the tenant does not exist.
        """
        body = limits.model_dump(exclude_none=True)
        entry = by.entry(tenant, "tenant.limits", limits=body)
        reply = await self._connection.change(TENANTS, "set_limits", tenant=tenant, entry=entry, limits=body)
        if reply.outcome == "absent":
            raise tenant_not_found(tenant)
        return _parse_info(tenant, reply.text)

    async def delete(self, by: Actor, tenant: str) -> None:
        """Delete a tenant with its tasks, keys, counts and its own audit. The hub's audit keeps its entries.

        Raises:
            NotFound: the tenant does not exist.
        """
        entry = by.entry(tenant, "tenant.delete")
        # In short steps, so that Redis serves other tenants in between. The last one deletes what was added meanwhile.
        has_tasks = True
        while has_tasks:
            dropped = await self._connection.change(
                TENANTS, "drop_tasks", tenant=tenant, entry=entry, max_versions=VERSIONS_PER_STEP
            )
            has_tasks = dropped.outcome == "in_use"
        reply = await self._connection.change(TENANTS, "delete", tenant=tenant, entry=entry)
        if reply.outcome == "absent":
            raise tenant_not_found(tenant)

    async def usage(self, tenant: str) -> Usage:
        """Return a tenant's limits, what it uses now, and its counts.

        Raises:
            NotFound: the tenant does not exist.
        """
        info = await self.get(tenant)
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.scard(tenant_key(tenant, "tasks"))
        pipeline.get(tenant_key(tenant, "bytes"))
        pipeline.get(tenant_key(tenant, "deleted"))
        pipeline.hvals(tenant_key(tenant, "flight"))
        pipeline.hgetall(tenant_key(tenant, "counts"))
        pipeline.mget(tenant_key(tenant, name) for name in ("images", "image_bytes", "training_bytes"))
        found = await self._connection.execute(pipeline.execute())
        tasks, stored_bytes, deleted_bytes, flight, counts, datasets = found
        images, image_bytes, training_bytes = [int(found or 0) for found in as_optional_texts(datasets)]
        used = UsedNow(
            tasks=as_integer(tasks),
            stored_bytes=int(as_optional_text(stored_bytes) or 0),
            deleted_bytes=int(as_optional_text(deleted_bytes) or 0),
            images_in_flight=_images_in_flight(as_texts(flight)),
            images=images,
            image_bytes=image_bytes,
            training_bytes=training_bytes,
        )
        return Usage(tenant=tenant, limits=info.limits, used=used, counted=_parse_counts(as_hash(counts)))

    async def activity(self, names: Sequence[str]) -> list[tuple[int, Counted | None]]:
        """Return images in flight and counts of each tenant, in one round trip; None for a tenant that is deleted."""
        if not names:
            return []
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.hexists("karst:tenants", name)
            pipeline.hvals(tenant_key(name, "flight"))
            pipeline.hgetall(tenant_key(name, "counts"))
        replies = await self._connection.execute(pipeline.execute())
        return [
            (_images_in_flight(as_texts(flight)), _parse_counts(as_hash(counts)) if exists else None)
            for exists, flight, counts in zip(replies[::3], replies[1::3], replies[2::3], strict=True)
        ]

    async def has_outdated_format(self) -> bool:
        """Return whether a hub without tenants wrote this registry. Its files would look like garbage to this hub."""
        pipeline = self._redis.pipeline(transaction=False)
        for key in ("karst:keys", "karst:admins", "karst:tenants"):
            pipeline.exists(key)
        keys, admins, tenants = [as_integer(reply) for reply in await self._connection.execute(pipeline.execute())]
        return bool(keys) and not admins and not tenants


def tenant_not_found(tenant: str) -> NotFound:
    """Return the same error for a tenant that does not exist and for one that the client may not see."""
    return NotFound.at("tenant", f"there is no tenant {tenant!r}")


def _images_in_flight(permits: Sequence[str]) -> int:
    """Return the images in flight at all gateways with unexpired permits, written by `admission/rate_limits`."""
    now_ms = time.time() * 1000
    fields = [permit.split(":") for permit in permits]
    return sum(int(images) for _, images, expiry_ms in fields if float(expiry_ms) > now_ms)


def _parse_counts(counts: Mapping[str, str]) -> Counted:
    return Counted(**{name: int(counts.get(name, 0)) for name in Counted.model_fields})


def _parse_info(tenant: str, text: str) -> TenantInfo:
    return TenantInfo(tenant=tenant, **json.loads(text))
