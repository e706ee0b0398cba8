"""Parts that `Client` and `AsyncClient` share: calls as values, options of a client, errors of the connection."""

import inspect
import os
import secrets
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Generic, NoReturn, TypeVar, get_args

import httpx

from ..errors import HubError, InvalidRequest, Unauthenticated, Unavailable
from .image_encoding import batches
from .proxies import proxy_for
from .retries import error_of

Item = TypeVar("Item")
Part = TypeVar("Part")
Reply = TypeVar("Reply")
Method = TypeVar("Method", bound=Callable[..., Any])

CHUNK_BYTES = 1024**2  # read size of an uploaded file


@dataclass(frozen=True)
class Call(Generic[Reply]):
    """One HTTP request and the parser of its reply."""

    method: str
    path: str
    parse: Callable[[bytes], Reply]
    params: Mapping[str, str | int | float] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    images: Sequence[tuple[str, bytes]] = ()  # multipart form: field, encoded image
    files: Sequence[tuple[str, str, bytes]] = ()  # multipart form: field, file name, content
    upload: Path | None = None  # file to send as the body
    download: Path | None = None  # file to write the reply to
    idempotent: bool = True  # a second execution has no further effect and gives the same reply
    first: int = 0  # index of the first input of this call among all inputs of the caller

    def options(self) -> dict[str, Any]:
        """Return the arguments of httpx's `stream`, except `content`."""
        headers = dict(self.headers)
        if self.upload is not None:
            headers["content-length"] = str(self.upload.stat().st_size)
        named = [*((name, name, data) for name, data in self.images), *self.files]
        files = [(field, (name, data, "application/octet-stream")) for field, name, data in named]
        return {
            "method": self.method,
            "url": self.path,
            "params": self.params,
            "headers": headers,
            "files": files or None,
        }


@dataclass(frozen=True)
class PagedCall(Generic[Reply]):
    """A list that the hub sends in pages. The clients read all of them, and return one reply."""

    first: Call[Reply]
    member: str  # of the reply: the list that each page continues

    def following(self, page: Reply) -> Call[Reply] | None:
        """Return the call of the next page; None after the last one."""
        cursor = getattr(page, "next", None)
        return None if cursor is None else replace(self.first, params={**self.first.params, "cursor": cursor})

    def join(self, pages: Sequence[Reply]) -> Reply:
        """Return the first page with the entries of all pages."""
        if len(pages) == 1:
            return pages[0]
        entries = [entry for page in pages for entry in getattr(page, self.member)]
        joined: Any = pages[0]
        whole: Reply = joined.model_copy(update={self.member: entries, "next": None})
        return whole


@dataclass(frozen=True)
class CallSeries(Generic[Item, Part, Reply]):
    """One request that may take several calls of the same kind, whose replies are joined.

    The first call is sent alone, since the others request the version of its reply.
    """

    items: Iterable[tuple[Item, int]]  # each with its size in bytes
    call: Callable[[int, Sequence[Item], Part | None], Call[Part]]  # from first index, items, reply to the first call
    join: Callable[[Sequence[Part]], Reply]
    total: int | None  # number of items; None: unknown before the end
    progress: bool
    verb: str = "classifying"  # of the progress bar

    def calls(self, max_bytes: int, replies: Sequence[Part]) -> Iterator[tuple[Call[Part], int]]:
        """Yield each call with its number of items. A call is made only when the caller requests it.

        Args:
            max_bytes: limit for the items of one call.
            replies: replies so far, which the caller extends. The second call needs the first reply.
        """
        for start, items in batches(self.items, max_bytes):
            yield self.call(start, items, replies[0] if replies else None), len(items)

    @contextmanager
    def progress_bar(self) -> Iterator[Callable[[int], None]]:
        """Show a progress bar on stderr if `progress` is set. Yield a function that adds a number of finished items."""
        if not self.progress:
            yield lambda _items: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn(self.verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=self.total)
            yield lambda items: progress.advance(task, items)


class BaseClient:
    """Options, HTTP client and error handling of both clients."""

    def __init__(
        self,
        url: str,
        key: str,
        *,
        timeout_s: float = 60.0,
        retry_s: float = 60.0,
        in_flight: int = 4,
        call_bytes: int = 16 * 1024**2,
        tls: ssl.SSLContext | None = None,
        on_response: Callable[[httpx.Response], None] | None = None,
    ) -> None:
        """
        Args:
            url: URL of the hub.
            key: API key.
            timeout_s: timeout in seconds for a connection, and for each read and write.
            retry_s: seconds after the start of a call in which retries may begin; 0: no retries.
            in_flight: maximum number of concurrent calls of one `classify`.
            call_bytes: maximum bytes of images per call; the hub's limit is four times its `HUB_MAX_IMAGE_BYTES`.
            tls: trusted certificates; None: the public ones, or the file in SSL_CERT_FILE.
            on_response: called with every response before its body is read, for example to log `Server-Timing`.

        Raises:
            Unauthenticated: The key is empty or has characters that no key has.
            InvalidRequest: The URL is invalid or does not start with http:// or https://.
        """
        if not url.lower().startswith(("http://", "https://")):
            raise InvalidRequest(f"the URL of the hub (HUB_URL) must start with http:// or https://, not {url!r}")
        key = key.strip()
        if not (key and key.isascii() and key.isprintable()):
            raise Unauthenticated(
                "the key is empty or has characters that are not printable ASCII; copy the whole key (HUB_KEY)"
            )
        self._url = url
        self._retry_s = retry_s
        self._in_flight = in_flight
        self._call_bytes = call_bytes
        self._on_response = on_response
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"the URL of the hub (HUB_URL) is invalid: {url!r}: {error}") from error
        self._proxy = proxy_for(parsed)
        self._http_options: dict[str, Any] = {
            "base_url": parsed,
            "timeout": timeout_s,
            "headers": {"authorization": f"Bearer {key}"},
            "limits": httpx.Limits(max_connections=100, max_keepalive_connections=100),
            "verify": tls if tls is not None else _trusted_certificates() if parsed.scheme == "https" else True,
            "proxy": self._proxy and self._proxy.url,
            "trust_env": False,  # `proxy_for` and `_trusted_certificates` read the environment
        }
        try:
            self._open()
        except ImportError as error:
            raise InvalidRequest(
                f"the proxy {self._proxy} needs a package: pip install 'httpx[socks]'; "
                "or add the hub's host to NO_PROXY"
            ) from error

    def __reduce__(self) -> NoReturn:
        kind = type(self).__name__
        raise TypeError(f"a {kind} cannot be pickled, since it holds connections; create one in each process")

    def _open(self) -> None:
        """Create the httpx client of this process."""
        raise NotImplementedError

    def _parse(self, call: Call[Reply], response: httpx.Response) -> Reply:
        """Parse a complete response.

        Raises:
            HubError: The response is an error, or not a reply of a hub.
        """
        if not response.is_success:
            raise error_of(response, call.first)
        try:
            return call.parse(response.content)
        except ValueError as error:
            raise HubError(
                f"the server at {self._url} is not a hub; check the URL. It replied {response.text[:80]!r}"
            ) from error

    def _closed_error(self) -> RuntimeError:
        """Return the error of a closed client. The message of httpx would name a class that callers do not know."""
        kind = type(self).__name__
        return RuntimeError(
            f"this {kind} is closed; create a new one, and close it (or leave its `with`) after the last call"
        )

    def _connection_error(self, error: httpx.RequestError) -> Unavailable:
        """Return the error of a request that got no response."""
        through, remedy = "", ""
        if self._proxy is not None:
            through = f" through the proxy {self._proxy}"
            remedy = f"; unset {self._proxy.variable}, or add the hub's host to NO_PROXY, if the hub needs no proxy"
        return Unavailable(f"no hub answers at {self._url}{through}: {_reason(error)}{remedy}", retry_after_s=None)


def _trusted_certificates() -> ssl.SSLContext:
    """Return the public certificates, or those of SSL_CERT_FILE or SSL_CERT_DIR.

    Raises:
        InvalidRequest: the file cannot be read.
    """
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # an `SSLError` too
        raise InvalidRequest(
            f"the trusted certificates (SSL_CERT_FILE or SSL_CERT_DIR) cannot be read: {error}; correct or unset the "
            "variable"
        ) from error


def without_traceback(error: httpx.RequestError) -> httpx.RequestError:
    """Return a copy of an error without its traceback, which has sixty lines. The retry policy needs its class."""
    return type(error)(_reason(error))


def _reason(error: httpx.RequestError) -> str:
    """Return why no response arrived, as the same text for both clients: asyncio hides the text of the system."""
    if isinstance(error, httpx.TimeoutException):
        return "timed out"
    last: BaseException = error
    while inner := last.__cause__ or last.__context__:
        # A group has one exception per address.
        last = inner.exceptions[0] if isinstance(inner, BaseExceptionGroup) else inner
    if isinstance(last, OSError) and last.errno is not None and "Connect call failed" in str(last):
        return f"[Errno {last.errno}] {os.strerror(last.errno)}"
    return str(error) or type(error).__name__


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing. It becomes `path` at the end, and is removed after an error."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def documented_by(endpoint: Callable[..., Any]) -> Callable[[Method], Method]:
    """Give a client's method the name, parameters and docstring of the function in `endpoints`."""
    signature = inspect.signature(endpoint)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    replies = get_args(signature.return_annotation)

    def decorate(method: Method) -> Method:
        reply = replies[-1] if replies else inspect.signature(method).return_annotation
        public = signature.replace(parameters=[own, *signature.parameters.values()], return_annotation=reply)
        decorated: Any = method
        decorated.__name__ = decorated.__qualname__ = endpoint.__name__
        decorated.__doc__ = endpoint.__doc__
        decorated.__signature__ = public
        return method

    return decorate
