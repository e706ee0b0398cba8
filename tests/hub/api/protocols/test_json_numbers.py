"""Numbers of large JSON bodies: equal to those of a parser of the whole body, and refused where it refuses them."""

import json
from typing import Any

import numpy as np
import pytest

from hub.api.protocols.json_numbers import JsonNumbers, split_numbers
from hub.errors import InvalidRequest, TooLarge

SHAPE = [4, 3, 100, 100]  # several pieces


def body_of(data: Any, **options: Any) -> bytes:
    return json.dumps({"inputs": [{"name": "pixels", "data": data, "shape": SHAPE}], "id": "x"}, **options).encode()


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("options", [{}, {"separators": (",", ":")}, {"indent": 1}])
@pytest.mark.parametrize("integers", [True, False])
def test_numbers_are_those_of_the_whole_body(flat: bool, options: dict[str, Any], integers: bool) -> None:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, SHAPE, np.uint8) if integers else draw.normal(size=SHAPE) * 10.0 ** draw.integers(9)
    body = body_of((pixels.ravel() if flat else pixels).tolist(), **options)
    rest, numbers = split_numbers(body, pixels.size)
    assert json.loads(rest) == {"inputs": [{"name": "pixels", "data": [], "shape": SHAPE}], "id": "x"}
    assert numbers is not None
    read = numbers.read("pixels", SHAPE, integers=integers)
    assert read.dtype == pixels.dtype
    assert (read == pixels.ravel()).all()
    with pytest.raises(TooLarge, match=f"more than {pixels.size - 1} values"):
        split_numbers(body, pixels.size - 1)


@pytest.mark.parametrize("body", [b"", b"[]", body_of(["text"]), body_of([{}]), body_of([1, {"a": 2}]), body_of("[1]")])
def test_body_is_unchanged_when_its_data_are_no_numbers(body: bytes) -> None:
    assert split_numbers(body, 10) == (body, None)


WRONG = {
    "1,2,3": "shape \\[2, 2\\] has 4 elements, but data has 3",
    "[1,2,3],[4]": "nesting of data does not match shape",
    "[1,2],[3,4],[5,6]": "nesting of data does not match shape",
    "[[1,2],[3,4]]": "nesting of data does not match shape",
    "[1,2],3,4": "nesting of data does not match shape",
    "1[,2],[3,4]": "is not JSON: data: a number beside a bracket",
    "[1,2],[3,4 5]": "is not JSON",
    "1,,3,4": "is not JSON",
    "1,2,3,": "is not JSON",
    "1,2,3,04": "is not JSON",
    "1,2,3,-": "is not JSON",
    "1,2,3,256": "UINT8 data must be integers from 0 to 255",
    "1,2,3,-1": "UINT8 data must be integers from 0 to 255",
    "1,2,3,4.0": "UINT8 data must be integers from 0 to 255",
    "1,2,3,true": "UINT8 data must be integers from 0 to 255",
    "1,2,3,null": "UINT8 data must be integers from 0 to 255",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=WRONG.keys())
def test_numbers_are_refused_when_they_do_not_match(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        JsonNumbers(text.encode()).read("pixels", [2, 2], integers=True)


def test_number_is_infinite_when_it_is_too_large_for_a_float() -> None:
    read = JsonNumbers(b"1," + b"9" * 400).read("pixels", [2], integers=False)
    assert not np.isfinite(read).any()
