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
from .turns import Turns


class Images:
    """Decodes images in a pool of threads, within a hub's limits."""

    def __init__(self, executor: Executor, *, at_once: int, max_bytes: int, max_pixels: int) -> None:
        """
        Args:
            at_once: images of one tenant that may be in the executor; as many as it has threads.
        """
        self._executor = executor
        self._turns = Turns(at_once)
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels

    async def pixels(self, tenant: str, images: Sequence[tuple[str, bytes, Mapping[str, Any]]]) -> list[np.ndarray]:
        """Decode and preprocess images.

        Args:
            tenant: whose they are.
            images: for each image its field's name (for errors), its bytes, and its adapter's `preprocess`.

        Returns:
            uint8 arrays (3, H, W), in the order given.

        Raises:
            TooLarge: an image over the limit of bytes or pixels.
            InvalidImage: bytes that are no usable image.
        """
        done = await asyncio.gather(*(self._in_turn(tenant, *image) for image in images), return_exceptions=True)
        for result in done:
            if isinstance(result, BaseException):
                raise result
        return done  # type: ignore[return-value]

    async def _in_turn(self, tenant: str, field: str, data: bytes, preprocess: Mapping[str, Any]) -> np.ndarray:
        async with self._turns.turn(tenant):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._executor, self._one, field, data, preprocess)

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
