"""A request's bytes -> checked, decoded, preprocessed pixels, off the event loop."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from functools import lru_cache
from typing import Any

import numpy as np

from adapters import ImageError, ImageTooLargeError
from adapters.data.images import decode_image, eval_transform, needed_px

from ..concurrency import Turns
from ..errors import InvalidImage, TooLarge

DECODE_S = 10.0
# A JPEG's scans each pass over the whole picture, and cost the sender a few bytes: 10 MB of them would take hours.
# Cameras and libraries make about ten.
MAX_JPEG_SCANS = 100

Preprocess = Mapping[str, Any]


class Images:
    """Decodes images in a pool of threads, within a hub's limits."""

    def __init__(
        self,
        executor: Executor,
        *,
        at_once: int,
        max_bytes: int,
        max_pixels: int,
        spare: int = 0,
        decode_s: float = DECODE_S,
    ) -> None:
        """
        Args:
            at_once: images that are decoded at the same time; a tenant's are one fewer, so that no tenant takes all.
            spare: threads that the executor has beyond `at_once`. A decode that takes too long cannot be stopped: it
                keeps its thread and its tenant's turn until it ends, and a spare thread works in its place.
            decode_s: the longest that a decode may take.
        """
        self._executor = executor
        self._turns = Turns(max(1, at_once - 1))
        self._threads = asyncio.Semaphore(at_once)
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._spare = spare
        self._decode_s = decode_s
        self._holding: set[asyncio.Task[None]] = set()

    async def pixels(
        self, tenant: str, images: Sequence[tuple[str, bytes | np.ndarray, Preprocess]]
    ) -> list[np.ndarray]:
        """Decode and preprocess images, and check what is preprocessed already.

        Args:
            tenant: whose they are.
            images: for each image its field's name (for errors), its bytes or its pixels (3, H, W), uint8 or float32
                in 0..255, and its adapter's `preprocess`.

        Returns:
            Arrays (3, H, W), uint8, or float32 where pixels came as float32, in the order given.

        Raises:
            TooLarge: an image over the limit of bytes or pixels.
            InvalidImage: bytes that are no usable image or take too long, or pixels that do not fit the adapter.
        """
        done = await asyncio.gather(*(self._one(tenant, *image) for image in images), return_exceptions=True)
        for result in done:
            if isinstance(result, BaseException):
                raise result
        return done  # type: ignore[return-value]

    async def _one(self, tenant: str, field: str, image: bytes | np.ndarray, preprocess: Preprocess) -> np.ndarray:
        if isinstance(image, np.ndarray):
            return checked_pixels(field, image, preprocess)
        if len(image) > self._max_bytes:
            message = f"{len(image)} bytes, but at most {self._max_bytes} are allowed for an image"
            raise TooLarge.at(field, message)
        async with AsyncExitStack() as held:
            await held.enter_async_context(self._turns.turn(tenant))
            await self._threads.acquire()
            decode = asyncio.get_running_loop().run_in_executor(self._executor, self._decode, field, image, preprocess)
            holding = asyncio.create_task(self._hold(held.pop_all(), decode))
            self._holding.add(holding)  # the loop itself keeps no task alive
            holding.add_done_callback(self._holding.discard)
        await asyncio.wait((decode,), timeout=self._decode_s)
        if not decode.done():
            message = f"the image took more than {self._decode_s:g} s to decode; save it again in a simpler form"
            raise InvalidImage.at(field, message)
        return decode.result()

    async def _hold(self, held: AsyncExitStack, decode: "asyncio.Future[np.ndarray]") -> None:
        """Hold a tenant's turn and a thread for as long as a decode runs, though nobody may wait for it any more:
        else a client could start any number of them. From `decode_s` on a spare thread works in the thread's place."""
        async with held:
            await asyncio.wait((decode,), timeout=self._decode_s)
            replaced = not decode.done() and self._spare > 0
            if replaced:
                self._spare -= 1
                self._threads.release()
            await asyncio.wait((decode,))
            if replaced:
                self._spare += 1
            else:
                self._threads.release()
        decode.exception()  # where nobody waited, asyncio would complain that nobody asked

    def _decode(self, field: str, data: bytes, preprocess: Preprocess) -> np.ndarray:
        try:
            if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
                raise ImageError(f"a JPEG of more than {MAX_JPEG_SCANS} scans; save it again in a simpler form")
            image = decode_image(data, max_pixels=self._max_pixels, needed_px=needed_px(preprocess))
        except ImageTooLargeError as error:
            raise TooLarge.at(field, str(error)) from error
        except ImageError as error:
            raise InvalidImage.at(field, str(error)) from error
        return _transform(json.dumps(preprocess, sort_keys=True))(image).numpy()


def checked_pixels(field: str, pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Preprocessed pixels as they are, if they are what the adapter takes: (3, H, W), uint8 or float32 in 0..255.

    Raises:
        InvalidImage: another shape or dtype, or numbers out of range.
    """
    message = ""
    if list(pixels.shape) != list(preprocess["input_size"]):
        message = f"pixels of shape {list(pixels.shape)}, but the adapter takes {list(preprocess['input_size'])}"
    elif pixels.dtype not in (np.uint8, np.float32):
        message = f"pixels of dtype {pixels.dtype}, but uint8 or float32 is needed"
    # NaN fails both comparisons.
    elif pixels.dtype == np.float32 and not (pixels.min() >= 0 and pixels.max() <= 255):
        message = "pixels outside of 0..255; send them as they are before they are normalised"
    if message:
        raise InvalidImage.at(field, message)
    return np.ascontiguousarray(pixels)


@lru_cache(maxsize=64)
def _transform(preprocess: str) -> Callable[..., Any]:
    return eval_transform(json.loads(preprocess))
