"""Pooled features of images in the store: float16, one small file per image and backbone.

A file lies beside the images at `features/{key}/{first two digits}/{digest}.f16`. The key names the backbone's weights
and the preprocessing, so that features of another backbone are never used. The calls block; run them in a thread pool.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from .store import unavailable, write_file

KEY_CHARS = 32


def feature_key(fingerprint: str, preprocess: Mapping[str, Any]) -> str:
    """Return the key of a backbone's features: equal weights and preprocessing have equal keys."""
    text = json.dumps([fingerprint, dict(preprocess)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_CHARS]


class FeatureStore:
    """Features of all images, for every backbone that the hub has served."""

    def __init__(self, url: str) -> None:
        self._fs, root = fsspec.core.url_to_fs(url)
        self._top = Path(root)
        self._root = f"{root.rstrip('/')}/features"
        self._local = isinstance(self._fs, LocalFileSystem)

    def put(self, key: str, features: Mapping[str, NDArray[np.float16]]) -> None:
        """Store the features (D,) of images, by digest.

        Raises:
            Unavailable: the store cannot be written.
        """
        files = {self._path(key, digest): row.astype("<f2").tobytes() for digest, row in features.items()}
        try:
            if self._local:
                for path, data in files.items():
                    write_file(self._top, Path(path), data)
            else:
                self._fs.pipe(files)
        except Exception as error:  # each file system has its own exception types
            raise unavailable(error, "write features", "image") from error

    def get(self, key: str, digests: Sequence[str], width: int) -> dict[str, NDArray[np.float16]]:
        """Return the features (width,) of those images that have some. A damaged file counts as missing.

        Raises:
            Unavailable: the store cannot be read.
        """
        paths = {self._path(key, digest): digest for digest in digests}
        try:
            found = self._fs.cat(list(paths), on_error="return") if paths else {}
        except Exception as error:
            raise unavailable(error, "read features", "image") from error
        rows = {}
        for path, data in found.items():
            if isinstance(data, bytes) and len(data) == 2 * width:
                row = np.frombuffer(data, "<f2")
                if np.isfinite(row).all():
                    rows[paths[path]] = row
            elif isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                raise unavailable(data, "read features", "image") from data
        return rows

    def delete(self, digest: str) -> None:
        """Remove an image's features for every backbone.

        Raises:
            Unavailable: the store cannot be written.
        """
        try:
            self._fs.invalidate_cache()
            keys = [str(folder).rpartition("/")[2] for folder in self._fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return
        except Exception as error:
            raise unavailable(error, "list features", "image") from error
        for key in keys:
            try:
                self._fs.rm_file(self._path(key, digest))
            except FileNotFoundError:
                continue
            except Exception as error:
                raise unavailable(error, "remove features", "image") from error

    def _path(self, key: str, digest: str) -> str:
        return f"{self._root}/{key}/{digest[:2]}/{digest}.f16"
