"""Request bodies: read within limits, decompressed, and parsed as JSON, multipart or images."""

import json
import re
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import PurePath
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser

from ..concurrency import Pool, run_blocking
from ..errors import FieldProblem, InvalidImage, InvalidRequest, TooLarge
from ..schemas import MAX_IMAGES, ClassifyOptions, ImagesBody
from .base64_images import NamedImage, decode_base64, refuse_base64
from .problems import invalid_fields, invalid_request
from .request_heads import announces_body

JSON = "application/json"
FORM = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"  # curl's content type for -d and --data-binary
NO_BODY = "this route has no body; remove it"
MAX_CHANGE_BYTES = 64 * 1024  # body of a request that changes settings, aliases, keys or tenants
MAX_EMPTY_BYTES = 1024  # body of a request to a route without a body, which may be `{}` or `null`
MAX_JSON_VALUES = 10_000  # a parsed value takes tens of bytes, and an invalid one becomes an error
MAX_JSON_MEMBERS = 10_000  # a member costs ten times as much as a number; an unknown one becomes an error
INLINE_BYTES = 64 * 1024  # a body up to this size is parsed without a thread, which would cost more than the parsing
JSON_START_BYTES = 64  # of a body that are searched for `{`
PIECE_BYTES = 1024**2  # most decompressed bytes at once

CODINGS = ("gzip", "x-gzip", "deflate")  # RFC 9110, section 8.4.1; `x-gzip` is the old name of gzip
APPLE_DOUBLE = b"\x00\x05\x16\x07"  # RFC 1740: the start of a macOS file of metadata, `._cat.jpg` beside `cat.jpg`

Model = TypeVar("Model", bound=BaseModel)
Parsed = TypeVar("Parsed")
Option = TypeVar("Option")


@dataclass(frozen=True)
class ImageRequest:
    """Images and options of a classification's body.

    Attributes:
        skipped: number of AppleDouble files of a form. They are no images; macOS adds them to folders and archives.
    """

    images: Sequence[NamedImage]
    options: ClassifyOptions = dataclass_field(default_factory=ClassifyOptions)
    skipped: int = 0


class RequestBody:
    """Body of one authenticated request. After the upload it checks the caller's key again.

    An upload may take minutes. Without the second check a key that an admin revokes meanwhile would still work.
    """

    def __init__(self, request: Request, recheck_key: Callable[[], Awaitable[None]], pool: Pool) -> None:
        """
        Args:
            recheck_key: raises `Unauthenticated` if the caller's key has expired or was revoked.
            pool: threads of the caller's tenant, for large bodies.
        """
        self._request = request
        self._recheck_key = recheck_key
        self.pool = pool

    @property
    def content_type(self) -> str:
        """Media type in lower case, without parameters; "" if the client sent none."""
        return self._request.headers.get("content-type", "").partition(";")[0].strip().lower()

    def option(self, name: str, query: Option, own: Option | None) -> Option:
        """Return an option that the query or the body may set.

        Args:
            query: value of the query, or its default.
            own: value in the body; None if the body does not set it.

        Raises:
            InvalidRequest: both set the option.
        """
        if own is None:
            return query
        if name in self._request.query_params:
            raise InvalidRequest.at(name, "is set in the query and in the body; set it in one of them")
        return own

    async def read(self, limit_bytes: int, subject: str = "body") -> bytes:
        """Return the whole body, decompressed if it has a `Content-Encoding`.

        Args:
            limit_bytes: limit of the body both before and after decompression.
            subject: name of the body in the error.

        Raises:
            TooLarge: the body is over the limit; raised before the rest is read.
            InvalidRequest: the body is a form, or not one whole stream of its content coding; or the coding is unknown.
            Unauthenticated: the key has expired or was revoked during the upload.
        """
        return b"".join([chunk async for chunk in self.stream(limit_bytes, subject)])

    async def read_file(self, limit_bytes: int, subject: str = "body") -> bytes:
        """Return the whole body, which is a binary file. Raises the errors of `read`.

        Raises:
            InvalidRequest: `curl -d` has removed bytes of the file.
        """
        data = await self.read(limit_bytes, subject)
        self._refuse_text(data)
        return data

    def stream(self, limit_bytes: int | None = None, subject: str = "body") -> AsyncGenerator[bytes, None]:
        """Return the body in chunks, decompressed. Raises the errors of `read`; without a limit no `TooLarge`."""
        if self.content_type == FORM:
            raise InvalidRequest.at("body", "this route accepts no form; send the file or the JSON itself as the body")
        return self._decoded(limit_bytes, subject)

    async def parse(self, parser: Callable[[bytes], Parsed], body: bytes) -> Parsed:
        """Return what a parser makes of a body. A large body waits for the tenant's turn at a thread."""
        return parser(body) if len(body) <= INLINE_BYTES else await run_blocking(self.pool, parser, body)

    async def read_json(self, model: type[Model], limit_bytes: int = MAX_CHANGE_BYTES, default: bytes = b"") -> Model:
        """Return the body as a model. Raises the errors of `read` and of `parse_json`.

        Args:
            default: JSON in place of an empty body.

        Raises:
            InvalidRequest: an object has a member twice; the model would have the last value only.
        """
        body = await self.read(limit_bytes) or default
        _refuse_repeated_members(body)
        return parse_json(model, body)

    async def read_images(self, limit_bytes: int) -> ImageRequest:
        """Return the images of a classification: one as the whole body, several as multipart or JSON.

        Raises:
            InvalidRequest: the multipart body or the JSON is not valid, or has an unknown option.
            InvalidImage: not base64, or base64 or JSON without its content type.
            TooLarge, Unauthenticated: see `read`.
        """
        if self.content_type == JSON:
            return await self.parse(_images_of_json, await self.read(limit_bytes))
        if self.content_type == FORM:
            async with self.form(limit_bytes) as form:
                return await _images_of_form(form)
        return ImageRequest([await self.read_image(limit_bytes)])

    async def read_image(self, limit_bytes: int) -> NamedImage:
        """Return the body as one image file. Raises the errors of `read_images`."""
        body = await self.read(limit_bytes)
        if body[:JSON_START_BYTES].lstrip().startswith(b"{"):  # no image format starts like this
            raise InvalidImage.at("body", f"the body looks like JSON; send it with Content-Type: {JSON}")
        refuse_base64("body", body)
        self._refuse_text(body)
        return "body", body

    async def refuse_content(self) -> None:
        """Refuse a body. The route has none, so it would ignore the options in the body.

        Raises:
            InvalidRequest: the body has content other than `{}` or `null`, which some clients always send.
        """
        if not announces_body(self._request.scope["headers"]):
            return
        try:
            content = await self.read(MAX_EMPTY_BYTES)
        except TooLarge as error:
            raise InvalidRequest.at("body", NO_BODY) from error
        if content.strip() not in (b"", b"{}", b"null"):
            raise InvalidRequest.at("body", NO_BODY)

    def _refuse_text(self, data: bytes) -> None:
        if self.content_type == URLENCODED and data and b"\0" not in data:  # every image and adapter has zero bytes
            message = "is the text of a form, without the zero bytes of a file; send a file by curl --data-binary @FILE"
            raise InvalidRequest.at("body", message)

    def _decoded(self, limit_bytes: int | None, subject: str) -> AsyncGenerator[bytes, None]:
        """Return the body in chunks, decompressed."""
        coding = ", ".join(self._request.headers.getlist("content-encoding")).strip().lower()
        chunks = self._received(limit_bytes, subject)
        return chunks if coding in ("", "identity") else inflate(chunks, coding, limit_bytes, subject, self.pool)

    async def _received(self, limit_bytes: int | None, subject: str) -> AsyncGenerator[bytes, None]:
        """Yield the body in chunks as the client sent it, and check the key again."""
        declared = self._request.headers.get("content-length", "")
        if limit_bytes is not None and declared.isdecimal() and int(declared) > limit_bytes:
            raise _too_large(subject, limit_bytes)
        received = 0
        async for chunk in self._request.stream():
            received += len(chunk)
            if limit_bytes is not None and received > limit_bytes:
                raise _too_large(subject, limit_bytes)
            yield chunk
        await self._recheck_key()

    @asynccontextmanager
    async def form(self, limit_bytes: int) -> AsyncIterator[FormData]:
        """Parse the body as a form of at most 64 images. Raises the errors of `read_images`."""
        stream = self._decoded(limit_bytes, "body")
        # Twice the images: a form may have an AppleDouble file for each image.
        parser = MultiPartParser(self._request.headers, stream, max_files=2 * MAX_IMAGES, max_fields=MAX_IMAGES)
        # In memory: otherwise Starlette would write files to disk, in one pool of threads for all tenants.
        parser.spool_max_size = limit_bytes
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise InvalidRequest.at("body", f"{error.message.rstrip('.')}; send each image as a file") from error
        try:
            yield form
        finally:
            await form.close()


def _too_large(subject: str, limit_bytes: int) -> TooLarge:
    return TooLarge.at("body", f"the {subject} exceeds the limit of {limit_bytes} bytes")


def is_apple_double(filename: str | None, data: bytes) -> bool:
    """Return whether a file of a form is macOS's metadata of another file."""
    return data.startswith(APPLE_DOUBLE) and PurePath(filename or "").name.startswith("._")


async def _images_of_form(form: FormData) -> ImageRequest:
    """Return the files of a form as images, and its text fields as options.

    Raises:
        InvalidRequest: no image, or a text field that is not an option.
        InvalidImage: a file is base64 text.
    """
    texts: dict[str, list[str]] = {}
    images: list[NamedImage] = []
    skipped = 0
    for name, part in form.multi_items():
        if isinstance(part, str):
            texts.setdefault(name, []).append(part)
            continue
        data = await part.read()
        if is_apple_double(part.filename, data):
            skipped += 1
            continue
        refuse_base64(name, data)
        images.append((name, data))
    options = _options_of_form(texts)
    if not images:
        files = f"; {skipped} AppleDouble files (._NAME) are not images" if skipped else ""
        raise InvalidRequest.at("body", f"the form has no image; send each image as a file{files}")
    if len(images) > MAX_IMAGES:
        raise InvalidRequest.at("body", f"the form has {len(images)} images; send at most {MAX_IMAGES}")
    return ImageRequest(images, options, skipped)


def _options_of_form(texts: Mapping[str, Sequence[str]]) -> ClassifyOptions:
    """Return the options of a form's text fields, whose numbers are text.

    Raises:
        InvalidRequest: a field is not an option, occurs twice, or has an invalid value.
    """
    names = ", ".join(ClassifyOptions.model_fields)
    hint = f"is text, and the text fields of this form are {names}; send an image as a file: curl -F image=@FILE"
    problems = [FieldProblem(name, hint) for name in texts if name not in ClassifyOptions.model_fields]
    problems += [FieldProblem(name, f"is set {len(v)} times; set it once") for name, v in texts.items() if len(v) > 1]
    if problems:
        raise invalid_fields(problems)
    values: dict[str, Any] = {name: text for name, (text,) in texts.items()}
    if re.fullmatch("[0-9]{1,9}", values.get("top_k", "")):
        values["top_k"] = int(values["top_k"])
    if re.fullmatch(r"[0-9]{0,9}\.?[0-9]{1,9}", values.get("coverage", "")):
        values["coverage"] = float(values["coverage"])
    try:
        return ClassifyOptions.model_validate(values)
    except ValidationError as error:
        raise invalid_request(error.errors()) from error


def parse_json(model: type[Model], body: bytes, max_values: int = MAX_JSON_VALUES) -> Model:
    """Return a JSON body as a model.

    Raises:
        TooLarge: more than `max_values` values or `MAX_JSON_MEMBERS` members; parsing them would block other requests.
        InvalidRequest: the JSON does not match the model.
    """
    # Each count is an upper bound, since texts may have the same characters. No text of a request has thousands.
    if sum(map(body.count, (b",", b"[", b"{"))) > max_values:
        message = f"the JSON has more than {max_values} values; send images as bytes instead of numbers"
        raise TooLarge.at("body", message)
    if max(map(body.count, (b":", b"{"))) > MAX_JSON_MEMBERS:
        raise TooLarge.at("body", f"the JSON has more than {MAX_JSON_MEMBERS} members; send fewer")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error.errors(), members=sorted(model.model_fields)) from error


async def inflate(
    chunks: AsyncIterable[bytes],
    coding: str,
    limit_bytes: int | None,
    subject: str = "body",
    pool: Pool = None,
) -> AsyncGenerator[bytes, None]:
    """Yield a decompressed body in pieces of at most `PIECE_BYTES`. Decompression stops at the limit.

    Args:
        coding: value of `Content-Encoding`.
        limit_bytes: limit of all pieces; None: no limit.
        subject: name of the body in the error.
        pool: threads that decompress, in turns with those of other tenants; None: the event loop's default pool.

    Raises:
        InvalidRequest: unknown coding, or the body is not one whole stream of it.
        TooLarge: the decompressed body is over the limit.
    """
    if coding not in CODINGS:
        message = f"{coding!r} is not supported; send gzip, deflate or no compression"
        raise InvalidRequest.at("Content-Encoding", message)
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # accepts the headers of gzip and of zlib
    size = 0
    async for chunk in chunks:
        more = bool(chunk)
        while more:
            try:
                piece = await run_blocking(pool, inflater.decompress, chunk, PIECE_BYTES)
            except zlib.error as error:
                raise InvalidRequest.at("body", f"is not {coding}: {error}") from error
            size += len(piece)
            if limit_bytes is not None and size > limit_bytes:
                raise TooLarge.at("body", f"the decompressed {subject} exceeds the limit of {limit_bytes} bytes")
            if piece:
                yield piece
            chunk = inflater.unconsumed_tail
            more = bool(chunk) or len(piece) == PIECE_BYTES  # a full piece may have a rest inside of zlib
        if inflater.unused_data:
            break
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequest.at("body", f"is truncated, or has more than one {coding} stream")


def _images_of_json(body: bytes) -> ImageRequest:
    request = parse_json(ImagesBody, body)
    images = decode_base64([(f"images.{i}", text) for i, text in enumerate(request.images)])
    return ImageRequest(images, ClassifyOptions(top_k=request.top_k, version=request.version))


def _refuse_repeated_members(body: bytes) -> None:
    """Refuse an object that has a member twice.

    Raises:
        InvalidRequest: the error names the member.
    """

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                raise InvalidRequest.at(name, f"is set {count} times; set it once")
        return dict(pairs)

    with suppress(ValueError, RecursionError):  # the parser of the model reports these
        json.loads(body, object_pairs_hook=once)
