"""Strict parser for the header of a safetensors file: sizes, duplicate keys, dtypes."""

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

from ..short_repr import short_repr
from .errors import AdapterError, Problem, enough, file_error

MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_HEADER_VALUES = 150_000  # a parsed value takes up to 30 times the memory of its text; 10,000 tensors have 110,000
MAX_TENSORS = 10_000
DTYPES = ("F32", "F16", "BF16")
_METADATA_FIRST = '{"__metadata__":'


@dataclass(frozen=True)
class RawHeader:
    """A header's text, split where safetensors writes it: metadata first, then the tensors.

    Attributes:
        text: the whole header.
        data_start: offset of the tensors' bytes in the file.
        metadata: the decoded metadata; None where the header is not as safetensors writes it.
        tensors_text: the text after the metadata, without padding; None with `metadata`.
    """

    text: str
    data_start: int
    metadata: dict[str, str] | None
    tensors_text: str | None

    __repr__ = short_repr


@dataclass(frozen=True)
class Header:
    """A parsed header: the metadata, and the names of the tensors in the order of their bytes."""

    metadata: dict[str, str]
    names: tuple[str, ...]


def read_header(data: bytes, max_tensors: int = MAX_TENSORS) -> RawHeader:
    """Return the header's text after checks of its length, without parsing the tensors' entries.

    Args:
        max_tensors: limit of the number of tensors, which are counted without parsing.

    Raises:
        AdapterError: the file is too short, the header is too long, has too many tensors or values, or is not UTF-8.
    """
    if len(data) < 8:
        raise file_error(f"not a safetensors file: {len(data)} bytes are too few for its header")
    length = struct.unpack("<Q", data[:8])[0]
    if length > MAX_HEADER_BYTES and data.startswith((b"PK\3\4", b"\x80")):
        raise file_error(
            "not a safetensors file, but a pickle or zip such as PyTorch's .pth, which is not loaded, since it can run "
            "code; convert an adapter with `karst-hub convert`"
        )
    if length > MAX_HEADER_BYTES:
        raise file_error(
            f"not a safetensors file, or its header is too long: the header claims {length} bytes, "
            f"at most {MAX_HEADER_BYTES} are allowed"
        )
    start = 8 + length
    if start > len(data):
        raise file_error(
            f"truncated: the header claims {length} bytes, but only {len(data) - 8} follow its length; "
            "copy or upload the file again"
        )
    if sum(data.count(mark, 8, start) for mark in (b",", b"[", b"{")) > MAX_HEADER_VALUES:
        raise file_error(f"its header has too many values; at most {MAX_HEADER_VALUES} are allowed")
    # Each tensor has this member. Its name with escapes is not counted here; `parse_header` counts the tensors again.
    if (tensors := data.count(b'"data_offsets"', 8, start)) > max_tensors:
        raise _too_many(tensors, max_tensors)
    try:
        text = data[8:start].decode()
    except UnicodeDecodeError as error:
        raise _not_json(error) from error
    return RawHeader(text, start, *_split(text))


def parse_header(raw: RawHeader, file_bytes: int, max_tensors: int = MAX_TENSORS) -> Header:
    """Parse the whole header, and check duplicates, dtypes and truncation, which safetensors does not.

    Args:
        file_bytes: length of the whole file.
        max_tensors: limit of the number of tensors.

    Raises:
        AdapterError: names each wrong tensor or field.
    """
    try:
        header = load_json(raw.text)
    except (ValueError, RecursionError) as error:
        raise _not_json(error) from error
    if not isinstance(header, dict):
        raise file_error("not a safetensors file: its header must be a JSON object")
    metadata = header.pop("__metadata__", {})
    if len(header) > max_tensors:
        raise _too_many(len(header), max_tensors)
    problems: list[Problem] = []
    for name, entry in header.items():
        if enough(problems):
            break
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtype not in DTYPES:
            problems.append(
                Problem(name, f"has dtype {dtype}, expected one of {', '.join(DTYPES)}; convert the tensor")
            )
    if problems:
        raise AdapterError(problems)
    ends = {name: e["data_offsets"][1] for name, e in header.items() if _has_offsets(e)}
    needed = raw.data_start + max(ends.values(), default=0)
    if ends and needed > file_bytes:
        raise file_error(
            f"truncated: its tensors need {needed} bytes, but the file has {file_bytes}; copy or upload the file again"
        )
    if not _are_strings(metadata):
        raise AdapterError([Problem("__metadata__", "must be a JSON object whose values are all strings")])
    return Header(metadata, tuple(sorted(ends, key=ends.__getitem__)))


def load_json(text: str) -> Any:
    """Parse JSON that can be written as JSON again: no duplicate key, NaN, float overflow or lone surrogate.

    Raises:
        ValueError: the text is not such JSON.
        RecursionError: the text is nested too deep.
    """
    value = _DECODER.decode(text)
    _check_encodable(value, text)
    return value


def _too_many(tensors: int, max_tensors: int) -> AdapterError:
    return file_error(f"has {tensors} tensors, but at most {max_tensors} are allowed; remove those of no layer")


def _not_json(error: Exception) -> AdapterError:
    return file_error(f"not a safetensors file: its header is not valid JSON ({error})")


def _split(text: str) -> tuple[dict[str, str] | None, str | None]:
    """Return the metadata and the text after it; None twice where the header is not as safetensors writes it."""
    if not text.startswith(_METADATA_FIRST):
        return None, None
    try:
        metadata, end = _DECODER.raw_decode(text, len(_METADATA_FIRST))
        _check_encodable(metadata, text)
    except (ValueError, RecursionError):  # `parse_header` reports it
        return None, None
    return (metadata, text[end:].rstrip(" ")) if _are_strings(metadata) else (None, None)


def _are_strings(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _check_encodable(value: Any, text: str) -> None:
    """Raise ValueError for a lone surrogate: UTF-8 cannot encode it, so no error message could quote it."""
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
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} appears twice")
            seen.add(key)
    return out


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_finite, parse_float=_finite)
