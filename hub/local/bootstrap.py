"""The first keys of a new registry."""

from dataclasses import dataclass

from ..errors import Conflict
from ..registry.audit import OPERATOR
from ..registry.keys import ADMIN, OWNER, KeyRegistry
from ..registry.tenants import TenantRegistry
from ..schemas import LimitsChange

DEFAULT_TENANT = "default"


@dataclass(frozen=True)
class FirstKeys:
    """The keys that a start of the hub created; None where one existed. The hub shows each key once."""

    admin: str | None
    owner: str | None


async def create_first_keys(tenants: TenantRegistry, keys: KeyRegistry) -> FirstKeys:
    """Create the default tenant with an owner's key in an empty registry, and a permanent admin key if none exists.

    The caller must show the keys: the registry stores only their hashes.

    Raises:
        Unavailable: Redis does not answer.
    """
    owner = None
    admins = await keys.list_keys("")
    if not admins and not await tenants.all():
        try:
            await tenants.create(OPERATOR, DEFAULT_TENANT, LimitsChange())
        except Conflict:  # another hub starts over the same registry at the same time
            return FirstKeys(None, None)
        owner = (await keys.create(OPERATOR, DEFAULT_TENANT, OWNER, "first key")).key
    if any(key.expires is None for key in admins):
        return FirstKeys(None, owner)
    return FirstKeys((await keys.create(OPERATOR, "", ADMIN, "first admin key")).key, owner)
