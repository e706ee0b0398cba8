"""One-time codes of login links: a person opens the console without typing a key.

A code is in a link's fragment, which browsers never send, and is exchanged once for new keys that expire. The registry
stores only the code's SHA-256, so no key exists before the exchange.
"""

import json
import secrets
from datetime import UTC, datetime, timedelta

from ..admin_schemas import Login
from ..errors import Unauthenticated
from ..registry.audit import OPERATOR
from ..registry.keys import ADMIN, OWNER, KeyRegistry, hash_key
from ..registry.redis.connection import RegistryConnection, as_optional_text
from ..registry.tenants import TenantRegistry

CODE_MINUTES = 60  # until an unused link expires
KEY_HOURS = 12  # until the keys of a used link expire
KEY_NAME = "console"


class LoginCodes:
    """Codes in Redis. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection
        self._tenants, self._keys = TenantRegistry(connection), KeyRegistry(connection)

    async def create(self, tenant: str, *, admin: bool) -> str:
        """Return a new code.

        Args:
            tenant: whose owner's key the code gives; '' for none.
            admin: whether the code also gives an admin key.

        Raises:
            NotFound: the tenant does not exist.
        """
        created = (await self._tenants.get(tenant)).created if tenant else ""
        code = secrets.token_urlsafe(32)
        grant = json.dumps({"tenant": tenant, "created": created, "admin": admin})
        await self._connection.execute(self._connection.redis.set(_name(code), grant, ex=60 * CODE_MINUTES))
        return code

    async def redeem(self, code: str) -> Login:
        """Return new keys for a code, which is then used up.

        Raises:
            Unauthenticated: the code is unknown, was used or has expired.
            NotFound: the tenant was deleted.
            LimitReached: the tenant has the maximum number of keys.
        """
        grant = as_optional_text(await self._connection.execute(self._connection.redis.getdel(_name(code))))
        message = "This login link was used or has expired. `karst-hub login-link` prints a new one."
        if grant is None:
            raise Unauthenticated(message)
        given = json.loads(grant)
        expires = datetime.now(UTC) + timedelta(hours=KEY_HOURS)
        tenant, key, admin_key = given["tenant"] or None, None, None
        if tenant is not None:
            if (await self._tenants.get(tenant)).created != given["created"]:  # made again by another owner
                raise Unauthenticated(message)
            key = (await self._keys.create(OPERATOR, tenant, OWNER, KEY_NAME, expires)).key
        if given["admin"]:
            admin_key = (await self._keys.create(OPERATOR, "", ADMIN, KEY_NAME, expires)).key
        return Login(tenant=tenant, key=key, admin_key=admin_key, expires=expires.isoformat(timespec="seconds"))


def _name(code: str) -> str:
    return f"karst:login:{hash_key(code)}"
