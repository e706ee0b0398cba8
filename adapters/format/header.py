"""The header of a safetensors file: read with suspicion, and known again.

Adapters of one shape differ in their metadata and their numbers only. So what follows from how the tensors lie in a
file, their `Layout`, is found out once: whether they are what a `karst/1` file may have (`file.py`), whether they fit
a backbone (`bank.py`), and where each number goes in a bank's row (`stacks.py`).
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import AdapterError, Problem, file_error

K = TypeVar("K")
V = TypeVar("V")

MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_HEADER_VALUES = 150_000  # parsed, one takes up to thirty times its text; 10,000 tensors have 110,000
MAX_TENSORS = 10_000
DTYPES = ("F32", "F16", "BF16")
MOST_LAYOUTS, LONGEST_LAYOUT = 32, 128 * 1024  # that are known again, and of what length
_FIRST = '{"__metadata__":'


@dataclass(frozen=True, eq=False)
class Layout:
    """How tensors lie in a file: one object for all files that have them so."""

    tensors: Mapping[str, tuple[int, ...]]  # name -> shape, in the order of their bytes
    dtype: torch.dtype | None  # of all of them; None where they differ
    data_bytes: int
    right_with: list[object] = field(default_factory=list)  # what else made them right, in the file before (`file.py`)


@dataclass(frozen=True)
class Header:
    """What comes before the numbers."""

    metadata: dict[str, str]
    start: int  # where the tensors' bytes begin
    layout: Layout | None  # if a file with this one was found to be right before
    _names: tuple[str, ...] = ()  # of the tensors, in the order of their bytes
    _text: str | None = None  # that says how they lie

    def learn(self, tensors: Mapping[str, Tensor], data_bytes: int) -> Layout:
        """The layout of tensors that are right; it will be known again."""
        if self.layout is not None:
            return self.layout
        shapes = {name: tuple(tensors[name].shape) for name in self._names}
        dtypes = {tensor.dtype for tensor in tensors.values()}
        layout = Layout(shapes, dtypes.pop() if len(dtypes) == 1 else None, data_bytes)
        if self._text is not None and len(self._text) <= LONGEST_LAYOUT:
            keep(_layouts, self._text, layout, MOST_LAYOUTS)
        return layout


_layouts: dict[str, Layout] = {}


def keep(known: dict[K, V], key: K, value: V, most: int) -> None:
    """Add to what is known, which then forgets the oldest; any thread may."""
    known[key] = value
    for oldest in list(known)[:-most]:
        known.pop(oldest, None)


def read_header(data: bytes) -> Header:
    """The header of a safetensors file, after what its own parser leaves open: sizes, duplicates, dtypes.

    Raises:
        AdapterError: names what is wrong.
    """
    if len(data) < 8:
        raise file_error(f"not a safetensors file: {len(data)} bytes are too few for its header")
    length = struct.unpack("<Q", data[:8])[0]
    if length > MAX_HEADER_BYTES:
        raise file_error(
            f"not a safetensors file, or its header is too long: it claims {length} bytes, "
            f"at most {MAX_HEADER_BYTES} are allowed"
        )
    if 8 + length > len(data):
        raise file_error(f"truncated: the header claims {length} bytes, the file has {len(data) - 8} after its length")
    if sum(data.count(mark, 8, 8 + length) for mark in (b",", b"[", b"{")) > MAX_HEADER_VALUES:
        raise file_error(f"its header has more than {MAX_HEADER_VALUES} values")
    start = 8 + length
    try:
        text = data[8:start].decode()
        metadata, rest = _split(text)
        layout = None if rest is None else _layouts.get(rest)
        if layout is not None and len(data) == start + layout.data_bytes and _are_strings(metadata):
            return Header(metadata, start, layout)
        header = load_json(text)
    except (ValueError, RecursionError) as error:
        raise file_error(f"not a safetensors file: its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise file_error("not a safetensors file: its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise file_error(f"{len(header)} tensors, but at most {MAX_TENSORS} are allowed")
    problems = []
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtype not in DTYPES:
            problems.append(Problem(name, f"dtype {dtype} is not one of {', '.join(DTYPES)}"))
    if problems:
        raise AdapterError(problems)
    ends = {name: e["data_offsets"][1] for name, e in header.items() if _has_offsets(e)}
    if ends and start + max(ends.values()) > len(data):
        needed = start + max(ends.values())
        raise file_error(f"truncated: its tensors need {needed} bytes, but the file has {len(data)}")
    if not _are_strings(metadata):
        raise AdapterError([Problem("__metadata__", "must be an object of strings")])
    return Header(metadata, start, None, tuple(sorted(ends, key=ends.__getitem__)), rest)


def _split(text: str) -> tuple[Any, str | None]:
    """A header's metadata, and the text after it without its padding; None where it is not as safetensors writes it."""
    if not text.startswith(_FIRST):
        return None, None
    try:
        metadata, end = _DECODER.raw_decode(text, len(_FIRST))
        _encodable(metadata, text)
    except (ValueError, RecursionError):  # something else is wrong, or it has spaces here
        return None, None
    return metadata, text[end:].rstrip(" ")


def _are_strings(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def load_json(text: str) -> Any:
    """JSON that can be sent on as JSON: no key twice, no NaN, no number beyond a float, no half of a surrogate pair.

    Raises:
        ValueError, RecursionError: anything else.
    """
    value = _DECODER.decode(text)
    _encodable(value, text)
    return value


def _encodable(value: Any, text: str) -> None:
    """Raises ValueError for half of a surrogate pair, which UTF-8 alone does not have."""
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a JSON number that fits a float")
    return number


def _has_offsets(entry: dict[str, Any]) -> bool:
    offsets = entry.get("data_offsets")
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} stands twice")
    return out


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_finite, parse_float=_finite)
