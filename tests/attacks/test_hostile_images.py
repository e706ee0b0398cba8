"""Hostile images: `decode_image` decodes each within the limits or raises an `ImageError`."""

import io
import struct
import tracemalloc
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageFile

from adapters import ImageError, ImageTooLargeError
from adapters.data.images import FORMATS, decode_image
from tests.support.models import bomb_png, encoded, png

SIZE = (48, 32)
MAX_PIXELS = 1_000_000
MANY = 10_000
MEGABYTE = 1024**2


def noise() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


GOOD = {name: encoded(noise(), name) for name in FORMATS}


def decode(data: bytes) -> Image.Image:
    """Decode as the hub does, where warnings are not errors."""
    with warnings.catch_warnings(action="ignore"):
        return decode_image(data, max_pixels=MAX_PIXELS)


def decoded_or_refused(data: bytes) -> None:
    try:
        image = decode(data)
    except ImageError as refusal:
        str(refusal).encode()
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= MAX_PIXELS


def others() -> dict[str, bytes]:
    """Return the image in every other format that Pillow can write."""
    Image.init()
    made = {}
    for name in sorted(set(Image.SAVE) - set(FORMATS)):
        for mode in ("RGB", "P", "1"):
            with warnings.catch_warnings(action="ignore"), suppress(OSError, ValueError, RuntimeError, AttributeError):
                made[name] = encoded(noise().convert(mode), name)
                break
    return made


OTHERS = others()


@pytest.mark.parametrize("name", FORMATS)
def test_a_listed_format_is_decoded(name: str) -> None:
    image = decode(GOOD[name])
    assert (image.mode, image.size) == ("RGB", SIZE)


@pytest.mark.parametrize("name", OTHERS)
def test_an_unlisted_format_is_refused(name: str) -> None:
    if name == "MPO":  # a JPEG with more JPEGs behind it: the first is the image
        assert decode(OTHERS[name]).size == SIZE
        return
    with pytest.raises(ImageError, match=r"^(not an image; expected one of JPEG, PNG|an? \w.*; (save|export) )"):
        decode(OTHERS[name])


def test_many_unlisted_formats_are_tried() -> None:
    assert len(OTHERS) > 15


@pytest.mark.parametrize(
    "start", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"%PDF-1.7\n", b"P6 9 9 255\n"]
)
def test_a_format_that_can_run_programs_is_refused(start: bytes) -> None:
    with pytest.raises(ImageError, match=r"^an? \w.*; (save|export) "):
        decode(start + bytes(1000))


# Each format with a false size.


def with_side(name: str, side: int) -> bytes:
    data = bytearray(GOOD[name])
    match name:
        case "PNG":
            return bomb_png(side)
        case "BMP":
            data[18:26] = struct.pack("<ii", side, side)
        case "GIF":
            side = min(side, 0xFFFF)
            data[6:10] = struct.pack("<HH", side, side)
        case "JPEG":
            side = min(side, 0xFFFF)
            at = next(i for i in range(len(data)) if data[i : i + 2] == b"\xff\xc0")
            data[at + 5 : at + 9] = struct.pack(">HH", side, side)
        case "TIFF":
            for tag in (256, 257):
                at = data.index(struct.pack("<H", tag), struct.unpack_from("<I", data, 4)[0])
                data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, side)
        case "AVIF":
            side = min(side, 16_000)  # libavif takes at most 2^28 pixels
            at = data.index(b"ispe") + 8
            data[at : at + 8] = struct.pack(">II", side, side)
        case "WEBP":  # lossless: each side has 14 bits
            data = bytearray(encoded(noise(), "WEBP", lossless=True))
            side = min(side, 2**14) - 1
            bits = struct.unpack_from("<I", data, 21)[0] & 0xF0000000
            struct.pack_into("<I", data, 21, bits | side | side << 14)
    return bytes(data)


@pytest.mark.parametrize("side", [1001, 13_000, 60_000])
@pytest.mark.parametrize("name", FORMATS)
def test_an_image_is_refused_before_decoding_when_its_header_claims_too_many_pixels(
    name: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ImageTooLargeError):
        decode(with_side(name, side))


def test_a_heic_is_decoded_or_refused_when_it_is_truncated_or_mutated() -> None:
    """With the extra `heic`. libheif decodes in C and C++, as the other decoders do."""
    heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    heif.from_pillow(noise()).save(out, quality=50)
    good = out.getvalue()
    assert decode(good).size == SIZE
    with pytest.raises(ImageTooLargeError):
        decode_image(good, max_pixels=1000)
    random = np.random.default_rng(0)
    for end in range(0, len(good), max(1, len(good) // 100)):
        decoded_or_refused(good[:end])
    for _ in range(200):
        data = np.frombuffer(good, np.uint8).copy()
        at = random.integers(0, len(data) if random.random() < 0.5 else 400, random.integers(1, 6))
        data[at] = random.integers(0, 256, len(at))
        decoded_or_refused(data.tobytes())


def test_a_gif_is_refused_when_a_frame_is_larger_than_the_file_s_size() -> None:
    data = bytearray(GOOD["GIF"])
    at = data.index(b"\x2c")
    while data[at + 5 : at + 9] != struct.pack("<HH", *SIZE):
        at = data.index(b"\x2c", at + 1)
    data[at + 5 : at + 9] = struct.pack("<HH", 20_000, 20_000)
    with pytest.raises(ImageTooLargeError):
        decode(bytes(data))


# Large numbers of frames, pages and chunks.


def gif_of(frames: int) -> bytes:
    one = encoded(Image.new("P", (8, 8)), "GIF")
    start = one.rindex(b"\x2c")
    return one[:start] + one[start:-1] * frames + b";"


def tiff_of(pages: int, last: int = 0) -> bytes:
    """Return a TIFF whose pages share their pixels; `last` is the offset of a next page that the last page claims."""
    data = bytearray(encoded(Image.new("L", (8, 8)), "TIFF"))
    at = struct.unpack_from("<I", data, 4)[0]
    length = 2 + 12 * struct.unpack_from("<H", data, at)[0]
    directory = bytes(data[at : at + length])
    link = at + length
    for _ in range(pages - 1):
        struct.pack_into("<I", data, link, len(data))
        link = len(data) + length
        data += directory + bytes(4)
    struct.pack_into("<I", data, link, last)
    return bytes(data)


def test_only_the_first_frame_is_decoded_when_there_are_many() -> None:
    for data in (gif_of(MANY), tiff_of(MANY), tiff_of(3, last=8)):
        with Image.open(io.BytesIO(data)) as image:
            assert image.format in ("GIF", "TIFF")
        assert decode(data).size == (8, 8)
    with Image.open(io.BytesIO(gif_of(5))) as image:
        assert getattr(image, "n_frames") == 5  # noqa: B009 (not in the type of every image); the frames exist
    with Image.open(io.BytesIO(tiff_of(5))) as image:
        assert getattr(image, "n_frames") == 5  # noqa: B009 (not in the type of every image)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes) -> bytes:
    """Return a good PNG with chunks before its pixels."""
    good = GOOD["PNG"]
    at = 8 + 25  # the signature and IHDR
    return good[:at] + b"".join(chunks) + good[at:]


ZEROS = zlib.compress(bytes(300 * MEGABYTE), 9)  # 300 kB
PNG_CHUNKS = {
    "zTXt": png_with(chunk(b"zTXt", b"k\0\0" + ZEROS)),
    "iTXt": png_with(chunk(b"iTXt", b"k\0\1\0\0\0" + ZEROS)),
    "iCCP": png_with(chunk(b"iCCP", b"k\0\0" + ZEROS)),
    "many zTXt": png_with(*[chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(MEGABYTE - 1))) for i in range(200)]),
    "many tEXt": png_with(*[chunk(b"tEXt", b"k%d\0v" % i) for i in range(MANY)]),
    "a long tEXt": png_with(chunk(b"tEXt", b"k\0" + bytes(5 * MEGABYTE))),
    "eXIf": png_with(chunk(b"eXIf", b"MM\0*\0\0\0\x08" + b"\xff" * 1000)),
    "garbage iCCP": png_with(chunk(b"iCCP", b"k\0\0" + b"\xff" * 1000)),
    "pixels after the end": GOOD["PNG"].replace(b"IEND", b"IDAT", 1) + chunk(b"IDAT", ZEROS),
}


@pytest.mark.parametrize("data", PNG_CHUNKS.values(), ids=PNG_CHUNKS.keys())
def test_png_chunks_need_little_memory_when_they_decompress_to_much(data: bytes) -> None:
    tracemalloc.start()
    try:
        decoded_or_refused(data)
        assert tracemalloc.get_traced_memory()[1] < 100 * MEGABYTE
    finally:
        tracemalloc.stop()


def jpeg_with(marker: int, body: bytes) -> bytes:
    good = GOOD["JPEG"]
    return good[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + good[2:]


def exif(*entries: bytes, order: bytes = b"II*\0", first: int = 8, more: int = 0) -> bytes:
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", more)
    return b"Exif\0\0" + order + struct.pack("<I", first) + directory


def orientation(kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", 274, kind, count) + value.ljust(4, b"\0")


METADATA = {
    "orientation 0": jpeg_with(0xE1, exif(orientation(3, 1, b"\0\0"))),
    "orientation 9": jpeg_with(0xE1, exif(orientation(3, 1, b"\x09\0"))),
    "orientation of text": jpeg_with(0xE1, exif(orientation(2, 4, b"six\0"))),
    "orientation by a rational at the end": jpeg_with(0xE1, exif(orientation(5, 1, b"\xff\xff\xff\x7f"))),
    "orientation many times": jpeg_with(0xE1, exif(*[orientation(3, 1, b"\x06\0")] * 1000)),
    "a count of 2^32 - 1": jpeg_with(0xE1, exif(orientation(1, 2**32 - 1, b"\x10\0\0\0"))),
    "a directory beyond the end": jpeg_with(0xE1, exif(first=2**31)),
    "a directory that links to itself": jpeg_with(0xE1, exif(orientation(3, 1, b"\x06\0"), more=8)),
    "a GPS directory that links to itself": jpeg_with(0xE1, exif(struct.pack("<HHII", 34853, 4, 1, 8))),
    "no byte order": jpeg_with(0xE1, exif(order=b"????")),
    "65,533 bytes of FF": jpeg_with(0xE1, b"Exif\0\0" + b"\xff" * 65_000),
    "an ICC profile of FF": jpeg_with(0xE2, b"ICC_PROFILE\0\x01\x01" + b"\xff" * 60_000),
    "an ICC profile with parts missing": jpeg_with(0xE2, b"ICC_PROFILE\0\x02\xff" + b"x" * 100),
    "a Photoshop block with a false length": jpeg_with(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\xff\xff\xff\xff"),
    "an Adobe marker that is short": jpeg_with(0xEE, b"Adobe"),
    "an MPF index with a false length": jpeg_with(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 200),
}


@pytest.mark.parametrize("data", METADATA.values(), ids=METADATA.keys())
def test_an_image_with_false_metadata_is_decoded_or_refused(data: bytes) -> None:
    decoded_or_refused(data)


def test_an_image_is_rotated_as_its_exif_orientation_says() -> None:
    turned = decode(jpeg_with(0xE1, exif(orientation(3, 1, b"\x06\0"))))
    assert turned.size == SIZE[::-1]


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_image_is_decoded_or_refused(name: str) -> None:
    data = GOOD[name]
    for end in range(0, len(data), max(1, len(data) // 300)):
        decoded_or_refused(data[:end])


@pytest.mark.parametrize("name", FORMATS)
def test_a_mutated_image_is_decoded_or_refused(name: str) -> None:
    random = np.random.default_rng(FORMATS.index(name))
    good = np.frombuffer(GOOD[name], np.uint8)
    for _ in range(500):
        data = good.copy()
        # Half of the changes hit the start, where the headers are.
        reach = len(data) if random.random() < 0.5 else min(len(data), 200)
        at = random.integers(0, reach, random.integers(1, 6))
        data[at] = random.choice(np.array([0, 1, 127, 128, 255, random.integers(0, 256)], np.uint8), len(at))
        decoded_or_refused(data.tobytes())


def test_an_image_is_decoded_when_other_bytes_follow_it() -> None:
    assert decode(png() + b"<script>").size == (32, 32)
