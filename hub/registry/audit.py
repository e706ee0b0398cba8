"""The audit: which key changed what, when and from which address. One Redis stream per tenant and one for the hub."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..admin_schemas import AuditEntry, AuditPage
from .redis.connection import RegistryConnection, as_entries, tenant_key
from .redis.scripts import AUDIT


@dataclass(frozen=True)
class Actor:
    """The author of a change: a key (its public id, its name, its role) and the client's address."""

    key: str
    name: str
    role: str
    address: str

    def entry(self, tenant: str, action: str, **detail: Any) -> str:
        """Return the audit entry, as JSON, of a change by this actor in a tenant (`''`: in the hub itself)."""
        author = {"key": self.key, "name": self.name, "role": self.role, "address": self.address}
        return json.dumps(author | {"tenant": tenant, "action": action, "detail": detail})


OPERATOR = Actor("", "operator", "admin", "the hub's own machine")


class AuditLog:
    """Audit entries of all tenants. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection

    async def append(self, entry: str) -> None:
        """Append an entry of the hub itself. Changes of the registry append their own."""
        await self._connection.change(AUDIT, "append", tenant="", entry=entry)

    async def read(
        self, tenant: str | None, after: str, count: int, *, admins: bool = False, newest_first: bool = False
    ) -> AuditPage:
        """Return a page of entries of a tenant, or of the whole hub (None).

        Args:
            after: the id of the last known entry; `0` starts with the first kept entry in the chosen order.
            admins: of the whole hub, only changes by admins. They have their own stream, so that entries of tenants
                cannot push them out.
        """
        hub_stream = "karst:audit:admins" if admins else "karst:audit"
        stream = hub_stream if tenant is None else tenant_key(tenant, "audit")
        redis = self._connection.redis
        if newest_first:
            command = redis.xrevrange(stream, max="+" if after == "0" else f"({after}", count=count + 1)
        else:
            command = redis.xrange(stream, min=f"({after}", count=count + 1)
        found = as_entries(await self._connection.execute(command))
        entries = [
            AuditEntry(
                id=id,
                at=datetime.fromtimestamp(int(id.partition("-")[0]) / 1000, UTC).isoformat(timespec="milliseconds"),
                **json.loads(fields["entry"]),
            )
            for id, fields in found[:count]
        ]
        return AuditPage(entries=entries, next=entries[-1].id if len(found) > count else None)
