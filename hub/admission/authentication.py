"""Who calls: from an API key to its tenant and role."""

import time
from dataclasses import dataclass

from ..errors import Forbidden, Unauthenticated
from ..registry.audit import Actor
from ..registry.cache import RegistryCache
from ..registry.keys import ADMIN, OWNER, key_id
from ..registry.models import task_not_found
from ..registry.tenants import tenant_not_found
from .rate_limits import Limiter


@dataclass(frozen=True)
class Caller(Actor):
    """Whoever sent a request: a key with its role, and its tenant; an admin key has none (`''`)."""

    tenant: str

    def place(self, name: str) -> tuple[str, str]:
        """`task` or `tenant:task` -> whose, and its name there."""
        owner, _, task = name.rpartition(":")
        return owner or self.tenant, task

    def own(self, name: str) -> str:
        """The name of a task that this caller's tenant owns, if there is one.

        Raises:
            NotFound: another tenant's, shared or not.
        """
        owner, task = self.place(name)
        if owner != self.tenant:
            raise task_not_found(name)
        return task

    def must_have_tenant(self) -> None:
        """
        Raises:
            Forbidden: an admin's key.
        """
        if not self.tenant:
            raise Forbidden("an admin key has no tasks; use a key of the tenant that owns them")

    def must_own(self) -> None:
        """
        Raises:
            Forbidden: the key may only classify, or it is an admin's.
        """
        self.must_have_tenant()
        if self.role != OWNER:
            raise Forbidden(f"a key with role {self.role!r} may only classify; use a key with role {OWNER!r}")

    def must_be_admin(self) -> None:
        """
        Raises:
            Forbidden: a tenant's key.
        """
        if self.role != ADMIN:
            raise Forbidden("only an admin key may do this")

    def must_manage(self, tenant: str) -> None:
        """
        Raises:
            NotFound: a tenant's key, and another tenant: the answer for one that is not there.
            Forbidden: a key of this tenant that may only classify.
        """
        if self.role == ADMIN:
            return
        if self.tenant != tenant:
            raise tenant_not_found(tenant)
        self.must_own()


class Access:
    """Resolves the `Authorization` header of a request."""

    def __init__(self, cache: RegistryCache, limiter: Limiter) -> None:
        self._cache = cache
        self._limiter = limiter

    async def caller(self, authorization: str | None, address: str) -> Caller:
        """
        Args:
            address: the sender's, for the audit.

        Raises:
            Unauthenticated: no bearer key, one that the hub does not know, or one whose time is over.
            LimitReached: the tenant has had its requests of this second.
            Unavailable: a key that is new here, while the registry does not answer.
        """
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("send the header `Authorization: Bearer <key>`")
        record = await self._cache.key(key)
        if record is None:
            raise Unauthenticated("the hub does not know this key")
        now_s = time.time()
        if record.is_expired(now_s):
            raise Unauthenticated(f"the key's time was over at {record.expires}; ask for a new one")
        id = key_id(key)
        self._limiter.note_key(id, now_s)
        if record.tenant:
            await self._limiter.request(record.tenant)
        return Caller(id, record.name, record.role, address, record.tenant)

    async def still(self, authorization: str) -> None:
        """For a request whose body took its time.

        Raises:
            Unauthenticated: the key was revoked meanwhile, or its time is over.
            Unavailable: the registry does not answer, and the key is not known here.
        """
        record = await self._cache.key(authorization.partition(" ")[2].strip())
        if record is None or record.is_expired(time.time()):
            raise Unauthenticated("the key ended while its request came in")
