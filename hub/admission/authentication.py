"""Authentication: from an API key to its tenant and role, and the checks of that role."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ..admin_schemas import NewToken, TokenRequest
from ..errors import Forbidden, Unauthenticated
from ..registry.audit import Actor
from ..registry.cache import RegistryCache
from ..registry.keys import ADMIN, CALLER, OWNER, KeyRecord, key_id
from ..registry.models import task_not_found
from ..registry.tenants import tenant_not_found
from .rate_limits import RateLimiter
from .tokens import TOKEN_PREFIX, Token, is_signed, read, sign

KEY_PADDING = " \t"  # around a key; HAProxy skips the same characters before it counts calls of the key
UNKNOWN = "The API key is unknown. Check it, or ask the owner of the tenant for a new key."


@dataclass(frozen=True)
class Caller(Actor):
    """Sender of a request: its key, role, address and tenant.

    Attributes:
        tenant: empty for an admin key.
        tasks: names of the tasks that the key may use; None: all.
        by_token: whether the request has a token, which acts for the key.
    """

    tenant: str
    tasks: Sequence[str] | None = None
    by_token: bool = False

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

    def may_use(self, name: str) -> bool:
        """Return whether the key is bound to no tasks, or to this one."""
        return self.tasks is None or self.resolve(name) in map(self.resolve, self.tasks)

    def require_task(self, name: str) -> None:
        """Refuse a task that the key is not bound to, whether the task exists or not.

        Raises:
            Forbidden: the key is bound to other tasks.
        """
        if not self.may_use(name):
            raise Forbidden(f"This key may use only {_listed(self.tasks or ())}. Use another key for task {name!r}.")

    def require_unbound(self) -> None:
        """Refuse keys and tokens that are bound to tasks.

        Raises:
            Forbidden: the key is bound to tasks.
        """
        if self.tasks is not None:
            raise Forbidden(f"This key may use only {_listed(self.tasks)}. Use a key without bounds.")

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


@dataclass(frozen=True)
class _Identity:
    """Record and bounds of a valid key or token."""

    id: str
    record: KeyRecord
    tasks: Sequence[str] | None
    origins: Sequence[str] | None
    is_token: bool


class Authenticator:
    """Resolver of the `Authorization` header."""

    def __init__(self, cache: RegistryCache, limiter: RateLimiter) -> None:
        self._cache = cache
        self._limiter = limiter

    async def authenticate(self, authorization: str | None, address: str, origin: str | None = None) -> Caller:
        """Return the caller of a request and count the request against its tenant's rate limit.

        Args:
            authorization: value of the `Authorization` header.
            address: the client's address, for the audit.
            origin: value of the `Origin` header, which browsers send.

        Raises:
            Unauthenticated: the header has no bearer key, or the key or token is unknown or expired.
            Forbidden: the key is bound to other web origins.
            LimitReached: the tenant's limit of requests per second.
            Unavailable: the gateway does not know the key, and the registry does not answer.
        """
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip(KEY_PADDING)
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("Send the header `Authorization: Bearer <key>`.")
        now_s = time.time()
        found = await self._identify(key, now_s)
        if found.origins is not None and origin not in found.origins:
            raise Forbidden(f"This key works only on pages of {_listed(found.origins)}.")
        record = found.record
        self._limiter.note_key(found.id, now_s)
        if record.tenant:
            await self._limiter.request(record.tenant)
        role = CALLER if found.is_token else record.role
        return Caller(found.id, record.name, role, address, record.tenant, found.tasks, found.is_token)

    async def recheck(self, authorization: str) -> None:
        """Check a key again after a request's body has arrived, which may take minutes.

        Raises:
            Unauthenticated: the key was revoked or has expired since `authenticate`.
            Unavailable: the gateway does not know the key, and the registry does not answer.
        """
        try:
            await self._identify(authorization.partition(" ")[2].strip(KEY_PADDING), time.time())
        except Unauthenticated as error:
            message = "The API key was revoked or expired while the request body arrived."
            raise Unauthenticated(message) from error

    async def issue(self, caller: Caller, request: TokenRequest) -> NewToken:
        """Return a token that acts for the caller's key.

        Raises:
            Forbidden: the key is bound to other tasks or origins, or is a token itself.
        """
        if caller.by_token:  # otherwise a token could outlive its hour
            raise Forbidden("A token cannot create tokens. Use its key.")
        record = await self._cache.key(caller.key)
        if record is None:
            raise Unauthenticated(UNKNOWN)
        caller.require_task(request.task)
        if record.origins is not None and not {*(request.origins or record.origins)} <= {*record.origins}:
            raise Forbidden.at("origins", f"this key works only on pages of {_listed(record.origins)}")
        expires_s = int(time.time()) + request.expires_s
        if record.expires is not None:
            expires_s = min(expires_s, int(datetime.fromisoformat(record.expires).timestamp()))
        origins = request.origins or (None if record.origins is None else [*record.origins])
        token = Token(caller.key, request.task, expires_s, tuple(origins or ()))
        expires = datetime.fromtimestamp(expires_s, UTC).isoformat(timespec="seconds")
        return NewToken(token=sign(token, record.hash), task=request.task, expires=expires, origins=origins)

    async def _identify(self, key: str, now_s: float) -> _Identity:
        """Return the record and the bounds of a key or a token.

        Raises:
            Unauthenticated: it is unknown, revoked or expired.
        """
        token = read(key) if key.startswith(TOKEN_PREFIX) else None
        id = token.key_id if token is not None else key_id(key)
        record = await self._cache.key(id)
        if token is not None:
            if record is None or not is_signed(key, record.hash):
                raise Unauthenticated("The token is not valid, or its key was revoked. Create a new token.")
            if token.expires_s <= now_s or record.is_expired(now_s):
                raise Unauthenticated("The token is expired. Create a new token.")
            return _Identity(id, record, (token.task,), token.origins or None, is_token=True)
        if record is None or not record.matches(key):
            raise Unauthenticated(UNKNOWN)
        if record.is_expired(now_s):
            raise Unauthenticated(f"The API key expired at {record.expires}. Ask for a new key.")
        return _Identity(id, record, record.tasks, record.origins, is_token=False)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
