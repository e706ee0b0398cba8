"""Request bodies: read within limits, decompressed, and parsed as JSON, multipart or images."""

import base64
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.formparsers import MultiPartException, MultiPartParser

from ..errors import InvalidImage, InvalidRequest, TooLarge
from ..schemas import MAX_IMAGES, ImagesBody
from .problems import invalid_request

JSON = "application/json"
FORM = "multipart/form-data"
MAX_CHANGE_BYTES = 64 * 1024  # body of a request that changes settings, aliases, keys or tenants
MAX_JSON_VALUES = 10_000  # a parsed value takes tens of bytes, and an invalid one becomes an error
JSON_START_BYTES = 64  # of a body that are searched for `{`

Model = TypeVar("Model", bound=BaseModel)
NamedImage = tuple[str, bytes]  # field name for errors, encoded image


class RequestBody:
    """Body of one authenticated request. After the upload it checks the caller's key again.

    An upload may take minutes. Without the second check a key that an admin revokes meanwhile would still work.
    """

    def __init__(self, request: Request, recheck_key: Callable[[], Awaitable[None]]) -> None:
        """
        Args:
            recheck_key: raises `Unauthenticated` if the caller's key has expired or was revoked.
        """
        self._request = request
        self._recheck_key = recheck_key

    @property
    def content_type(self) -> str:
        """Media type in lower case, without parameters; "" if the client sent none."""
        return self._request.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def read(self, limit_bytes: int, subject: str = "body") -> bytes:
        """Return the whole body.

        Args:
            subject: name of the body in the error.

        Raises:
            TooLarge: the body is over the limit; raised before the rest is read.
            Unauthenticated: the key has expired or was revoked during the upload.
        """
        return b"".join([chunk async for chunk in self.stream(limit_bytes, subject)])

    async def stream(self, limit_bytes: int, subject: str = "body") -> AsyncGenerator[bytes, None]:
        """Yield the body in chunks. Raises the errors of `read`."""
        error = TooLarge.at("body", f"the {subject} exceeds the limit of {limit_bytes} bytes")
        declared = self._request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit_bytes:
            raise error
        received = 0
        async for chunk in self._request.stream():
            received += len(chunk)
            if received > limit_bytes:
                raise error
            yield chunk
        await self._recheck_key()

    async def read_json(self, model: type[Model], limit_bytes: int = MAX_CHANGE_BYTES) -> Model:
        """Return the body as a model. Raises the errors of `read` and of `parse_json`."""
        return parse_json(model, await self.read(limit_bytes))

    async def read_decompressed(self, limit_bytes: int) -> bytes:
        """Return the whole body, decompressed if it has a `Content-Encoding`.

        Raises the errors of `read` and of `inflate`.

        Args:
            limit_bytes: limit of the body both before and after decompression.
        """
        body = await self.read(limit_bytes)
        coding = self._request.headers.get("content-encoding", "identity").strip().lower()
        return body if coding == "identity" else await run_in_threadpool(inflate, body, coding, limit_bytes)

    async def read_images(self, limit_bytes: int) -> list[NamedImage]:
        """Return the images of a classification: one as the whole body, several as multipart or JSON.

        Raises:
            InvalidRequest: the multipart body or the JSON is not valid.
            InvalidImage: not base64, or JSON without its content type.
            TooLarge, Unauthenticated: see `read`.
        """
        if self.content_type == JSON:
            return await run_in_threadpool(_images_of_json, await self.read(limit_bytes))
        if self.content_type == FORM:
            return await self._read_form(limit_bytes)
        body = await self.read(limit_bytes)
        if body[:JSON_START_BYTES].lstrip().startswith(b"{"):  # no image format starts like this
            raise InvalidImage.at("body", f"the body looks like JSON; send it with Content-Type: {JSON}")
        return [("body", body)]

    async def _read_form(self, limit_bytes: int) -> list[NamedImage]:
        stream = self.stream(limit_bytes)
        parser = MultiPartParser(self._request.headers, stream, max_files=MAX_IMAGES, max_fields=MAX_IMAGES)
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise InvalidRequest.at("body", error.message) from error
        try:
            images = [(name, await part.read()) for name, part in form.multi_items() if not isinstance(part, str)]
        finally:
            await form.close()
        if not images:
            raise InvalidRequest.at("body", "the form has no file part; send each image as a file")
        return images


def parse_json(model: type[Model], body: bytes, max_values: int = MAX_JSON_VALUES) -> Model:
    """Return a JSON body as a model.

    Raises:
        TooLarge: more than `max_values` values; parsing them would block other requests.
        InvalidRequest: the JSON does not match the model.
    """
    if body.count(b",") > max_values:
        message = f"the JSON has more than {max_values} values; send images as bytes instead of numbers"
        raise TooLarge.at("body", message)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error.errors()) from error


def decode_base64(images: Sequence[tuple[str, str]]) -> list[NamedImage]:
    """Return base64 texts as bytes. The header of a `data:` URL is skipped.

    Raises:
        InvalidImage: a text is not base64; the error names its field.
    """
    decoded = []
    for field, text in images:
        encoded = text.partition(",")[2] if text.startswith("data:") else text
        try:
            decoded.append((field, base64.b64decode(encoded, validate=True)))
        except ValueError as error:  # binascii.Error, or a character outside of ASCII
            raise InvalidImage.at(field, f"not base64 (RFC 4648, section 4): {error}") from error
    return decoded


def inflate(body: bytes, coding: str, limit_bytes: int) -> bytes:
    """Return a decompressed body. Decompression stops at the limit.

    Raises:
        InvalidRequest: unknown coding, or the body is not one whole stream of it.
        TooLarge: the decompressed body is over the limit.
    """
    if coding not in ("gzip", "deflate"):
        message = f"{coding!r} is not supported; send gzip, deflate or no compression"
        raise InvalidRequest.at("Content-Encoding", message)
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # accepts the headers of gzip and of zlib
    try:
        plain = inflater.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise InvalidRequest.at("body", f"is not {coding}: {error}") from error
    if len(plain) > limit_bytes:
        raise TooLarge.at("body", f"the decompressed body exceeds the limit of {limit_bytes} bytes")
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequest.at("body", f"is truncated, or has more than one {coding} stream")
    return plain


def _images_of_json(body: bytes) -> list[NamedImage]:
    images = parse_json(ImagesBody, body).images
    return decode_base64([(f"images.{i}", text) for i, text in enumerate(images)])
