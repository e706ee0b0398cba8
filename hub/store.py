"""Adapter files by digest, on anything that fsspec reaches: a folder, S3, GCS.

A file is written once, completely or not at all, and read back against its digest: what was damaged on the way
is never served. The calls block; run them in a thread.
"""

import hashlib
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from adapters.file import write_atomically

from .errors import Unavailable


class Store:
    """The adapter files of a hub."""

    def __init__(self, url: str) -> None:
        """Open a store; a local folder is made by the first `put`.

        Args:
            url: a folder, or any fsspec URL (`s3://bucket/prefix`).
        """
        self._fs, root = fsspec.core.url_to_fs(url)
        self._root = root.rstrip("/")

    def put(self, digest: str, data: bytes) -> None:
        """Keep a file under its digest; does nothing if it is there and whole.

        Raises:
            Unavailable: the store cannot be written (away, full, not allowed).
        """
        path = self._path(digest)
        try:
            if self._fs.exists(path) and self._fs.cat_file(path) == data:
                return
            self._fs.makedirs(self._fs._parent(path), exist_ok=True)
            if isinstance(self._fs, LocalFileSystem):
                write_atomically(Path(path), data)
            else:  # an object appears when its upload is complete, never before
                self._fs.pipe_file(path, data)
        except Exception as error:  # every file system has its own kinds
            raise Unavailable(f"the adapter store cannot be written: {_first_line(error)}") from error

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
            raise Unavailable(f"the adapter store cannot be read: {_first_line(error)}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise Unavailable(f"the file {digest} in the adapter store is damaged: its sha256 is another")
        return data

    def _path(self, digest: str) -> str:
        return f"{self._root}/{digest[:2]}/{digest}.safetensors"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
