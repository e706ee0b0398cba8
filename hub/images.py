"""A request's bytes -> checked, decoded, preprocessed pixels, off the event loop."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import lru_cache
from typing import Any

import numpy as np

from adapters import ImageError, ImageTooLargeError
from adapters.data import decode_image, eval_transform, needed_px

from .errors import FieldProblem, InvalidImage, TooLarge


class Images:
    """Decodes images in a pool of threads, within a hub's limits."""

    def __init__(self, executor: Executor, *, max_bytes: int, max_pixels: int) -> None:
        self._executor = executor
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels

    async def pixels(self, images: Sequence[tuple[str, bytes, Mapping[str, Any]]]) -> list[np.ndarray]:
        """Decode and preprocess images.

        Args:
            images: for each image its field's name (for errors), its bytes, and its adapter's `preprocess`.

        Returns:
            uint8 arrays (3, H, W), in the order given.

        Raises:
            TooLarge: an image over the limit of bytes or pixels.
            InvalidImage: bytes that are no usable image.
        """
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(self._executor, self._one, *image) for image in images]
        done = await asyncio.gather(*jobs, return_exceptions=True)
        for result in done:
            if isinstance(result, BaseException):
                raise result
        return done  # type: ignore[return-value]

    def _one(self, field: str, data: bytes, preprocess: Mapping[str, Any]) -> np.ndarray:
        if len(data) > self._max_bytes:
            message = f"{len(data)} bytes, but at most {self._max_bytes} are allowed for an image"
            raise TooLarge(f"{field}: {message}", [FieldProblem(field, message)])
        try:
            image = decode_image(data, max_pixels=self._max_pixels, needed_px=needed_px(preprocess))
        except ImageTooLargeError as error:
            raise TooLarge(f"{field}: {error}", [FieldProblem(field, str(error))]) from error
        except ImageError as error:
            raise InvalidImage(f"{field}: {error}", [FieldProblem(field, str(error))]) from error
        return _transform(json.dumps(preprocess, sort_keys=True))(image).numpy()


@lru_cache(maxsize=64)
def _transform(preprocess: str) -> Callable[..., Any]:
    return eval_transform(json.loads(preprocess))
