"""The first keys of a new registry."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..admin_schemas import LimitsChange
from ..errors import Conflict
from ..registry.audit import OPERATOR
from ..registry.keys import ADMIN, OWNER, KeyRegistry
from ..registry.tenants import TenantRegistry

DEFAULT_TENANT = "default"
KEYS_FILE = "first-keys"


@dataclass(frozen=True)
class FirstKeys:
    """The keys that a start of the hub created; None where one existed. The hub shows each key once."""

    admin: str | None
    owner: str | None

    def variables(self) -> list[str]:
        """Return the keys as lines of a shell or of an environment file; none if this start created no key."""
        named = {"HUB_ADMIN_KEY": self.admin, "HUB_KEY": self.owner}
        return [f"{name}={key}" for name, key in named.items() if key is not None]


async def create_first_keys(tenants: TenantRegistry, keys: KeyRegistry) -> FirstKeys:
    """Create the default tenant with an owner's key in an empty registry, and a permanent admin key if none exists.

    The caller must show the keys: the registry stores only their hashes.

    Raises:
        Unavailable: Redis does not answer.
    """
    owner = None
    admins = await keys.all("")
    if not admins and not (await tenants.page(1, "")).tenants:
        try:
            await tenants.create(OPERATOR, DEFAULT_TENANT, LimitsChange())
        except Conflict:  # another hub starts over the same registry at the same time
            return FirstKeys(None, None)
        owner = (await keys.create(OPERATOR, DEFAULT_TENANT, OWNER, "first key")).key
    if any(key.expires is None for key in admins):
        return FirstKeys(None, owner)
    return FirstKeys((await keys.create(OPERATOR, "", ADMIN, "first admin key")).key, owner)


def write_first_keys(keys: FirstKeys, home: Path) -> Path:
    """Append the keys to a file of mode 600 in the home, and return its path.

    Raises:
        OSError: the file cannot be written, or is a symbolic link.
    """
    path = home / KEYS_FILE
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write("".join(f"{line}\n" for line in keys.variables()))
    return path
