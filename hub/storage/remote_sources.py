"""Adapter files by reference, read only from prefixes that the operator lists in `HUB_SOURCES` (empty by default).

A reference has exactly one valid spelling, without escapes and without `..`. The hub compares it with the prefixes part
by part. It checks the target again where it opens it: a file's real path, or a host's actual address.
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
from ..urls import shown_text, shown_url

OBJECT_STORES = ("s3", "gs", "hf")
MAX_URL_CHARACTERS = 2048
CONNECT_TIMEOUT_S = 10.0
HTTPS_PORT = 443
PART = re.compile(r"[A-Za-z0-9._~+=,@-]+")
HOST = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9])?")
BUCKET = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
# Python calls these networks global, but they lead to private hosts: protocol assignments, 6to4 relays, a cloud's
# metadata service.
NOT_PUBLIC = tuple(ipaddress.ip_network(n) for n in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32"))
NOT_PUBLIC_6 = tuple(ipaddress.ip_network(n) for n in ("2001::/23", "3fff::/20"))
UNICAST_6 = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_global(address: IPAddress) -> bool:
    """Return whether an address belongs to a host of the public internet. IPv4 inside IPv6 is checked as IPv4."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and not any(address in n for n in NOT_PUBLIC)
    inner = address.ipv4_mapped or address.sixtofour
    if address in NAT64:
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if inner is not None:
        return is_global(inner)
    return address in UNICAST_6 and address.is_global and not any(address in n for n in NOT_PUBLIC_6)


def resolve(host: str, port: int) -> list[str]:
    """Return all addresses of a host, from the system's resolver and within its timeouts.

    Raises:
        OSError: the host has no address.
    """
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True)
class SourceURL:
    """A parsed reference.

    Attributes:
        host: host name in lower case, bucket or account; '' for a file.
        port: 0 for every scheme but https.
        parts: path components.
        folder: the reference ends with a slash.
    """

    scheme: str
    host: str
    port: int
    parts: tuple[str, ...]
    folder: bool

    @classmethod
    def parse(cls, text: str, object_stores: Collection[str] = OBJECT_STORES) -> "SourceURL":
        """Parse a reference.

        Args:
            object_stores: fsspec protocols that are allowed besides https and file.

        Raises:
            ValueError: not the valid spelling. The message does not repeat the text, which may contain a password.
        """
        scheme, separator, rest = text.partition("://")
        scheme = scheme.lower()
        schemes = (*object_stores, "https", "file")
        if scheme == "http":
            raise ValueError("http:// is not supported, because others can change the file in transit; use https://")
        if not separator or scheme not in schemes:
            raise ValueError(f"must start with one of {', '.join(f'{s}://' for s in schemes)}")
        if len(text) > MAX_URL_CHARACTERS:
            raise ValueError(f"has {len(text)} characters; the limit is {MAX_URL_CHARACTERS}")
        authority, _, path = rest.partition("/")
        host, port = _host(scheme, authority)
        parts = path.removesuffix("/").split("/") if path else []
        for part in parts:
            if part in (".", "..") or not PART.fullmatch(part):
                raise ValueError(
                    "the path may have only letters, digits and ._~+=,@- between single slashes: no '..', '%' or query"
                )
        return cls(scheme, host, port, tuple(parts), folder=path.endswith("/"))

    def __str__(self) -> str:
        """Return the one valid spelling, built from the checked parts: no user, password or query."""
        host = self.host if self.port in (0, HTTPS_PORT) else f"{self.host}:{self.port}"
        return f"{self.scheme}://{'/'.join((host, *self.parts))}" + ("/" if self.folder else "")

    def is_below(self, prefix: "SourceURL") -> bool:
        """Return whether this is a file below a prefix."""
        if (self.scheme, self.host, self.port) != (prefix.scheme, prefix.host, prefix.port):
            return False
        rest = self.parts[len(prefix.parts) :]
        if not rest or self.parts[: len(prefix.parts)] != prefix.parts:
            return False
        # On the Hugging Face Hub every user may propose a revision to a repository, so only the operator names one.
        return self.scheme != "hf" or not any("@" in part for part in rest)


def parse_prefixes(prefixes: Iterable[str], object_stores: Collection[str] = OBJECT_STORES) -> tuple[SourceURL, ...]:
    """Parse the operator's prefixes.

    Raises:
        ValueError: a prefix is invalid, or it is the whole file system.
    """
    urls = []
    for text in prefixes:
        try:
            url = SourceURL.parse(text, object_stores)
        except ValueError as error:
            raise ValueError(f"{shown_url(text)!r}: {error}") from error
        if url.scheme == "file" and not url.parts:
            raise ValueError(f"{text!r}: name a folder, not the whole file system")
        urls.append(url)
    return tuple(urls)


def permitted(
    source: str, prefixes: Sequence[SourceURL], object_stores: Collection[str] = OBJECT_STORES
) -> tuple[SourceURL, SourceURL]:
    """Parse a reference and return it with the shortest prefix that covers it. Does no input or output.

    Raises:
        InvalidRequest: not the valid spelling of a file below a prefix.
    """
    if not prefixes:
        raise _refused("this hub reads no sources: its operator lists no prefix in HUB_SOURCES")
    try:
        url = SourceURL.parse(source, object_stores)
    except ValueError as error:
        raise _refused(str(error)) from error
    covering = [prefix for prefix in prefixes if url.is_below(prefix)]
    if not covering or url.folder:
        raise _refused("not a file below a prefix that the operator lists in HUB_SOURCES")
    return url, min(covering, key=lambda prefix: len(prefix.parts))


class RemoteSources:
    """Reader of adapter files below the allowed prefixes. Its calls block; run them in a thread pool."""

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
            allowed: prefixes, such as `s3://bucket/adapters/`. Without prefixes every reference is refused.
            max_bytes: size limit of one file.
            timeout_s: time limit of one https download, from the connection to the last byte.
            allowed_address: whether the hub may connect to an address of an https host.
            resolve: function from host and port to addresses; raises OSError.
            tls: trusted certificates; None for those of the public authorities.
            object_stores: fsspec protocols that a reference may have.

        Raises:
            ValueError: a prefix is invalid or needs a package that is not installed.
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
                raise ValueError(f"HUB_SOURCES: {scheme}:// needs another package: {error}") from error

    def fetch(self, source: str) -> bytes:
        """Return the whole file of a reference.

        Raises:
            InvalidRequest: the reference is not allowed, not found or not a file. The hub refuses a reference outside
                the prefixes before it looks whether the file exists.
            TooLarge: the file has more than `max_bytes`.
            Unavailable: the source does not answer in time.
        """
        url, widest = permitted(source, self._allowed, self._object_stores)
        if url.scheme == "file":
            data = _read_below("/" + "/".join(widest.parts), url.parts[len(widest.parts) :], self._max_bytes + 1)
        elif url.scheme == "https":
            data = self._download(url)
        else:
            data = self._read_object(url)
        if len(data) > self._max_bytes:
            raise TooLarge.at("source", f"the file has more than {self._max_bytes} bytes, which is the limit")
        return data

    def canonical(self, source: str) -> str:
        """Return the one valid spelling of a reference, which contains no secret.

        Raises:
            ValueError: the reference is invalid.
        """
        return str(SourceURL.parse(source, self._object_stores))

    def _read_object(self, url: SourceURL) -> bytes:
        path = "/".join((url.host, *url.parts))
        try:
            # Not the cached instance: it keeps old listings, so a new file would be missing.
            fs = fsspec.filesystem(url.scheme, skip_instance_cache=True)
            if fs.info(path)["type"] != "file":
                raise FileNotFoundError
            # By name: the second parameter of s3fs is `version_id`.
            return bytes(fs.cat_file(path, start=0, end=self._max_bytes + 1))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise _refused("no such file") from error
        except Exception as error:  # each object store has its own exception types
            raise Unavailable(f"The source cannot be read: {_without_secrets(error)}") from error

    def _download(self, url: SourceURL) -> bytes:
        try:
            addresses = list(dict.fromkeys(self._resolve(url.host, url.port)))
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that DNS does not allow
            raise Unavailable("The source's host has no address at the moment. Retry later.") from error
        if not addresses or not all(self._allowed_address(ipaddress.ip_address(a)) for a in addresses):
            raise _refused("the host has an address that is not public; name a host of the public internet")
        try:
            return asyncio.run(self._get(url, addresses))
        except TimeoutError as error:
            raise Unavailable(f"The source did not send the file within {self._timeout_s:g} s. Retry later.") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"The source cannot be read: {_without_secrets(error)}") from error

    async def _get(self, url: SourceURL, addresses: Sequence[str]) -> bytes:
        """Download from the first checked address that answers.

        There is no second look-up; otherwise the host's address could change after the check.
        """
        limits = httpx.Timeout(self._timeout_s, connect=CONNECT_TIMEOUT_S)
        client = httpx.AsyncClient(verify=self._tls or True, trust_env=False, follow_redirects=False, timeout=limits)
        async with asyncio.timeout(self._timeout_s), client:
            for i, address in enumerate(addresses):
                try:
                    return await self._get_from(client, url, address)
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    if i == len(addresses) - 1:
                        raise
        raise AssertionError("there is an address")

    async def _get_from(self, client: httpx.AsyncClient, url: SourceURL, address: str) -> bytes:
        target = httpx.URL(scheme="https", host=address, port=url.port, path="/" + "/".join(url.parts))
        name = url.host if url.port == HTTPS_PORT else f"{url.host}:{url.port}"
        headers = {"host": name, "accept-encoding": "identity"}
        # The connection goes to an address, but the certificate must be that of the host.
        async with client.stream("GET", target, headers=headers, extensions={"sni_hostname": url.host}) as response:
            _check_response(response)
            data = bytearray()
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > self._max_bytes:
                    break
        return bytes(data)


def _check_response(response: httpx.Response) -> None:
    status = response.status_code
    if 300 <= status < 400:
        raise _refused(f"the host redirects ({status}), and the hub does not follow redirects; name the final URL")
    if status >= 500 or status == 429:
        raise Unavailable(f"The source cannot be read: its host answers {status}. Retry later.")
    if status != 200:
        raise _refused(f"the host answers {status}; the hub needs 200")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _refused("the host sends the file compressed, but the hub accepts only identity encoding")


def _read_below(folder: str, parts: Sequence[str], count: int) -> bytes:
    """Return at most `count` bytes of a regular file below a folder. Symbolic links may not leave the folder.

    Raises:
        InvalidRequest: the file cannot be read. All causes give one message; otherwise it would reveal other files.
    """
    try:
        root = os.path.realpath(folder, strict=True)
        real = os.path.realpath(os.path.join(root, *parts), strict=True)
        if os.path.commonpath((root, real)) != root:
            raise FileNotFoundError
        with open(_open_below(root, os.path.relpath(real, root).split("/")), "rb") as file:
            return file.read(count)
    except OSError as error:
        raise _refused("no such file, or the hub may not read it") from error


def _open_below(root: str, names: Sequence[str]) -> int:
    """Open a path step by step without following links. A link that another process inserts is an error."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.open(root, flags | os.O_DIRECTORY)
    try:
        for name in names[:-1]:
            folder, parent = os.open(name, flags | os.O_DIRECTORY, dir_fd=folder), folder
            os.close(parent)
        # Checked before opening, because opening a device can have effects, and after it, in case it was replaced.
        if not stat.S_ISREG(os.stat(names[-1], dir_fd=folder, follow_symlinks=False).st_mode):
            raise FileNotFoundError
        file = os.open(names[-1], flags | os.O_NONBLOCK, dir_fd=folder)  # a FIFO would block otherwise
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError
    return file


def _host(scheme: str, authority: str) -> tuple[str, int]:
    if scheme == "file":
        if authority:
            raise ValueError("file:// needs an absolute path, with three slashes")
        return "", 0
    if scheme != "https":
        if not BUCKET.fullmatch(authority):
            raise ValueError("needs a bucket or an account after ://, without user or password")
        return authority, 0
    host, colon, port = authority.lower().partition(":")
    if not HOST.fullmatch(host) or ".." in host or "@" in port:
        raise ValueError("needs a host name after https://, without user or password")
    if colon and not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535 and port[0] != "0"):
        raise ValueError("has an invalid port; use a number from 1 to 65535")
    return host, int(port) if colon else HTTPS_PORT


def _without_secrets(error: Exception) -> str:
    """Return an error's first line, with its URLs made safe to show, and without text that looks like a key."""
    line = shown_text((str(error).strip() or type(error).__name__).splitlines()[0])
    return re.sub(r"[A-Za-z0-9+/=_-]{20,}", "...", line)


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest.at("source", message)
