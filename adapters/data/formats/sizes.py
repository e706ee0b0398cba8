"""The number of pixels that an image file's header claims, without decoding.

A service needs it before it lets an image wait for a decoder. The decoder compares it with the size that it finds.
"""

import struct
from contextlib import suppress

_MAX_SEGMENTS = 200  # of a JPEG before its frame; cameras write about twenty
_JPEG_WITHOUT_BODY = {0x01, *range(0xD0, 0xD9)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start-of-frame markers
_SOS, _EOI = 0xDA, 0xD9


def header_pixels(data: bytes) -> int | None:
    """Return width times height of a PNG, JPEG, WebP or BMP in a few microseconds; None for anything else."""
    with suppress(struct.error):
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            kind, width, height = struct.unpack_from(">4sII", data, 12)
            return int(width * height) if kind == b"IHDR" else None
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg_pixels(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp_pixels(data)
        if data.startswith(b"BM"):
            (header_bytes,) = struct.unpack_from("<I", data, 14)
            width, height = struct.unpack_from("<HH" if header_bytes == 12 else "<ii", data, 18)
            return abs(int(width * height))
    return None


def _jpeg_pixels(data: bytes) -> int | None:
    at = 2
    for _ in range(_MAX_SEGMENTS):
        prefix, marker = struct.unpack_from("BB", data, at)
        if prefix != 0xFF or marker in (_SOS, _EOI):
            return None
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return int(width * height)
        at += 2 if marker in _JPEG_WITHOUT_BODY else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _webp_pixels(data: bytes) -> int | None:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return int((width & 0x3FFF) * (height & 0x3FFF))
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return int(((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1))
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return width * height if len(data) >= 30 else None
    return None
