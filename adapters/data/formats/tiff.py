"""TIFF files: the tags say what the pixels mean, and Pillow only decompresses them.

Pillow chooses a mode from the tags, and several of its choices are wrong without an error: it ignores WhiteIsZero at
16 bits, reads 12 bits as 16, signed bytes as unsigned ones, and separate planes of 16 bits as bytes. Here the tags are
read first. Pillow then gets a copy of the file with new tags, one layout of which it reads correctly, and without any
metadata. Other layouts are refused by name.
"""

import io
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from PIL import Image

from ...short_repr import short_repr
from ..errors import ImageError, ImageTooLargeError
from .metadata import MAX_METADATA_BYTES, Metadata

# Tags (TIFF 6.0; Adobe's technical notes for JPEG tables).
NEW_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 254, 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR = 273, 274, 277, 278, 279, 284
T4_OPTIONS, T6_OPTIONS, PREDICTOR, COLOUR_MAP, TILE_WIDTH, TILE_HEIGHT = 292, 293, 317, 320, 322, 323
TILE_OFFSETS, TILE_BYTES, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES = 324, 325, 332, 338, 339, 347
SUBSAMPLING, XMP = 530, 700
_KEPT = (T4_OPTIONS, T6_OPTIONS, JPEG_TABLES, SUBSAMPLING)  # the decompressors need them
_READ = {
    *_KEPT,
    *(NEW_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIP_OFFSETS, ORIENTATION, SAMPLES),
    *(ROWS_PER_STRIP, STRIP_BYTES, PLANAR, PREDICTOR, COLOUR_MAP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES),
    *(INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, XMP),
}

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_SHORT, _LONG, _UNDEFINED = 3, 4, 7

_JPEG, _WEBP = 7, 50001
_WITH_PREDICTOR = (5, 8, 32946, 34925, 50000)
_COMPRESSIONS = {1, 2, 3, 4, _JPEG, 32773, _WEBP, *_WITH_PREDICTOR}
_OTHER_COMPRESSIONS = {
    6: "old-style JPEG",
    **dict.fromkeys((9, 10, 34661), "JBIG"),
    **dict.fromkeys((33003, 33005, 34712), "JPEG 2000"),
    **dict.fromkeys((34676, 34677), "SGI LogLuv"),
    34887: "LERC",
    34892: "lossy JPEG of a camera raw file",
    **dict.fromkeys((50002, 52546), "JPEG XL"),
}
_GREY_INVERTED, _GREY, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_COLOURS = {_GREY_INVERTED: 1, _GREY: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
_OTHER_COLOURS = {
    4: "a transparency mask",
    **dict.fromkeys((8, 9, 10), "CIE L*a*b* colours"),
    **dict.fromkeys((32803, 34892), "the raw pixels of a camera's sensor"),
    32844: "LogL brightness",
    32845: "LogLuv colours",
}
_NO_ALPHA, _PREMULTIPLIED, _ALPHA = 0, 1, 2  # values of EXTRA_SAMPLES
_MAX_SAMPLES = 64
_MAX_VALUES = 4_000_000  # of one tag; the largest tag of a sound file lists its strips or tiles
_BAND_ROWS = 256

Chunks = tuple[Sequence[int], Sequence[int]]  # offsets and sizes in bytes of strips or tiles


@dataclass(frozen=True)
class Tiff:
    """The first page of a TIFF: its layout from the tags, and the file's bytes."""

    data: bytes
    order: str  # byte order, "<" or ">"
    tags: Mapping[int, tuple[int, ...] | bytes]
    width: int
    height: int
    bits: int  # of a sample
    samples: int  # of a pixel
    photometric: int
    extra: tuple[int, ...]  # the meaning of each sample behind the colours
    metadata: Metadata

    __repr__ = short_repr

    def orientation(self) -> int | None:
        """Return the orientation, 1 to 8, from its tag, otherwise from XMP; None without a valid one."""
        value = self.number(ORIENTATION, 0)
        return value if 1 <= value <= 8 else self.metadata.orientation()

    def number(self, tag: int, default: int) -> int:
        """Return the first integer of a tag."""
        values = self.numbers(tag)
        return values[0] if values else default

    def numbers(self, tag: int) -> tuple[int, ...]:
        """Return the integers of a tag; empty if it is missing."""
        values = self.tags.get(tag, ())
        return values if isinstance(values, tuple) else ()

    def image(self) -> Image.Image:
        """Decode the page to 8 bits a sample: mode L, LA, RGB or RGBA. Orientation is not applied.

        Raises:
            ImageError: the layout or the compression is not supported, or the pixels are damaged.
        """
        self._check()
        pixels = self._pixels()  # (H, W, S) uint8
        colours = _COLOURS[self.photometric]
        if self.photometric == _PALETTE:
            image = Image.fromarray(self._palette()[pixels[..., 0]])
        elif self.photometric == _CMYK:
            image = Image.frombuffer("CMYK", (self.width, self.height), pixels[..., :4].tobytes()).convert("RGB")
        else:
            if self.photometric == _GREY_INVERTED:
                pixels[..., 0] ^= 255
            image = Image.fromarray(pixels[..., 0] if colours == 1 else np.ascontiguousarray(pixels[..., :3]))
        if self.extra and self.extra[0] != _NO_ALPHA and self.photometric in (_GREY_INVERTED, _GREY, _RGB):
            alpha = Image.fromarray(pixels[..., colours])
            premultiplied = self.extra[0] == _PREMULTIPLIED and self.photometric != _GREY_INVERTED
            mode = {"L": "La" if premultiplied else "LA", "RGB": "RGBa" if premultiplied else "RGBA"}[image.mode]
            image = Image.merge(mode, (*image.split(), alpha)).convert(mode.upper())
        return image

    @property
    def _separate(self) -> bool:
        return self.number(PLANAR, 1) == 2 and self.samples > 1

    def _check(self) -> None:
        """Raise ImageError unless the layout is one that `_pixels` reads correctly."""
        compression = self.number(COMPRESSION, 1)
        formats = set(self.numbers(SAMPLE_FORMAT)) or {1}
        if self.number(NEW_SUBFILE, 0) & 1:
            _refuse("whose first page is a reduced preview, as in camera raw files; export the photo as JPEG or PNG")
        if self.photometric not in _COLOURS:
            name = _OTHER_COLOURS.get(self.photometric, f"an unknown kind of colour ({self.photometric})")
            _refuse(f"with {name}; save it as PNG or JPEG")
        if compression not in _COMPRESSIONS:
            name = _OTHER_COMPRESSIONS.get(compression, f"an unknown kind ({compression})")
            _refuse(f"with compression of {name}; save it without compression or as PNG")
        if formats != {1}:
            kinds = {2: "signed integers", 3: "floating-point numbers", 5: "complex numbers", 6: "complex numbers"}
            _refuse(
                f"whose samples are {kinds.get(max(formats), 'of an unknown type')} of {self.bits} bits, without an "
                "8-bit meaning; save the image with 8 or 16 bits, unsigned"
            )
        if self.bits not in (1, 2, 4, 8, 12, 16):
            _refuse(f"with {self.bits} bits a sample, without an 8-bit meaning; save the image with 8 or 16 bits")
        if self.number(FILL_ORDER, 1) != 1 and self.bits > 8:
            _refuse(f"with reversed bits (FillOrder 2) and {self.bits} bits a sample; save it as PNG")
        if self.photometric == _CMYK and self.number(INK_SET, 1) != 1:
            _refuse("with inks other than CMYK; save it as PNG or JPEG")
        if self.photometric == _YCBCR and (compression != _JPEG or self._separate):
            _refuse("with YCbCr colours in another form than JPEG; save it as PNG or JPEG")
        if self.photometric == _PALETTE and (self.bits > 8 or len(self.numbers(COLOUR_MAP)) != 3 * 2**self.bits):
            _refuse(f"with {self.bits} bits a sample and no palette for them; save it as PNG")
        if compression in (_JPEG, _WEBP) and (self.bits != 8 or not (self._separate or self._is_native)):
            _refuse(f"with {self.samples} lossy samples of {self.bits} bits; save it as PNG or JPEG")
        if compression in _WITH_PREDICTOR and self.number(PREDICTOR, 1) not in (1, 2):
            _refuse(f"with predictor {self.number(PREDICTOR, 1)}; save it as PNG")
        if compression in _WITH_PREDICTOR and self.number(PREDICTOR, 1) == 2 and self.bits not in (8, 16):
            _refuse(f"with a predictor and {self.bits} bits a sample; save it as PNG")

    @property
    def _is_native(self) -> bool:
        """Whether Pillow reads all samples of a pixel together. Otherwise each sample is a grey pixel for Pillow."""
        more = len(self.extra)
        if self.samples == 1 or self.photometric == _YCBCR:
            return more == 0
        most = {8: {_RGB: 3, _CMYK: 2, _GREY: 1, _GREY_INVERTED: 1}, 16: {_RGB: 1, _CMYK: 0}}
        return more <= most.get(self.bits, {}).get(self.photometric, -1)

    def _pixels(self) -> np.ndarray:
        """Return all samples as 8 bits, palette indices unscaled: uint8 (H, W, S)."""
        if self._separate:
            return np.stack([self._decoded(1, plane) for plane in self._planes()], axis=-1)[:, :, 0]
        chunks = self._chunks()
        return self._decoded(self.samples, chunks) if self._is_native else self._decoded(1, chunks, self.samples)

    def _chunks(self) -> Chunks:
        """Return all strips or tiles. Pillow would leave missing ones black."""
        tiled = TILE_OFFSETS in self.tags
        offsets = self.numbers(TILE_OFFSETS if tiled else STRIP_OFFSETS)
        sizes = self.numbers(TILE_BYTES if tiled else STRIP_BYTES)
        across = math.ceil(self.width / max(1, self.number(TILE_WIDTH, 1))) if tiled else 1
        rows = self.number(TILE_HEIGHT if tiled else ROWS_PER_STRIP, self.height)
        needed = across * math.ceil(self.height / max(1, rows)) * (self.samples if self._separate else 1)
        if len(offsets) != needed or (sizes and len(sizes) != needed):
            kind = "tiles" if tiled else "strips"
            raise ImageError(f"the TIFF is damaged: it lists {len(offsets)} {kind} of {needed}; save it again")
        return offsets, sizes

    def _planes(self) -> Iterator[Chunks]:
        """Yield the strips or tiles of each plane."""
        offsets, sizes = self._chunks()
        count = len(offsets) // self.samples
        for start in range(0, len(offsets), count):
            yield offsets[start : start + count], sizes[start : start + count]

    def _decoded(self, samples: int, chunks: Chunks, columns: int = 1) -> np.ndarray:
        """Decompress strips or tiles: uint8 (H, W, S). Pillow leaves out samples behind the alpha channel.

        Args:
            samples: samples of a pixel as Pillow sees it.
            columns: pixels that Pillow sees for each real one.
        """
        predicted = columns > 1 and self.number(PREDICTOR, 1) == 2 and self.number(COMPRESSION, 1) in _WITH_PREDICTOR
        file = self._rewritten(samples, chunks, columns, predictor=not predicted)
        try:
            image = Image.open(io.BytesIO(file), formats=("TIFF",))
            image.load()
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            size = f"{self.width} x {self.height} pixels of {self.samples} samples"
            raise ImageTooLargeError(f"a TIFF of {size}; reduce the image first, or save it with 8 bits") from error
        pixels = np.empty((self.height, self.width, len(image.getbands()) * columns), np.uint8)
        for y in range(0, self.height, _BAND_ROWS):  # a copy of the whole image would need its size again
            rows = np.asarray(image.crop((0, y, image.width, min(y + _BAND_ROWS, self.height))))
            rows = rows.reshape(len(rows), self.width, -1)
            pixels[y : y + _BAND_ROWS] = self._eight_bits(self._summed(rows) if predicted else rows)
        return pixels

    def _eight_bits(self, rows: np.ndarray) -> np.ndarray:
        if rows.dtype == np.bool_:
            return rows * np.uint8(1 if self.photometric == _PALETTE else 255)
        if rows.dtype != np.uint8:
            return (rows >> (self.bits - 8)).astype(np.uint8)
        if self.photometric == _PALETTE and self.bits < 8:  # Pillow has scaled the indices to 0..255
            return rows // np.uint8(255 // (2**self.bits - 1))
        return rows

    def _summed(self, rows: np.ndarray) -> np.ndarray:
        """Undo the predictor: each sample is the difference from the pixel on the left in the same strip or tile."""
        step = self.number(TILE_WIDTH, self.width) if TILE_OFFSETS in self.tags else self.width
        values = rows.astype(np.uint16 if self.bits > 8 else np.uint8)
        for x in range(0, self.width, step):
            part = values[:, x : x + step]
            np.cumsum(part, axis=1, dtype=values.dtype, out=part)
        return values

    def _palette(self) -> np.ndarray:
        """Return the colours: uint8 (2^bits, 3). Some programs write 8 bits where TIFF has 16."""
        colours = np.array(self.numbers(COLOUR_MAP), np.uint16).reshape(3, -1).T
        return (colours if colours.max() < 256 else colours >> 8).astype(np.uint8)

    def _rewritten(self, samples: int, chunks: Chunks, columns: int, predictor: bool) -> bytes:
        """Return the file with one new directory of tags."""
        offsets, sizes = chunks
        tiled = TILE_OFFSETS in self.tags
        inverted_or_palette = self.photometric in (_GREY_INVERTED, _PALETTE)
        photometric = _GREY if samples == 1 or inverted_or_palette else self.photometric
        tags: dict[int, tuple[int, Sequence[int] | bytes]] = {
            WIDTH: (_LONG, [self.width * columns]),
            HEIGHT: (_LONG, [self.height]),
            BITS: (_SHORT, [self.bits] * samples),
            COMPRESSION: (_SHORT, [self.number(COMPRESSION, 1)]),
            PHOTOMETRIC: (_SHORT, [photometric]),
            FILL_ORDER: (_SHORT, [self.number(FILL_ORDER, 1)]),
            SAMPLES: (_SHORT, [samples]),
            TILE_OFFSETS if tiled else STRIP_OFFSETS: (_LONG, offsets),
        }
        if sizes:
            tags[TILE_BYTES if tiled else STRIP_BYTES] = (_LONG, sizes)
        if tiled:
            tags[TILE_WIDTH] = (_LONG, [self.number(TILE_WIDTH, 0) * columns])
            tags[TILE_HEIGHT] = (_LONG, [self.number(TILE_HEIGHT, 0)])
        else:
            tags[ROWS_PER_STRIP] = (_LONG, [min(self.number(ROWS_PER_STRIP, self.height), self.height)])
        if predictor and self.number(COMPRESSION, 1) in _WITH_PREDICTOR:
            tags[PREDICTOR] = (_SHORT, [self.number(PREDICTOR, 1)])
        if more := samples - _COLOURS[photometric]:
            # Alpha, so that Pillow keeps the sample and does not touch the colours. CMYK has no alpha in Pillow.
            tags[EXTRA_SAMPLES] = (_SHORT, [_NO_ALPHA if photometric == _CMYK else _ALPHA, *[_NO_ALPHA] * (more - 1)])
        for tag in _KEPT:
            if (values := self.tags.get(tag)) is not None:
                kind = _UNDEFINED if isinstance(values, bytes) else _SHORT if tag == SUBSAMPLING else _LONG
                tags[tag] = (kind, values)
        # Pillow knows 12 bits only in this order. Their bytes have none.
        return _with_directory(self.data, "<" if self.bits == 12 else self.order, tags)


def is_tiff(data: bytes) -> bool:
    """Return whether the bytes start like a TIFF or a BigTIFF."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def parse_tiff(data: bytes) -> Tiff:
    """Read the tags of the first page.

    Raises:
        ImageError: the directory is damaged, or a tag contradicts the others.
    """
    order = "<" if data[:2] == b"II" else ">"
    try:
        tags = _read_directory(data, order)
    except struct.error as error:
        raise ImageError("the TIFF is damaged or truncated: its directory of tags ends early; save it again") from error

    def number(tag: int, default: int) -> int:
        values = tags.get(tag)
        return values[0] if isinstance(values, tuple) and values else default

    width, height = number(WIDTH, 0), number(HEIGHT, 0)
    photometric = number(PHOTOMETRIC, -1)
    colours = _COLOURS.get(photometric, 1)
    samples = number(SAMPLES, colours if number(COMPRESSION, 1) == _JPEG else 1)
    bits = set(tags.get(BITS, ())) or {1}
    if width < 1 or height < 1:
        raise ImageError("the TIFF is damaged: width or height is missing; save it again")
    if not colours <= samples <= _MAX_SAMPLES:
        _refuse(f"with {samples} samples a pixel, {colours} of them colours; save it as PNG or JPEG")
    if len(bits) != 1:
        _refuse(f"whose samples have {', '.join(map(str, sorted(bits)[:4]))} bits; save it with 8 bits each")
    # Without the tag, a fourth sample behind RGB is alpha, as in Pillow and libtiff.
    missing = [_ALPHA if samples - colours == 1 else _NO_ALPHA] * (samples - colours)
    extra = (tags.get(EXTRA_SAMPLES) or missing)[: samples - colours]
    xmp = tags.get(XMP, b"")
    return Tiff(
        data,
        order,
        tags,
        width,
        height,
        bits.pop(),
        samples,
        photometric,
        tuple(value if value in (_NO_ALPHA, _PREMULTIPLIED) else _ALPHA for value in extra),
        Metadata(xmp=xmp if isinstance(xmp, bytes) else b""),
    )


def _refuse(reason: str) -> NoReturn:
    raise ImageError(f"a TIFF {reason}")


def _read_directory(data: bytes, order: str) -> dict[int, tuple[int, ...] | bytes]:
    """Return the integers of each tag, or its bytes (XMP, JPEG tables). Other types and damaged tags are left out."""
    big = data[2:4] in (b"+\0", b"\0+")
    (at,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
    if at > len(data):  # struct takes no offset beyond 2^63
        raise struct.error("the directory begins behind the end")
    (entries,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, at)
    at += 8 if big else 2
    tags: dict[int, tuple[int, ...] | bytes] = {}
    for i in range(min(entries, 65_535)):
        entry = at + i * (20 if big else 12)
        tag, kind, count = struct.unpack_from(f"{order}HH{'Q' if big else 'I'}", data, entry)
        if tag not in _READ or tag in tags or count > _MAX_VALUES:
            continue
        place, room = (entry + 12, 8) if big else (entry + 8, 4)
        size = _SIZES.get(kind, 0) * count
        if size > room:
            (place,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, place)
        if kind in (1, 7) and tag in (XMP, JPEG_TABLES):
            tags[tag] = data[place : place + min(size, MAX_METADATA_BYTES)]
        elif kind in _INTEGERS and place + size <= len(data):
            tags[tag] = struct.unpack_from(f"{order}{count}{_INTEGERS[kind]}", data, place)
    return tags


def _with_directory(data: bytes, order: str, tags: Mapping[int, tuple[int, Sequence[int] | bytes]]) -> bytes:
    """Return a TIFF with the bytes of another and this directory."""
    start = math.ceil(len(data) / 2) * 2
    place = start + 2 + 12 * len(tags) + 4  # of the values that do not fit into their entry
    entries, values = [], []
    for tag in sorted(tags):
        kind, items = tags[tag]
        try:
            packed = items if isinstance(items, bytes) else struct.pack(f"{order}{len(items)}{_INTEGERS[kind]}", *items)
            inside = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(f"{order}I", place)
        except struct.error as error:
            raise ImageError("the TIFF is damaged, or larger than 4 GB; save it as PNG") from error
        if len(packed) > 4:
            packed += b"\0" * (len(packed) % 2)
            values.append(packed)
            place += len(packed)
        entries.append(struct.pack(f"{order}HHI", tag, kind, len(items)) + inside)
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    return b"".join([header, data[8:], b"\0" * (start - len(data)), directory, *values])
