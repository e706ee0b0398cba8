"""Who calls: from an API key to its tenant and role."""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from .cache import RegistryCache
from .errors import Forbidden, Unauthenticated
from .registry import KeyRecord, Registry

KEY_PREFIX = "kh_"
DEFAULT_TENANT = "default"
OWNER, CALLER = "owner", "caller"


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request: a tenant, and what its key may do there."""

    tenant: str
    role: str

    def must_own(self) -> None:
        """
        Raises:
            Forbidden: the key may only classify.
        """
        if self.role != OWNER:
            raise Forbidden(f"a key with role {self.role!r} may only classify; use a key with role {OWNER!r}")


class Access:
    """Resolves the `Authorization` header of a request."""

    def __init__(self, cache: RegistryCache) -> None:
        self._cache = cache

    async def caller(self, authorization: str | None) -> Caller:
        """
        Raises:
            Unauthenticated: no bearer key, or one that the hub does not know.
            Unavailable: a key that is new here, while the registry does not answer.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("send the header `Authorization: Bearer <key>`")
        record = await self._cache.key(hash_key(key.strip()))
        if record is None:
            raise Unauthenticated("the hub does not know this key")
        return Caller(record.tenant, record.role)


def hash_key(key: str) -> str:
    """sha256 (hex): a key has 256 random bits, so a plain hash keeps it, and looking it up compares no secret."""
    return hashlib.sha256(key.encode()).hexdigest()


async def first_key(registry: Registry) -> str | None:
    """Make the default tenant's owner key where the registry has no key yet; None where it has.

    The key is shown to whoever starts the hub, once: only its hash is kept.
    """
    if await registry.has_keys():
        return None
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    await registry.add_key(hash_key(key), KeyRecord(DEFAULT_TENANT, OWNER, "first key", created))
    return key
