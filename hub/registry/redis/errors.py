"""Errors of Redis and of its connection: the remedy for the operator, and the errors that a new connection cures."""

import os
import re
import socket
import ssl
from collections.abc import Iterator

from redis.exceptions import ConnectionError, InvalidResponse, ResponseError

from ...urls import shown_text

# A server with one of these answers is not the primary, or not yet. It executed nothing, so a retry is always safe.
NOT_PRIMARY = ("READONLY", "MASTERDOWN", "LOADING", "UNBLOCKED")
# Redis 6.2 puts the answer to a command of a Lua script into a longer text, after a hyphen.
IN_SCRIPT = re.compile(r"(?:^|[\s-])([A-Z]{4,}|OOM)(?= )")
CLUSTER = "Redis Cluster is not supported. Use one server without cluster mode."
NO_TLS = "The server uses no TLS at this port. Use redis:// instead of rediss://, or its TLS port."
REMEDIES = {
    "READONLY": "This server is a replica. Point HUB_REDIS_URL at the primary, or at an address that follows it.",
    "MASTERDOWN": "This server is a replica that lost its primary. Point HUB_REDIS_URL at the primary.",
    "LOADING": "Redis still reads its data from the disk. Wait until it has finished.",
    "UNBLOCKED": "This server became a replica. Point HUB_REDIS_URL at an address that follows the primary.",
    "WRONGPASS": "Correct user and password in HUB_REDIS_URL. Escape the characters / ? # @ : % of the password.",
    "NOAUTH": "Add the password to HUB_REDIS_URL: redis://:PASSWORD@HOST:PORT/0.",
    "NOPERM": "Give the user of HUB_REDIS_URL all that the hub needs: ACL SETUSER NAME ~karst:* +@all -@admin.",
    "OOM": "Redis has no memory left. Raise its maxmemory, or delete data of other programs.",
    "MISCONF": "Redis cannot save its data. Free disk space, or repair its folder, as its own log says.",
    "NOREPLICAS": "Too few replicas of Redis answer. Start them, or lower its min-replicas-to-write.",
    "BUSY": "A script blocks Redis. Wait, or end the script by SCRIPT KILL.",
    "CLUSTERDOWN": CLUSTER,
    "MOVED": CLUSTER,
    "CROSSSLOT": CLUSTER,
}
TEXTS = {
    "invalid password": REMEDIES["WRONGPASS"],
    "DB index is out of range": "Redis has the databases 0 to 15 by default. Correct the number in HUB_REDIS_URL.",
    "unknown command": "The server lacks a command that the hub needs. Use Redis 6.2 or newer with EVALSHA and INFO.",
    "max number of clients reached": "Raise maxclients of Redis; each gateway opens up to 66 connections.",
    "CERTIFICATE_VERIFY_FAILED": (
        "The server's certificate is not trusted. Add ?ssl_ca_certs=/PATH/TO/CA.pem to HUB_REDIS_URL, "
        "and use a host name that the certificate has."
    ),
    "certificate required": "The server wants a client certificate. Add ssl_certfile and ssl_keyfile to HUB_REDIS_URL.",
    "WRONG_VERSION_NUMBER": NO_TLS,
    "RECORD_LAYER_FAILURE": NO_TLS,
    "Connection refused": "Start Redis, or correct the host and the port in HUB_REDIS_URL.",
    "No such file or directory": "Start Redis, or correct the path of its socket in HUB_REDIS_URL.",
    "Permission denied": "Let the hub's user write to the socket of Redis (unixsocketperm 770 and a shared group).",
    "Network is unreachable": "Check the network between this machine and Redis.",
    "No route to host": "Check the network and the firewall between this machine and Redis.",
    "No connection available": "The hub uses all its connections to Redis. Redis answers too slowly.",
    "Protocol Error": "The server at this address is not Redis. Correct the host and the port in HUB_REDIS_URL.",
}
UNKNOWN_HOST = "The host in HUB_REDIS_URL has no address. Correct its name, or this machine's DNS."
TIMEOUT = "Redis does not answer in time. Check its load, its address, and the firewall between this machine and Redis."
TLS_TIMEOUT = "The server answers no TLS in time. Check its address and its TLS port; without TLS use redis://."
CLOSED = "The server closed the connection. Check its log; a server that expects TLS needs rediss:// in HUB_REDIS_URL."


class NotPrimary(ConnectionError):
    """The answer of a server that is not the primary, or not ready. It executed nothing.

    As a `ConnectionError` it lets the Redis client retry with a new connection.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text, status_code=code)

    @property
    def allows_reads(self) -> bool:
        """Whether the server answers reads."""
        return self.status_code in ("READONLY", "UNBLOCKED")


def error_code(error: BaseException) -> str:
    """Return the code of a Redis answer, such as `READONLY`; `''` without one. It may be inside a script's answer."""
    code = getattr(error, "status_code", None)
    if code and code != "ERR":
        return str(code)
    known = {*NOT_PRIMARY, *REMEDIES}
    return next((found[1] for found in IN_SCRIPT.finditer(str(error)) if found[1] in known), "")


def explain(error: BaseException, url: str) -> str:
    """Return the words of Redis or of the socket, and what the operator can do. The text has no password."""
    causes, code = list(_chain(error)), error_code(error)
    said = shown_text(_first_line(error), url).rstrip(".")
    if isinstance(error, ResponseError) or code:
        said = f"Redis said: {said[said.index(code) :] if code in said else f'{code} {said}'}"
    reasons = _system_reasons(causes)
    if reasons and reasons not in said:
        said += f" ({reasons})"
    if url.startswith("rediss://") and any("imeout" in type(cause).__name__ for cause in causes):
        return f"{said}. {TLS_TIMEOUT}"
    return f"{said}. {_remedy(causes, code)}".strip()


def _system_reasons(causes: list[BaseException]) -> str:
    """Return the system's words for the error numbers in the texts; asyncio replaces them by its own."""
    found = re.findall(r"\bErr(?:no|or) (\d+)\b", " ".join(str(cause) for cause in causes))
    return ", ".join(dict.fromkeys(os.strerror(int(number)) for number in found))


def _remedy(causes: list[BaseException], code: str) -> str:
    text = f"{_system_reasons(causes)} {' '.join(str(cause) for cause in causes)}"
    if code in REMEDIES:
        return REMEDIES[code]
    for part, remedy in TEXTS.items():
        if part in text:
            return remedy
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return UNKNOWN_HOST
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return TEXTS["CERTIFICATE_VERIFY_FAILED"]
    if any(isinstance(cause, InvalidResponse) for cause in causes):
        return TEXTS["Protocol Error"]
    if any("imeout" in type(cause).__name__ for cause in causes):
        return TIMEOUT
    if isinstance(causes[0], ConnectionError | OSError):
        return CLOSED
    return ""


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without the arguments of a command, which may be secret."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].partition(", with args beginning with")[0]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
