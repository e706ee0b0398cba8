"""Authentication: from an API key to its tenant and role, and the checks of that role."""

import time
from dataclasses import dataclass

from ..errors import Forbidden, Unauthenticated
from ..registry.audit import Actor
from ..registry.cache import RegistryCache
from ..registry.keys import ADMIN, OWNER, key_id
from ..registry.models import task_not_found
from ..registry.tenants import tenant_not_found
from .rate_limits import RateLimiter


@dataclass(frozen=True)
class Caller(Actor):
    """Sender of a request: its key, role, address and tenant. An admin key has no tenant (`''`)."""

    tenant: str

    def resolve(self, name: str) -> tuple[str, str]:
        """Return the owner and the task of a name: `task` is the caller's own, `tenant:task` any tenant's."""
        owner, _, task = name.rpartition(":")
        return owner or self.tenant, task

    def own_task(self, name: str) -> str:
        """Return the task of a name that belongs to the caller's tenant; the task may not exist.

        Raises:
            NotFound: the name belongs to another tenant, whether that tenant shares the task or not.
        """
        owner, task = self.resolve(name)
        if owner != self.tenant:
            raise task_not_found(name)
        return task

    def require_tenant(self) -> None:
        """Refuse admin keys.

        Raises:
            Forbidden: the key is an admin key.
        """
        if not self.tenant:
            raise Forbidden("An admin key has no tasks. Use a key of the tenant that owns them.")

    def require_owner(self) -> None:
        """Refuse keys that may only classify, and admin keys.

        Raises:
            Forbidden: the key is not an owner's key.
        """
        self.require_tenant()
        if self.role != OWNER:
            raise Forbidden(f"A key with role {self.role!r} may only classify. Use a key with role {OWNER!r}.")

    def require_admin(self) -> None:
        """Refuse keys of tenants.

        Raises:
            Forbidden: the key is not an admin key.
        """
        if self.role != ADMIN:
            raise Forbidden("Only an admin key may do this.")

    def require_manager(self, tenant: str) -> None:
        """Refuse every key but an admin key or an owner's key of this tenant.

        Raises:
            NotFound: a key of another tenant; a tenant that does not exist gets the same answer.
            Forbidden: a key of this tenant that may only classify.
        """
        if self.role == ADMIN:
            return
        if self.tenant != tenant:
            raise tenant_not_found(tenant)
        self.require_owner()


class Authenticator:
    """Resolver of the `Authorization` header."""

    def __init__(self, cache: RegistryCache, limiter: RateLimiter) -> None:
        self._cache = cache
        self._limiter = limiter

    async def authenticate(self, authorization: str | None, address: str) -> Caller:
        """Return the caller of a request and count the request against its tenant's rate limit.

        Args:
            authorization: value of the `Authorization` header.
            address: the client's address, for the audit.

        Raises:
            Unauthenticated: the header has no bearer key, or the key is unknown or expired.
            LimitReached: the tenant's limit of requests per second.
            Unavailable: the gateway does not know the key, and the registry does not answer.
        """
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("Send the header `Authorization: Bearer <key>`.")
        record = await self._cache.key(key)
        if record is None:
            raise Unauthenticated("The API key is unknown. Check it, or ask the owner of the tenant for a new key.")
        now_s = time.time()
        if record.is_expired(now_s):
            raise Unauthenticated(f"The API key expired at {record.expires}. Ask for a new key.")
        id = key_id(key)
        self._limiter.note_key(id, now_s)
        if record.tenant:
            await self._limiter.request(record.tenant)
        return Caller(id, record.name, record.role, address, record.tenant)

    async def recheck(self, authorization: str) -> None:
        """Check a key again after a request's body has arrived, which may take minutes.

        Raises:
            Unauthenticated: the key was revoked or has expired since `authenticate`.
            Unavailable: the gateway does not know the key, and the registry does not answer.
        """
        record = await self._cache.key(authorization.partition(" ")[2].strip())
        if record is None or record.is_expired(time.time()):
            raise Unauthenticated("The API key was revoked or expired while the request body arrived.")
