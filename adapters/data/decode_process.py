"""Decoder of images in a process of its own, which can be ended, and holds no lock of its parent.

Some steps of Pillow's decoders hold Python's interpreter lock: the pixels of a WebP of 50 megapixels are copied in one
step. In the parent's process all other threads would wait for such a step.

    python -m adapters.data.decode_process

reads requests from its standard input, and writes replies to its standard output, until the input ends. A request is a
line of JSON (`Request`) and the image's bytes. A reply is a line of JSON with the size of the image and its pixels, or
with an error.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, Any, cast

from PIL import Image

from .errors import ImageError, ImageTooLargeError
from .images import decode_image
from .transform import resized

NICE = 10  # priority of the process: a tenth of a core beside a thread of normal priority


@dataclass(frozen=True)
class Request:
    """Arguments of `decode_image`, and of `resized`, which follows.

    Attributes:
        size_bytes: of the encoded image.
    """

    size_bytes: int
    max_pixels: int
    needed_px: int | None
    background: Sequence[int] | None
    shorter_px: int
    interpolation: str


class DecodeProcess:
    """A process that decodes one image at a time. The methods block; run them in threads."""

    def __init__(self) -> None:
        """
        Raises:
            OSError: the system starts no further process.
        """
        # In a session of its own, Ctrl+C in a terminal does not reach it. It ends when its input ends with its parent.
        self._process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603 a fixed command
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def decode(self, data: bytes, timeout_s: float, **options: Any) -> Image.Image:
        """Return a decoded and resized image.

        Args:
            timeout_s: then the process is ended.
            options: the other attributes of a `Request`.

        Raises:
            ImageTooLargeError, ImageError: as `decode_image`, or the process has ended.
        """
        watchdog = threading.Timer(timeout_s, self.end)
        watchdog.start()
        try:
            return self._decode(data, Request(size_bytes=len(data), **options))
        except ImageError:
            raise
        except (OSError, ValueError) as error:  # a pipe or a line that is cut off
            self.end()
            message = f"the image ended its decoder, or took more than {timeout_s:g} s; save it in a simpler form"
            raise ImageError(message) from error
        finally:
            watchdog.cancel()

    @property
    def ended(self) -> bool:
        """Whether the process decodes no further images."""
        return self._process.poll() is not None

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process, and close its pipes. No thread may use it any more."""
        self.end()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # bytes that the process has not read
                    pipe.close()

    def _decode(self, data: bytes, request: Request) -> Image.Image:
        requests, replies = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        requests.write(json.dumps(asdict(request)).encode() + b"\n")
        requests.write(data)
        requests.flush()
        reply = json.loads(replies.readline())
        if "error" in reply:
            raise (ImageTooLargeError if reply["too_large"] else ImageError)(reply["error"])
        width, height = reply["size"]
        pixels = replies.read(3 * width * height)
        return Image.frombytes("RGB", (width, height), pixels)


def _serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    while line := requests.readline():
        request = Request(**json.loads(line))
        data = requests.read(request.size_bytes)
        pixels = b""
        try:
            image = decode_image(
                data,
                max_pixels=request.max_pixels,
                needed_px=request.needed_px,
                background=request.background,
            )
            image = resized(image, request.shorter_px, request.interpolation)
            reply: dict[str, Any] = {"size": image.size}
            pixels = image.tobytes()
        except ImageError as error:
            reply = {"error": str(error), "too_large": isinstance(error, ImageTooLargeError)}
        replies.write(json.dumps(reply).encode() + b"\n" + pixels)
        replies.flush()


if __name__ == "__main__":
    if sys.platform != "win32":
        os.setpriority(os.PRIO_PROCESS, 0, max(NICE, os.getpriority(os.PRIO_PROCESS, 0)))
    _serve(sys.stdin.buffer, sys.stdout.buffer)
