"""Check of the registry before a hub starts, alone on a machine or on a cluster."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from redis.exceptions import AuthenticationError, BusyLoadingError, ConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..errors import Unavailable
from ..urls import shown_url
from .health import read_facts
from .redis.connection import RegistryConnection, reason_of
from .tenants import TenantRegistry


class UnfitRegistry(ValueError):
    """A hub cannot use this registry; the text has the reason and the remedy, and no password.

    Attributes:
        may_pass: Redis does not answer yet, which a later start may cure.
    """

    def __init__(self, text: str, *, may_pass: bool = False) -> None:
        super().__init__(text)
        self.may_pass = may_pass


def check_registry(url: str) -> None:
    """Check a registry, with an event loop of its own. The caller may run one already.

    Raises:
        UnfitRegistry: the URL is not valid, Redis does not answer, it is a replica, it may evict keys, or an older
            version of the hub wrote its data.
    """
    with ThreadPoolExecutor(1, "check") as thread:
        thread.submit(asyncio.run, _check(url)).result()


async def _check(url: str) -> None:
    shown = f"HUB_REDIS_URL={shown_url(url)}"
    try:
        database = RegistryConnection(url, quiet=True)
    except ValueError as error:
        raise UnfitRegistry(f"{shown}: {error}.") from error
    try:
        if (fault := (await read_facts(database)).fault()) is not None:
            raise UnfitRegistry(f"{shown}: {fault}")
        if await TenantRegistry(database).has_outdated_format():
            raise UnfitRegistry(
                "An older karst-hub wrote this registry and stored keys in another form. Start with an empty registry "
                "(another HUB_HOME, or HUB_REDIS_URL) and register the adapters again."
            )
    except Unavailable as error:
        raise UnfitRegistry(f"{shown}: {reason_of(error, url)}", may_pass=_may_pass(error.__cause__)) from error
    finally:
        await database.close()


def _may_pass(cause: BaseException | None) -> bool:
    """Return whether Redis gave no answer of its own: it may still start, or the network may return."""
    if isinstance(cause, AuthenticationError):  # a wrong password, which redis-py counts as a lost connection
        return False
    return isinstance(cause, ConnectionError | BusyLoadingError | RedisTimeoutError | OSError)
