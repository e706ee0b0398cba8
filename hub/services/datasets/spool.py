"""Upload of a large file to a temporary file on the hub's disk."""

import tempfile
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import IO

from ...concurrency import Pool, run_blocking
from ...errors import TooLarge, Unavailable

CHUNK_BYTES = 1024**2


@asynccontextmanager
async def spooled(pool: Pool, chunks: AsyncIterable[bytes], max_bytes: int, subject: str) -> AsyncIterator[IO[bytes]]:
    """Write a body to a temporary file without a name: the system removes it even after a crash.

    Raises:
        TooLarge: the body has more than `max_bytes`.
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
                raise TooLarge.at("body", f"the {subject} has more than {max_bytes} bytes; send it in parts")
            buffer += chunk
            if len(buffer) >= CHUNK_BYTES:
                await _write(pool, file, bytes(buffer))
                buffer.clear()
        await _write(pool, file, bytes(buffer))
        yield file


async def _write(pool: Pool, file: IO[bytes], data: bytes) -> None:
    try:
        await run_blocking(pool, file.write, data)
        await run_blocking(pool, file.flush)
    except OSError as error:
        raise _unavailable(error) from error


def _unavailable(error: OSError) -> Unavailable:
    return Unavailable(f"The hub cannot store the upload on its disk: {error.strerror or error}.")
