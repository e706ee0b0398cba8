"""Adapter files by digest, on anything that fsspec reaches: a folder, S3, GCS.

A file is written once, completely or not at all, and read back against its digest: what was damaged on the way
is never served. The calls block; run them in a thread.

Errors name the file's digest and nothing of the place: whoever gets them may be a tenant. The log has the rest.
"""

import hashlib
import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from adapters.format.file import write_atomically

from ..errors import Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")
FILE = re.compile(r"([0-9a-f]{64})\.safetensors")
UNFINISHED = re.compile(r"\.[0-9a-f]{64}\.safetensors\.[a-z0-9_]{8}")  # as `write_atomically` names what it writes
TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")  # how file systems call it


class OffLoop(Protocol):
    """Runs a blocking function in a thread."""

    def __call__(self, function: Callable[..., T], /, *args: Any) -> Awaitable[T]: ...


class StoredFile(NamedTuple):
    """A file of the store, as it was when somebody looked."""

    digest: str
    size_bytes: int
    modified: datetime


class Store:
    """The adapter files of a hub."""

    def __init__(self, url: str) -> None:
        """Open a store; a local folder is made by the first `put`.

        Args:
            url: a folder, or any fsspec URL (`s3://bucket/prefix`).
        """
        self._fs, root = fsspec.core.url_to_fs(url)
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def put(self, digest: str, data: bytes) -> None:
        """Keep a file under its digest. One that is there and whole is only made young again, so that it is not
        collected before a version holds it.

        Raises:
            Unavailable: the store cannot be written (away, full, not allowed).
        """
        path = self._path(digest)
        try:
            if not self._local:  # an object appears when its upload is complete, never before
                self._fs.pipe_file(path, data)
            elif not _refresh(Path(path), data):
                self._fs.makedirs(self._fs._parent(path), exist_ok=True)
                write_atomically(Path(path), data)
        except Exception as error:  # every file system has its own kinds
            raise _unwritable(error, f"file {digest}") from error

    def get(self, digest: str) -> bytes:
        """Read a file and check it against its digest.

        Raises:
            Unavailable: not there, not readable, or damaged.
        """
        try:
            data = self._fs.cat_file(self._path(digest))
        except FileNotFoundError as error:
            raise Unavailable(f"the adapter store has no file {digest}") from error
        except Exception as error:
            raise _unreadable(error, f"file {digest}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            path = self._fs.unstrip_protocol(self._path(digest))
            logger.error("%s is damaged: it has %d bytes with sha256 %s", path, len(data), found)
            raise Unavailable(f"the file {digest} in the adapter store is damaged: its sha256 is another")
        return data

    def find(self, digest: str) -> StoredFile | None:
        """Size and age of a file without reading it; None where it is not there.

        Raises:
            Unavailable: the store cannot be read.
        """
        try:
            self._fs.invalidate_cache()  # another process may have changed what a listing had
            return self._stored(digest, self._fs.info(self._path(digest)))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise _unreadable(error, f"file {digest}") from error

    def files(self) -> Iterator[StoredFile]:
        """Every adapter file, in no order; whatever else lies there is passed over.

        Raises:
            Unavailable: the store cannot be read.
        """
        for name, entry in self._entries():
            match = FILE.fullmatch(name)
            if match and entry["name"] == self._path(match[1]):
                yield self._stored(match[1], entry)

    def delete(self, digest: str) -> bool:
        """Remove a file; False where it was not there.

        Raises:
            Unavailable: the store cannot be written.
        """
        try:
            self._fs.rm_file(self._path(digest))
        except FileNotFoundError:
            return False
        except Exception as error:
            raise _unwritable(error, f"the removal of file {digest}") from error
        return True

    def delete_unfinished(self, before: datetime) -> list[int]:
        """Remove what writes that a crash cut short have left, if it is older than `before`; returns sizes in bytes.

        Raises:
            Unavailable: the store cannot be read.
        """
        removed = []
        for name, entry in self._entries() if self._local else ():
            if UNFINISHED.fullmatch(name) and _time(entry) < before:
                try:
                    os.unlink(entry["name"])
                except OSError:
                    continue  # gone, or not ours
                removed.append(entry["size"])
        return removed

    def _entries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names and details of all files in the folders for the digests' first two digits, one folder at a time."""
        self._fs.invalidate_cache()
        for folder in self._list(self._root):
            if folder["type"] == "directory" and re.fullmatch(r"[0-9a-f]{2}", _name(folder)):
                for entry in self._list(folder["name"]):
                    if entry["type"] == "file":
                        yield _name(entry), entry

    def _list(self, folder: str) -> list[dict[str, Any]]:
        try:
            return list(self._fs.ls(folder, detail=True))
        except FileNotFoundError:
            return []  # nothing was put yet, or the folder went away meanwhile
        except Exception as error:
            raise _unreadable(error, "its files") from error

    def _stored(self, digest: str, entry: dict[str, Any]) -> StoredFile:
        return StoredFile(digest, entry["size"], _time(entry))

    def _path(self, digest: str) -> str:
        return f"{self._root}/{digest[:2]}/{digest}.safetensors"


def _refresh(path: Path, data: bytes) -> bool:
    """Whether the file is there and whole; its age is nothing then."""
    try:
        if path.read_bytes() != data:
            return False
        os.utime(path)
    except (FileNotFoundError, PermissionError):  # collected meanwhile; or another user's, whom a new file replaces
        return False
    return True


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def _time(entry: dict[str, Any]) -> datetime:
    """When a file was written last. One whose file system does not tell is young for ever, and never collected."""
    found = next((entry[name] for name in TIMES if entry.get(name) is not None), None)
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    if isinstance(found, datetime):
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    return datetime.fromtimestamp(found, UTC) if found is not None else datetime.max.replace(tzinfo=UTC)


def _unreadable(error: Exception, what: str) -> Unavailable:
    logger.error("the adapter store cannot be read (%s): %s", what, _first_line(error))
    return Unavailable(f"the adapter store does not give {what} for now; the hub's log says why")


def _unwritable(error: Exception, what: str) -> Unavailable:
    logger.error("the adapter store cannot be written (%s): %s", what, _first_line(error))
    return Unavailable(f"the adapter store does not take {what} for now; the hub's log says why")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
