"""Reader of a zip of class folders: which entries are images, their labels, and their bytes within limits.

The reader parses the central directory itself, entry by entry. Python's `zipfile` makes an object of a kilobyte per
entry before it returns, so a file of a million entries would take a gigabyte. It never writes an entry to a disk, so a
path in the zip leads nowhere; paths and links are refused nevertheless, because their names are not the user's.
"""

import re
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO

from adapters.data.files import is_system_name

from ...dataset_schemas import Split
from ...errors import InvalidImage, InvalidRequest, TooLarge
from ...field_types import clean_label

MAX_ENTRIES = 100_000
MAX_DIRECTORY_BYTES = 32 * 1024**2
MAX_FOLDERS = 32  # in a path
STEP_ENTRIES = 2000  # of the directory, some 20 ms of Python
MAX_RATIO, RATIO_FROM_BYTES = 200, 1024**2  # images are compressed already; larger entries that shrink more are bombs
CHUNK_BYTES = 256 * 1024
TAIL_BYTES = 22 + 65_535  # the end record with the longest comment
END, END_64, LOCATOR, ENTRY, LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b"PK\x03\x04"
ENCRYPTED, UTF_8 = 1, 1 << 11  # flags
STORED, DEFLATED = 0, 8  # methods
FULL_32, FULL_16 = 0xFFFFFFFF, 0xFFFF
SPLIT_FOLDERS: dict[str, Split] = {"train": "train", "training": "train", "test": "test", "testing": "test"}


@dataclass(frozen=True)
class ZipEntry:
    """One file of a zip.

    Attributes:
        label: name of its folder; None at the top level.
        split: `train` or `test` if a folder above the label's has such a name.
        refusal: why the hub does not read the entry; "" for others.
    """

    name: str
    label: str | None
    split: Split | None
    refusal: str
    method: int
    crc: int
    packed_bytes: int
    size_bytes: int
    offset: int


class ZipFolders:
    """A zip in a file. The methods block; run them in a thread pool."""

    def __init__(self, file: IO[bytes], *, max_image_bytes: int) -> None:
        self._file = file
        self._max_image_bytes = max_image_bytes
        self._size = file.seek(0, 2)

    def entries(self) -> Iterator[list[ZipEntry]]:
        """Yield all files but those that operating systems add to folders.

        Each step reads `STEP_ENTRIES` entries of the directory, and may yield none of them. Reading holds Python's
        interpreter lock.

        Raises:
            InvalidRequest: not a zip, truncated, or entries that share bytes.
            TooLarge: too many entries.
        """
        count, size, offset = self._directory()
        if count > MAX_ENTRIES or size > MAX_DIRECTORY_BYTES:
            message = f"the zip has {count} entries (limit {MAX_ENTRIES}); send it in parts"
            raise TooLarge.at("body", message)
        self._file.seek(offset)
        directory = self._file.read(size)
        if len(directory) < size:
            raise _invalid("the zip is truncated")
        parsed, number, packed = _parse(directory), 0, 0
        while step := list(islice(parsed, STEP_ENTRIES)):
            number += len(step)
            if number > MAX_ENTRIES:
                raise TooLarge.at("body", f"the zip has more than {MAX_ENTRIES} entries; send it in parts")
            packed += sum(entry.packed_bytes for entry in step)
            yield [entry for entry in step if not _is_ignored(entry)]
        if packed > self._size:
            raise _invalid("entries of the zip share the same bytes; write the zip again")

    def read(self, entry: ZipEntry) -> bytes:
        """Return the bytes of an entry.

        Raises:
            InvalidImage: the entry is refused, damaged, or over the limit of an image.
        """
        if entry.refusal:
            raise InvalidImage.at(entry.name, entry.refusal)
        if entry.size_bytes > self._max_image_bytes:
            message = f"the image has {entry.size_bytes} bytes (limit {self._max_image_bytes})"
            raise InvalidImage.at(entry.name, message)
        self._file.seek(min(entry.offset, self._size))  # otherwise the system refuses offsets from 2**63
        header = self._file.read(30)
        if len(header) < 30 or not header.startswith(LOCAL):
            raise InvalidImage.at(entry.name, "the zip is damaged at this entry; write the zip again")
        self._file.seek(sum(struct.unpack("<2H", header[26:])), 1)
        data = b"".join(self._chunks(entry))
        if len(data) != entry.size_bytes or zlib.crc32(data) != entry.crc:
            raise InvalidImage.at(entry.name, "the entry is damaged: its checksum differs; write the zip again")
        return data

    def _chunks(self, entry: ZipEntry) -> Iterator[bytes]:
        """Yield the entry's bytes, never more than its header claims."""
        inflater = zlib.decompressobj(-zlib.MAX_WBITS) if entry.method == DEFLATED else None
        left, size = entry.packed_bytes, 0
        while left > 0 and size <= entry.size_bytes:
            chunk = self._file.read(min(left, CHUNK_BYTES))
            if not chunk:
                return
            left -= len(chunk)
            try:
                piece = inflater.decompress(chunk, entry.size_bytes + 1 - size) if inflater else chunk
            except zlib.error as error:
                raise InvalidImage.at(entry.name, "the entry is damaged; write the zip again") from error
            size += len(piece)
            yield piece

    def _directory(self) -> tuple[int, int, int]:
        """Return number of entries, size and offset of the central directory."""
        start = max(0, self._size - TAIL_BYTES)
        self._file.seek(start)
        tail = self._file.read(TAIL_BYTES)
        at = tail.rfind(END)
        if at < 0 or len(tail) - at < 22:
            raise _invalid("not a zip, or the zip is truncated")
        count, size, offset = struct.unpack("<H2I", tail[at + 10 : at + 20])
        if count == FULL_16 or FULL_32 in (size, offset):
            count, size, offset = self._directory_64(start + at)
        if offset + size > self._size:
            raise _invalid("the zip is truncated, or has bytes before its start")
        return count, size, offset

    def _directory_64(self, end: int) -> tuple[int, int, int]:
        self._file.seek(max(0, end - 20))
        locator = self._file.read(20)
        if not locator.startswith(LOCATOR):
            raise _invalid("the zip is damaged: its ZIP64 locator is missing")
        self._file.seek(min(struct.unpack("<Q", locator[8:16])[0], self._size))
        record = self._file.read(56)
        if len(record) < 56 or not record.startswith(END_64):
            raise _invalid("the zip is damaged: its ZIP64 record is missing")
        count, size, offset = struct.unpack("<3Q", record[32:56])
        return count, size, offset


def _parse(directory: bytes) -> Iterator[ZipEntry]:
    """Yield the files of a central directory, folders left out."""
    at = 0
    while at < len(directory):
        header = directory[at : at + 46]
        if len(header) < 46 or not header.startswith(ENTRY):
            raise _invalid("the directory of the zip is damaged")
        flags, method = struct.unpack("<2H", header[8:12])
        crc, packed, size, name_bytes, extra_bytes, comment_bytes = struct.unpack("<3I3H", header[16:34])
        attributes, offset = struct.unpack("<2I", header[38:46])
        raw = directory[at + 46 : at + 46 + name_bytes]
        extra = directory[at + 46 + name_bytes : at + 46 + name_bytes + extra_bytes]
        at += 46 + name_bytes + extra_bytes + comment_bytes
        packed, size, offset = _sizes_64(extra, packed, size, offset)
        name = _name(raw, flags).replace("\\", "/")
        if not name.endswith("/"):
            mode = attributes >> 16
            yield _entry(name, flags, mode, method, crc, packed, size, offset)


def _entry(name: str, flags: int, mode: int, method: int, crc: int, packed: int, size: int, offset: int) -> ZipEntry:
    *folders, file = name.split("/", MAX_FOLDERS + 1)
    label, split, refusal = None, None, ""
    if len(folders) > MAX_FOLDERS:
        refusal = f"its path has more than {MAX_FOLDERS} folders; put images into one folder per label"
    elif name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in folders or "\0" in name:
        refusal = "its path is absolute or leads out of the zip; use relative paths"
    elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        refusal = "a link or a special file; put the image itself into the zip"
    elif "\ufffd" in name:
        refusal = "its path is not valid UTF-8, so its label is not known; rename it and write the zip again"
    elif flags & ENCRYPTED:
        refusal = "encrypted; write the zip without a password"
    elif method not in (STORED, DEFLATED):
        refusal = f"compressed by method {method}; use Deflate or no compression"
    elif size > RATIO_FROM_BYTES and size > MAX_RATIO * max(packed, 1):
        refusal = f"expands from {packed} to {size} bytes, more than {MAX_RATIO} times, which no image does"
    elif file.lower().endswith((".zip", ".tar", ".gz", ".7z", ".rar")):
        refusal = "an archive inside the zip; put its images into folders of this zip"
    elif folders:
        try:
            label = clean_label(folders[-1])
        except ValueError as error:
            refusal = f"the name of its folder, which is its label, {error}"
        split = next((SPLIT_FOLDERS[f.lower()] for f in folders[:-1] if f.lower() in SPLIT_FOLDERS), None)
    return ZipEntry(name, label, split, refusal, method, crc, packed, size, offset)


def _is_ignored(entry: ZipEntry) -> bool:
    """Return whether an operating system has added the file."""
    parts = entry.name.split("/", MAX_FOLDERS + 1)
    if len(parts) > MAX_FOLDERS + 1:
        return False
    return any((part.startswith(".") and part != "..") or is_system_name(part) for part in parts)


def _name(raw: bytes, flags: int) -> str:
    """Return an entry's name. macOS writes UTF-8 without the flag; other old tools write code page 437."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("utf-8", "replace") if flags & UTF_8 else raw.decode("cp437")


def _sizes_64(extra: bytes, packed: int, size: int, offset: int) -> tuple[int, int, int]:
    """Return sizes and offset; the field 1 of `extra` has those that 32 bits do not hold."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack("<2H", extra[at : at + 4])
        values = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind != 1:
            continue
        numbers = iter(struct.unpack(f"<{len(values) // 8}Q", values[: len(values) // 8 * 8]))
        size = next(numbers, size) if size == FULL_32 else size
        packed = next(numbers, packed) if packed == FULL_32 else packed
        offset = next(numbers, offset) if offset == FULL_32 else offset
    return packed, size, offset


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest.at("body", message)
