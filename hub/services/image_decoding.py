"""Image decoding: a request's bytes to checked, preprocessed pixels, in a thread pool."""

import asyncio
import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from adapters import ImageError, ImageTooLargeError
from adapters.data.images import WHITE, background_of, decode_image, eval_transform, needed_px

from ..concurrency import TenantConcurrencyLimit
from ..errors import InvalidImage, TooLarge

DECODE_TIMEOUT_S = 10.0
# A JPEG scan costs the sender a few bytes and the decoder a pass over the whole image: 10 MB of scans would take hours.
# Cameras and libraries write about ten.
MAX_JPEG_SCANS = 100
THUMBNAIL_PX = 192

Preprocess = Mapping[str, Any]
Decode = Callable[..., Any]
T = TypeVar("T")


class ImageDecoder:
    """Decoder of images in a thread pool, within a hub's size limits."""

    def __init__(
        self,
        executor: Executor,
        *,
        threads: int,
        max_bytes: int,
        max_pixels: int,
        spare_threads: int = 0,
        timeout_s: float = DECODE_TIMEOUT_S,
        decode: Decode = decode_image,
    ) -> None:
        """
        Args:
            executor: thread pool with `threads + spare_threads` threads.
            threads: images decoded at the same time. One tenant gets one thread fewer, so no tenant uses all of them.
            max_bytes: size limit of an encoded image.
            max_pixels: limit of width times height.
            spare_threads: replacements for threads whose decode has timed out. Python cannot stop a running decode: it
                keeps its thread and its tenant's share until it ends, and a spare thread replaces it for others.
            timeout_s: time limit of one decode.
            decode: function that decodes, with the arguments of `adapters.data.images.decode_image`.
        """
        self._executor = executor
        self._tenant_limit = TenantConcurrencyLimit(max(1, threads - 1))
        self._threads = asyncio.Semaphore(threads)
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._spare_threads = spare_threads
        self._timeout_s = timeout_s
        self._decode_image = decode
        self._decodes: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> int:
        """Number of running decodes, including those whose request has ended."""
        return len(self._decodes)

    async def decode(
        self, tenant: str, images: Sequence[tuple[str, bytes | np.ndarray, Preprocess]]
    ) -> list[np.ndarray]:
        """Decode and preprocess encoded images; check pixels that the client has preprocessed.

        Args:
            tenant: tenant whose share of the threads the images use.
            images: for each image its field name (for errors), its bytes or its pixels (3, H, W), uint8 or float32 in
                0..255, and its adapter's `preprocess`.

        Returns:
            Arrays (3, H, W) in the order of `images`: uint8, or float32 for pixels that came as float32.

        Raises:
            TooLarge: an image exceeds the limit of bytes or pixels.
            InvalidImage: an image cannot be decoded or takes too long, or pixels do not fit the adapter.
        """
        results = await asyncio.gather(*(self._one(tenant, *image) for image in images), return_exceptions=True)
        decoded = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            decoded.append(result)
        return decoded

    async def thumbnail(self, tenant: str, field: str, image: bytes) -> bytes:
        """Return a JPEG of at most `THUMBNAIL_PX` on each side, without any metadata of the image.

        Raises:
            TooLarge, InvalidImage: as in `decode`.
        """
        return await self._run(tenant, field, image, self._thumbnail)

    async def _one(self, tenant: str, field: str, image: bytes | np.ndarray, preprocess: Preprocess) -> np.ndarray:
        if isinstance(image, np.ndarray):
            return checked_pixels(field, image, preprocess)
        return await self._run(tenant, field, image, lambda name, data: self._decode(name, data, preprocess))

    async def _run(self, tenant: str, field: str, image: bytes, work: Callable[[str, bytes], T]) -> T:
        """Run work on an encoded image in a thread, within the limits of size, time and the tenant's share."""
        if len(image) > self._max_bytes:
            raise TooLarge.at(field, f"the image has {len(image)} bytes; the limit is {self._max_bytes}")
        async with AsyncExitStack() as held:
            await held.enter_async_context(self._tenant_limit.acquire(tenant))
            await self._threads.acquire()
            decode = asyncio.get_running_loop().run_in_executor(self._executor, work, field, image)
            task = asyncio.create_task(self._hold(held.pop_all(), decode))
            self._decodes.add(task)  # otherwise the task could be garbage-collected: the loop holds weak references
            task.add_done_callback(self._decodes.discard)
        await asyncio.wait((decode,), timeout=self._timeout_s)
        if not decode.done():
            message = f"the image took more than {self._timeout_s:g} s to decode; save it in a simpler form"
            raise InvalidImage.at(field, message)
        return decode.result()

    async def _hold(self, held: AsyncExitStack, decode: "asyncio.Future[Any]") -> None:
        """Hold the tenant's share and the thread until the decode ends, even if the request ends earlier.

        Otherwise a client that disconnects could start any number of decodes. After the timeout a spare thread replaces
        the decode's thread.
        """
        async with held:
            await asyncio.wait((decode,), timeout=self._timeout_s)
            replaced = not decode.done() and self._spare_threads > 0
            if replaced:
                self._spare_threads -= 1
                self._threads.release()
            await asyncio.wait((decode,))
            if replaced:
                self._spare_threads += 1
            else:
                self._threads.release()
        decode.exception()  # otherwise asyncio logs an error that no request retrieved

    def _decode(self, field: str, data: bytes, preprocess: Preprocess) -> np.ndarray:
        image = self._opened(field, data, needed_px=needed_px(preprocess), background=background_of(preprocess))
        pixels: np.ndarray = _transform(json.dumps(preprocess, sort_keys=True))(image).numpy()
        return pixels

    def _thumbnail(self, field: str, data: bytes) -> bytes:
        image = self._opened(field, data, needed_px=THUMBNAIL_PX, background=WHITE)
        image.info.clear()  # otherwise the file would have the colour profile of the image
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        return buffer.getvalue()

    def _opened(self, field: str, data: bytes, **options: Any) -> Any:
        try:
            if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
                raise ImageError(f"the JPEG has more than {MAX_JPEG_SCANS} scans; save it in a simpler form")
            return self._decode_image(data, max_pixels=self._max_pixels, **options)
        except ImageTooLargeError as error:
            raise TooLarge.at(field, str(error)) from error
        except ImageError as error:
            raise InvalidImage.at(field, str(error)) from error


def checked_pixels(field: str, pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Return preprocessed pixels unchanged, C-contiguous.

    Args:
        field: field name for errors.
        pixels: (3, H, W), uint8 or float32 in 0..255.
        preprocess: the adapter's `preprocess`; its `input_size` is [3, H, W].

    Raises:
        InvalidImage: another shape or dtype, or values out of range.
    """
    message = ""
    if list(pixels.shape) != list(preprocess["input_size"]):
        message = f"pixels have shape {list(pixels.shape)}; the adapter takes {list(preprocess['input_size'])}"
    elif pixels.dtype not in (np.uint8, np.float32):
        message = f"pixels have dtype {pixels.dtype}; send uint8 or float32"
    # NaN fails both comparisons.
    elif pixels.dtype == np.float32 and not (pixels.min() >= 0 and pixels.max() <= 255):
        message = "pixels must be in 0..255; send them before normalisation"
    if message:
        raise InvalidImage.at(field, message)
    return np.ascontiguousarray(pixels)


@lru_cache(maxsize=64)
def _transform(preprocess: str) -> Callable[..., Any]:
    return eval_transform(json.loads(preprocess))
