"""Numbers of a large JSON body, parsed in pieces.

A parser of a whole body holds Python's interpreter lock until it ends, for 0.1 s with a million numbers, and every
other request of the gateway waits. So the numbers are cut out of the body, and each piece of them is parsed alone.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import InvalidRequest, TooLarge

PIECE_BYTES = 64 * 1024  # less than a millisecond of parsing
_START = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*\[')
_MARKS = b"[],"  # what the numbers of a list leave
_WITHOUT_MARKS = bytes(set(range(256)) - set(_MARKS))
_MISPLACED = re.compile(rb"[0-9.][ \t\r\n]*\[|\][ \t\r\n]*[0-9.-]")


@dataclass(frozen=True)
class JsonNumbers:
    """The text of a list of numbers, flat or nested, without its outer brackets; not yet checked."""

    text: bytes

    def read(self, name: str, shape: Sequence[int], *, integers: bool) -> np.ndarray:
        """Return the numbers, flat: uint8 for integers, which are from 0 to 255, else float64.

        Args:
            name: name of the tensor for errors.

        Raises:
            InvalidRequest: the text is not numbers of this kind, or does not match the shape.
        """
        marks = self.text.translate(None, _WITHOUT_MARKS)
        count = math.prod(shape)
        if b"[" in marks or b"]" in marks:
            if count > len(marks) + 1 or marks != _nested(shape)[1:-1]:
                raise InvalidRequest.at(name, f"nesting of data does not match shape {[*shape]}")
        elif len(marks) + 1 != count:
            raise InvalidRequest.at(name, f"shape {[*shape]} has {count} elements, but data has {len(marks) + 1}")
        return np.concatenate([_parsed(name, piece, integers=integers) for piece in self._pieces()])

    def _pieces(self) -> Iterator[bytes]:
        """Yield the text in pieces that end at commas."""
        start = 0
        while start < len(self.text):
            end = self.text.find(b",", start + PIECE_BYTES)
            end = len(self.text) if end < 0 else end
            yield self.text[start:end]
            start = end + 1


def split_numbers(body: bytes, max_values: int) -> tuple[bytes, JsonNumbers | None]:
    """Return a JSON body with an empty list in place of the first list `data`, and the numbers of that list.

    The body is returned unchanged, with None, if it has no such list, or one that has anything but numbers.

    Raises:
        TooLarge: the list has more than `max_values` numbers.
    """
    found = _START.search(body)
    if found is None:
        return body, None
    start = found.end()
    ends = [at for at in (body.find(mark, start) for mark in (b'"', b"}")) if at >= 0]
    end = body.rfind(b"]", start, min(ends, default=len(body)))
    if end < 0 or body.find(b"{", start, end) >= 0:
        return body, None
    if body.count(b",", start, end) >= max_values:
        message = f"the JSON has more than {max_values} values; send images as bytes instead of numbers"
        raise TooLarge.at("body", message)
    return body[:start] + body[end:], JsonNumbers(body[start:end])


def _nested(shape: Sequence[int]) -> bytes:
    """Return the marks of a nested list of this shape."""
    marks = b""
    for size in reversed(shape):
        marks = b"[" + b",".join([marks] * size) + b"]"
    return marks


def _parsed(name: str, piece: bytes, *, integers: bool) -> np.ndarray:
    try:
        if _MISPLACED.search(piece):
            raise ValueError("a number beside a bracket")
        numbers = json.loads(b"[" + piece.translate(None, b"[]") + b"]")
    except ValueError as error:
        raise InvalidRequest.at("body", f"is not JSON: data: {error}") from error
    return array_of(name, numbers, integers=integers)


def array_of(name: str, numbers: list[Any], *, integers: bool) -> np.ndarray:
    """Return parsed numbers: uint8 for integers, which are from 0 to 255, else float64.

    Raises:
        InvalidRequest: an element is no number of this kind.
    """
    kinds = set(map(type, numbers))
    if integers:
        if kinds != {int} or min(numbers) < 0 or max(numbers) > 255:
            raise InvalidRequest.at(name, "UINT8 data must be integers from 0 to 255")
        return np.array(numbers, np.uint8)
    if not kinds <= {int, float}:
        raise InvalidRequest.at(name, "FP32 data must be numbers")
    try:
        return np.array(numbers, np.float64)
    except OverflowError:  # an integer too large for a float
        return np.full(len(numbers), math.inf)
