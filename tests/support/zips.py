"""Zips of class folders for tests."""

import io
import zipfile
from collections.abc import Mapping


def zip_of(files: Mapping[str, bytes], *, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip of files: path -> bytes. A path that ends in a slash is a folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as written:
        for path, data in files.items():
            written.writestr(path, data)
    return buffer.getvalue()
