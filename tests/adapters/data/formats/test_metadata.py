"""Metadata of image files: the orientation survives, and nothing else in them can refuse a sound photo."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from adapters.data.formats.metadata import Metadata, split_metadata
from adapters.data.images import decode_image
from tests.support.models import encoded

SIZE = (32, 16)
TURNED = 6  # an orientation that swaps the sides
MEGABYTE = 1024**2


def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize(SIZE)


def entry(tag: int, kind: int, count: int, value: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0")


def exif(*entries: bytes, order: str = "<", end: bytes = b"") -> bytes:
    """Return EXIF bytes without a prefix: one directory with these entries."""
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return start + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4) + end


def turn(order: str = "<") -> bytes:
    return entry(274, 3, 1, struct.pack(f"{order}H", TURNED), order)


# Each has the orientation, and something that a whole parser stumbles over.
ODD_EXIF = {
    "alone": exif(turn()),
    "big endian": exif(turn(">"), order=">"),
    "a second prefix": b"Exif\0\0" + exif(turn()),
    "text as a fraction": exif(entry(271, 5, 1, b"\xff\xff\xff\x7f"), turn()),
    "a fraction of zero": exif(entry(282, 5, 1, struct.pack("<I", 38)), turn(), end=bytes(8)),
    "a count of 2^32 - 1": exif(entry(305, 2, 2**32 - 1, b"\x10\0\0\0"), turn()),
    "an unknown type": exif(entry(40_000, 99, 3, b"\xff" * 4), turn()),
    "integers where text belongs": exif(entry(270, 3, 2, b"\1\0\2\0"), turn()),
    "negative numbers": exif(entry(33434, 10, 1, b"\x1a\0\0\0"), turn()),
    "a directory behind the end": exif(entry(34665, 4, 1, b"\xff\xff\xff\x7f"), turn()),
    "a directory in itself": exif(entry(34665, 4, 1, b"\x08\0\0\0"), turn()),
    "a GPS directory of text": exif(entry(34853, 2, 4, b"gps\0"), turn()),
    "a directory that ends early": exif(turn())[:-3],
    "more entries than there are": exif(turn()).replace(b"\x01\0\x12", b"\xff\xff\x12", 1),
    "the orientation as a long": exif(entry(274, 4, 1, struct.pack("<I", TURNED))),
    "the orientation as a byte": exif(entry(274, 1, 1, bytes([TURNED]))),
}
BROKEN_EXIF = {
    "empty": b"",
    "zeros": bytes(100),
    "no byte order": b"XX*\0\x08\0\0\0",
    "a header only": b"II*\0\x08\0\0\0",
    "0xFF": b"II*\0\x08\0\0\0" + b"\xff" * 1000,
    "a directory behind the end": b"MM\0*\x7f\xff\xff\xff",
    "orientation 0": exif(entry(274, 3, 1, b"\0\0")),
    "orientation 9": exif(entry(274, 3, 1, b"\x09\0")),
    "orientation 6 and 2": exif(entry(274, 3, 2, b"\6\0\2\0")),
    "orientation of text": exif(entry(274, 2, 4, b"six\0")),
}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def jpeg_with(marker: int, *bodies: bytes) -> bytes:
    good = encoded(photo(), "JPEG", quality=95)
    segments = [struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for body in bodies]
    return good[:2] + b"".join(segments) + good[2:]


def png_with(*chunks: bytes, after: bool = False) -> bytes:
    good = encoded(photo(), "PNG")
    at = len(good) - 12 if after else 33  # before the end, or behind the header
    return good[:at] + b"".join(chunks) + good[at:]


def webp_with(kind: bytes, data: bytes) -> bytes:
    good = encoded(photo(), "WEBP", lossless=True)
    extended = struct.pack("<4sIB3x", b"VP8X", 10, {b"EXIF": 8, b"XMP ": 4, b"ICCP": 32}[kind])
    extended += struct.pack("<I", SIZE[0] - 1)[:3] + struct.pack("<I", SIZE[1] - 1)[:3]
    more = struct.pack("<4sI", kind, len(data)) + data + b"\0" * (len(data) % 2)
    body = b"WEBP" + extended + (more + good[12:] if kind == b"ICCP" else good[12:] + more)
    return struct.pack("<4sI", b"RIFF", len(body)) + body


def avif_with(data: bytes) -> bytes:
    """Return an AVIF with these EXIF bytes. Pillow would parse them while it writes, so they replace others."""
    marked = exif(entry(270, 7, 4, b"mark"), end=b"\xee" * len(data))
    good = encoded(photo(), "AVIF", quality=95, exif=marked)
    assert good.count(marked) == 1
    return good.replace(marked, data.ljust(len(marked), b"\0"))


def profile(data: bytes) -> bytes:
    """Return EXIF as ImageMagick writes it."""
    data = b"Exif\0\0" + data
    return b"\nexif\n%8d\n" % len(data) + data.hex().encode() + b"\n"


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": lambda data: jpeg_with(0xE1, b"Exif\0\0" + data),
    "PNG": lambda data: png_with(chunk(b"eXIf", data)),
    "PNG, behind the pixels": lambda data: png_with(chunk(b"eXIf", data), after=True),
    "PNG, as text": lambda data: png_with(chunk(b"tEXt", b"Raw profile type exif\0" + profile(data))),
    "PNG, as compressed text": lambda data: png_with(
        chunk(b"zTXt", b"Raw profile type APP1\0\0" + zlib.compress(profile(data)))
    ),
    "WebP": lambda data: webp_with(b"EXIF", data),
}


@pytest.mark.parametrize("data", ODD_EXIF.values(), ids=ODD_EXIF.keys())
@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_decode_applies_the_orientation_when_other_entries_of_exif_are_odd(
    container: Callable[[bytes], bytes], data: bytes
) -> None:
    image = decode_image(container(data))
    assert image.size == SIZE[::-1]
    turned = photo().transpose(Image.Transpose.ROTATE_270)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(turned)).mean() < 10  # of about 80 for another rotation


@pytest.mark.parametrize("data", BROKEN_EXIF.values(), ids=BROKEN_EXIF.keys())
@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_decode_reads_the_pixels_when_exif_is_broken(container: Callable[[bytes], bytes], data: bytes) -> None:
    assert decode_image(container(data)).size == SIZE


@pytest.mark.parametrize("data", [*ODD_EXIF.values(), *BROKEN_EXIF.values()], ids=[*ODD_EXIF, *BROKEN_EXIF])
def test_decode_reads_an_avif_when_its_exif_is_odd_or_broken(data: bytes) -> None:
    """The rotation of an AVIF is a property of the image, not its EXIF."""
    assert decode_image(avif_with(data)).size == SIZE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_decode_agrees_with_pillow_when_exif_has_an_orientation(kind: str, orientation: int) -> None:
    """Pillow's own transposition is the reference, for files that it can read."""
    tags = Image.Exif()
    tags[274] = orientation
    data = encoded(photo(), kind, exif=tags)
    with Image.open(io.BytesIO(data)) as image:
        turned = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(np.asarray(decode_image(data)), turned)
    assert decode_image(data).size == (SIZE if orientation < 5 else SIZE[::-1])


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    "data",
    [
        jpeg_with(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
        png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))),
        webp_with(b"XMP ", XMP),
    ],
    ids=["JPEG", "PNG", "PNG, compressed", "WebP"],
)
def test_decode_applies_the_orientation_when_only_xmp_has_it(data: bytes) -> None:
    assert decode_image(data).size == SIZE[::-1]


def test_orientation_is_that_of_exif_when_xmp_has_another() -> None:
    assert Metadata(exif(entry(274, 3, 1, b"\3\0")), XMP).orientation() == 3
    assert Metadata(b"", XMP).orientation() == 6
    assert Metadata(b"", b"tiff:Orientation='6'").orientation() is None


BIG = zlib.compress(bytes(100 * MEGABYTE), 9)  # 100 kB
LARGE = {
    "a compressed text of 100 MB": png_with(chunk(b"zTXt", b"k\0\0" + BIG)),
    "an international text of 100 MB": png_with(chunk(b"iTXt", b"k\0\1\0\0\0" + BIG)),
    "XMP of 100 MB": png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BIG)),
    "a profile of 100 MB": png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + BIG)),
    "an ICC profile of 100 MB": png_with(chunk(b"iCCP", b"k\0\0" + BIG)),
    "a plain text of 3 MB": png_with(chunk(b"tEXt", b"k\0" + b"v" * 3 * MEGABYTE)),
    "a thousand texts": png_with(*[chunk(b"tEXt", b"k%d\0v" % i) for i in range(1000)]),
    "a text with a false checksum": png_with(chunk(b"tEXt", b"k\0v")[:-1] + b"\0"),
    "chunks that are short": png_with(*[chunk(kind, b"") for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"acTL")]),
    "an ICC profile of 3 MB in a JPEG": jpeg_with(
        0xE2, *[b"ICC_PROFILE\0" + bytes([i + 1, 50]) + b"x" * 60_000 for i in range(50)]
    ),
    "an ICC profile with parts missing": jpeg_with(0xE2, b"ICC_PROFILE\0\x02\xff" + b"x" * 100),
    "an ICC profile of one byte": jpeg_with(0xE2, b"ICC_PROFILE\0"),
    "comments of 3 MB": jpeg_with(0xFE, *[b"c" * 60_000] * 50),
    "a Photoshop block with a false length": jpeg_with(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\xff\xff\xff\xff"),
    "an Adobe marker that is short": jpeg_with(0xEE, b"Adobe"),
    "a JFIF marker that is short": jpeg_with(0xE0, b"JFIF\0"),
    "an MPF index of FF": jpeg_with(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 200),
    "an ICC profile in a WebP": webp_with(b"ICCP", b"\xff" * MEGABYTE),
}


@pytest.mark.parametrize("data", LARGE.values(), ids=LARGE.keys())
def test_decode_reads_the_pixels_when_other_metadata_are_large_or_broken(data: bytes) -> None:
    tracemalloc.start()
    try:
        assert decode_image(data).size == SIZE
        assert tracemalloc.get_traced_memory()[1] < 40 * MEGABYTE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"comment": b"c", "dpi": (72, 72), "icc_profile": b"x"}]
)
def test_split_keeps_the_pixels_when_a_jpeg_has_any_colours(mode: str, options: dict[str, Any]) -> None:
    data = encoded(photo().convert(mode), "JPEG", **options)
    split, _ = split_metadata(data)
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(split)) as after:
        assert (after.mode, after.tobytes()) == (before.mode, before.tobytes())
    assert (b"ICC_PROFILE" in data) == ("icc_profile" in options)
    assert b"ICC_PROFILE" not in split


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_split_keeps_pixels_and_transparency_when_a_png_has_any_mode(mode: str) -> None:
    pixels = np.arange(512, dtype=np.uint16).reshape(16, 32) * 100
    image = Image.fromarray(pixels) if mode == "I;16" else photo().convert(mode)
    data = encoded(image, "PNG", **({"transparency": 3} if mode in ("L", "P") else {}))
    split, _ = split_metadata(data)
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(split)) as after:
        assert (after.mode, after.tobytes()) == (before.mode, before.tobytes())
        assert after.info.get("transparency") == before.info.get("transparency")


@pytest.mark.parametrize("make", [*CONTAINERS.values(), avif_with], ids=[*CONTAINERS.keys(), "AVIF"])
def test_split_adds_nothing_when_a_file_is_truncated(make: Callable[[bytes], bytes]) -> None:
    data = make(exif(turn()))
    for end in range(len(data)):
        split, _ = split_metadata(data[:end])
        assert len(split) <= end
