"""HAProxy of one node: the program that Ray starts in its place, its certificate, its drain.

`main` is the command `karst-hub-haproxy`.
"""

import json
import os
import resource
import shlex
import signal
import sys
import time
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ..admission.quotas import KEY_CALLS
from ..api.security_headers import (
    CLOSE_HEADER,
    DISCONNECT_HEADER,
    RAY_HEADERS,
    RAY_REQUEST_ID,
    REPEATED,
    SINGLE_HEADERS,
    security_headers,
)
from ..errors import LimitReached, Unavailable
from ..settings import InvalidSettings, Settings, load_settings
from .haproxy import Frontend, command
from .ray_compat import find_haproxy

DRAIN_TIMEOUT_S = 30.0  # for accepted requests, when the hub stops
FILES_PER_CONNECTION = 2.5  # a socket on each side, and a pipe for two of them that splice
OTHER_FILES = 128  # HAProxy 2.8 needs 37, and one per gateway for its check
MAX_CONNECTIONS = 100_000  # where files are not limited


class HAProxyUnavailable(RuntimeError):
    """HAProxy is not installed, or its files cannot be written."""


def main() -> None:
    """Become this node's HAProxy; Ray runs this where `RAY_SERVE_HAPROXY_BINARY_PATH` names it.

    HAProxy listens where Serve's configuration says. TLS and trusted proxies come from the node's own settings.
    """
    try:
        settings = load_settings()
    except InvalidSettings as error:
        print(f"karst-hub-haproxy: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        folder = settings.home / "haproxy"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        script = install_haproxy(settings, None, folder)
    except (OSError, HAProxyUnavailable) as error:
        sys.exit(f"karst-hub-haproxy: {error}")
    os.execv(script, [str(script), *sys.argv[1:]])  # noqa: S606 (the process that Ray watches)


def install_haproxy(settings: Settings, host: str | None, folder: Path) -> Path:
    """Write the program that Ray starts as HAProxy, and return its path.

    Args:
        host: address to listen on; None: the address of Serve's configuration.
        folder: private folder for the program and the certificate.

    Raises:
        HAProxyUnavailable: HAProxy is not installed.
        OSError: the certificate cannot be read, or the folder cannot be written.
    """
    binary = find_haproxy()
    if binary is None:
        raise HAProxyUnavailable("HAProxy is not installed (ray[serve] has it on Linux only). Set HUB_HAPROXY=false.")
    script = folder / "haproxy"
    line = f'exec {shlex.join(command(frontend(settings, host, folder), binary))} "$@"'
    script.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8", errors="surrogateescape")
    script.chmod(0o700)
    return script


def frontend(settings: Settings, host: str | None, folder: Path) -> Frontend:
    """Return the options of HAProxy's HTTP frontend; writes the certificate into the folder."""
    detail = f"Too many concurrent requests with this key (limit {KEY_CALLS}). Try again later."
    return Frontend(
        host=host,
        delete_headers=[name for name in RAY_HEADERS if name != DISCONNECT_HEADER],
        request_id=f"^{RAY_REQUEST_ID}$",
        requests_per_key=KEY_CALLS,
        refusal=_document(LimitReached(detail).problem()),
        single_headers=SINGLE_HEADERS,
        repeated=_document(_status_problem(HTTPStatus.BAD_REQUEST, REPEATED)),
        not_found=_document(_status_problem(HTTPStatus.NOT_FOUND, "Not found")),
        security_headers=security_headers(tls=settings.tls_cert is not None),
        close_header=CLOSE_HEADER,
        errors={str(problem["status"]): _document(problem) for problem in _own_errors()},
        max_connections=connections_for(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        certificate=_write_certificate(settings, folder),
        client_ca=str(settings.tls_client_ca) if settings.tls_client_ca else None,
        trusted_proxies=settings.trusted_proxies,
    )


def _own_errors() -> list[dict[str, Any]]:
    """Return the problems of requests that no gateway answers.

    HAProxy answers a malformed request (400) and slow headers (408) before its configuration applies.
    """
    unclear = "A change may have been made."
    details = {
        HTTPStatus.BAD_GATEWAY: f"The gateway closed the connection before it had answered. {unclear}",
        HTTPStatus.GATEWAY_TIMEOUT: f"The gateway did not answer in time. {unclear}",
    }
    others = [_status_problem(status, detail) for status, detail in details.items()]
    return [*others, Unavailable("No gateway answers. Retry later.").problem()]


def _status_problem(status: HTTPStatus, detail: str) -> dict[str, Any]:
    return {"type": "about:blank", "title": status.phrase, "status": int(status), "detail": detail}


def _document(problem: dict[str, Any]) -> str:
    """Return a problem as JSON. HAProxy does not know the protocol of a path, so each one has the member `error`."""
    return json.dumps(problem | {"error": problem["detail"]})


def connections_for(open_files: int) -> int:
    """Return the number of concurrent connections that HAProxy can serve under a limit of open files."""
    if open_files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, int((open_files - OTHER_FILES) / FILES_PER_CONNECTION)))


def _write_certificate(settings: Settings, folder: Path) -> str | None:
    """Write certificate and key into one file, as HAProxy needs them, and return its path."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    both = folder / "certificate.pem"
    both.touch(0o600)
    both.write_bytes(settings.tls_cert.read_bytes() + b"\n" + settings.tls_key.read_bytes())
    return str(both)


def drain(folder: Path) -> None:
    """Let the HAProxy of this folder close its listeners, and wait until it has answered all accepted requests.

    Serve kills HAProxy without waiting. Serve's stock proxy has no such signal, so its requests are lost.
    """
    proc = Path("/proc")
    numbers = [int(p.name) for p in proc.iterdir() if p.name.isdigit()] if proc.is_dir() else []
    processes = [pid for pid in numbers if _is_haproxy(pid, folder)]
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)  # HAProxy's soft stop
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    while any(_is_haproxy(pid, folder) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.02)


def _is_haproxy(pid: int, folder: Path) -> bool:
    """Return whether a process is HAProxy with a configuration in this folder; False on systems without /proc."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return arguments[0].endswith(b"/haproxy") and any(part.startswith(os.fsencode(folder)) for part in arguments)
