"""Metadata of image files: the orientation is read, and everything else is cut out before Pillow opens the file.

Pillow parses metadata while it opens or loads a file, and refuses the file if they are damaged or large. A photo with
sound pixels must not be refused for them.
"""

import re
import struct
import zlib
from dataclasses import dataclass

from ...short_repr import short_repr
from ..errors import ImageError

# Of a JPEG before its pixels, or of an AVIF. Photos have at most 300: a large ICC profile has a part for each 64 KiB.
_MAX_PARTS = 1000
_MAX_PNG_CHUNKS = 20_000  # encoders write pixels in chunks of 8 KiB and more
_PNG_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type ")
_MAX_PNG_TEXTS = 8  # chunks with these names that are read; each may inflate to `MAX_METADATA_BYTES`
_MAX_GIF_BLOCKS = 50_000  # before the first image; XMP in a GIF has one for each hundred bytes or so
_NO_FILL_BYTE = re.compile(rb"[^\xff]")
MAX_METADATA_BYTES = 1024**2  # of EXIF or XMP that is searched for the orientation; longer metadata are cut
_ORIENTATION = 274
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_WITHOUT_BODY = {0x00, 0x01, *range(0xD0, 0xD9)}  # 0: an escaped byte of pixels, which has no meaning here
# Comments, application segments, and reserved ones: Pillow would search the bodies of the last byte by byte.
_JPEG_CUT = {0xFE, *range(0xE0, 0xF0), 0xC8, *range(0xF0, 0xFE)}
_SOS, _EOI = 0xDA, 0xD9
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # TIFF types of one integer


@dataclass
class Metadata:
    """The metadata that may contain an orientation, raw and cut to `MAX_METADATA_BYTES`."""

    exif: bytes = b""
    xmp: bytes = b""

    __repr__ = short_repr

    def orientation(self) -> int | None:
        """Return the orientation, 1 to 8, from EXIF, otherwise from XMP; None if neither has a valid one."""
        return _exif_orientation(self.exif) or _xmp_orientation(self.xmp)


def split_metadata(data: bytes) -> tuple[bytes, Metadata]:
    """Return an image file without its metadata, and the metadata. Pixels and transparency stay unchanged.

    Other formats than JPEG, PNG, GIF, AVIF and HEIF are returned unchanged: Pillow does not parse their metadata.

    Raises:
        ImageError: the file has far more parts than encoders write. Each would hold Python's interpreter lock.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _split_jpeg(data)
    if data.startswith(_PNG_SIGNATURE):
        return _split_png(data)
    if data.startswith(b"GIF8"):
        return _split_gif(data), Metadata()
    if data[4:8] == b"ftyp":
        return _without_exif_item(data), Metadata()
    return data, Metadata()


def _exif_orientation(exif: bytes) -> int | None:
    """Return the orientation, 1 to 8, in the first directory of EXIF bytes; None without a valid one.

    Other entries, valid or not, are passed over.
    """
    exif = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        if order is None:
            return None
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, at)
        for i in range(entries):
            tag, kind, count = struct.unpack_from(f"{order}HHI", exif, at + 2 + 12 * i)
            if tag == _ORIENTATION and kind in _INTEGERS and count == 1:
                (value,) = struct.unpack_from(order + _INTEGERS[kind], exif, at + 10 + 12 * i)
                return int(value) if 1 <= value <= 8 else None
    except struct.error:  # the directory ends beyond the bytes
        pass
    return None


def _xmp_orientation(xmp: bytes) -> int | None:
    """Return the orientation, 1 to 8, in XMP bytes; None without a valid one."""
    found = _XMP_ORIENTATION.search(xmp[:MAX_METADATA_BYTES])
    return int(found[1]) if found else None


def _split_jpeg(data: bytes) -> tuple[bytes, Metadata]:
    """Cut application segments and comments, except the two that say how colours are stored (JFIF and Adobe).

    Bytes between segments go too: Pillow would skip them one by one.
    """
    metadata = Metadata()
    kept = [data[:2]]
    at = start = 2  # data[start:at] is kept and not yet in the list
    for _ in range(_MAX_PARTS):
        found = data.find(b"\xff", at)
        following = None if found < 0 else _NO_FILL_BYTE.search(data, found)
        if following is None or following.start() + 3 > len(data):
            break
        if following.start() - 1 > at:
            kept.append(data[start:at])
            start = at = following.start() - 1
        marker = data[at + 1]
        if marker in _JPEG_WITHOUT_BODY:
            kept.append(data[start:at])
            start = at = at + 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _EOI:  # Pillow would read on
            return b"".join([*kept, data[start : at + 2]]), metadata
        if marker == _SOS or end > len(data):
            break
        if marker in _JPEG_CUT:
            body = data[at + 4 : end]
            if marker == 0xE1 and body.startswith(b"Exif\0\0"):
                metadata.exif = (metadata.exif + body[6:])[:MAX_METADATA_BYTES]
            elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                metadata.xmp = metadata.xmp or body
            colours = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}.get(marker)
            if colours is None or not body.startswith(colours) or len(body) < 12:
                kept.append(data[start:at])
                start = end
        at = end
    else:
        raise _too_many_parts("JPEG", "segments", _MAX_PARTS)
    return (data if start == 2 else b"".join([*kept, data[start:]])), metadata


def _split_png(data: bytes) -> tuple[bytes, Metadata]:
    """Cut every ancillary chunk except transparency. An animation becomes its default image."""
    metadata = Metadata()
    kept = [data[:8]]
    at, texts = 8, 0
    for _ in range(_MAX_PNG_CHUNKS):
        if at + 12 > len(data):
            break
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if end > len(data):
            break
        if not kind[0] & 0x20 or kind == b"tRNS":  # an upper-case first letter: the pixels need the chunk
            kept.append(data[at:end])
        elif kind == b"eXIf":
            metadata.exif = metadata.exif or data[at + 8 : min(end - 4, at + 8 + MAX_METADATA_BYTES)]
        elif kind in (b"tEXt", b"zTXt", b"iTXt") and texts < _MAX_PNG_TEXTS:
            texts += data.startswith(_PNG_TEXTS, at + 8, end - 4)
            _read_png_text(kind, data[at + 8 : end - 4], metadata)
        at = end
        if kind == b"IEND":
            return b"".join(kept), metadata
    else:
        raise _too_many_parts("PNG", "chunks", _MAX_PNG_CHUNKS)
    return b"".join([*kept, data[at:]]), metadata


def _split_gif(data: bytes) -> bytes:
    """Cut the extensions before the first image, except its control extension. Pillow would join their blocks."""
    at = 13 + (3 << (data[10] & 7) + 1 if data[10:11] >= b"\x80" else 0)
    kept, left = [data[:at]], _MAX_GIF_BLOCKS
    while data[at : at + 1] == b"!":
        start, at = at, at + 2
        while (size := data[at : at + 1]) not in (b"", b"\0"):
            at, left = at + 1 + size[0], left - 1
            if not left:
                raise _too_many_parts("GIF", "blocks", _MAX_GIF_BLOCKS)
        at += 1
        if data[start + 1 : start + 2] == b"\xf9":
            kept.append(data[start:at])
    return b"".join([*kept, data[at:]])


def _too_many_parts(name: str, parts: str, limit: int) -> ImageError:
    return ImageError(f"a {name} with more than {limit} {parts}; save it in a simpler form")


def _read_png_text(kind: bytes, body: bytes, metadata: Metadata) -> None:
    """Keep XMP, and the EXIF profile that ImageMagick writes as hexadecimal text."""
    name, _, text = body.partition(b"\0")
    if name == b"XML:com.adobe.xmp" and kind == b"iTXt" and not metadata.xmp:
        metadata.xmp = _inflated(text[2:].split(b"\0", 2)[-1]) if text[:1] == b"\1" else text[:MAX_METADATA_BYTES]
    elif name in (b"Raw profile type exif", b"Raw profile type APP1") and not metadata.exif:
        profile = _inflated(text[1:]) if kind == b"zTXt" else text[:MAX_METADATA_BYTES]
        digits = b"".join(profile.split(b"\n")[3:])
        if re.fullmatch(rb"[0-9A-Fa-f]*", digits):
            metadata.exif = bytes.fromhex(digits[: len(digits) // 2 * 2].decode())


def _inflated(text: bytes) -> bytes:
    """Return at most `MAX_METADATA_BYTES` of a zlib stream; empty if the stream is damaged."""
    try:
        return zlib.decompressobj().decompress(text, MAX_METADATA_BYTES)
    except zlib.error:
        return b""


def _without_exif_item(data: bytes) -> bytes:
    """Rename the EXIF item of an AVIF or HEIF, so that no decoder parses it.

    Rotation and mirroring of these formats are properties of the image, and the EXIF orientation only repeats them
    (ISO/IEC 23008-12, annex A.2.1).
    """
    at = 0
    for _ in range(_MAX_PARTS):
        if at + 8 > len(data):
            break
        size = int.from_bytes(data[at : at + 4], "big")
        end = len(data) if size == 0 else at + size
        if data[at + 4 : at + 8] == b"meta" and 8 <= size <= len(data) - at:
            # An entry: type, version, 3 bytes of flags, item number (2 or 4 bytes), 2 bytes of protection, item type.
            entry = rb"(infe(?:\x02.{7}|\x03.{9}))Exif"
            return data[:at] + re.sub(entry, rb"\1skip", data[at:end], flags=re.DOTALL) + data[end:]
        if end <= at:
            break
        at = end
    else:
        raise _too_many_parts("HEIC or AVIF", "boxes", _MAX_PARTS)
    return data
