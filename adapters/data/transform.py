"""timm's evaluation transform by Pillow and numpy alone: bit-equal to timm's, and without torch.

A gateway decodes every image and runs no model; torch and torchvision would take most of its memory.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels: TypeAlias = NDArray[np.uint8]

_BLACK = (0, 0, 0)


def pixel_transform(preprocess: Mapping[str, Any]) -> Callable[[Image.Image], Pixels]:
    """Return timm's evaluation transform without normalisation: RGB image -> (3, H, W) uint8, writable.

    Args:
        preprocess: input_size, interpolation, crop_pct, crop_mode and mean of timm's data config. The mean is the
            colour of the borders of crop_mode `border`.
    """
    crop = int(preprocess["input_size"][1]), int(preprocess["input_size"][2])  # height, width
    height, width = (math.floor(side / preprocess["crop_pct"]) for side in crop)
    mode, interpolation = preprocess["crop_mode"], preprocess["interpolation"]
    by_shorter_side = resize_of(preprocess)
    fill = tuple(round(255 * value) for value in preprocess["mean"]) if mode == "border" else _BLACK

    def transform(image: Image.Image) -> Pixels:
        if by_shorter_side is not None:
            image = resized(image, *by_shorter_side)
        elif mode == "squash":
            image = _resize(image, (width, height), interpolation)
        else:
            ratios = image.height / height, image.width / width
            ratio = max(ratios) if mode == "border" else min(ratios)
            image = _resize(image, (round(image.width / ratio), round(image.height / ratio)), interpolation)
        return np.array(_centre_crop(image, crop, fill)).transpose(2, 0, 1)

    return transform


def resize_of(preprocess: Mapping[str, Any]) -> tuple[int, str] | None:
    """Return the shorter side, in pixels, and the interpolation of the resize with which `pixel_transform` begins.

    After `resized` with these, `pixel_transform` gives the same pixels as without. None for a transform that resizes
    otherwise.
    """
    _, height, width = preprocess["input_size"]
    if preprocess["crop_mode"] != "center" or height != width:
        return None
    return math.floor(int(height) / float(preprocess["crop_pct"])), str(preprocess["interpolation"])


def resized(image: Image.Image, shorter_px: int, interpolation: str) -> Image.Image:
    """Resize an image to this shorter side, as torchvision does."""
    shorter, longer = sorted(image.size)
    longer_px = int(shorter_px * longer / shorter)
    size = (shorter_px, longer_px) if image.width <= image.height else (longer_px, shorter_px)
    return _resize(image, size, interpolation)


def _resize(image: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling[interpolation.upper()])


def _centre_crop(image: Image.Image, crop: tuple[int, int], fill: Sequence[int]) -> Image.Image:
    """Return the centre of an image in the crop's height and width; a smaller image gets borders."""
    height, width = crop
    more_width, more_height = max(0, width - image.width), max(0, height - image.height)
    if more_width or more_height:
        borders = more_width // 2, more_height // 2, (more_width + 1) // 2, (more_height + 1) // 2
        image = ImageOps.expand(image, borders, tuple(fill))
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
