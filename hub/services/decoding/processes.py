"""Processes that decode images."""

import threading
from typing import Any

from adapters import ImageError
from adapters.data.decode_process import DecodeProcess

from ...errors import Unavailable


class DecodeProcesses:
    """Decoder of images: as many processes as images at the same time. Threads may share it.

    A process starts with the first image that finds none idle, and stays.
    """

    def __init__(self) -> None:
        self._idle: list[DecodeProcess] = []
        self._closed = False
        self._lock = threading.Lock()

    def decode(self, data: bytes, **options: Any) -> Any:
        """Return a decoded and resized Pillow image, in the calling thread; see `DecodeProcess.decode`.

        Raises:
            ImageTooLargeError, ImageError: the image cannot be decoded in time.
            Unavailable: the system starts no further process.
        """
        process = self._take()
        try:
            image = process.decode(data, **options)
        except ImageError:
            self._give_back(process)
            raise
        except BaseException:
            process.close()
            raise
        self._give_back(process)
        return image

    def close(self) -> None:
        """End the idle processes now, and busy ones after their image."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for process in idle:
            process.close()

    def _take(self) -> DecodeProcess:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        try:
            return DecodeProcess()
        except OSError as error:
            raise Unavailable(f"The gateway cannot start a decoder: {error.strerror}. Retry later.") from error

    def _give_back(self, process: DecodeProcess) -> None:
        with self._lock:
            if not process.ended and not self._closed:
                self._idle.append(process)
                return
        process.close()
