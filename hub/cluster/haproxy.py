"""HAProxy's configuration: the hub's changes to the one that Ray generates, as a list of rules.

    python haproxy.py '<JSON of Frontend>' <haproxy> -db -f <haproxy.cfg> ...

Ray starts this program in HAProxy's place. It applies `RULES` to the configuration file and then becomes HAProxy. If a
rule finds no section or line, HAProxy does not start: the configuration of an unknown Ray could be unsafe.

The program imports only the standard library, since Ray starts it at every change of the gateways.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import TypeVar

T = TypeVar("T")
HEAD_TIMEOUT_S = 10
HEALTH_PATH = "/-/healthz"  # Ray's page of a node's health
REPLY_BUFFER_BYTES = 256 * 1024  # of a reply, in the kernel, on each side of HAProxy
CHECK_TIMEOUT_S = 10


class ConfigurationError(Exception):
    """Ray's configuration does not have the lines that a rule changes."""


@dataclass(frozen=True)
class Frontend:
    """The hub's options of the HTTP frontend.

    Attributes:
        host: address to listen on, `0.0.0.0` or `::` for all; None: the address of Ray's configuration.
        delete_headers: request headers that a client may not set.
        request_id: regular expression of valid values of `x-request-id`.
        requests_per_key: limit of concurrent requests with one API key.
        refusal: problem document of a request over that limit, as JSON.
        single_headers: request headers that a client may send once only.
        repeated: problem document of a request that has one of them twice, as JSON.
        not_found: problem document for Ray's own pages, as JSON.
        security_headers: headers of every reply, unless the gateway has set them.
        close_header: reply header by which a gateway asks for the end of the client's connection.
        errors: status -> problem document of HAProxy's own error with this status, as JSON.
        max_connections: largest number of concurrent connections that the limit of open files allows.
        certificate: PEM file with certificate, chain and key; None: no TLS.
        client_ca: PEM file with certificate authorities; clients then need a certificate of one of them.
        trusted_proxies: networks of reverse proxies, whose `X-Forwarded-For` HAProxy keeps.
    """

    host: str | None
    delete_headers: Sequence[str]
    request_id: str
    requests_per_key: int
    refusal: str
    single_headers: Sequence[str]
    repeated: str
    not_found: str
    security_headers: Mapping[str, str]
    close_header: str
    errors: Mapping[str, str]
    max_connections: int
    certificate: str | None = None
    client_ca: str | None = None
    trusted_proxies: Sequence[str] = ()


@dataclass(frozen=True)
class Rule:
    """One change of Ray's configuration.

    Attributes:
        reason: why the hub needs it.
        section: header line of the section.
        line: beginning of the line to change; None: the whole section is removed.
        replacement: returns the hub's lines from Ray's line and the options; None: the line is removed.
    """

    reason: str
    section: str
    line: str | None = None
    replacement: Callable[[str, Frontend], list[str]] | None = None


def command(frontend: Frontend, haproxy: str, python: str = sys.executable) -> list[str]:
    """Return the command that Ray starts as HAProxy; Ray appends its arguments."""
    return [python, "-I", __file__, json.dumps(asdict(frontend)), haproxy]


def _sections(config: str) -> list[list[str]]:
    """Split a configuration; each section is its header line and the lines below it, which are indented."""
    sections: list[list[str]] = [[]]
    for line in config.splitlines():
        if line[:1].strip() not in ("", "#"):
            sections.append([])
        sections[-1].append(line)
    return sections if sections[0] else sections[1:]


def _connection_limits(maxconn_line: str, frontend: Frontend) -> list[str]:
    """Return a limit of connections that is not above Ray's and fits the limit of open files, and their buffers.

    Without a limit the kernel takes tens of megabytes of a reply that the client does not read, for each connection.
    """
    (ray,) = maxconn_line.split()[1:]
    return [
        f"    maxconn {min(int(ray), frontend.max_connections)}",
        f"    tune.rcvbuf.server {REPLY_BUFFER_BYTES}",
        f"    tune.sndbuf.client {REPLY_BUFFER_BYTES}",
    ]


def _check_timeout(_line: str, _frontend: Frontend) -> list[str]:
    """Return a timeout of health checks. Without it, a check may take no longer than the interval of checks."""
    return [f"    timeout check {CHECK_TIMEOUT_S}s"]


def _own_errors(_line: str, frontend: Frontend) -> list[str]:
    """Return the errors of requests that no gateway answers, as problems."""
    return [
        f"    http-error status {status} content-type application/problem+json string {_single_quoted(problem)}"
        + (" hdr retry-after 2" if status == "503" else "")
        for status, problem in frontend.errors.items()
    ]


def _frontend_lines(bind_line: str, frontend: Frontend) -> list[str]:
    """Return the lines of `haproxy_frontend.cfg`.

    Raises:
        ConfigurationError: Ray's `bind` line has more than one address and port.
    """
    host, _, port = _only(bind_line.split()[1:], f"words after 'bind' in {bind_line.strip()!r}").rpartition(":")
    if frontend.host is not None:
        host = f"[{frontend.host}]" if ":" in frontend.host else frontend.host
    certificate = _quoted(frontend.certificate) if frontend.certificate else ""
    tls = f" ssl crt {certificate} ssl-min-ver TLSv1.2 alpn http/1.1" if certificate else ""
    if tls and frontend.client_ca:
        tls += f" ca-file {_quoted(frontend.client_ca)} verify required"
    trusted = " ".join(frontend.trusted_proxies)
    template = Path(__file__).with_name("haproxy_frontend.cfg").read_text(encoding="utf-8")
    text = Template(template).substitute(
        bind=f"{host}:{port}{tls}",
        head_timeout_s=HEAD_TIMEOUT_S,
        refusal=_single_quoted(frontend.refusal),
        repeated=_single_quoted(frontend.repeated),
        not_found=_single_quoted(frontend.not_found),
        health_path=HEALTH_PATH,
        close_header=frontend.close_header,
        repeated_headers="\n    ".join(
            f"acl karst_hub_repeated req.fhdr_cnt({name}) gt 1" for name in frontend.single_headers
        ),
        security_headers="\n    ".join(
            f"http-after-response set-header {name} {_quoted(value)} if !{{ res.hdr({name}) -m found }}"
            for name, value in frontend.security_headers.items()
        ),
        requests_per_key=frontend.requests_per_key,
        unless_trusted=f" unless {{ src {trusted} }}" if trusted else "",
        protocol="https" if tls else "http",
        delete_headers="\n    ".join(f"http-request del-header {name}" for name in frontend.delete_headers),
        request_id=frontend.request_id,
    )
    return text.splitlines()


def _only(found: Sequence[T], what: str) -> T:
    if len(found) != 1:
        raise ConfigurationError(f"Ray's HAProxy configuration has {len(found)} {what}, not one.")
    return found[0]


def _single_quoted(document: str) -> str:
    """Return a JSON document as HAProxy reads it between single quotes, which have no escapes."""
    return "'" + document.replace("'", "\\u0027") + "'"


def _quoted(text: str) -> str:
    """Return a text as HAProxy reads it between double quotes."""
    for character in '\\"$':
        text = text.replace(character, "\\" + character)
    return f'"{text}"'


RULES = (
    Rule("The metrics page listens on all interfaces, and the hub does not use it.", "frontend prometheus"),
    Rule("The statistics page listens on all interfaces, and the hub does not use it.", "listen stats"),
    Rule(
        "HAProxy does not start if the limit of open files is below what its limit of connections needs.",
        "global",
        "maxconn ",
        _connection_limits,
    ),
    Rule(
        "After a spliced body HAProxy 2.8 does not notice that a client disconnects: its workers would compute on. "
        "Checks are more frequent than a busy gateway may answer.",
        "defaults",
        "option splice-request",
        _check_timeout,
    ),
    Rule("HAProxy's own errors would be plain text with status 500.", "defaults", "errorfile 502 ", _own_errors),
    Rule("See 502.", "defaults", "errorfile 503 "),
    Rule("See 502.", "defaults", "errorfile 504 "),
    Rule(
        "Address, TLS, timeout of headers, limit per key, the client's address, headers that control Ray.",
        "frontend http_frontend",
        "bind ",
        _frontend_lines,
    ),
)


def rewrite(config: str, frontend: Frontend, rules: Sequence[Rule] = RULES) -> str:
    """Return Ray's configuration with all rules applied.

    Raises:
        ConfigurationError: a rule's section or line does not occur exactly once.
    """
    sections = _sections(config)
    for rule in rules:
        section = _only([s for s in sections if s[0] == rule.section], f"sections {rule.section!r}")
        if rule.line is None:
            sections.remove(section)
            continue
        found = [number for number, line in enumerate(section) if line.strip().startswith(rule.line)]
        number = _only(found, f"lines {rule.line!r} in {rule.section!r}")
        section[number : number + 1] = rule.replacement(section[number], frontend) if rule.replacement else []
    return "\n".join(line for section in sections for line in section) + "\n"


def _end_with_parent() -> None:
    """Ask Linux for SIGKILL when the parent's thread ends, even by SIGKILL; the request survives `exec` (prctl)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> None:
    """Change the configuration file among the arguments, and become HAProxy."""
    description, haproxy, *arguments = sys.argv[1:]
    frontend = Frontend(**json.loads(description))
    path = Path(arguments[arguments.index("-f") + 1])
    try:
        path.write_text(rewrite(path.read_text(encoding="utf-8"), frontend), encoding="utf-8")
    except ConfigurationError as error:
        sys.exit(f"{error} Set HUB_HAPROXY=false, or install the version of Ray that karst-hub requires.")
    _end_with_parent()  # otherwise HAProxy would keep the hub's port after a SIGKILL of all else
    os.execv(haproxy, [haproxy, *arguments])  # noqa: S606 (the process that Ray watches)


if __name__ == "__main__":
    main()
