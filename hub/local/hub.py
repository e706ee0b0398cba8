"""A whole hub on this machine: lock, checks, registry, Ray, first keys.

Ray reads its environment variables at import, so this module imports Ray only after it has set them.
"""

import asyncio
import os
import resource
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ..admission.login_codes import LoginCodes
from ..cluster.haproxy_node import drain
from ..cluster.ray_compat import LOOPBACK_SWITCHES, actor_logs
from ..errors import Unavailable
from ..observability import log_format
from ..registry.audit import OPERATOR
from ..registry.keys import ADMIN, KeyRegistry
from ..registry.redis.connection import RegistryConnection, reason_of
from ..registry.tenants import TenantRegistry
from ..settings import Settings
from ..urls import shown_url
from . import preflight
from .bootstrap import DEFAULT_TENANT, FirstKeys, create_first_keys
from .deployer import Deployer
from .embedded_redis import data_folder, embedded_redis, url_of_running
from .errors import StartError
from .front_door import url_of, wait_until_answered
from .log_stream import forwarded_logs
from .ports import check_port
from .ray_environment import ray_environment
from .run_folder import run_folder
from .start_error import start_error

T = TypeVar("T")


@dataclass(frozen=True)
class LocalHub:
    """A running hub: its URL; its first keys and a login link of the console if this start created them."""

    url: str
    first_keys: FirstKeys
    login_link: str | None


@contextmanager
def local_hub(settings: Settings) -> Iterator[LocalHub]:
    """Run a hub while the context lasts; no process outlives it.

    Raises:
        StartError: a check of `preflight` failed, the port is in use, or Ray Serve could not start the hub.
        EmbeddedRedisError: the embedded Redis did not start.
    """
    preflight.check_import_names()
    with ExitStack() as stack:
        stack.callback(os.umask, os.umask(0o077))  # of all processes that the hub starts
        stack.enter_context(preflight.locked_home(settings.home))
        folder = stack.enter_context(run_folder(settings.home))
        check_port(settings.host, settings.port)
        log_format.start(settings.log_format, settings.log_level)  # of this process
        preflight.check_open_files(settings, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        preflight.check_tls(settings)
        redis_url = settings.redis_url or stack.enter_context(embedded_redis(settings.home))
        store_url = settings.store_url or str(settings.home / "store")
        settings = settings.model_copy(update={"redis_url": redis_url, "store_url": store_url})
        preflight.check_store(store_url)
        preflight.check_sources(settings)
        preflight.check_registry(redis_url)
        os.environ.update(ray_environment(settings, folder) | LOOPBACK_SWITCHES)
        stack.enter_context(forwarded_logs(lambda: actor_logs(folder), sys.stderr, settings.log_format))

        with Deployer(settings) as deployer:
            from ..cluster import local_cluster  # imports Ray, which reads the environment now

            stack.callback(local_cluster.stop)
            stack.callback(drain, folder)
            stack.callback(deployer.kill)
            try:
                deployer.deploy(local_cluster.start(settings, folder))
                wait_until_answered(settings)
            except StartError:
                raise
            except (RuntimeError, TimeoutError, ValueError, OSError) as error:  # Ray's; the text may have tracebacks
                raise StartError(start_error(error, folder)) from error
        # Last: the keys of a start that failed would never be shown.
        keys = asyncio.run(_with_database(redis_url, lambda db: create_first_keys(TenantRegistry(db), KeyRegistry(db))))
        link = None
        if keys.owner is not None:
            made = _with_database(redis_url, lambda db: LoginCodes(db).create(DEFAULT_TENANT, admin=True))
            code = asyncio.run(made)
            link = login_link(url_of(settings), code)
        yield LocalHub(url_of(settings), keys, link)


def new_admin_key(settings: Settings) -> str:
    """Create an admin key directly in the registry, whether a hub runs on it or not.

    For an operator without an admin key: the call requires access to the registry, but no key.

    Raises:
        EmbeddedRedisError, StartError: the registry does not answer, or a hub could not start with it.
    """
    made = _in_registry(settings, lambda db: KeyRegistry(db).create(OPERATOR, "", ADMIN, "made by hand"))
    return made.key


def new_login_link(settings: Settings, tenant: str, *, admin: bool, url: str | None = None) -> str:
    """Create a login link directly in the registry, whether a hub runs on it or not.

    Args:
        url: of the hub; None: as the settings have it.

    Raises:
        EmbeddedRedisError, StartError: the registry does not answer, a hub could not start with it, or there is none.
        NotFound: the tenant does not exist.
    """
    if settings.redis_url is None and not data_folder(settings.home).is_dir():
        raise StartError(f"No hub has run in {settings.home}. Set HUB_HOME to the folder of the hub.")
    code = _in_registry(settings, lambda db: LoginCodes(db).create(tenant, admin=admin))
    return login_link(url or url_of(settings), code)


def login_link(url: str, code: str) -> str:
    """Return the address that opens the console with a code. Browsers do not send the part behind `#`."""
    return f"{url}/#/login/{code}"


def _in_registry(settings: Settings, use: Callable[[RegistryConnection], Awaitable[T]]) -> T:
    """Use the registry of a hub that runs or is stopped."""
    with ExitStack() as stack:
        url = settings.redis_url
        if url is not None:
            preflight.check_registry(url)
        else:
            try:
                stack.enter_context(preflight.locked_home(settings.home))
                url = stack.enter_context(embedded_redis(settings.home))
            except StartError:  # a hub runs in this home
                url = url_of_running(settings.home)
        return asyncio.run(_with_database(url, use))


async def _with_database(url: str, use: Callable[[RegistryConnection], Awaitable[T]]) -> T:
    database = RegistryConnection(url, quiet=True)
    try:
        return await use(database)
    except Unavailable as error:
        raise StartError(f"The registry at {shown_url(url)}: {reason_of(error, url)}") from error
    finally:
        await database.close()
