"""Upload of a large file to a temporary file on the hub's disk."""

import tempfile
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

from ..concurrency import Pool, run_blocking
from ..errors import TooLarge, Unavailable
from ..storage.store import require_free_space

CHUNK_BYTES = 1024**2


@asynccontextmanager
async def spooled(
    pool: Pool, chunks: AsyncIterable[bytes], *, max_bytes: int, too_large: str, min_free_bytes: int
) -> AsyncIterator[IO[bytes]]:
    """Write a body to a temporary file without a name: the system removes it even after a crash.

    Args:
        max_bytes: limit of the body.
        too_large: message of the error beyond it.
        min_free_bytes: bytes that the upload leaves free on the disk of temporary files.

    Raises:
        TooLarge: the body has more than `max_bytes`.
        InsufficientStorage: the disk would have less than the least free space.
        Unavailable: the disk is full or cannot be written.
    """
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
    except OSError as error:
        raise _unavailable(error) from error
    with file:
        total, buffer = 0, bytearray()
        async for chunk in chunks:
            total += len(chunk)
            if total > max_bytes:
                raise TooLarge.at("body", too_large)
            buffer += chunk
            if len(buffer) >= CHUNK_BYTES:
                await run_blocking(pool, _write, file, bytes(buffer), min_free_bytes)
                buffer.clear()
        await run_blocking(pool, _write, file, bytes(buffer), min_free_bytes)
        yield file


def _write(file: IO[bytes], data: bytes, min_free_bytes: int) -> None:
    require_free_space(Path(tempfile.gettempdir()), len(data), min_free_bytes)
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        raise _unavailable(error) from error


def _unavailable(error: OSError) -> Unavailable:
    return Unavailable(f"The hub cannot store the upload on its disk: {error.strerror or error}.")
