"""Image decoding and preprocessing, shared by training and serving so that both see identical pixels.

Images travel as uint8 tensors. Normalisation runs on the model's device.
"""

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data.transforms_factory import create_transform
from torch import Tensor

from ..backbone import Backbone
from ..format.metadata import PREPROCESS
from .errors import ImageError, ImageTooLargeError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_IMAGE_PIXELS = 50_000_000
# Resizing the shorter side of a 1 x 50,000,000 image to 224 pixels would need terabytes.
MAX_ASPECT_RATIO = 100


def decode_image(
    source: bytes | Path, *, max_pixels: int = MAX_IMAGE_PIXELS, needed_px: int | None = None
) -> Image.Image:
    """Decode one image to 8-bit RGB.

    The first frame or page is returned. EXIF orientation is applied. 16-bit channels are scaled to 8 bits.
    The alpha channel is dropped without blending, as in the loaders of torchvision and timm.

    Args:
        source: a complete JPEG, PNG, WebP, BMP, GIF or TIFF, in memory or in a file.
        max_pixels: limit on width times height. It is checked against the header, before decoding.
        needed_px: shorter side, in pixels, after the resize that follows (see `needed_px`). A JPEG at least six
            times that size is decoded at 1/2, 1/4 or 1/8 scale, never below three times `needed_px`. This is several
            times faster. docs/performance.md gives the difference in pixel values.

    Raises:
        ImageTooLargeError: the image has more than `max_pixels` pixels.
        ImageError: the bytes are empty, truncated, of another format or of a 32-bit mode, or the aspect ratio
            exceeds `MAX_ASPECT_RATIO`.
    """
    if isinstance(source, bytes) and not source:
        raise ImageError("0 bytes; expected an image file")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageTooLargeError(
                    f"{width} x {height} pixels, but at most {max_pixels} are allowed; reduce the image first"
                )
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ImageError(
                    f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other; "
                    "crop the image first"
                )
            if needed_px is not None and image.format == "JPEG":
                image.draft(None, (3 * needed_px, 3 * needed_px))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    # Pillow warns above 89 million pixels and raises above twice that. A warnings filter may turn the warning into
    # an error.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(
            f"far more than the {max_pixels} pixels that are allowed; not decoded; reduce the image first"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image; expected one of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, IndexError and more
        raise ImageError(f"the image cannot be decoded: {error}") from error


def preprocess_of(backbone: Backbone) -> dict[str, Any]:
    """Return the backbone's preprocessing in the form of an adapter's metadata (timm's data config, JSON types)."""
    config = backbone.data_config
    return {name: list(config[name]) if isinstance(config[name], tuple) else config[name] for name in PREPROCESS}


def eval_transform(preprocess: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """Return timm's evaluation transform without normalisation: RGB image -> (3, H, W) uint8."""
    transform = create_transform(
        input_size=tuple(preprocess["input_size"]),
        interpolation=preprocess["interpolation"],
        crop_pct=preprocess["crop_pct"],
        crop_mode=preprocess["crop_mode"],
        mean=tuple(preprocess["mean"]),  # fill colour of crop_mode "border"
        is_training=False,
        normalize=False,
    )
    return cast(Callable[[Image.Image], Tensor], transform)


def needed_px(preprocess: Mapping[str, Any]) -> int | None:
    """Return the shorter side, in pixels, to which `eval_transform` resizes an image before it crops.

    None for nearest-neighbour interpolation: it samples single pixels, and a reduced JPEG has different ones.
    """
    if preprocess["interpolation"] == "nearest":
        return None
    height, width = preprocess["input_size"][1:]
    return math.ceil(max(int(height), int(width)) / float(preprocess["crop_pct"]))


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Scale and normalise pixels: (B, 3, H, W) uint8 -> float32, bit-equal to torchvision's ToTensor and Normalize.

    Args:
        mean, std: float32, (3,) for the whole batch or (B, 3) per image.
    """
    mean, std = (t.reshape(-1, 3, 1, 1) for t in (mean, std))
    return pixels.float().div_(255).sub_(mean).div_(std)


def normalise_for(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Normalise pixels with the backbone's mean and std, on its device: (B, 3, H, W) uint8 -> float32."""
    config = backbone.data_config
    mean, std = (torch.tensor(config[name], device=backbone.device) for name in ("mean", "std"))
    return normalise(pixels.to(backbone.device), mean, std)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert("RGB") would clip values above 255
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            f"mode {image.mode!r} (32 bits a pixel) has no 8-bit meaning; save the image with 8 or 16 bits"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct conversion, which gives the same pixels
    return image.convert("RGB")
