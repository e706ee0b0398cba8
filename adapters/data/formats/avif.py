"""The size of the AV1 frames in an AVIF, from their own headers.

An AVIF's header names one size, and its AV1 data another. A decoder allocates the second and scales it to the first, so
a file of 1 kB with a header of 100 x 100 pixels can take the memory of 268 million (libavif's own limit).
"""

from collections.abc import Iterator

from ..errors import ImageError

_MAX_OBUS = 1000  # of an item; encoders write about three
_MAX_BOXES = 10_000  # of a list; grids of phones have hundreds
_MAX_PARTS = 10_000  # of all items
_SEQUENCE_HEADER = 1
_HEADER_BYTES = 64  # of a sequence header that are read; its sizes are in the first 30


def av1_sizes(data: bytes) -> list[tuple[int, int]]:
    """Return the largest width and height that each AV1 sequence header of an AVIF allows.

    Raises:
        ImageError: the file is damaged, animated, or uses a form that no encoder of still images writes.
    """
    sizes: list[tuple[int, int]] = []
    for kind, start, end in _boxes(data, 0, len(data)):
        if kind == b"moov":
            raise ImageError("an animated AVIF; save one frame as PNG or JPEG")
        if kind == b"meta":
            for item in _av1_items(data, start + 4, end):
                sizes += _sequence_sizes(item)
    return sizes


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start of the body, and end of each box.

    Raises:
        ImageError: too many boxes.
    """
    for _ in range(_MAX_BOXES):
        if at + 8 > end:
            return
        size, body = int.from_bytes(data[at : at + 4], "big"), at + 8
        if size == 1:
            size, body = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        if size == 0:
            size = end - at
        if not body - at <= size <= end - at:
            return  # truncated; the decoder refuses the file, or ignores the rest
        yield data[at + 4 : at + 8], body, at + size
        at += size
    raise ImageError(f"an AVIF with more than {_MAX_BOXES} boxes; save it in a simpler form")


def _av1_items(data: bytes, start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes of each AV1 item of a `meta` box (ISO/IEC 14496-12, 8.11.3 and 8.11.6)."""
    items: set[int] = set()
    locations: list[tuple[int, int]] = []
    inside = 0
    for kind, body, box_end in _boxes(data, start, end):
        if kind == b"iinf":
            items |= _av1_numbers(data, body, box_end)
        elif kind == b"iloc":
            locations.append((body, box_end))
        elif kind == b"idat":
            inside = body
    for body, box_end in locations:
        for number, parts in _locations(data[body:box_end], inside):
            if number in items:
                # Otherwise thousands of parts, each of the whole file, would need more memory than the machine has.
                if sum(size or len(data) for _, size in parts) > 2 * len(data):
                    raise ImageError("an AVIF whose items share bytes; save it in a simpler form")
                yield b"".join(data[at : at + size if size else None] for at, size in parts)


def _av1_numbers(data: bytes, body: int, end: int) -> set[int]:
    numbers = set()
    for kind, entry, _ in _boxes(data, body + (6 if data[body : body + 1] == b"\0" else 8), end):
        width = 2 if data[entry : entry + 1] == b"\2" else 4
        if kind == b"infe" and data[entry + 6 + width : entry + 10 + width] == b"av01":
            numbers.add(int.from_bytes(data[entry + 4 : entry + 4 + width], "big"))
    return numbers


def _locations(box: bytes, inside: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield each item's number and its parts in the file: offset and size in bytes."""
    if len(box) < 8:
        raise ImageError("an AVIF whose list of items is damaged; save it again")
    version = box[0]
    offset_size, length_size = box[4] >> 4, box[4] & 15
    base_size, index_size = box[5] >> 4, box[5] & 15 if version else 0
    at = 6

    def number(width: int) -> int:
        nonlocal at
        at += width
        if at > len(box):
            raise ImageError("an AVIF whose list of items is damaged; save it again")
        return int.from_bytes(box[at - width : at], "big")

    left = _MAX_PARTS
    for _ in range(number(4 if version == 2 else 2)):
        item = number(4 if version == 2 else 2)
        method = number(2) & 15 if version else 0
        number(2)
        base = number(base_size) + (inside if method == 1 else 0)
        if method > 1:
            raise ImageError("an AVIF whose items are made of other items; save it as PNG or JPEG")
        parts = []
        for _ in range(number(2)):
            left -= 1
            if not left:
                raise ImageError(f"an AVIF with more than {_MAX_PARTS} parts of items; save it in a simpler form")
            number(index_size)
            offset = number(offset_size)
            parts.append((base + offset, number(length_size)))
        yield item, parts


def _sequence_sizes(item: bytes) -> Iterator[tuple[int, int]]:
    """Yield the sizes in the sequence headers among the open bitstream units of an item (AV1, 5.3 and 5.5)."""
    at = 0
    for _ in range(_MAX_OBUS):
        if at >= len(item):
            return
        header = item[at]
        at += 2 if header & 4 else 1
        size = len(item) - at
        if header & 2:
            size, shift = 0, 0
            while at < len(item) and shift < 56:
                byte = item[at]
                at += 1
                size |= (byte & 127) << shift
                shift += 7
                if not byte & 128:
                    break
        if header >> 3 & 15 == _SEQUENCE_HEADER:
            yield _largest_frame(item[at : at + min(size, _HEADER_BYTES)])
        at += size
    raise ImageError(f"an AVIF with more than {_MAX_OBUS} parts of AV1 data; save it in a simpler form")


def _largest_frame(header: bytes) -> tuple[int, int]:
    at = 0

    def bits(count: int) -> int:
        nonlocal at
        at += count
        if at > 8 * len(header):
            raise ImageError("an AVIF whose AV1 header is truncated; send the whole file")
        return int.from_bytes(header, "big") >> 8 * len(header) - at & (1 << count) - 1

    bits(4)  # profile, still picture
    if bits(1):  # the reduced header of a still picture
        bits(5)
    else:
        if bits(1):
            raise ImageError("an AVIF with the timing of a video; save it as PNG or JPEG")
        delays = bits(1)
        for _ in range(bits(5) + 1):
            bits(12)
            if bits(5) > 7:
                bits(1)
            if delays and bits(1):
                bits(4)
    widths, heights = bits(4) + 1, bits(4) + 1
    return bits(widths) + 1, bits(heights) + 1
