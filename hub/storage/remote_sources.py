"""Adapter files by reference, only from where the operator said: `HUB_SOURCES`, a list of prefixes, empty by default.

A reference is compared with the prefixes part by part, in one plain spelling, so there is nothing to decode and nothing
to go back by. What it leads to is checked again where it is opened: a file's real path, a host's real address.
"""

import asyncio
import ipaddress
import os
import re
import socket
import ssl
import stat
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import fsspec
import httpx

from ..errors import InvalidRequest, TooLarge, Unavailable

OBJECT_STORES = ("s3", "gs", "hf")
MAX_CHARACTERS = 2048
CONNECT_S = 10.0
HTTPS_PORT = 443
PART = re.compile(r"[A-Za-z0-9._~+=,@-]+")
HOST = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9])?")
BUCKET = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
# Python calls these global, yet they lead into a network: protocol assignments, 6to4 relays, a cloud's own service.
NOT_PUBLIC = tuple(ipaddress.ip_network(n) for n in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32"))
NOT_PUBLIC_6 = tuple(ipaddress.ip_network(n) for n in ("2001::/23", "3fff::/20"))
UNICAST_6 = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_global(address: IPAddress) -> bool:
    """Whether an address belongs to a host of the public internet; IPv4 inside IPv6 is judged as IPv4."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and not any(address in n for n in NOT_PUBLIC)
    inner = address.ipv4_mapped or address.sixtofour
    if address in NAT64:
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if inner is not None:
        return is_global(inner)
    return address in UNICAST_6 and address.is_global and not any(address in n for n in NOT_PUBLIC_6)


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host; the system's resolver has time limits of its own."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True)
class Place:
    """A reference, taken apart: `host` is a host (lower case), a bucket, an account, or nothing for a file."""

    scheme: str
    host: str
    port: int  # 0 but for https
    parts: tuple[str, ...]
    folder: bool  # it ended in a slash

    @classmethod
    def parse(cls, text: str, object_stores: Collection[str] = OBJECT_STORES) -> "Place":
        """
        Raises:
            ValueError: anything but the one plain spelling; the message does not repeat the text, which may hold a
                password.
        """
        scheme, separator, rest = text.partition("://")
        scheme = scheme.lower()
        schemes = (*object_stores, "https", "file")
        if scheme == "http":
            raise ValueError("http:// is never read, since anybody on the way can change it; use https://")
        if not separator or scheme not in schemes:
            raise ValueError(f"has to begin with one of {', '.join(f'{s}://' for s in schemes)}")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"has more than {MAX_CHARACTERS} characters")
        authority, _, path = rest.partition("/")
        host, port = _host(scheme, authority)
        parts = path.removesuffix("/").split("/") if path else []
        for part in parts:
            if part in (".", "..") or not PART.fullmatch(part):
                raise ValueError(
                    "the path may have letters, digits and ._~+=,@- between single slashes: no '..', no '%', no query"
                )
        return cls(scheme, host, port, tuple(parts), folder=path.endswith("/"))

    def __str__(self) -> str:
        """Its one spelling, made of what was checked: no user, no password, no query."""
        host = self.host if self.port in (0, HTTPS_PORT) else f"{self.host}:{self.port}"
        return f"{self.scheme}://{'/'.join((host, *self.parts))}" + ("/" if self.folder else "")

    def below(self, prefix: "Place") -> bool:
        if (self.scheme, self.host, self.port) != (prefix.scheme, prefix.host, prefix.port):
            return False
        rest = self.parts[len(prefix.parts) :]
        if not rest or self.parts[: len(prefix.parts)] != prefix.parts:
            return False
        # On the Hugging Face Hub anybody may propose a revision to a repository; so the operator alone names one.
        return self.scheme != "hf" or not any("@" in part for part in rest)


def parse_prefixes(prefixes: Iterable[str], object_stores: Collection[str] = OBJECT_STORES) -> tuple[Place, ...]:
    """
    Raises:
        ValueError: a prefix that is none, or is as wide as a whole file system or hub.
    """
    places = []
    for text in prefixes:
        try:
            place = Place.parse(text, object_stores)
        except ValueError as error:
            shown = re.sub(r"//[^/]*@", "//...@", text)  # a password may be in it
            raise ValueError(f"{shown!r}: {error}") from error
        if place.scheme == "file" and not place.parts:
            raise ValueError(f"{text!r}: name a folder, not the whole file system")
        places.append(place)
    return tuple(places)


class Sources:
    """Fetches adapter files from the allowed places. The calls block; run them in a thread."""

    def __init__(
        self,
        allowed: Sequence[str],
        *,
        max_bytes: int,
        timeout_s: float = 60,
        allowed_address: Callable[[IPAddress], bool] = is_global,
        resolve: Callable[[str, int], list[str]] = resolve,
        tls: ssl.SSLContext | None = None,
        object_stores: Collection[str] = OBJECT_STORES,
    ) -> None:
        """
        Args:
            allowed: prefixes, such as `s3://bucket/adapters/`; none: every reference is refused.
            max_bytes: of one file.
            timeout_s: for one https download, from the connection to the last byte.
            allowed_address: whether an address of an https host may be connected to.
            resolve: host, port -> its addresses; raises OSError.
            tls: whose certificates count; None: those of the public authorities.
            object_stores: fsspec's protocols that may be named.

        Raises:
            ValueError: a prefix that is none, or one that needs a package which is not installed.
        """
        self._allowed = parse_prefixes(allowed, object_stores)
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._allowed_address = allowed_address
        self._resolve = resolve
        self._tls = tls
        self._object_stores = object_stores
        for scheme in {p.scheme for p in self._allowed} & set(object_stores):
            try:
                fsspec.get_filesystem_class(scheme)
            except ImportError as error:
                raise ValueError(f"HUB_SOURCES has a prefix of {scheme}://, but: {error}") from error

    def fetch(self, source: str) -> bytes:
        """The whole file that a reference names.

        Raises:
            InvalidRequest: not allowed, not there, or not a file; a reference outside of the prefixes is refused before
                anybody looks whether it exists.
            TooLarge: more than `max_bytes`.
            Unavailable: the place does not answer, or not in time.
        """
        if not self._allowed:
            raise _refused("this hub takes no references: its operator lists no prefix in HUB_SOURCES")
        try:
            place = Place.parse(source, self._object_stores)
        except ValueError as error:
            raise _refused(str(error)) from error
        prefixes = [p for p in self._allowed if place.below(p)]
        if not prefixes or place.folder:
            raise _refused("names no file under a prefix that the operator lists in HUB_SOURCES")
        if place.scheme == "file":
            widest = min(prefixes, key=lambda p: len(p.parts))
            data = _read_below("/" + "/".join(widest.parts), place.parts[len(widest.parts) :], self._max_bytes + 1)
        elif place.scheme == "https":
            data = self._download(place)
        else:
            data = self._read_object(place)
        if len(data) > self._max_bytes:
            message = f"the file has more than the {self._max_bytes} bytes that are allowed"
            raise TooLarge.at("source", message)
        return data

    def told(self, source: str) -> str:
        """A reference that was fetched, as others may read it.

        Raises:
            ValueError: one that could not have been fetched.
        """
        return str(Place.parse(source, self._object_stores))

    def _read_object(self, place: Place) -> bytes:
        path = "/".join((place.host, *place.parts))
        try:
            # An instance of its own: the shared ones remember listings, and what was not there a while ago.
            fs = fsspec.filesystem(place.scheme, skip_instance_cache=True)
            if fs.info(path)["type"] != "file":
                raise FileNotFoundError
            return bytes(fs.cat_file(path, 0, self._max_bytes + 1))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise _refused("there is no such file") from error
        except Exception as error:  # every object store has its own kinds
            raise Unavailable(f"the source cannot be read: {_without_secrets(error)}") from error

    def _download(self, place: Place) -> bytes:
        try:
            addresses = list(dict.fromkeys(self._resolve(place.host, place.port)))
        except (OSError, UnicodeError) as error:  # the latter: a name that DNS cannot have
            raise Unavailable("the source's host has no address for now") from error
        if not addresses or not all(self._allowed_address(ipaddress.ip_address(a)) for a in addresses):
            raise _refused("the host has an address that is not public")
        try:
            return asyncio.run(self._get(place, addresses))
        except TimeoutError as error:
            raise Unavailable(f"the source did not send the file within {self._timeout_s:g} seconds") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"the source cannot be read: {_without_secrets(error)}") from error

    async def _get(self, place: Place, addresses: Sequence[str]) -> bytes:
        """From the first of the checked addresses that answers: no second look-up, so nothing changes in between."""
        limits = httpx.Timeout(self._timeout_s, connect=CONNECT_S)
        client = httpx.AsyncClient(verify=self._tls or True, trust_env=False, follow_redirects=False, timeout=limits)
        async with asyncio.timeout(self._timeout_s), client:
            for i, address in enumerate(addresses):
                try:
                    return await self._get_from(client, place, address)
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    if i == len(addresses) - 1:
                        raise
        raise AssertionError("there is an address")

    async def _get_from(self, client: httpx.AsyncClient, place: Place, address: str) -> bytes:
        url = httpx.URL(scheme="https", host=address, port=place.port, path="/" + "/".join(place.parts))
        name = place.host if place.port == HTTPS_PORT else f"{place.host}:{place.port}"
        headers = {"host": name, "accept-encoding": "identity"}
        # The certificate has to be the host's, although the connection goes to an address.
        async with client.stream("GET", url, headers=headers, extensions={"sni_hostname": place.host}) as response:
            _check_answer(response)
            data = bytearray()
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > self._max_bytes:
                    break
        return bytes(data)


def _check_answer(response: httpx.Response) -> None:
    status = response.status_code
    if 300 <= status < 400:
        raise _refused(f"the host redirects ({status}), which is not followed; name the final place")
    if status >= 500 or status == 429:
        raise Unavailable(f"the source cannot be read: its host answers {status}")
    if status != 200:
        raise _refused(f"the host answers {status}")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _refused("the host sends the file compressed, although it was asked not to")


def _read_below(folder: str, parts: Sequence[str], count: int) -> bytes:
    """At most `count` bytes of a regular file below a folder; symbolic links count if they stay below.

    Raises:
        InvalidRequest: one answer for whatever is wrong, since another would tell what is outside.
    """
    try:
        root = os.path.realpath(folder, strict=True)
        real = os.path.realpath(os.path.join(root, *parts), strict=True)
        if os.path.commonpath((root, real)) != root:
            raise FileNotFoundError
        with open(_open_below(root, os.path.relpath(real, root).split("/")), "rb") as file:
            return file.read(count)
    except OSError as error:
        raise _refused("there is no such file, or none that the hub may read") from error


def _open_below(root: str, names: Sequence[str]) -> int:
    """Open a path without links step by step: if somebody puts a link there meanwhile, it is an error."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.open(root, flags | os.O_DIRECTORY)
    try:
        for name in names[:-1]:
            folder, above = os.open(name, flags | os.O_DIRECTORY, dir_fd=folder), folder
            os.close(above)
        # Looked at before it is opened, since opening a device may do something; and after, in case it was replaced.
        if not stat.S_ISREG(os.stat(names[-1], dir_fd=folder, follow_symlinks=False).st_mode):
            raise FileNotFoundError
        file = os.open(names[-1], flags | os.O_NONBLOCK, dir_fd=folder)  # a FIFO would wait for its writer
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError
    return file


def _host(scheme: str, authority: str) -> tuple[str, int]:
    if scheme == "file":
        if authority:
            raise ValueError("file:// takes an absolute path: three slashes")
        return "", 0
    if scheme != "https":
        if not BUCKET.fullmatch(authority):
            raise ValueError("needs the name of a bucket or an account after ://, and no user or password")
        return authority, 0
    host, colon, port = authority.lower().partition(":")
    if not HOST.fullmatch(host) or ".." in host or "@" in port:
        raise ValueError("needs a plain host name after https://, and no user or password")
    if colon and not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535 and port[0] != "0"):
        raise ValueError("has a port that is none")
    return host, int(port) if colon else HTTPS_PORT


def _without_secrets(error: Exception) -> str:
    """An error's first line: of URLs only scheme, host and path, and nothing that looks like a key or a signature."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = re.sub(r"\b([a-z][a-z0-9+]*://)(?:[^\s/@]*@)?([^\s?#'\"]*)[^\s'\"]*", r"\1\2", line, flags=re.IGNORECASE)
    return re.sub(r"[A-Za-z0-9+/=_-]{20,}", "...", line)


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest.at("source", message)
