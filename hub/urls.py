"""URLs in texts that people read: every error, log line and command prints a URL through this module.

A URL of a registry, a store or a source may contain a password, also where its owner did not escape it.
"""

import re
from urllib.parse import SplitResult, unquote, urlsplit

HIDDEN = "..."
REDIS_SCHEMES = ("redis", "rediss", "unix")
# Harmless options of a URL. The value of any other one may be a password.
SHOWN_OPTIONS = frozenset({"db", "ssl_ca_certs", "ssl_cert_reqs", "ssl_check_hostname", "socket_timeout", "protocol"})
AUTHORITY = re.compile(r"([\w.~-]*|\[[0-9A-Fa-f:.]+\])(:\d*)?")
URL_IN_TEXT = re.compile(
    r"\b[A-Za-z][A-Za-z0-9+.-]*:/{0,2}[^\s'\"<>]*@[^\s'\"<>]*|\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+"
)


def shown_url(url: str) -> str:
    """Return a URL without its password, user and secret options. It needs no valid URL.

    A password that is not escaped may contain `/`, `?`, `#` and `@`. So everything before the last `@` is hidden.
    """
    if url.startswith(("/", "./", "../", "~")):  # a folder
        return url
    before, at, rest = url.rpartition("@")
    scheme, separator, after = (before if at else url).partition("://")
    if at:
        return f"{scheme}://{HIDDEN}@{_shown_options(rest)}" if separator else f"{HIDDEN}@{_shown_options(rest)}"
    if not separator:
        return url if ":" not in url else _shown_authority("", url)
    return _shown_authority(f"{scheme}://", after)


def shown_text(text: str, *urls: str | None) -> str:
    """Return a text of another program without the passwords of its URLs, nor those of the given URLs."""
    for secret in sorted({secret for url in urls if url for secret in _secrets(url)}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return URL_IN_TEXT.sub(lambda found: shown_url(found[0]), text)


def check_redis_url(url: str) -> None:
    """Check a registry's URL before any connection.

    Raises:
        ValueError: the URL cannot name a Redis server; the message has no part of the URL that may be secret.
    """
    form = "Use redis://[USER:PASSWORD@]HOST:PORT/DATABASE, rediss:// for TLS, or unix:///PATH"
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    if "sentinel" in scheme:
        raise ValueError(
            "Redis Sentinel URLs are not supported. Name one address that always leads to the primary, such as a "
            "service or a TCP proxy that follows Sentinel; the hub reconnects after a failover"
        )
    if "cluster" in scheme:
        raise ValueError("Redis Cluster is not supported. Name one server without cluster mode")
    if scheme not in REDIS_SCHEMES:
        raise ValueError(f"the URL must start with redis://, rediss:// or unix://. {form}")
    parts = _split(url)
    if parts is None:
        raise ValueError(
            f"the URL is not valid. {form}. Escape the characters / ? # @ : % of a password, such as %2F for /"
        )
    if scheme == "unix":
        if not parts.path:
            raise ValueError(f"the URL names no socket. {form}")
        return
    if "," in parts.netloc:
        raise ValueError("the URL names several servers. Name one address that always leads to the primary")
    if not parts.hostname:
        raise ValueError(f"the URL names no host. {form}")
    database = parts.path.strip("/")
    if database and not database.isdecimal():
        raise ValueError(f"the database after the port must be a number, such as /0. {form}")


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for a port that is no number
    except ValueError:
        return None
    return parts if "@" not in parts.path + parts.query + parts.fragment or parts.scheme == "unix" else None


def _shown_authority(start: str, rest: str) -> str:
    """Return a URL without `@`. A text after the host's colon that is no port may be a password without its host."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if not AUTHORITY.fullmatch(authority):
        return start + HIDDEN
    return start + _shown_options(rest)


def _shown_options(rest: str) -> str:
    """Return host and path, with the values of unknown options hidden."""
    path, question, query = rest.partition("?")
    if not question:
        return path
    options = [option.partition("=") for option in re.split(r"[&#]", query)]
    return path + "?" + "&".join(f"{n}={v if n in SHOWN_OPTIONS else HIDDEN}" for n, _, v in options if n)


def _secrets(url: str) -> set[str]:
    """Return the texts of a URL that may be secret, as written and decoded. Short ones would hit ordinary words."""
    before, at, rest = url.rpartition("@")
    found = {url} if shown_url(url) != url else set()
    if at:
        user_info = before.partition("://")[2] or before
        found |= {user_info, user_info.partition(":")[2]}
    for option in re.split(r"[?&#]", rest if at else url)[1:]:
        name, _, value = option.partition("=")
        if name not in SHOWN_OPTIONS:
            found.add(value)
    if not at and shown_url(url).endswith(HIDDEN):
        found |= set(re.split(r"[/:?#]+", url.partition("://")[2] or url))
    return {text for secret in found for text in (secret, unquote(secret)) if len(text) >= 3}
