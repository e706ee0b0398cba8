"""Seeded mutations of adapter files: bits, bytes, lengths, and the JSON of the header."""

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

Random = np.random.Generator
Mutation = Callable[[Random, bytes], bytes]

ODD_NUMBERS = [0, -1, 1, 2, 3, 255, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e300, 1e-300]
ODD_VALUES: list[Any] = [None, True, False, "", "x", "\ud800", "é" * 300, [], {}, [[]], {"a": {}}, "0" * 5000]
ODD_TEXTS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0",
    "01",
    "[" * 2000 + "]" * 2000,
    '{"a":' * 500 + "1" + "}" * 500,
]
DTYPES = ["F64", "F32", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "C64", "f32", "F128", "", None, 4]
NAMES = ["head.weight", "head.bias", "__metadata__", "", ".", "a", "blocks.0.attn.qkv.karst_c", "x" * 5000, "\0"]
ODD_BYTES = [0, 1, 127, 128, 255, *b'",:[]{}\\']
NUMBERS = [b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\x01\x00\x00\x00"]


def mutated(files: list[bytes], seed: int, index: int) -> bytes:
    """Return file `index` of a seed: one of the files with one to five mutations."""
    random = np.random.default_rng([seed, index])
    data = files[random.integers(len(files))]
    for _ in range(random.choice([1, 1, 1, 2, 3, 5])):
        data = MUTATIONS[random.integers(len(MUTATIONS))](random, data)
    return data


# Bytes


def flip_bits(random: Random, data: bytes) -> bytes:
    out = np.frombuffer(data, np.uint8).copy()
    if out.size:
        at = random.integers(0, _reach(random, len(data)), random.integers(1, 9))
        out[at] ^= (1 << random.integers(0, 8, len(at))).astype(np.uint8)
    return out.tobytes()


def put_bytes(random: Random, data: bytes) -> bytes:
    out = np.frombuffer(data, np.uint8).copy()
    if out.size:
        out[random.integers(0, _reach(random, len(data)), 3)] = random.choice(ODD_BYTES)
    return out.tobytes()


def truncate(random: Random, data: bytes) -> bytes:
    return data[: random.integers(0, len(data) + 1)]


def cut(random: Random, data: bytes) -> bytes:
    start, end = sorted(random.integers(0, len(data) + 1, 2))
    return data[:start] + data[min(end, start + random.integers(1, 64)) :]


def append(random: Random, data: bytes) -> bytes:
    return data + random.bytes(int(random.integers(1, 64)))


def repeat(random: Random, data: bytes) -> bytes:
    start, end = sorted(random.integers(0, len(data) + 1, 2))
    return data[:end] + data[start:]


def falsify_header_length(random: Random, data: bytes) -> bytes:
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    lengths = [
        0,
        1,
        7,
        length - 1,
        length + 1,
        length + 8,
        len(data),
        len(data) - 8,
        2**22,
        2**22 + 1,
        2**31,
        2**63,
        2**64 - 1,
    ]
    return struct.pack("<Q", max(0, lengths[random.integers(len(lengths))]) % 2**64) + data[8:]


def put_numbers(random: Random, data: bytes) -> bytes:
    """Write NaN, infinity or another edge value over a number after the header."""
    header, payload = _split(data)
    if len(payload) < 4:
        return data
    at = random.integers(0, len(payload) // 4) * 4
    return data[: 8 + len(header)] + payload[:at] + NUMBERS[random.integers(len(NUMBERS))] + payload[at + 4 :]


# The header


def change_json(random: Random, data: bytes) -> bytes:
    """Replace, remove or add a value anywhere in the header."""
    return _edited(data, lambda header: _change(random, header))


def change_entry(random: Random, data: bytes) -> bytes:
    """Change a tensor's dtype, shape or offsets: wrong, huge, overlapping, or another tensor's."""

    def edit(header: Any) -> None:
        names = [name for name, entry in header.items() if isinstance(entry, dict) and name != "__metadata__"]
        if not names:
            return
        entry, other = (header[names[random.integers(len(names))]] for _ in range(2))
        match random.integers(6):
            case 0:
                entry["dtype"] = DTYPES[random.integers(len(DTYPES))]
            case 1:
                entry["shape"] = [_number(random) for _ in range(random.integers(0, 6))]
            case 2:
                entry["data_offsets"] = [_number(random) for _ in range(random.integers(0, 4))]
            case 3:
                entry["data_offsets"] = other.get("data_offsets")
            case 4:
                entry["shape"] = other.get("shape")
            case _:
                header[NAMES[random.integers(len(NAMES))]] = dict(entry)

    return _edited(data, edit)


def change_metadata(random: Random, data: bytes) -> bytes:
    """Change a value inside the metadata's JSON strings: config, labels, preprocess, metrics."""

    def edit(header: Any) -> None:
        metadata = header.get("__metadata__")
        if not isinstance(metadata, dict) or not metadata:
            return
        name = sorted(metadata)[random.integers(len(metadata))]
        try:
            inner = json.loads(metadata[name])
        except (ValueError, TypeError, RecursionError):
            metadata[name] = _value(random)
            return
        if isinstance(inner, dict | list) and random.random() < 0.9:
            _change(random, inner)
        else:
            inner = _value(random)
        metadata[name] = json.dumps(inner)

    return _edited(data, edit)


def put_text(random: Random, data: bytes) -> bytes:
    """Insert text into the header: duplicate keys, deep nesting, invalid numbers."""
    header, payload = _split(data)
    marks = [i for i, byte in enumerate(header) if byte in b",:{["]
    if not marks:
        return data
    at = marks[random.integers(len(marks))] + 1
    texts = [*ODD_TEXTS, '"head.bias":{"dtype":"F32"},', '"dtype":"F32",', '"x":1,', ",", "\x00", "\ufeff", "/**/"]
    text = texts[random.integers(len(texts))].encode()
    return _joined(header[:at] + text + header[at:], payload)


MUTATIONS: list[Mutation] = [
    flip_bits,
    put_bytes,
    truncate,
    cut,
    append,
    repeat,
    falsify_header_length,
    put_numbers,
    change_json,
    change_json,
    change_entry,
    change_entry,
    change_metadata,
    change_metadata,
    put_text,
]


def _reach(random: Random, size: int) -> int:
    """Return the end of the range to change: half of the time the first 200 bytes, which have the header's start."""
    return size if random.random() < 0.5 else min(size, 200)


def _split(data: bytes) -> tuple[bytes, bytes]:
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    return data[8 : 8 + length], data[8 + length :]


def _joined(header: bytes, payload: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + payload


def _edited(data: bytes, edit: Callable[[Any], None]) -> bytes:
    """Return the file with an edited header; unchanged where the header is not a JSON object."""
    header, payload = _split(data)
    try:
        value = json.loads(header)
    except (ValueError, RecursionError):
        return data
    if not isinstance(value, dict):
        return data
    edit(value)
    return _joined(json.dumps(value).encode(), payload)


def _change(random: Random, value: Any) -> None:
    """Change, remove or add one value at any depth."""
    while isinstance(value, dict | list) and value:
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = keys[random.integers(len(keys))]
        if not isinstance(value[key], dict | list) or not value[key] or random.random() < 0.3:
            break
        value = value[key]
    else:
        return
    match random.integers(4):
        case 0:
            del value[key]
        case 1 if isinstance(value, list):
            value.append(value[key])
        case 2 if isinstance(value[key], int | float):
            value[key] = _number(random)
        case _:
            value[key] = _value(random)


def _number(random: Random) -> Any:
    return ODD_NUMBERS[random.integers(len(ODD_NUMBERS))]


def _value(random: Random) -> Any:
    values = [*ODD_VALUES, *ODD_NUMBERS]
    return values[random.integers(len(values))]
