"""API keys in Redis. Every change is one atomic script and leaves an audit entry.

A key has 256 random bits. The hub shows it once and stores its SHA-256. The first 64 bits of the hash are the key's
public id, by which the hub finds the record; it then compares the whole hash in constant time.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from ..admin_schemas import KeyInfo, KeyList, NewKey
from ..admission.quotas import API_KEYS
from ..errors import Conflict, InvalidRequest, LimitReached, NotFound
from .audit import Actor
from .redis.connection import (
    READ_TIMEOUT_S,
    RegistryConnection,
    as_optional_text,
    as_optional_texts,
    as_texts,
    tenant_key,
)
from .redis.scripts import KEYS
from .tenants import tenant_not_found

KEY_PREFIX = "kh_"
PAGE_BYTES = 512 * 1024  # of stored keys in one page
KEYS_PER_READ = 50
ADMIN, OWNER, CALLER = "admin", "owner", "caller"


@dataclass(frozen=True)
class KeyRecord:
    """The stored facts about an API key.

    Attributes:
        hash: SHA-256 of the key, in hex.
        tenant: empty for an admin key.
        created, expires: RFC 3339.
        tasks: tasks that the key may use; None: all.
        origins: web origins that the key works from; None: any client.
    """

    hash: str
    tenant: str
    role: str
    name: str
    created: str
    expires: str | None = None
    tasks: Sequence[str] | None = None
    origins: Sequence[str] | None = None

    def matches(self, key: str) -> bool:
        """Compare the key's hash in constant time."""
        return hmac.compare_digest(self.hash, hash_key(key))

    def is_expired(self, now_s: float) -> bool:
        """Return whether the key is expired at this time, in seconds since 1970."""
        return self.expires is not None and datetime.fromisoformat(self.expires).timestamp() <= now_s


class KeyRegistry:
    """Reads and atomic changes of API keys. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection
        self._redis = connection.redis

    async def find(self, id: str) -> KeyRecord | None:
        """Return the record of a key by its public id, or None if the hub does not know it."""
        command = self._redis.hget("karst:keys", id)
        text = as_optional_text(await self._connection.execute(command, timeout_s=READ_TIMEOUT_S))
        return KeyRecord(**json.loads(text)) if text is not None else None

    async def page(self, tenant: str, limit: int, after: str) -> KeyList:
        """Return a page of a tenant's keys, or of the admin keys (`''`), oldest first.

        Pages follow the order of ids, since it never changes. A page ends early where its keys have many bounds.

        Args:
            after: the id of the last key, by id, of the previous page; `''` for the first page.

        Raises:
            NotFound: the tenant does not exist.
        """
        if tenant and not await self._connection.execute(self._redis.hexists("karst:tenants", tenant)):
            raise tenant_not_found(tenant)
        members = self._redis.smembers(tenant_key(tenant, "keys") if tenant else "karst:admins")
        ids = sorted(id for id in as_texts(await self._connection.execute(members)) if id > after)
        shown, size_bytes, keys = 0, 0, list[KeyInfo]()
        while shown < min(limit, len(ids)) and size_bytes < PAGE_BYTES:
            part = ids[shown : min(limit, shown + KEYS_PER_READ)]
            shown += len(part)
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.hmget("karst:keys", part)
            pipeline.hmget("karst:used", part)
            records, used = [as_optional_texts(reply) for reply in await self._connection.execute(pipeline.execute())]
            size_bytes += sum(len(record or "") for record in records)
            keys += [
                _key_info(id, KeyRecord(**json.loads(record)), last_use)
                for id, record, last_use in zip(part, records, used, strict=True)
                if record is not None
            ]
        keys.sort(key=lambda key: (key.created, key.id))
        return KeyList(keys=keys, next=ids[shown - 1] if shown < len(ids) else None)

    async def all(self, tenant: str) -> list[KeyInfo]:
        """Return all keys of a tenant, or all admin keys (`''`), in the order of their ids."""
        found, after = list[KeyInfo](), ""
        while True:
            page = await self.page(tenant, KEYS_PER_READ, after)
            found += sorted(page.keys, key=lambda key: key.id)
            if page.next is None:
                return found
            after = page.next

    async def create(
        self,
        by: Actor,
        tenant: str,
        role: str,
        name: str,
        expires: datetime | None = None,
        *,
        tasks: Sequence[str] | None = None,
        origins: Sequence[str] | None = None,
    ) -> NewKey:
        """Create a key. The reply is the only place that shows it.

        Args:
            tenant: the owner; `''` for an admin key.
            tasks: tasks that the key may use; None: all.
            origins: web origins that the key works from; None: any client.

        Raises:
            NotFound: the tenant does not exist.
            LimitReached: the tenant has the maximum number of keys.
            Conflict: an admin key with an expiry date, while no admin key without one exists.
        """
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        try:
            expiry = expires.astimezone(UTC).isoformat(timespec="seconds") if expires is not None else None
        except OverflowError as error:
            message = "must be within the years 1 to 9999 in UTC"
            raise InvalidRequest.at("expires", message) from error
        record = KeyRecord(hash_key(key), tenant, role, name, _now(), expiry, tasks, origins)
        bounds = {n: list(value) for n, value in (("tasks", tasks), ("origins", origins)) if value is not None}
        reply = await self._connection.change(
            KEYS,
            "create",
            tenant=tenant,
            entry=by.entry(tenant, "key.create", id=key_id(key), role=role, name=name, expires=expiry, **bounds),
            id=key_id(key),
            key=json.dumps(asdict(record)),
            max_keys=API_KEYS,
        )
        match reply.outcome:
            case "absent":
                raise tenant_not_found(tenant)
            case "limit":
                message = f"Too many API keys (limit {API_KEYS}). Revoke unused keys first."
                raise LimitReached(message, retry_after_s=60)
            case "no_permanent_key":
                message = "no admin key without an expiry date exists; create one first, without `expires`"
                raise Conflict.at("expires", message)
        return NewKey(key=key, **_key_info(key_id(key), record, None).model_dump())

    async def revoke(self, by: Actor, tenant: str, id: str) -> None:
        """Revoke a key. A change event tells every gateway.

        Raises:
            NotFound: the tenant has no such key.
            Conflict: the last admin key without an expiry date.
        """
        entry = by.entry(tenant, "key.revoke", id=id)
        reply = await self._connection.change(KEYS, "revoke", tenant=tenant, entry=entry, id=id, now=_now())
        if reply.outcome == "absent":
            raise NotFound.at("id", f"there is no API key {id!r}")
        if reply.outcome == "no_permanent_key":
            message = "cannot revoke the last admin key without an expiry date; create another one first"
            raise Conflict.at("id", message)

    async def record_use(self, times: Mapping[str, float]) -> None:
        """Store the last use of keys: id -> seconds since 1970."""
        # Not by `change`: counts of limits wait behind this call, so it also runs while changes are refused.
        await self._connection.call(KEYS, "record_use", times=dict(times))


def hash_key(key: str) -> str:
    """Return the SHA-256 of a key, in hex. A plain hash suffices for 256 random bits."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_id(key: str) -> str:
    """Return a key's public id."""
    return hash_key(key)[:16]


def _key_info(id: str, record: KeyRecord, last_use: str | None) -> KeyInfo:
    names = ("name", "role", "created", "expires", "tasks", "origins")
    fields: dict[str, Any] = {name: getattr(record, name) for name in names}
    last_used = datetime.fromtimestamp(float(last_use), UTC).isoformat(timespec="seconds") if last_use else None
    return KeyInfo(id=id, last_used=last_used, **fields)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
