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

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
_BLACK = (0, 0, 0)


def pixel_transform(preprocess: Mapping[str, Any]) -> Callable[[Image.Image], Pixels]:
    """Return timm's evaluation transform without normalisation: RGB image -> (3, H, W) uint8, writable.

    Args:
        preprocess: input_size, interpolation, crop_pct, crop_mode and mean of timm's data config. The mean is the
            colour of the borders of crop_mode `border`.
    """
    crop = int(preprocess["input_size"][1]), int(preprocess["input_size"][2])  # height, width
    height, width = (math.floor(side / preprocess["crop_pct"]) for side in crop)
    mode = preprocess["crop_mode"]
    resampling = _RESAMPLING[preprocess["interpolation"]]
    fill = tuple(round(255 * value) for value in preprocess["mean"]) if mode == "border" else _BLACK

    def transform(image: Image.Image) -> Pixels:
        size = _resized(image.size, (width, height), mode)
        if size != image.size:
            image = image.resize(size, resampling)
        return np.array(_centre_crop(image, crop, fill)).transpose(2, 0, 1)

    return transform


def _resized(size: tuple[int, int], target: tuple[int, int], mode: str) -> tuple[int, int]:
    """Return the width and height after the resize."""
    (width, height), (to_width, to_height) = size, target
    if mode == "squash":
        return target
    if mode != "border" and to_width == to_height:  # the shorter side becomes the target, the longer one is cut off
        if width <= height:
            return to_width, int(to_width * height / width)
        return int(to_width * width / height), to_width
    ratios = height / to_height, width / to_width
    ratio = max(ratios) if mode == "border" else min(ratios)
    return round(width / ratio), round(height / ratio)


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
