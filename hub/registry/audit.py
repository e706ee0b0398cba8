"""The audit: which key changed what, when and from which address. One Redis stream per tenant and one for the hub."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..admin_schemas import AuditEntry, AuditPage
from ..concurrency import TenantReads
from .redis.connection import RegistryConnection, as_entries, tenant_key
from .redis.scripts import AUDIT

PAGE_BYTES = 512 * 1024  # of stored text in one page; a page has at least one entry
ENTRIES_PER_READ = 50
MAX_TEXT = 200  # characters of a text in an entry
MAX_MEMBERS_BYTES = 1000  # JSON bytes of a list or an object in an entry; it keeps one member at least


@dataclass(frozen=True)
class Actor:
    """The author of a change: a key (its public id, its name, its role) and the client's address."""

    key: str
    name: str
    role: str
    address: str

    def entry(self, tenant: str, action: str, **detail: Any) -> str:
        """Return the audit entry, as JSON, of a change by this actor in a tenant (`''`: in the hub itself).

        Long values are cut: the audit bounds the number of a tenant's entries, so each must be small.
        """
        author = {"key": self.key, "name": self.name, "role": self.role, "address": self.address}
        cut = {name: _cut(value) for name, value in detail.items()}
        return json.dumps(author | {"tenant": tenant, "action": action, "detail": cut})


def _cut(value: Any) -> Any:
    """Return a value with its long texts cut, and with the first members of its long lists and objects."""
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]}..."
    if isinstance(value, Mapping):
        kept = dict(_first([(str(name), _cut(member)) for name, member in value.items()]))
        return kept if len(kept) == len(value) else kept | {"...": f"{len(value) - len(kept)} more"}
    if isinstance(value, list | tuple):
        members = _first([_cut(member) for member in value])
        return members if len(members) == len(value) else [*members, f"... {len(value) - len(members)} more"]
    return value


def _first(members: list[Any]) -> list[Any]:
    """Return the first members whose JSON has `MAX_MEMBERS_BYTES` at most, and at least one."""
    size_bytes = 0
    for number, member in enumerate(members):
        size_bytes += len(json.dumps(member))
        if size_bytes > MAX_MEMBERS_BYTES:
            return members[: max(number, 1)]
    return members


OPERATOR = Actor("", "operator", "admin", "the hub's own machine")


class AuditLog:
    """Audit entries of all tenants. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection, reads: TenantReads) -> None:
        """
        Args:
            reads: turns of reads by tenant.
        """
        self._connection = connection
        self._reads = reads

    async def append(self, entry: str) -> None:
        """Append an entry of the hub itself. Changes of the registry append their own."""
        await self._connection.change(AUDIT, "append", tenant="", entry=entry)

    async def read(
        self,
        tenant: str | None,
        after: str,
        count: int,
        *,
        admins: bool = False,
        newest_first: bool = False,
        reader: str = "",
    ) -> AuditPage:
        """Return a page of entries of a tenant, or of the whole hub (None).

        Args:
            after: the id of the last known entry; `0` starts with the first kept entry in the chosen order.
            count: number of entries. A page may have fewer, since its size is bounded too.
            admins: of the whole hub, only changes by admins. They have their own stream, so that entries of tenants
                cannot push them out.
            reader: tenant of the caller; `''` for an admin.
        """
        hub_stream = "karst:audit:admins" if admins else "karst:audit"
        stream = hub_stream if tenant is None else tenant_key(tenant, "audit")
        entries: list[AuditEntry] = []
        size_bytes = 0
        while len(entries) < count and size_bytes < PAGE_BYTES:
            wanted = min(count - len(entries), ENTRIES_PER_READ)
            async with self._reads.turn(reader):
                found = await self._range(stream, after, wanted + 1, newest_first)
                entries += [_entry(id, fields["entry"]) for id, fields in found[:wanted]]
            if len(found) <= wanted:
                return AuditPage(entries=entries, next=None)
            size_bytes += sum(len(fields["entry"]) for _, fields in found[:wanted])
            after = entries[-1].id
        return AuditPage(entries=entries, next=after)

    async def _range(self, stream: str, after: str, count: int, newest_first: bool) -> list[tuple[str, dict[str, str]]]:
        redis = self._connection.redis
        if newest_first:
            command = redis.xrevrange(stream, max="+" if after == "0" else f"({after}", count=count)
        else:
            command = redis.xrange(stream, min=f"({after}", count=count)
        return as_entries(await self._connection.execute(command))


def _entry(id: str, text: str) -> AuditEntry:
    at = datetime.fromtimestamp(int(id.partition("-")[0]) / 1000, UTC).isoformat(timespec="milliseconds")
    return AuditEntry(id=id, at=at, **json.loads(text))
