"""Files that are written completely or not at all. No torch: the store of a hub writes with it too."""

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file through a temporary name, so that readers see all of it or none; it survives a power cut.

    Args:
        mode: permissions of the file.

    Raises:
        OSError: the folder does not exist or is not writable, or the disk is full; no file is left behind.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # otherwise a power cut could lose the file's name
    finally:
        os.close(folder)
