"""Who changed what, when and from where: entries in Redis streams, one of each tenant and one of the whole hub."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..schemas import AuditEntry, AuditPage
from .connection import Database


@dataclass(frozen=True)
class Actor:
    """Whoever makes a change: a key (its public id, its name, its role) and the address it came from."""

    key: str
    name: str
    role: str
    address: str

    def entry(self, tenant: str, action: str, **detail: Any) -> str:
        """The audit's JSON for a change that this one makes in a tenant (`''`: in the hub itself)."""
        who = {"key": self.key, "name": self.name, "role": self.role, "address": self.address}
        return json.dumps(who | {"tenant": tenant, "action": action, "detail": detail})


OPERATOR = Actor("", "operator", "admin", "the hub's own machine")


async def read_audit(
    database: Database, tenant: str | None, after: str, count: int, *, admins: bool = False
) -> AuditPage:
    """Changes in a tenant, or in the whole hub (None), oldest first.

    Args:
        admins: of the whole hub only what admins did, which is kept apart, so that no tenant can push it out.
        after: the id of the last entry that is known; `0` begins at the oldest that is kept.

    Raises:
        Unavailable: Redis does not answer.
    """
    whole = "karst:audit:admins" if admins else "karst:audit"
    stream = whole if tenant is None else f"karst:t:{tenant}:audit"
    found = await database.do(database.redis.xrange(stream, min=f"({after}", count=count + 1))
    entries = [
        AuditEntry(
            id=id,
            at=datetime.fromtimestamp(int(id.partition("-")[0]) / 1000, UTC).isoformat(timespec="milliseconds"),
            **json.loads(fields["entry"]),
        )
        for id, fields in found[:count]
    ]
    return AuditPage(entries=entries, next=entries[-1].id if len(found) > count else None)
