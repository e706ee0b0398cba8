"""Checks before a local hub starts: each one fails in a second with one line, not in a minute with a traceback."""

import fcntl
import logging
import os
import resource
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

from ..cluster.haproxy_node import connections_for
from ..registry import startup
from ..settings import Settings
from ..storage.remote_sources import RemoteSources
from ..storage.store import Store
from ..urls import shown_text, shown_url
from .bootstrap import KEYS_FILE
from .errors import StartError
from .run_folder import RECORD

logger = logging.getLogger(__name__)

DISTRIBUTION = "karst-hub"
OWN_NAMES = ("lock", RECORD, KEYS_FILE, "redis", "store")  # what the hub writes in its home
OTHERS = stat.S_IRWXG | stat.S_IRWXO
LEAST_OPEN_FILES = 1024
HAPROXY_CONNECTIONS = 4096  # Ray's limit, see `RAY_SERVE_HAPROXY_MAXCONN`


@contextmanager
def locked_home(home: Path) -> Iterator[None]:
    """Hold the lock of a hub's folder, so that no second hub uses the same embedded Redis.

    Raises:
        StartError: another hub holds it, or the folder cannot be written.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (home / "lock").open("w")
    except OSError as error:
        raise StartError(f"Cannot use HUB_HOME {home}: {error.strerror}. Choose another folder.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StartError(f"Another hub runs in {home}. Stop it, or choose another HUB_HOME.") from error
        tighten(home)
        yield


def tighten(home: Path) -> None:
    """Remove the permissions of other users from a hub's folder and from all that the hub has written there.

    An older hub left them to the umask. Other files in the folder stay as they are, and so does a folder that is not
    the hub's alone: the user's home, or one in which all users may write.
    """
    shared = str(home) == os.path.expanduser("~") or home.stat().st_mode & stat.S_ISVTX
    own = [home / name for name in OWN_NAMES if (home / name).exists()]
    paths = ([] if shared else [home]) + own
    paths += [Path(folder, name) for path in own for folder, names, files in os.walk(path) for name in names + files]
    changed, failed = 0, []
    for path in paths:
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) or not found.st_mode & OTHERS:
            continue
        try:
            path.chmod(stat.S_IMODE(found.st_mode) & ~OTHERS)
            changed += 1
        except OSError:
            failed.append(path)
    if changed:
        logger.warning("%s: removed the permissions of other users from %d files and folders", home, changed)
    if failed:
        logger.warning(
            "other users may read %s and %d more: they do not belong to this user; change their owner, or their mode",
            *(failed[0], len(failed) - 1),
        )


def check_import_names() -> None:
    """Check that no other distribution installed a package `hub` or `adapters`: pip overwrites files silently.

    Raises:
        StartError: one did.
    """
    # `packages_distributions` of importlib parses each line of each record, which takes three times as long.
    found = [
        (one, (one.read_text("top_level.txt") or "").split(), "\n" + (one.read_text("RECORD") or ""))
        for one in distributions()
    ]
    for package in ("hub", "adapters"):
        owners = {
            one.metadata["Name"]
            for one, names, record in found
            if package in names or f"\n{package}/" in record or f"\n{package}.py," in record
        }
        if others := sorted(owners - {DISTRIBUTION}):
            raise StartError(
                f"The package {package!r} also belongs to {', '.join(others)}. Uninstall that, or install "
                f"{DISTRIBUTION} into a virtual environment of its own."
            )


def check_open_files(settings: Settings, limit: int) -> None:
    """Log a warning if the limit of open files reduces the number of connections.

    Args:
        limit: the process's hard limit of open files.

    Raises:
        StartError: the limit is too low for Ray and HAProxy.
    """
    if limit != resource.RLIM_INFINITY and limit < LEAST_OPEN_FILES:
        raise StartError(
            f"The hard limit of open files is {limit}, and the hub needs {LEAST_OPEN_FILES}. Raise it: "
            "`ulimit -Hn` in a shell, LimitNOFILE in a systemd unit, `--ulimit nofile=` in Docker."
        )
    connections = connections_for(limit)
    if settings.haproxy and connections < HAPROXY_CONNECTIONS:
        logger.warning(
            "the hard limit of open files is %d: HAProxy serves at most %d connections at once instead of %d",
            *(limit, connections, HAPROXY_CONNECTIONS),
        )


def check_tls(settings: Settings) -> None:
    """
    Raises:
        StartError: the certificate, its key or the client authorities cannot be used.
    """
    if settings.tls_cert is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
        if settings.tls_client_ca is not None:
            context.load_verify_locations(settings.tls_client_ca)
    except (OSError, ssl.SSLError) as error:
        raise StartError(f"HUB_TLS_CERT, HUB_TLS_KEY, HUB_TLS_CLIENT_CA: {error.strerror or error}") from error


def check_store(url: str) -> None:
    """
    Raises:
        StartError: fsspec does not know the URL's scheme, its package is not installed, or it refuses the URL.
    """
    try:
        Store(url)
    except Exception as error:  # some file systems connect at once, and each has its own exception types
        said = shown_text(str(error) or type(error).__name__, url)
        raise StartError(f"HUB_STORE_URL={shown_url(url)}: {said}") from error


def check_sources(settings: Settings) -> None:
    """
    Raises:
        StartError: the package for a source's scheme is not installed.
    """
    try:
        RemoteSources(settings.sources, max_bytes=settings.max_adapter_bytes)
    except ValueError as error:
        raise StartError(str(error)) from error


def check_registry(url: str) -> None:
    """
    Raises:
        StartError: the hub cannot use this registry, or Redis does not answer (`registry.startup`).
    """
    try:
        startup.check_registry(url)
    except startup.UnfitRegistry as error:
        raise StartError(str(error)) from error
