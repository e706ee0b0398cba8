"""Started by Ray in HAProxy's place: HAProxy itself, with what Ray's configuration of it has no switch for.

    python haproxy.py '<JSON of Edge>' <haproxy> -db -f <haproxy.cfg> ...

- Its pages of statistics and metrics, on all interfaces and unused here, are left out. The hub listens where it was
  told, while what stands behind HAProxy stays on loopback.
- The head of a request has 10 s: nobody holds connections by sending theirs byte by byte.
- The gateway hears who connected (`X-Forwarded-For`), whatever the client says of that.
- A crowd of calls with one key is refused here, where that costs microseconds: in a gateway it costs as much as an
  answer, and others would wait for that.
- Bodies are not spliced: after one that was, HAProxy 2.8 does not see that the client has gone, and the gateway and
  its workers would go on with calls that nobody waits for.
- Headers that steer Ray are Ray's own. One is set: the gateway gets the connection as it is, so that a body waits in
  the network and not in memory until a route reads it.
- TLS, where it is set.

Each change has to find the line that it changes, else HAProxy does not start: of another Ray that writes its
configuration in another way, nobody shall believe that it is safe. No import of the hub's: Ray starts this at each
change of the gateways.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

HEAD_S = 10
# Calls of one key that may be under way here: as many as a gateway takes of a tenant (`assembly.TENANT_WAITING`).
CALLS_OF_A_KEY = 512
TOO_MANY = json.dumps(
    {
        "type": "urn:karst-hub:problem:limit-reached",
        "title": "A limit of the tenant is reached",
        "status": 429,
        "detail": f"more than {CALLS_OF_A_KEY} calls with this key are under way; try again",
    }
)
# The same as `RAY_HEADERS` and `RAY_REQUEST_ID` in `api.security_headers`.
STEERING = ("x-request-timeout-seconds", "serve_multiplexed_model_id", "serve-multiplexed-model-id", "x-session-id")
REQUEST_ID = "^[A-Za-z0-9_.:-]{1,128}$"


class ConfigurationError(Exception):
    """Ray's configuration is not as this module knows it."""


@dataclass(frozen=True)
class Edge:
    """Where HAProxy listens and whom it believes.

    Attributes:
        host: an address, or `0.0.0.0` or `::` for all; None: where Ray's configuration says.
        certificate: a PEM file with certificate, chain and key; None: no TLS.
        client_ca: a PEM file; only clients with a certificate of these may connect.
        trusted: networks of proxies in front, whose last entry of `X-Forwarded-For` is the client.
    """

    host: str | None
    certificate: str | None = None
    client_ca: str | None = None
    trusted: tuple[str, ...] = ()


def command(edge: Edge, haproxy: str, python: str = sys.executable) -> list[str]:
    """The command that stands for HAProxy; Ray adds its arguments."""
    return [python, "-I", __file__, json.dumps(asdict(edge)), haproxy]


def rewritten(config: str, edge: Edge) -> str:
    """Ray's configuration as the hub wants it.

    Raises:
        ConfigurationError: a line that has to be changed is not there exactly once.
    """
    for section in ("frontend prometheus", "listen stats"):
        config = _replaced(config, rf"(?m)^{section}\n(?:[ \t]+\S.*(?:\n|\Z))+", "")
    config = _replaced(config, r"(?m)^ *option splice-request\n", "")
    return _replaced(config, r"(frontend http_frontend\n    bind )(\S+)(:\d+)\n", lambda m: _frontend(m, edge))


def _frontend(found: re.Match[str], edge: Edge) -> str:
    host = found[2] if edge.host is None else f"[{edge.host}]" if ":" in edge.host else edge.host
    tls = f" ssl crt {_quoted(edge.certificate)} ssl-min-ver TLSv1.2" if edge.certificate else ""
    if tls and edge.client_ca:
        tls += f" ca-file {_quoted(edge.client_ca)} verify required"
    unless = f" unless {{ src {' '.join(edge.trusted)} }}" if edge.trusted else ""
    lines = [
        f"{found[1]}{host}{found[3]}{tls}",
        f"timeout http-request {HEAD_S}s",
        "stick-table type string len 128 size 100k expire 60s store conn_cur",
        "http-request track-sc0 req.hdr(authorization)",
        "http-request return status 429 content-type application/problem+json"
        f" string '{TOO_MANY}' hdr retry-after 1 if {{ sc0_conn_cur gt {CALLS_OF_A_KEY} }}",
        f"http-request set-header X-Forwarded-For %[src]{unless}",
        f"http-request set-header X-Forwarded-Proto {'https' if tls else 'http'}{unless}",
        *[f"http-request del-header {name}" for name in STEERING],
        f"http-request del-header x-request-id unless {{ req.hdr(x-request-id) -m reg {REQUEST_ID} }}",
        "http-request set-header x-request-disconnect-disabled ?1",
        "http-response del-header server",
    ]
    return "\n    ".join(lines) + "\n"


def _replaced(config: str, pattern: str, by: str | Callable[[re.Match[str]], str]) -> str:
    config, count = re.subn(pattern, by, config)
    if count != 1:
        raise ConfigurationError(f"Ray's HAProxy configuration has {count} places like {pattern!r}, not one")
    return config


def _quoted(path: str) -> str:
    return '"' + re.sub(r'(["\\$])', r"\\\1", path) + '"'


def main() -> None:
    described, haproxy, *arguments = sys.argv[1:]
    edge = Edge(**json.loads(described))
    path = Path(arguments[arguments.index("-f") + 1])
    try:
        path.write_text(rewritten(path.read_text(), edge))
    except ConfigurationError as error:
        sys.exit(f"{error}; set HUB_HAPROXY=false, or use the version of Ray that this hub was made for")
    os.execv(haproxy, [haproxy, *arguments])  # noqa: S606 (the process that Ray watches)


if __name__ == "__main__":
    main()
