"""The proxy of a client's requests, from the variables that other programs read too (HTTP_PROXY, NO_PROXY, ...).

httpx reads the variables itself, but it refuses IPv6 networks in NO_PROXY and `socks://`, and its errors name no
variable.
"""

import urllib.request
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

import httpx

from ..errors import InvalidRequest

_SCHEMES = ("http", "https", "socks5", "socks5h")


@dataclass(frozen=True)
class EnvironmentProxy:
    """A proxy, and the variable that names it."""

    url: httpx.URL
    variable: str

    def __str__(self) -> str:
        """Return the proxy without its password."""
        port = "" if self.url.port is None else f":{self.url.port}"
        return f"{self.url.scheme}://{self.url.host}{port} ({self.variable})"


def proxy_for(url: httpx.URL) -> EnvironmentProxy | None:
    """Return the proxy that the environment names for a URL; None if it names none or NO_PROXY excludes the host.

    Raises:
        InvalidRequest: the variable's value is not the URL of a proxy.
    """
    named = urllib.request.getproxies()
    kind = next((kind for kind in (url.scheme, "all") if named.get(kind)), None)
    if kind is None or is_excluded(url.host, named.get("no", "")):
        return None
    variable = f"{kind.upper()}_PROXY"
    text = named[kind] if "://" in named[kind] else f"http://{named[kind]}"
    if text.startswith("socks://"):  # desktops write it for SOCKS 5
        text = f"socks5://{text.removeprefix('socks://')}"
    try:
        proxy = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise InvalidRequest(f"{variable} is not the URL of a proxy: {error}; correct or unset the variable") from error
    if proxy.scheme not in _SCHEMES or not proxy.host:
        schemes = ", ".join(_SCHEMES)
        raise InvalidRequest(
            f"{variable} names a proxy with the scheme {proxy.scheme!r}; expected one of {schemes}. "
            "Correct or unset the variable, or add the hub's host to NO_PROXY"
        )
    return EnvironmentProxy(proxy, variable)


def is_excluded(host: str, no_proxy: str) -> bool:
    """Return whether NO_PROXY excludes a host: by `*`, its name, a parent domain, its address, or a network."""
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    for entry in (part.strip().lower() for part in no_proxy.split(",")):
        name = entry.lstrip(".").removeprefix("*.")
        if entry == "*" or (name and (host.lower() == name or host.lower().endswith(f".{name}"))):
            return True
        try:
            if address is not None and address in ip_network(name.replace("[", "").replace("]", ""), strict=False):
                return True
        except ValueError:  # a name
            continue
    return False
