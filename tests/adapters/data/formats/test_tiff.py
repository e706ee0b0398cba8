"""TIFF files of every layout: the decoder agrees with tifffile, or refuses the layout by name."""

import io
import itertools
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from adapters import ImageError
from adapters.data.images import decode_image

HEIGHT, WIDTH = 37, 45  # no multiple of a strip or a tile
ROWS_PER_STRIP, TILE = 10, (16, 32)
REFUSAL = re.compile(r"^a TIFF .*; (save|export)")
RED, BLUE = (200, 40, 10), (10, 40, 200)
Tags = Mapping[int, tuple[int, Sequence[int]]]

# photometric interpretation, number of colours, samples
KINDS = {
    "grey": ("minisblack", 1, 1),
    "inverted grey": ("miniswhite", 1, 1),
    "grey and alpha": ("minisblack", 1, 2),
    "rgb": ("rgb", 3, 3),
    "rgb and alpha": ("rgb", 3, 4),
    "rgb and two": ("rgb", 3, 5),
    "cmyk": ("separated", 4, 4),
}


def tiff(values: np.ndarray, kind: str, bits: int, *, separate: bool = False, **options: Any) -> bytes:
    """Return a TIFF of values (H, W, S), written by tifffile."""
    photometric, colours, samples = KINDS[kind]
    dtype = np.bool_ if bits == 1 else np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32
    values = values.astype(dtype)
    if samples == 1:
        values = values[..., 0]
    elif separate:
        values = np.ascontiguousarray(values.transpose(2, 0, 1))
    if bits not in (1, 8, 16, 32):
        options["bitspersample"] = bits
    if samples > 1:
        options["planarconfig"] = "separate" if separate else "contig"
    if options.get("tile") is None and "compression" in options:
        options["rowsperstrip"] = ROWS_PER_STRIP
    if samples > colours:
        options["extrasamples"] = ["unassalpha", *["unspecified"] * 8][: samples - colours]
    out = io.BytesIO()
    with tifffile.TiffWriter(out, byteorder=options.pop("byteorder", "<"), bigtiff=options.pop("big", False)) as file:
        file.write(values, photometric=photometric, metadata=None, **options)
    return out.getvalue()


def expected(data: bytes, kind: str, bits: int, separate: bool) -> np.ndarray:
    """Return the picture that tifffile reads, as 8-bit RGB without alpha."""
    _, colours, samples = KINDS[kind]
    values = tifffile.imread(io.BytesIO(data)).astype(np.int64)
    values = values.reshape(samples, HEIGHT, WIDTH).transpose(1, 2, 0) if separate else values
    values = values.reshape(HEIGHT, WIDTH, samples)[..., :colours]
    values = values * 255 // (2**bits - 1) if bits < 8 else values >> (bits - 8)
    eight = np.ascontiguousarray(values, dtype=np.uint8)
    if kind == "inverted grey":
        eight = 255 - eight
    if kind == "cmyk":
        return np.asarray(Image.frombytes("CMYK", (WIDTH, HEIGHT), eight.tobytes()).convert("RGB"))
    return eight.repeat(3 // colours, axis=2)


def compared(kind: str, bits: int, separate: bool, data: bytes) -> str:
    """Return "right", "wrong", "refused" (by name), or the text of another refusal."""
    try:
        seen = np.asarray(decode_image(data))
    except ImageError as error:
        return "refused" if REFUSAL.search(str(error)) else str(error)
    return "right" if np.array_equal(seen, expected(data, kind, bits, separate)) else "wrong"


def noise(bits: int, samples: int) -> np.ndarray:
    return np.random.default_rng(bits).integers(0, 2**bits, (HEIGHT, WIDTH, samples), dtype=np.int64)


@pytest.mark.parametrize("compression", [None, "deflate", "lzw", "packbits"])
def test_decode_agrees_with_tifffile_or_refuses_by_name_when_the_layout_varies(compression: str | None) -> None:
    """512 layouts: 4 depths, 4 kinds of colours, planes or pixels, 4 codecs, 2 byte orders, strips or tiles."""
    found = Counter[tuple[str, int]]()
    kinds = ("grey", "inverted grey", "rgb", "rgb and alpha")
    for bits, kind, separate, order, tile in itertools.product(
        (1, 8, 16, 32), kinds, (False, True), "<>", (None, TILE)
    ):
        options: dict[str, Any] = {"compression": compression, "byteorder": order, "tile": tile}
        data = tiff(noise(bits, KINDS[kind][2]), kind, bits, separate=separate, **options)
        found[compared(kind, bits, separate, data), bits] += 1
    assert found == {("right", 1): 32, ("right", 8): 32, ("right", 16): 32, ("refused", 32): 32}


@pytest.mark.parametrize("compression", ["deflate", "lzw", "zstd", "lzma"])
@pytest.mark.parametrize("bits", [8, 16])
def test_decode_agrees_with_tifffile_when_the_compression_has_a_predictor(compression: str, bits: int) -> None:
    for kind, separate, order, tile in itertools.product(KINDS, (False, True), "<>", (None, TILE)):
        options: dict[str, Any] = {"compression": compression, "byteorder": order, "tile": tile, "predictor": True}
        data = tiff(noise(bits, KINDS[kind][2]), kind, bits, separate=separate, **options)
        assert compared(kind, bits, separate, data) == "right", (kind, separate, order, tile)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_decode_agrees_with_tifffile_when_the_depth_varies(bits: int, kind: str) -> None:
    for separate, big in itertools.product((False, True), (False, True)):
        data = tiff(noise(bits, KINDS[kind][2]), kind, bits, separate=separate, big=big)
        assert compared(kind, bits, separate, data) == "right"


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "u4", "u8", "f2", "f4", "f8", "c8"])
@pytest.mark.parametrize("samples", [1, 3])
def test_decode_refuses_by_name_when_samples_have_no_8_bit_meaning(dtype: str, samples: int, order: str) -> None:
    values = np.ones((HEIGHT, WIDTH, samples), dtype).squeeze()
    options: dict[str, Any] = {"byteorder": order, "photometric": "rgb" if samples == 3 else "minisblack"}
    out = io.BytesIO()
    tifffile.imwrite(out, values, metadata=None, **options)
    with pytest.raises(ImageError, match=r"^a TIFF w.*; save the image with 8 or 16 bits"):
        decode_image(out.getvalue())


@pytest.mark.parametrize(("photometric", "subsampling"), [("minisblack", None), ("rgb", None), ("ycbcr", (2, 2))])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_decode_agrees_with_tifffile_when_the_compression_is_jpeg(
    photometric: str, subsampling: tuple[int, int] | None, tile: tuple[int, int] | None
) -> None:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    values = np.stack([5 * y, 5 * x, 255 - 5 * y], axis=2).astype(np.uint8)
    values = values[..., 0] if photometric == "minisblack" else values
    options: dict[str, Any] = {"rowsperstrip": 16} if tile is None else {"tile": tile}
    if subsampling is not None:
        options["subsampling"] = subsampling
    out = io.BytesIO()
    tifffile.imwrite(out, values, photometric=photometric, compression="jpeg", **options)
    read = tifffile.imread(io.BytesIO(out.getvalue())).reshape(HEIGHT, WIDTH, -1).astype(int)
    seen = np.asarray(decode_image(out.getvalue())).astype(int)
    assert np.abs(seen - read).mean() < 2
    if photometric != "ycbcr":  # of which tifffile takes the values as they are
        assert np.abs(seen - values.reshape(HEIGHT, WIDTH, -1)).mean() < 6


def raw(tags: Tags, pixels: bytes, order: str = "<") -> bytes:
    """Return an uncompressed TIFF of one strip: 4 x 2 pixels, 8 bits, grey, with these tags (type, values) changed."""
    base: Tags = {
        256: (3, [4]), 257: (3, [2]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1]), 278: (3, [2]),
        273: (4, [8]), 279: (4, [len(pixels)]),
    }  # fmt: skip
    merged = {tag: entry for tag, entry in {**base, **tags}.items() if entry[1]}
    pixels += b"\0" * (len(pixels) % 2)
    start = 8 + len(pixels)
    more, entries = b"", b""
    for tag, (kind, values) in sorted(merged.items()):
        packed = struct.pack(f"{order}{len(values)}{ {1: 'B', 3: 'H', 4: 'I', 7: 'B'}[kind] }", *values)
        if len(packed) > 4:
            place = start + 6 + 12 * len(merged) + len(more)
            more += packed + b"\0" * (len(packed) % 2)
            packed = struct.pack(f"{order}I", place)
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return header + pixels + struct.pack(f"{order}H", len(merged)) + entries + bytes(4) + more


EIGHT = bytes([0, 10, 20, 30, 40, 50, 60, 255])


@pytest.mark.parametrize("order", "<>")
def test_decode_reads_a_tiff_when_it_is_baseline(order: str) -> None:
    assert decode_image(raw({}, EIGHT, order)).getchannel(0).tobytes() == EIGHT


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_decode_reads_the_palette_when_a_tiff_has_one(bits: int) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (2**bits, 3), dtype=np.uint8)
    indices = np.random.default_rng(1).integers(0, 2**bits, (HEIGHT, WIDTH), dtype=np.uint8)
    rows = [
        int("".join(f"{value:0{bits}b}" for value in row).ljust(360, "0"), 2).to_bytes(45, "big") for row in indices
    ]
    pixels = b"".join(row[: -(-WIDTH * bits // 8)] for row in rows)
    for scale in (257, 1):  # some programs write 8 bits into the map of 16
        tags: Tags = {256: (3, [WIDTH]), 257: (3, [HEIGHT]), 278: (3, [HEIGHT]), 258: (3, [bits]), 262: (3, [3])}
        colour_map: list[int] = (colours.T.astype(int) * scale).ravel().tolist()
        seen = np.asarray(decode_image(raw({**tags, 320: (3, colour_map)}, pixels)))
        assert np.array_equal(seen, colours[indices])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_decode_reads_a_tiff_when_the_bits_of_each_byte_are_reversed(bits: int) -> None:
    plain = raw({258: (3, [bits]), 256: (3, [8 * 4 // bits])}, EIGHT)
    reversed_bytes = bytes(int(f"{byte:08b}"[::-1], 2) for byte in EIGHT)
    turned = raw({258: (3, [bits]), 256: (3, [8 * 4 // bits]), 266: (3, [2])}, reversed_bytes)
    assert decode_image(turned).tobytes() == decode_image(plain).tobytes()


@pytest.mark.parametrize(
    ("extra", "seen"), [(0, RED), (1, (255, 51, 12)), (2, RED)], ids=["other", "premultiplied", "alpha"]
)
@pytest.mark.parametrize("separate", [False, True])
def test_decode_divides_by_alpha_when_colours_are_premultiplied(
    extra: int, seen: tuple[int, int, int], separate: bool
) -> None:
    pixels = bytes([*RED, 200]) * 8
    tags: Tags = {258: (3, [8] * 4), 262: (3, [2]), 277: (3, [4]), 338: (3, [extra]), 284: (3, [1 + separate])}
    if separate:
        pixels = b"".join(pixels[i::4] for i in range(4))
        tags = {**tags, 273: (4, [8, 16, 24, 32]), 279: (4, [8] * 4)}
    assert decode_image(raw(tags, pixels)).getpixel((1, 1)) == seen


@pytest.mark.parametrize("extra", [[], [2], [0]], ids=["no tag", "alpha", "other"])
def test_decode_shows_the_background_when_a_tiff_has_alpha(extra: list[int]) -> None:
    tags: Tags = {258: (3, [8] * 4), 262: (3, [2]), 277: (3, [4]), 338: (3, extra)}
    seen = decode_image(raw(tags, bytes([*RED, 0]) * 8), background=BLUE).getpixel((0, 0))
    assert seen == (RED if extra == [0] else BLUE)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({254: (4, [1])}, "whose first page is a reduced preview, as in camera raw files"),
        ({262: (3, [8]), 277: (3, [3]), 258: (3, [8] * 3)}, "with CIE L\\*a\\*b\\* colours"),
        ({262: (3, [32803])}, "with the raw pixels of a camera's sensor"),
        ({262: (3, [9999])}, r"with an unknown kind of colour \(9999\)"),
        ({262: (3, [])}, r"with an unknown kind of colour \(-1\)"),
        ({259: (3, [6])}, "with compression of old-style JPEG"),
        ({259: (3, [34712])}, "with compression of JPEG 2000"),
        ({259: (3, [4711])}, r"with compression of an unknown kind \(4711\)"),
        ({258: (3, [5, 6, 5]), 277: (3, [3]), 262: (3, [2])}, "whose samples have 5, 6 bits"),
        ({258: (3, [24])}, "with 24 bits a sample"),
        ({339: (3, [2])}, "whose samples are signed integers of 8 bits"),
        ({339: (3, [3]), 258: (3, [16])}, "whose samples are floating-point numbers of 16 bits"),
        ({266: (3, [2]), 258: (3, [16])}, r"with reversed bits \(FillOrder 2\) and 16 bits a sample"),
        ({262: (3, [5]), 277: (3, [4]), 258: (3, [8] * 4), 332: (3, [2])}, "with inks other than CMYK"),
        ({262: (3, [6]), 277: (3, [3]), 258: (3, [8] * 3)}, "with YCbCr colours in another form than JPEG"),
        ({262: (3, [3])}, "with 8 bits a sample and no palette for them"),
        ({262: (3, [2]), 277: (3, [2])}, "with 2 samples a pixel, 3 of them colours"),
        ({277: (3, [65])}, "with 65 samples a pixel, 1 of them colours"),
        ({259: (3, [8]), 317: (3, [3])}, "with predictor 3"),
        ({259: (3, [8]), 317: (3, [2]), 258: (3, [4])}, "with a predictor and 4 bits a sample"),
        ({259: (3, [7]), 258: (3, [12])}, "with 1 lossy samples of 12 bits"),
    ],
)
def test_decode_names_the_layout_when_it_refuses_a_tiff(tags: Tags, reason: str) -> None:
    with pytest.raises(ImageError, match=f"^a TIFF {reason}"):
        decode_image(raw(tags, bytes(64)))


@pytest.mark.parametrize(
    "tags",
    [
        {256: (3, [])},
        {257: (3, [0])},
        {273: (4, [])},
        {273: (4, [10_000])},
        {279: (4, [8, 8])},
        {273: (4, [8, 12]), 279: (4, [4, 4])},
        {278: (3, [1])},
        {284: (3, [2]), 277: (3, [3]), 258: (3, [8] * 3), 262: (3, [2])},
    ],
    ids=["width", "height", "no strips", "behind the end", "sizes", "too many strips", "too few strips", "planes"],
)
def test_decode_refuses_a_tiff_when_its_list_of_strips_is_damaged(tags: Tags) -> None:
    with pytest.raises(ImageError, match="damaged"):
        decode_image(raw(tags, EIGHT))


@pytest.mark.parametrize("end", [4, 8, 12, 30, 60])
def test_decode_refuses_a_tiff_when_its_directory_is_truncated(end: int) -> None:
    data = raw({}, EIGHT)
    with pytest.raises(ImageError, match="truncated"):
        decode_image(data[: 16 + end] if end > 8 else data[:end])


def test_decode_applies_the_orientation_when_other_tags_of_a_tiff_are_odd() -> None:
    odd: Tags = {
        270: (3, [1, 2, 3]),  # ImageDescription is text
        282: (3, [0]),  # XResolution is a fraction
        305: (7, list(b"\xff\xfe\0")),
        34665: (4, [2**31]),  # the EXIF directory, behind the end
        34853: (4, [8]),  # the GPS directory, in the pixels
        700: (1, [255] * 100),
        33723: (4, [2**32 - 1] * 3),
    }
    assert decode_image(raw({274: (3, [6]), **odd}, EIGHT)).size == (2, 4)
    xmp = list(b'<x tiff:Orientation="8"/>')
    assert decode_image(raw({700: (1, xmp)}, EIGHT)).size == (2, 4)
    assert decode_image(raw({700: (1, xmp), 274: (3, [1])}, EIGHT)).size == (4, 2)


def test_decode_reads_group_4_when_white_is_zero() -> None:
    page = Image.new("1", (64, 40), 1)
    page.paste(0, (8, 8, 24, 24))
    out = io.BytesIO()
    page.save(out, "TIFF", compression="group4")
    assert np.array_equal(np.asarray(decode_image(out.getvalue()).convert("1")), np.asarray(page))
