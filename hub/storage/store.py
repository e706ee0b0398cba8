"""Files by digest, on any fsspec file system: a folder, S3, GCS. Adapter files, and images and snapshots of datasets.

A file is written once, completely or not at all. Each read checks the digest, so a damaged file is never served. The
calls block; run them in a thread pool.

In a local folder, files and folders have the permissions of the store's folder. A folder that the hub makes is private.

Error texts name a file's digest and never its location, because tenants see them. The log has the location.
"""

import hashlib
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from adapters.format.atomic_write import write_atomically

from ..errors import InsufficientStorage, Unavailable
from ..urls import shown_text

logger = logging.getLogger(__name__)

FILE = re.compile(r"([0-9a-f]{64})\.safetensors")
PRIVATE = 0o700  # of folders that the hub makes


@dataclass(frozen=True)
class Kind:
    """One kind of files in a store.

    Attributes:
        folder: below the store's root, with a slash at its end; "" for the root.
        suffix: of each file's name, after the digest.
        noun: name of the kind in errors.
        remedy: of a missing or damaged file.
    """

    folder: str
    suffix: str
    noun: str
    remedy: str


ADAPTERS = Kind("", ".safetensors", "adapter", "Register the adapter again.")
IMAGES = Kind("images/", ".image", "image", "Delete the image and add it again.")
SNAPSHOTS = Kind("snapshots/", ".json", "snapshot", "Train again.")
REPORTS = Kind("reports/", ".zip", "report", "Train again.")
OWNER = "registry-id"  # file with the id of the registry that the store belongs to
UNFINISHED = re.compile(
    r"\.[0-9a-f]{64}\.(?:safetensors|image|json|zip)\.[a-z0-9_]{8}"
)  # temporary files of `write_atomically`
TIMES = (
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)  # modification time in fsspec


class StoredFile(NamedTuple):
    """A file of the store at the time of the look-up."""

    digest: str
    size_bytes: int
    modified: datetime


class Store:
    """The files of one kind of a hub."""

    def __init__(self, url: str, kind: Kind = ADAPTERS, min_free_bytes: int = 0) -> None:
        """Open a store. The first `put` creates a local folder.

        Args:
            url: a folder, or any fsspec URL (`s3://bucket/prefix`).
            min_free_bytes: bytes that `put` leaves free on the disk of a local folder.
        """
        self._min_free_bytes = min_free_bytes
        self._fs, root = fsspec.core.url_to_fs(url)
        self._top = Path(root)
        self._root = f"{root.rstrip('/')}/{kind.folder}".rstrip("/")
        self._kind = kind
        self._name = re.compile(f"([0-9a-f]{{64}}){re.escape(kind.suffix)}")
        self._local = isinstance(self._fs, LocalFileSystem)

    def put(self, digest: str, data: bytes) -> None:
        """Store a file under its digest. For an intact existing file, set its modification time to now.

        Otherwise garbage collection could remove the file before a version holds it.

        Raises:
            InsufficientStorage: the disk would have less than the least free space.
            Unavailable: the store cannot be written: unreachable, full or not permitted.
        """
        path = self._path(digest)
        try:
            if not self._local:  # an object is visible only after its complete upload
                self._fs.pipe_file(path, data)
            elif not _refresh(Path(path), data):
                self.require_space(len(data))
                write_file(self._top, Path(path), data)
        except InsufficientStorage:
            raise
        except Exception as error:  # each file system has its own exception types
            raise unavailable(error, f"write file {digest}") from error

    def put_missing(self, digest: str, data: bytes) -> None:
        """Store a file again if it was removed since `put`. For a file that is in use by now, so no removal begins."""
        if self.find(digest) is None:
            self.put(digest, data)

    def require_space(self, size_bytes: int) -> None:
        """Check that the disk of a local store has room for a file.

        Raises:
            InsufficientStorage: it has not.
        """
        if self._local:
            require_free_space(Path(self._root), size_bytes, self._min_free_bytes)

    def get(self, digest: str) -> bytes:
        """Return a file after checking its digest.

        Raises:
            Unavailable: the file is missing, unreadable or damaged.
        """
        try:
            data: bytes = self._fs.cat_file(self._path(digest))
        except FileNotFoundError as error:
            message = f"The {self._kind.noun} store has no file {digest}. {self._kind.remedy}"
            raise Unavailable(message) from error
        except Exception as error:
            raise unavailable(error, f"read file {digest}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            path = self._fs.unstrip_protocol(self._path(digest))
            logger.error("%s is damaged: it has %d bytes with sha256 %s", path, len(data), found)
            raise Unavailable(f"The stored file {digest} is damaged: its sha256 differs. {self._kind.remedy}")
        return data

    def find(self, digest: str) -> StoredFile | None:
        """Return size and modification time of a file without reading it; None if the file is missing.

        Raises:
            Unavailable: the store cannot be read.
        """
        try:
            self._fs.invalidate_cache()  # otherwise the answer could be an old listing's
            return self._stored(digest, self._fs.info(self._path(digest)))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise unavailable(error, f"read file {digest}") from error

    def files(self) -> Iterator[StoredFile]:
        """Yield every file of the kind, in no order. Other files are skipped.

        Raises:
            Unavailable: the store cannot be read.
        """
        for name, entry in self._entries():
            match = self._name.fullmatch(name)
            if match and entry["name"] == self._path(match[1]):
                yield self._stored(match[1], entry)

    def delete(self, digest: str) -> bool:
        """Remove a file. Return False if it was missing.

        Raises:
            Unavailable: the store cannot be written.
        """
        try:
            self._fs.rm_file(self._path(digest))
        except FileNotFoundError:
            return False
        except Exception as error:
            raise unavailable(error, f"remove file {digest}") from error
        return True

    def delete_unfinished(self, before: datetime) -> list[int]:
        """Remove temporary files of crashed writes that are older than `before`. Return their sizes in bytes.

        Raises:
            Unavailable: the store cannot be read.
        """
        removed = []
        for name, entry in self._entries() if self._local else ():
            if UNFINISHED.fullmatch(name) and _time(entry) < before:
                try:
                    os.unlink(entry["name"])
                except OSError:
                    continue  # already removed, or owned by another user
                removed.append(entry["size"])
        return removed

    def owner(self) -> str | None:
        """Return the id of the registry that the store belongs to; None for a new store.

        Raises:
            Unavailable: the store cannot be read.
        """
        try:
            return bytes(self._fs.cat_file(f"{self._root}/{OWNER}")).decode().strip()
        except FileNotFoundError:
            return None
        except Exception as error:
            raise unavailable(error, f"read {OWNER}") from error

    def set_owner(self, id: str) -> None:
        """Write the id of the registry that the store belongs to.

        Raises:
            Unavailable: the store cannot be written.
        """
        path = f"{self._root}/{OWNER}"
        try:
            if self._local:
                write_file(self._top, Path(path), id.encode())
            else:
                self._fs.pipe_file(path, id.encode())
        except Exception as error:
            raise unavailable(error, f"write {OWNER}") from error

    def _entries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield name and details of all files in the folders `00` to `ff`, one folder at a time."""
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
            return []  # no file yet, or the folder was removed after its listing
        except Exception as error:
            raise unavailable(error, "list its files") from error

    def _stored(self, digest: str, entry: dict[str, Any]) -> StoredFile:
        return StoredFile(digest, entry["size"], _time(entry))

    def _path(self, digest: str) -> str:
        return f"{self._root}/{digest[:2]}/{digest}{self._kind.suffix}"


def write_file(top: Path, path: Path, data: bytes) -> None:
    """Write a file of a local store, with the permissions of the store's folder: a group may share the folder.

    Args:
        top: the store's folder.
    """
    top.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    mode = stat.S_IMODE(top.stat().st_mode)
    for folder in reversed(path.relative_to(top).parents[:-1]):
        if not (top / folder).exists():
            (top / folder).mkdir(mode=PRIVATE, exist_ok=True)
            with suppress(PermissionError):  # another gateway of the group has just made it
                (top / folder).chmod(mode)
    write_atomically(path, data, mode & 0o666)


def require_free_space(folder: Path, size_bytes: int, min_free_bytes: int) -> None:
    """Check that a folder's disk keeps its least free space beside a new file. The folder may be missing.

    Raises:
        InsufficientStorage: it would not.
    """
    if min_free_bytes == 0:
        return
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes - size_bytes < min_free_bytes:
        logger.error(
            "the disk of %s has %d bytes free; HUB_MIN_FREE_DISK is %d, so a file of %d bytes was refused",
            *(existing, free_bytes, min_free_bytes, size_bytes),
        )
        raise InsufficientStorage(
            "The hub's disk is nearly full, so the hub stores no new file. Classification continues. Ask the operator "
            "to free disk space or to collect garbage (karst-hub gc), then retry."
        )


def _refresh(path: Path, data: bytes) -> bool:
    """Set the modification time of an intact file to now. Return False if the file is missing or damaged."""
    try:
        if path.read_bytes() != data:
            return False
        os.utime(path)
    except (FileNotFoundError, PermissionError):  # just collected, or another user's: a new file replaces it
        return False
    return True


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def _time(entry: dict[str, Any]) -> datetime:
    """Return the modification time. Without one a file counts as new, so garbage collection never removes it."""
    found = next((entry[name] for name in TIMES if entry.get(name) is not None), None)
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    if isinstance(found, datetime):
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    return datetime.fromtimestamp(found, UTC) if found is not None else datetime.max.replace(tzinfo=UTC)


def unavailable(error: Exception, action: str, noun: str = "adapter") -> Unavailable:
    """Log why a store cannot do something, and return the error for the client.

    Args:
        noun: what the store keeps.
    """
    reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    logger.error("the %s store cannot %s: %s", noun, action, shown_text(reason))
    return Unavailable(f"The {noun} store cannot {action}. The hub's log has the cause.")
