"""What both Python clients share: a call as a value, and how a client is made. `Client` and `AsyncClient` send."""

import inspect
import os
import secrets
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, get_args

import httpx

from ..errors import HubError, InvalidRequest, Unauthenticated, Unavailable
from .image_encoding import portions
from .retries import error_of

Item = TypeVar("Item")
Part = TypeVar("Part")
Reply = TypeVar("Reply")
Method = TypeVar("Method", bound=Callable[..., Any])

CHUNK_BYTES = 1024**2  # of a file that is sent


@dataclass(frozen=True)
class Call(Generic[Reply]):
    """One HTTP request, and how its reply is read."""

    method: str
    path: str
    read: Callable[[bytes], Reply]
    params: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    images: Sequence[tuple[str, bytes]] = ()  # sent as a form: field, encoded image
    upload: Path | None = None  # a file that is the body
    to: Path | None = None  # the file that the reply is written to
    repeatable: bool = True  # twice does no more than once, and is answered in the same way
    first: int = 0  # index, among all of the caller's inputs, of the first in this call

    def options(self) -> dict[str, Any]:
        """Arguments of httpx's `stream`, but for the content."""
        headers = dict(self.headers)
        if self.upload is not None:
            headers["content-length"] = str(self.upload.stat().st_size)
        files = [(name, (name, data, "application/octet-stream")) for name, data in self.images]
        return {
            "method": self.method,
            "url": self.path,
            "params": self.params,
            "headers": headers,
            "files": files or None,
        }


@dataclass(frozen=True)
class Many(Generic[Item, Part, Reply]):
    """What may be more than one call takes: calls of one kind, whose replies are put together.

    The first call goes alone, so that the others can ask for the version that it met.
    """

    items: Iterable[tuple[Item, int]]  # with their bytes
    call: Callable[[int, Sequence[Item], Part | None], Call[Part]]  # index of the first, items, the first call's reply
    join: Callable[[Sequence[Part]], Reply]
    total: int | None  # None: not known before the end
    progress: bool

    def calls(self, most_bytes: int, answered: Sequence[Part]) -> Iterator[tuple[Call[Part], int]]:
        """The calls, made as they are asked for, and how many items each has.

        Args:
            answered: the replies so far; the first is there before a second call is asked for.
        """
        for start, items in portions(self.items, most_bytes):
            yield self.call(start, items, answered[0] if answered else None), len(items)

    @contextmanager
    def bar(self) -> Iterator[Callable[[int], None]]:
        """A progress bar on stderr, if wanted; yields what notes that so many items are answered."""
        if not self.progress:
            yield lambda _items: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=self.total)
            yield lambda items: progress.advance(task, items)


class Base:
    """What a client is made with."""

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
            url: where the hub is.
            key: an API key.
            timeout_s: for connecting, and for each wait for bytes.
            retry_s: no call is tried again later than this after its start; 0: never.
            in_flight: calls at once for one `classify` with many images.
            call_bytes: most bytes of images in one call; a hub takes four times its `HUB_MAX_IMAGE_BYTES`.
            tls: the certificates to trust; None: the public ones, or those that SSL_CERT_FILE names.
            on_response: sees every response, such as its `Server-Timing` header, before it is read.

        Raises:
            Unauthenticated: what no hub has as a key.
            InvalidRequest: the URL is none, or not one of HTTP.
        """
        if not url.lower().startswith(("http://", "https://")):
            raise InvalidRequest(f"the hub's URL (HUB_URL) needs http:// or https:// at its start; {url!r} has neither")
        key = key.strip()
        if not (key and key.isascii() and key.isprintable()):
            raise Unauthenticated("the key is empty or has characters that no key of a hub has")
        self._url = url
        self._retry_s = retry_s
        self._in_flight = in_flight
        self._call_bytes = call_bytes
        try:
            self._connect(
                on_response,
                base_url=url,
                timeout=timeout_s,
                headers={"authorization": f"Bearer {key}"},
                limits=httpx.Limits(max_connections=100, max_keepalive_connections=100),
                verify=tls if tls is not None else True,
            )
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"{url!r} is no URL: {error}") from error

    def _connect(self, on_response: Callable[[httpx.Response], None] | None, **options: Any) -> None:
        """Make httpx's client."""
        raise NotImplementedError

    def _answer(self, call: Call[Reply], response: httpx.Response) -> Reply:
        """Read a response that has arrived whole.

        Raises:
            HubError: the kind that the hub answered with.
        """
        if not response.is_success:
            raise error_of(response, call.first)
        try:
            return call.read(response.content)
        except ValueError as error:
            raise HubError(f"what answers at {self._url} is no hub: {response.text[:80]!r}") from error

    def _ended(self) -> RuntimeError:
        """Why a closed client sends nothing; httpx's own words would name a client that the caller never made."""
        kind = type(self).__name__
        return RuntimeError(
            f"this {kind} is closed: make a new one, and close it (or leave its `with`) after the last call"
        )

    def _lost(self, error: httpx.RequestError) -> Unavailable:
        return Unavailable(f"no hub answers at {self._url}: {_reason(error)}", retry_after_s=None)


def bare(error: httpx.RequestError) -> httpx.RequestError:
    """The error as a cause: its kind, which decides whether to try again, without sixty lines of httpx's frames."""
    return type(error)(_reason(error))


def _reason(error: httpx.RequestError) -> str:
    """Why no answer came, in the same words for both clients; asyncio hides the system's words behind its own."""
    if isinstance(error, httpx.TimeoutException):
        return "timed out"
    last: BaseException = error
    while below := last.__cause__ or last.__context__:
        last = below.exceptions[0] if isinstance(below, BaseExceptionGroup) else below  # one for each address
    if isinstance(last, OSError) and last.errno is not None and "Connect call failed" in str(last):
        return f"[Errno {last.errno}] {os.strerror(last.errno)}"
    return str(error) or type(error).__name__


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which appears at `path` when all of it is there."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def described_by(describe: Callable[..., Any]) -> Callable[[Method], Method]:
    """Gives a client's method the name, parameters and words of the function that describes its call."""
    signature = inspect.signature(describe)
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    shown = signature.replace(
        parameters=[me, *signature.parameters.values()],
        return_annotation=get_args(signature.return_annotation)[-1],
    )

    def dress(method: Method) -> Method:
        dressed: Any = method
        dressed.__name__ = dressed.__qualname__ = describe.__name__
        dressed.__doc__ = describe.__doc__
        dressed.__signature__ = shown
        return method

    return dress
