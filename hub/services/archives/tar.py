"""Uncompressed tars, as an export writes them and an import reads them: plain files without any extension."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, TypeVar

from pydantic import BaseModel, ValidationError

from ...errors import InvalidRequest

M = TypeVar("M", bound=BaseModel)

BLOCK_BYTES = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK_BYTES)
CHUNK_BYTES = 1024**2
MAX_PADDING_BYTES = 64 * 1024  # some tools add zeros after the end


@dataclass(frozen=True)
class Member:
    """A member of a tar: its name, and the position of its content.

    Attributes:
        at: position of its header.
        is_file: whether it is a plain file.
    """

    name: str
    at: int
    size_bytes: int
    is_file: bool

    @property
    def offset(self) -> int:
        """Position of the content."""
        return self.at + BLOCK_BYTES


def member_bytes(size_bytes: int) -> int:
    """Return how many bytes a member with content of this size takes in a tar."""
    return BLOCK_BYTES + size_bytes + len(padding(size_bytes))


def header(name: str, size_bytes: int) -> bytes:
    """Return the header of a member."""
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    return member.tobuf(tarfile.USTAR_FORMAT)


def padding(size_bytes: int) -> bytes:
    """Return what follows a content of this size."""
    return bytes(-size_bytes % BLOCK_BYTES)


def member(name: str, *parts: bytes) -> Iterator[bytes]:
    """Yield a member with its header and padding, in small pieces."""
    size_bytes = sum(map(len, parts))
    yield header(name, size_bytes)
    for part in parts:
        for at in range(0, len(part), CHUNK_BYTES):
            yield part[at : at + CHUNK_BYTES]
    yield padding(size_bytes)


def members(file: IO[bytes]) -> Iterator[Member]:
    """Yield the members of a tar in order. The caller refuses sizes that it does not expect.

    Headers are parsed with `TarInfo.frombuf`, not with `TarFile`: that class also follows extensions (long names,
    sparse files, links), which an export never has and a hostile file may have.

    Raises:
        InvalidRequest: the tar is damaged, truncated, or followed by something else.
    """
    end = file.seek(0, 2)
    at = 0
    while True:
        file.seek(at)
        block = file.read(BLOCK_BYTES)
        if block == bytes(BLOCK_BYTES):
            break
        try:
            found = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise invalid(f"not a tar, or the tar is truncated or damaged at byte {at}") from error
        yield Member(found.name, at, found.size, found.type == tarfile.REGTYPE)
        at += member_bytes(max(0, found.size))
    end_blocks = file.read(MAX_PADDING_BYTES)
    max_end = at + BLOCK_BYTES + MAX_PADDING_BYTES
    if at == 0 or len(end_blocks) < BLOCK_BYTES or any(end_blocks) or end > max_end:
        raise invalid("the tar has no valid end: two blocks of zeros")


def read(file: IO[bytes], member: Member) -> bytes:
    """Return the content of a member. Several threads may read one file at once."""
    return os.pread(file.fileno(), member.size_bytes, member.offset)


def json_lines(file: IO[bytes], name: str, member: Member, model: type[M], max_line_bytes: int) -> Iterator[M]:
    """Yield the lines of a member as models. Other reads of the file may come between two lines.

    Args:
        name: of the member, for errors.

    Raises:
        InvalidRequest: a line is no such JSON text, or has too many bytes.
    """
    at, end, number = member.offset, member.offset + member.size_bytes, 0
    while at < end:
        file.seek(at)
        line = file.readline(min(max_line_bytes, end - at))
        at, number = at + len(line), number + 1
        where = f"{name}: line {number}"
        if not line.endswith(b"\n"):
            raise invalid(f"{where} has no end, or more than {max_line_bytes} bytes")
        try:
            yield model.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the line"
            raise invalid(f"{where}: {field}: {first['msg']}") from error


def invalid(message: str) -> InvalidRequest:
    """Return the error of a body that is no export."""
    return InvalidRequest.at("body", message)
