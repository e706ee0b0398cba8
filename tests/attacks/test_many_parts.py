"""Images with far more parts than pixels: each part would hold Python's interpreter lock, or need the file once more.

Without limits a JPEG of 10 MB took five seconds, and an AVIF of 1 MB 65 GB.
"""

import struct
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from adapters import ImageError
from adapters.data.images import decode_image, pixels_of
from tests.support.models import encoded

MEGABYTE = 1024**2
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
JPEG, GIF, PNG = (encoded(NOISE, kind) for kind in ("JPEG", "GIF", "PNG"))
GIF_START = 13 + (3 << (GIF[10] & 7) + 1)
END_OF_EXIF = b"\xff\xe1\0\x08Exif\0\0"


def jpeg_with(parts: bytes) -> bytes:
    """Return a JPEG with these bytes before its first segment."""
    return JPEG[:2] + parts + JPEG[2:]


def gif_with(extension: bytes) -> bytes:
    """Return a GIF with this extension before its image."""
    return GIF[:GIF_START] + extension + GIF[GIF_START:]


def png_with(chunk: bytes, count: int) -> bytes:
    """Return a PNG with these chunks before its pixels."""
    return PNG[:33] + chunk * count + PNG[33:]


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def avif_of(parts: int, others: int = 0) -> bytes:
    """Return an AVIF whose item is the whole file, this many times."""
    entry = box(b"infe", b"\2\0\0\0" + struct.pack(">HH", 1, 0) + b"av01\0")
    names = box(b"iinf", bytes(4) + struct.pack(">H", 1) + entry)
    places = box(b"iloc", bytes(6) + struct.pack(">HHHH", 1, 1, 0, parts))
    first = box(b"ftyp", b"avif\0\0\0\0avifmif1")
    return first + box(b"free", b"") * others + box(b"meta", bytes(4) + names + places) + box(b"mdat", bytes(50_000))


REFUSED = {
    "restarts": (jpeg_with(b"\xff\xd0" * MEGABYTE), "a JPEG with more than 1000 segments"),
    "escaped bytes": (jpeg_with(b"\xff\0" * MEGABYTE), "a JPEG with more than 1000 segments"),
    "tables": (jpeg_with((b"\xff\xdb\0\x43\0" + b"\1" * 64) * 10_000), "a JPEG with more than 1000 segments"),
    "comments": (jpeg_with(b"\xff\xfe\0\4ab" * 100_000), "a JPEG with more than 1000 segments"),
    "EXIF": (jpeg_with(END_OF_EXIF * 100_000), "a JPEG with more than 1000 segments"),
    "behind the end": (jpeg_with(b"\xff\xd9" + b"\xff\xfe\0\4ab" * 100_000), "a JPEG that is damaged or truncated"),
    "chunks": (png_with(struct.pack(">I", 0) + b"tEXt" + bytes(4), 100_000), "a PNG with more than 20000 chunks"),
    "blocks": (gif_with(b"!\xf0" + b"\1c" * 100_000 + b"\0"), "a GIF with more than 50000 blocks"),
    "boxes": (avif_of(1, others=100_000), "a HEIC or AVIF with more than 1000 boxes"),
    "parts": (avif_of(65_535), "an AVIF with more than 10000 parts of items"),
    "shared parts": (avif_of(9_000), "an AVIF whose items share bytes"),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_image_is_refused_with_little_memory_when_it_has_very_many_parts(data: bytes, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=f"^{message}"):
            decode_image(data)
        assert pixels_of(data) in (0, 32 * 48)
        assert tracemalloc.get_traced_memory()[1] < 20 * MEGABYTE
    finally:
        tracemalloc.stop()


DECODED = {
    "a JPEG with fill bytes": (jpeg_with(b"\xff" * MEGABYTE), JPEG),
    "a JPEG with bytes between segments": (JPEG[:20] + bytes(MEGABYTE) + JPEG[20:], JPEG),
    "a JPEG with a reserved segment": (jpeg_with(b"\xff\xf0\xff\xff" + bytes(65_533)), JPEG),
    "a JPEG with a large profile": (jpeg_with(b"\xff\xe2\0\x10ICC_PROFILE\0\1\1" * 255), JPEG),
    "a GIF with a long comment": (gif_with(b"!\xfe" + (b"\xff" + b"c" * 255) * 4_000 + b"\0"), GIF),
    "a PNG with many false profiles": (
        png_with(struct.pack(">I", 24) + b"tEXtRaw profile type exif\0no" + bytes(4), 1_000),
        PNG,
    ),
}


@pytest.mark.parametrize(("data", "plain"), DECODED.values(), ids=DECODED.keys())
def test_image_has_the_same_pixels_when_parts_that_say_nothing_are_cut(data: bytes, plain: bytes) -> None:
    assert (np.asarray(decode_image(data)) == np.asarray(decode_image(plain))).all()
