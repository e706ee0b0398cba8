"""Parsing, decoding and decompression of request bodies. `test_tasks` and `test_oip` cover reading over HTTP."""

import asyncio
import base64
import gzip
import textwrap
import zlib
from collections.abc import AsyncIterator, Callable

import pytest
from pydantic import BaseModel

from hub.api.base64_images import decode_base64, refuse_base64
from hub.api.bodies import PIECE_BYTES, inflate, parse_json
from hub.errors import InvalidImage, InvalidRequest, TooLarge


class Numbers(BaseModel):
    numbers: list[int]


def test_json_is_parsed_when_it_matches_the_model() -> None:
    assert parse_json(Numbers, b'{"numbers": [1, 2]}').numbers == [1, 2]


def test_json_gets_an_error_for_each_invalid_value() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(Numbers, b'{"numbers": [1, "a", "b"]}')
    assert [error.field for error in caught.value.errors] == ["numbers.1", "numbers.2"]
    assert caught.value.detail.startswith("numbers.1: ")


def test_text_that_is_not_json_gets_an_error_about_the_body() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(Numbers, b"{")
    assert [error.field for error in caught.value.errors] == ["body"]


def test_json_with_too_many_values_is_not_parsed() -> None:
    with pytest.raises(TooLarge, match="more than 2 values"):
        parse_json(Numbers, b"not json,,,", max_values=2)


@pytest.mark.parametrize("body", [b"[" * 11_000, b"{" * 11_000, b",[{" * 4_000])
def test_json_is_not_parsed_when_it_has_too_many_lists_or_objects(body: bytes) -> None:
    with pytest.raises(TooLarge, match="more than 10000 values"):
        parse_json(Numbers, body)


@pytest.mark.parametrize("body", [b"{" * 11_000, b'"":' * 11_000])
def test_json_is_not_parsed_when_it_has_too_many_members(body: bytes) -> None:
    with pytest.raises(TooLarge, match="more than 10000 members"):
        parse_json(Numbers, body, max_values=2**20)


def test_base64_is_decoded_with_and_without_the_header_of_a_data_url() -> None:
    text = base64.b64encode(b"image").decode()
    assert decode_base64([("a", text), ("b", f"data:image/png;base64,{text}")]) == [("a", b"image"), ("b", b"image")]


BYTES = bytes(range(256))[::-1]  # the two alphabets differ on these bytes


@pytest.mark.parametrize("count", [253, 254, 255, 256])
def test_base64_is_decoded_in_every_form_that_encoders_write(count: int) -> None:
    data = BYTES[:count]
    standard, url_safe = base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()
    assert "-" in url_safe
    wrapped = base64.encodebytes(data).decode()
    forms = [standard, url_safe, wrapped, wrapped.replace("\n", "\r\n"), f" {standard}\n", url_safe.rstrip("=")]
    forms += ["\n".join(textwrap.wrap(standard, 64)), f"data:image/png;base64,{url_safe}"]
    assert [found for _, found in decode_base64([("a", form) for form in forms])] == [data] * len(forms)


def test_base64_with_a_lost_plus_or_two_alphabets_is_refused() -> None:
    with pytest.raises(InvalidImage, match=r"a: .* decoding of a URL or a form turns \+ into a space"):
        decode_base64([("a", "ab cd")])
    with pytest.raises(InvalidImage, match="mixes the standard and the URL-safe alphabet"):
        decode_base64([("a", "a+-d")])


@pytest.mark.parametrize("start", ["89504e470d0a1a0a", "ffd8ff", "474946383961", "52494646", "49492a00", "4d4d002a"])
def test_base64_text_in_place_of_an_image_file_gets_a_hint(start: str) -> None:
    data = bytes.fromhex(start) + bytes(30)
    refuse_base64("body", data)
    with pytest.raises(InvalidImage, match="body: is base64 text of an image"):
        refuse_base64("body", base64.b64encode(data))


@pytest.mark.parametrize("text", ["?", "a", "\u00e4"])
def test_text_that_is_not_base64_gets_an_error_about_its_field(text: str) -> None:
    with pytest.raises(InvalidImage) as caught:
        decode_base64([("images.0", ""), ("images.1", text)])
    assert [error.field for error in caught.value.errors] == ["images.1"]


def inflated(body: bytes, coding: str, limit_bytes: int | None, chunk_bytes: int = 10**9) -> list[bytes]:
    """Return the pieces of a body that arrives in chunks."""

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), chunk_bytes):
            yield body[start : start + chunk_bytes]

    async def collect() -> list[bytes]:
        return [piece async for piece in inflate(chunks(), coding, limit_bytes)]

    return asyncio.run(collect())


CODINGS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("deflate", zlib.compress),
]


@pytest.mark.parametrize(("coding", "compress"), CODINGS)
def test_a_body_is_decompressed_up_to_the_limit(coding: str, compress: Callable[[bytes], bytes]) -> None:
    assert inflated(compress(b"x" * 100), coding, 100) == [b"x" * 100]
    with pytest.raises(TooLarge, match="exceeds the limit of 100 bytes"):
        inflated(compress(b"x" * 10**6), coding, 100)


@pytest.mark.parametrize("chunk_bytes", [100, 1000, 10**9])
@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
def test_a_decompressed_body_arrives_in_bounded_pieces(size: int, chunk_bytes: int) -> None:
    pieces = inflated(zlib.compress(bytes(size)), "deflate", None, chunk_bytes)
    assert sum(map(len, pieces)) == size
    assert max(map(len, pieces), default=0) <= PIECE_BYTES


@pytest.mark.parametrize("chunk_bytes", [1, 10**9])
def test_a_body_that_is_not_one_whole_stream_gets_an_error(chunk_bytes: int) -> None:
    whole = gzip.compress(b"x" * 100)
    for body, message in ((whole[:-1], "is truncated"), (whole * 2, "more than one gzip"), (b"xx", "is not gzip")):
        with pytest.raises(InvalidRequest, match=message):
            inflated(body, "gzip", 1000, chunk_bytes)
    with pytest.raises(InvalidRequest, match="'br' is not supported"):
        inflated(whole, "br", 1000)
