"""The log lines of all gateways and workers on the hub's own stderr, so that journald and docker show them.

Ray writes the stderr of each of its actors to a file. A thread follows these files. It copies the hub's own lines as
they are, and puts other lines into a line of the configured format.
"""

import ctypes
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ..observability.log_format import OWN_LINE, Format, foreign_line

POLL_S = 0.2
CHUNK_BYTES = 1 << 20
FREE_BYTES = 16 << 20  # of a file that are copied before they are given back to the disk
# Lines that Ray writes without a fault: an actor's name and job, and what happens in Serve.
ORDINARY = re.compile(rb":(actor_name|job_id|task_name):|(INFO|DEBUG) \d{4}-|  \xe2\x80\xa2 ")


@contextmanager
def forwarded_logs(files: Callable[[], Sequence[Path]], stream: TextIO, format: Format) -> Iterator[None]:
    """Copy the lines of these files to a stream while the context lasts, and those left at its end.

    Args:
        files: returns the files; new ones may appear.
        format: format of lines that the hub's code has not written, such as a traceback of Ray's.
    """
    follower = _Follower(stream, format)
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(POLL_S):
            follower.copy(files())

    thread = threading.Thread(target=follow, name="logs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        follower.copy(files())


class _Follower:
    """The places up to which the files are copied."""

    def __init__(self, stream: TextIO, format: Format) -> None:
        self._stream, self._format = stream, format
        self._offsets: dict[Path, int] = {}
        self._freed: dict[Path, int] = {}

    def copy(self, files: Sequence[Path]) -> None:
        """Write all whole new lines to the stream."""
        for path in files:
            with suppress(FileNotFoundError):  # removed
                while new := self._new_lines(path):
                    self._write("".join(f"{line}\n" for line in _formatted(new, self._format)))

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # stderr is closed; the hub serves on
            self._stream.write(text)
            self._stream.flush()

    def _new_lines(self, path: Path) -> bytes:
        """Return the next whole lines of a file, at most `CHUNK_BYTES`, and count them as copied."""
        offset = self._offsets.get(path, 0)
        if offset - self._freed.get(path, 0) >= FREE_BYTES:
            self._freed[path] = offset
            _free_disk(path, offset)
        with path.open("rb") as file:
            file.seek(offset)
            new = file.read(CHUNK_BYTES)
        end = new.rfind(b"\n") + 1 or (len(new) if len(new) == CHUNK_BYTES else 0)
        self._offsets[path] = offset + end
        return new[:end]


def _free_disk(path: Path, size: int) -> None:
    """Give the first bytes of a file back to the disk; the file's length stays, so that its writer notices nothing.

    Otherwise the files of a hub that logs each request would fill the disk. File systems without holes keep the bytes.
    """
    keep_size, punch_hole = 1, 2
    with path.open("r+b") as file:
        ctypes.CDLL(None).fallocate(file.fileno(), keep_size | punch_hole, ctypes.c_int64(0), ctypes.c_int64(size))


def _formatted(text: bytes, format: Format) -> Iterator[str]:
    """Yield the hub's own lines as they are, and each block of other lines as one."""
    block: list[str] = []
    for line in text.splitlines():
        own = OWN_LINE.match(line)
        if block and own:
            yield foreign_line("\n".join(block), format)
            block = []
        if own:
            yield line.decode(errors="replace")
        elif line.strip() and not ORDINARY.match(line):
            block.append(line.decode(errors="replace"))
    if block:
        yield foreign_line("\n".join(block), format)
