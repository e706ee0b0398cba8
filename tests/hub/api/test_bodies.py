"""Parsing, decoding and decompression of request bodies. `test_tasks` and `test_oip` cover reading over HTTP."""

import base64
import gzip
import zlib
from collections.abc import Callable

import pytest
from pydantic import BaseModel

from hub.api.bodies import decode_base64, inflate, parse_json
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


def test_base64_is_decoded_with_and_without_the_header_of_a_data_url() -> None:
    text = base64.b64encode(b"image").decode()
    assert decode_base64([("a", text), ("b", f"data:image/png;base64,{text}")]) == [("a", b"image"), ("b", b"image")]


@pytest.mark.parametrize("text", ["?", "a", "\u00e4"])
def test_text_that_is_not_base64_gets_an_error_about_its_field(text: str) -> None:
    with pytest.raises(InvalidImage) as caught:
        decode_base64([("images.0", ""), ("images.1", text)])
    assert [error.field for error in caught.value.errors] == ["images.1"]


@pytest.mark.parametrize(("coding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_body_is_decompressed_up_to_the_limit(coding: str, compress: Callable[[bytes], bytes]) -> None:
    assert inflate(compress(b"x" * 100), coding, 100) == b"x" * 100
    with pytest.raises(TooLarge, match="exceeds the limit of 100 bytes"):
        inflate(compress(b"x" * 10**6), coding, 100)
