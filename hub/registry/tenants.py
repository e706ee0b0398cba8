"""The truth about tenants, their limits and their keys, in Redis. Every change is one script, and audited.

A key has 256 random bits and is shown once. What is kept is its sha256; the first 64 bits of that are its public id,
by which it is found, and the whole is then compared in constant time.
"""

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from ..admission.quotas import API_KEYS
from ..errors import Conflict, InvalidRequest, LimitReached, NotFound, Unauthenticated
from ..schemas import Counted, KeyInfo, LimitsChange, NewKey, TenantInfo, TenantLimits, Usage, UsedNow
from .audit import Actor
from .connection import QUICK_S, Database
from .scripts import DELETE_TENANT

KEY_PREFIX = "kh_"
ADMIN, OWNER, CALLER = "admin", "owner", "caller"

# ARGV: tenant, entry, JSON of the tenant
_CREATE = """
if revoked(ARGV[2]) then return 'key' end
if redis.call('HSETNX', 'karst:tenants', ARGV[1], ARGV[3]) == 0 then return 0 end
changed(ARGV[1], 'tenant', ARGV[1], ARGV[2])
return 1
"""

# ARGV: tenant, entry, JSON of the limits to change
_LIMIT = """
if revoked(ARGV[2]) then return 'key' end
local info = redis.call('HGET', 'karst:tenants', ARGV[1])
if not info then return false end
info = cjson.decode(info)
for name, value in pairs(cjson.decode(ARGV[3])) do info['limits'][name] = value end
info = cjson.encode(info)
redis.call('HSET', 'karst:tenants', ARGV[1], info)
changed(ARGV[1], 'tenant', ARGV[1], ARGV[2])
return info
"""

# Whether there is an admin key that never ends, beside one: where all end, the day comes when nobody administers.
_LASTING = """
local function lasting(beside)
  for _, id in ipairs(redis.call('SMEMBERS', 'karst:admins')) do
    local key = redis.call('HGET', 'karst:keys', id)
    if key and id ~= beside and (cjson.decode(key)['expires'] or cjson.null) == cjson.null then return true end
  end
  return false
end
"""

# ARGV: tenant ('': an admin key), entry, id, JSON of the key, most keys, when it ends ('': never)
_ADD_KEY = (
    _LASTING
    + """
if revoked(ARGV[2]) then return 'key' end
local held = 'karst:admins'
if ARGV[1] ~= '' then
  if redis.call('HEXISTS', 'karst:tenants', ARGV[1]) == 0 then return 'absent' end
  held = 'karst:t:' .. ARGV[1] .. ':keys'
end
if redis.call('SCARD', held) >= tonumber(ARGV[5]) then return 'full' end
if ARGV[1] == '' and ARGV[6] ~= '' and not lasting('') then return 'ends' end
redis.call('SADD', held, ARGV[3])
redis.call('HSET', 'karst:keys', ARGV[3], ARGV[4])
changed(ARGV[1], 'key', ARGV[3], ARGV[2])
return 'done'
"""
)

# ARGV: tenant ('': an admin key), entry, id, now, written as `expires` is. A key whose time is over may always go.
_REVOKE = (
    _LASTING
    + """
if revoked(ARGV[2]) then return 'key' end
local held = 'karst:admins'
if ARGV[1] ~= '' then held = 'karst:t:' .. ARGV[1] .. ':keys' end
if redis.call('SISMEMBER', held, ARGV[3]) == 0 then return 'absent' end
if ARGV[1] == '' and not lasting(ARGV[3]) then
  local key = redis.call('HGET', 'karst:keys', ARGV[3])
  local ends = key and cjson.decode(key)['expires'] or cjson.null
  if key and (ends == cjson.null or ends > ARGV[4]) then return 'last' end
end
redis.call('SREM', held, ARGV[3])
redis.call('HDEL', 'karst:keys', ARGV[3])
redis.call('HDEL', 'karst:used', ARGV[3])
changed(ARGV[1], 'key', ARGV[3], ARGV[2])
return 'done'
"""
)

# ARGV: id, seconds since 1970, ...
_NOTE_USED = """
for i = 1, #ARGV, 2 do
  if redis.call('HEXISTS', 'karst:keys', ARGV[i]) == 1 then redis.call('HSET', 'karst:used', ARGV[i], ARGV[i + 1]) end
end
"""


@dataclass(frozen=True)
class KeyRecord:
    """What the hub knows of an API key: never the key itself. Of an admin key, `tenant` is empty."""

    hash: str
    tenant: str
    role: str
    name: str
    created: str
    expires: str | None = None

    def is_of(self, key: str) -> bool:
        return hmac.compare_digest(self.hash, hash_key(key))

    def expired(self, now_s: float) -> bool:
        return self.expires is not None and datetime.fromisoformat(self.expires).timestamp() <= now_s


class Tenants:
    """Reads and atomic changes; every method may raise `Unavailable` where Redis does not answer."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._redis = database.redis

    async def create(self, by: Actor, tenant: str, limits: LimitsChange) -> TenantInfo:
        """
        Raises:
            Conflict: there is one of this name.
        """
        created = datetime.now(UTC).isoformat(timespec="microseconds")  # so fine that no other one of its name has it
        info = TenantInfo(tenant=tenant, created=created, limits=limits.on(TenantLimits()))
        entry = by.entry(tenant, "tenant.create", limits=limits.model_dump(exclude_none=True))
        done = await self._change(_CREATE, tenant, entry, info.model_dump_json(exclude={"tenant"}))
        if not done:
            message = f"there is a tenant {tenant!r} already"
            raise Conflict.at("tenant", message)
        return info

    async def all(self) -> list[TenantInfo]:
        """Every tenant, by name."""
        found = await self._db.do(self._redis.hgetall("karst:tenants"))
        return [_info(tenant, found[tenant]) for tenant in sorted(found)]

    async def get(self, tenant: str) -> TenantInfo:
        """
        Raises:
            NotFound: no such tenant.
        """
        found = await self._db.do(self._redis.hget("karst:tenants", tenant), within_s=QUICK_S)
        if found is None:
            raise tenant_not_found(tenant)
        return _info(tenant, found)

    async def change_limits(self, by: Actor, tenant: str, limits: LimitsChange) -> TenantInfo:
        """
        Raises:
            NotFound: no such tenant.
        """
        body = limits.model_dump(exclude_none=True)
        done = await self._change(_LIMIT, tenant, by.entry(tenant, "tenant.limits", limits=body), json.dumps(body))
        if done is None:
            raise tenant_not_found(tenant)
        return _info(tenant, done)

    async def delete(self, by: Actor, tenant: str) -> None:
        """Delete a tenant with its tasks, keys, counts and its own audit; the hub's audit keeps what was done.

        Raises:
            NotFound: no such tenant.
        """
        done = await self._change(DELETE_TENANT, tenant, by.entry(tenant, "tenant.delete"))
        if done == ["absent"]:
            raise tenant_not_found(tenant)

    async def usage(self, tenant: str) -> Usage:
        """
        Raises:
            NotFound: no such tenant.
        """
        info = await self.get(tenant)
        base = f"karst:t:{tenant}:"
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.scard(base + "tasks").get(base + "bytes").hvals(base + "flight").hgetall(base + "counts")
        tasks, stored, flight, counts = await self._db.do(pipeline.execute())
        return Usage(
            tenant=tenant,
            limits=info.limits,
            used=UsedNow(
                tasks=tasks,
                stored_bytes=int(stored or 0),
                images_in_flight=_in_flight(flight),
            ),
            counted=_counted(counts),
        )

    async def in_use(self, names: Sequence[str]) -> list[tuple[int, Counted | None]]:
        """Images in flight and counts of tenants, in one go; None for one that is not there."""
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            base = f"karst:t:{name}:"
            pipeline.hexists("karst:tenants", name).hvals(base + "flight").hgetall(base + "counts")
        found = await self._db.do(pipeline.execute()) if names else []
        return [
            (_in_flight(flight), _counted(counts) if there else None)
            for there, flight, counts in zip(found[::3], found[1::3], found[2::3], strict=True)
        ]

    async def key(self, key: str) -> KeyRecord | None:
        """What is known of a key; None if nothing is."""
        found = await self._db.do(self._redis.hget("karst:keys", key_id(key)), within_s=QUICK_S)
        record = KeyRecord(**json.loads(found)) if found is not None else None
        return record if record is not None and record.is_of(key) else None

    async def keys(self, tenant: str) -> list[KeyInfo]:
        """A tenant's keys, or the admin keys (`''`), oldest first.

        Raises:
            NotFound: no such tenant.
        """
        if tenant:
            await self.get(tenant)
        ids = sorted(await self._db.do(self._redis.smembers(_held(tenant))))
        if not ids:
            return []
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.hmget("karst:keys", ids).hmget("karst:used", ids)
        records, used = await self._db.do(pipeline.execute())
        found = [_key_info(id, KeyRecord(**json.loads(r)), u) for id, r, u in zip(ids, records, used, strict=True) if r]
        return sorted(found, key=lambda info: (info.created, info.id))

    async def add_key(self, by: Actor, tenant: str, role: str, name: str, expires: datetime | None = None) -> NewKey:
        """Make a key; the reply is the only place that shows it.

        Args:
            tenant: whose; `''` for an admin key.

        Raises:
            NotFound: no such tenant.
            LimitReached: it has as many keys as it may.
            Conflict: an admin key that ends, while there is none that never does.
        """
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        try:
            until = expires.astimezone(UTC).isoformat(timespec="seconds") if expires is not None else None
        except OverflowError as error:
            message = "is beyond the years 1 to 9999 in UTC"
            raise InvalidRequest.at("expires", message) from error
        record = KeyRecord(hash_key(key), tenant, role, name, _now(), until)
        entry = by.entry(tenant, "key.create", id=key_id(key), role=role, name=name, expires=until)
        body = json.dumps(asdict(record))
        done = await self._change(_ADD_KEY, tenant, entry, key_id(key), body, API_KEYS, until or "")
        if done == "absent":
            raise tenant_not_found(tenant)
        if done == "full":
            raise LimitReached(f"there are {API_KEYS} keys already; revoke some first", retry_after_s=60)
        if done == "ends":
            message = "there is no admin key that never ends; make one without `expires` first"
            raise Conflict.at("expires", message)
        return NewKey(key=key, **_key_info(key_id(key), record, None).model_dump())

    async def revoke(self, by: Actor, tenant: str, id: str) -> None:
        """End a key; every gateway hears of it.

        Raises:
            NotFound: the tenant has no such key.
            Conflict: without it there would be no admin key that never ends.
        """
        done = await self._change(_REVOKE, tenant, by.entry(tenant, "key.revoke", id=id), id, _now())
        if done == "absent":
            message = f"there is no key {id!r}"
            raise NotFound.at("id", message)
        if done == "last":
            message = "no other admin key never ends, so this one stays; make one without `expires` first"
            raise Conflict.at("id", message)

    async def is_old(self) -> bool:
        """Whether the registry was written before there were tenants in it; its files would look like nobody's."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.exists("karst:keys").exists("karst:admins").exists("karst:tenants")
        keys, admins, tenants = await self._db.do(pipeline.execute())
        return bool(keys) and not admins and not tenants

    async def note_used(self, used: Mapping[str, float]) -> None:
        """Keys (by id) were used at these times, in seconds since 1970."""
        await self._db.run(_NOTE_USED, *(x for pair in used.items() for x in pair))

    async def _change(self, script: str, *args: Any) -> Any:
        done = await self._db.change(script, *args)
        if done in ("key", ["key"]):
            raise Unauthenticated("the key is no more")
        return done


def hash_key(key: str) -> str:
    """sha256 (hex). A key has 256 random bits, so that a plain hash keeps it."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_id(key: str) -> str:
    """A key's public name."""
    return hash_key(key)[:16]


def tenant_not_found(tenant: str) -> NotFound:
    """The one answer for a tenant that is not there, and for one that is not the caller's."""
    message = f"there is no tenant {tenant!r}"
    return NotFound.at("tenant", message)


def _in_flight(held: Sequence[str]) -> int:
    """Images in flight over all gateways whose permits have not lapsed; `held` as `limits` writes it."""
    now_ms = time.time() * 1000
    return sum(int(used) for _, used, until_ms in (entry.split(":") for entry in held) if float(until_ms) > now_ms)


def _counted(counts: Mapping[str, str]) -> Counted:
    return Counted(**{name: int(counts.get(name, 0)) for name in Counted.model_fields})


def _held(tenant: str) -> str:
    return f"karst:t:{tenant}:keys" if tenant else "karst:admins"


def _info(tenant: str, text: str) -> TenantInfo:
    return TenantInfo(tenant=tenant, **json.loads(text))


def _key_info(id: str, record: KeyRecord, used: str | None) -> KeyInfo:
    fields: dict[str, Any] = {name: getattr(record, name) for name in ("name", "role", "created", "expires")}
    last = datetime.fromtimestamp(float(used), UTC).isoformat(timespec="seconds") if used is not None else None
    return KeyInfo(id=id, last_used=last, **fields)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
