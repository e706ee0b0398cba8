"""Image decoding and preprocessing, shared by training and serving so that both see identical pixels.

Images travel as uint8. Normalisation runs on the model's device. No torch at import: gateways decode without it.
"""

import importlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import AvifImagePlugin, Image, UnidentifiedImageError

from ..backbone_info import BackboneInfo
from ..format.metadata import PREPROCESS
from .errors import ImageError, ImageTooLargeError
from .formats.avif import av1_sizes
from .formats.metadata import Metadata, split_metadata
from .formats.refusals import brands_of, name_of
from .formats.sizes import header_pixels
from .formats.tiff import is_tiff, parse_tiff
from .transform import pixel_transform

if TYPE_CHECKING:
    from torch import Tensor

    from ..backbone import Backbone

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
MAX_IMAGE_PIXELS = 50_000_000
# Resizing the shorter side of a 1 x 50,000,000 image to 224 pixels would need terabytes.
MAX_ASPECT_RATIO = 100
WHITE = (255, 255, 255)

# Otherwise one AVIF would use all cores, and a caller's own threads could not share them fairly.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(
    source: bytes | Path,
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
    needed_px: int | None = None,
    background: Sequence[int] | None = None,
) -> Image.Image:
    """Decode one image to 8-bit RGB.

    The first frame or page is returned. The orientation of EXIF or XMP is applied; other metadata are not parsed.
    Samples of more than 8 bits are reduced to their 8 highest bits.

    Args:
        source: a complete JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF, in memory or in a file; also a HEIC where the
            package `pillow-heif` is installed.
        max_pixels: limit on width times height. It is checked against the header, before decoding. If it is above
            Pillow's own limit (`PIL.Image.MAX_IMAGE_PIXELS`, 89 million), Pillow's is raised for the whole process.
        needed_px: shorter side, in pixels, after the resize that follows (see `needed_px`). A JPEG at least six
            times that size is decoded at 1/2, 1/4 or 1/8 scale, never below three times `needed_px`. This is several
            times faster. docs/performance.md gives the difference in pixel values.
        background: red, green and blue (0 to 255) behind transparent pixels. None drops the alpha channel without
            blending, as the loaders of torchvision and timm do.

    Raises:
        ImageTooLargeError: the image has more than `max_pixels` pixels.
        ImageError: the bytes are empty, truncated, of another format or of a layout without an 8-bit meaning, or the
            aspect ratio exceeds `MAX_ASPECT_RATIO`. The error names the format or the layout, and the remedy.
    """
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise ImageError(f"the image cannot be decoded: {error.strerror or error}") from error
    if not data:
        raise ImageError("0 bytes; expected an image file")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image, orientation = _decoded_tiff(data, max_pixels) if is_tiff(data) else _decoded(data, max_pixels, needed_px)
        image = _to_rgb(image, background)
        return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image
    except ImageError:
        raise
    # Pillow warns above 89 million pixels and raises above twice that. A warnings filter may turn the warning into
    # an error.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(
            f"far more than the {max_pixels} pixels that are allowed; not decoded; reduce the image first"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(name_of(data) or f"not an image; expected one of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, IndexError and more
        message = f"the image cannot be decoded: {error}; it may be damaged or truncated, so send the whole file"
        raise ImageError(message) from error


def pixels_of(data: bytes) -> int:
    """Return the number of pixels that decoding an image file takes, from its headers; 0 if it cannot be decoded.

    For a PNG, JPEG, WebP or BMP `formats.sizes.header_pixels` is faster.
    """
    try:
        if is_tiff(data):
            tiff = parse_tiff(data)
            return tiff.width * tiff.height
        sizes = av1_sizes(data) if "AVIF" in brands_of(data) else []
        return max(width * height for width, height in (*sizes, _opened(split_metadata(data)[0]).size))
    except Exception:  # `decode_image` raises an error that says what is wrong
        return header_pixels(data) or 0


def _decoded(data: bytes, max_pixels: int, needed_px: int | None) -> tuple[Image.Image, int]:
    """Return the pixels of the first frame in Pillow's mode, not yet rotated, and the orientation."""
    data, metadata = split_metadata(data)
    if "AVIF" in brands_of(data):
        for size in av1_sizes(data):
            _check_size(size, max_pixels)
    image = _opened(data)
    _check_size(image.size, max_pixels)
    if needed_px is not None and image.format == "JPEG":
        image.draft(None, (3 * needed_px, 3 * needed_px))
    image.load()
    if image.format == "PNG" and "transparency" in image.info and image.mode != "P":
        return _with_alpha(image, bits=data[24]), metadata.orientation() or 1
    if image.format == "HEIF":  # its decoder has rotated the image
        return image, 1
    # Files of the other formats were not split. Pillow writes an AVIF's own rotation as EXIF.
    more = Metadata(image.info.get("exif", b""), b"" if image.format == "AVIF" else image.info.get("xmp", b""))
    return image, metadata.orientation() or more.orientation() or 1


def _decoded_tiff(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """Return the pixels of the first page, not yet rotated, and the orientation."""
    tiff = parse_tiff(data)
    _check_size((tiff.width, tiff.height), max_pixels)
    return tiff.image(), tiff.orientation() or 1


def _opened(data: bytes) -> Image.Image:
    if "HEIC" in brands_of(data):
        try:
            heif: Any = importlib.import_module("pillow_heif")
        except ImportError as error:
            raise UnidentifiedImageError from error
        try:
            return cast(Image.Image, heif.HeifImageFile(io.BytesIO(data)))
        except SyntaxError as error:
            raise ImageError(f"a HEIC image that is damaged or truncated: {error}; send the whole file") from error
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name != "TIFF"])


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{width} x {height} pixels, but at most {max_pixels} are allowed; reduce the image first"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other; crop the image first"
        )


def preprocess_of(backbone: BackboneInfo, background: Sequence[int] | None = WHITE) -> dict[str, Any]:
    """Return the backbone's preprocessing in the form of an adapter's metadata (timm's data config, JSON types).

    Args:
        background: see `decode_image`. With None the entry is left out.
    """
    config = backbone.data_config
    found = {name: list(config[name]) if isinstance(config[name], tuple) else config[name] for name in PREPROCESS}
    return found if background is None else found | {"background": list(background)}


def background_of(preprocess: Mapping[str, Any]) -> Sequence[int] | None:
    """Return the colour behind transparent pixels; None for an adapter that drops the alpha channel."""
    found: Sequence[int] | None = preprocess.get("background")
    return found


def eval_transform(preprocess: Mapping[str, Any]) -> "Callable[[Image.Image], Tensor]":
    """Return timm's evaluation transform without normalisation: RGB image -> (3, H, W) uint8.

    `transform.pixel_transform` returns the same pixels as an array.
    """
    import torch

    transform = pixel_transform(preprocess)
    return lambda image: torch.from_numpy(transform(image))


def needed_px(preprocess: Mapping[str, Any]) -> int | None:
    """Return the shorter side, in pixels, to which `eval_transform` resizes an image before it crops.

    None for nearest-neighbour interpolation: it samples single pixels, and a reduced JPEG has different ones.
    """
    if preprocess["interpolation"] == "nearest":
        return None
    height, width = preprocess["input_size"][1:]
    return math.ceil(max(int(height), int(width)) / float(preprocess["crop_pct"]))


def normalise(pixels: "Tensor", mean: "Tensor", std: "Tensor") -> "Tensor":
    """Scale and normalise pixels: (B, 3, H, W) uint8 -> float32, bit-equal to torchvision's ToTensor and Normalize.

    Args:
        mean, std: float32, (3,) for the whole batch or (B, 3) per image.
    """
    mean, std = (t.reshape(-1, 3, 1, 1) for t in (mean, std))
    return pixels.float().div_(255).sub_(mean).div_(std)


def normalise_for(backbone: "Backbone", pixels: "Tensor") -> "Tensor":
    """Normalise pixels with the backbone's mean and std, on its device: (B, 3, H, W) uint8 -> float32."""
    config = backbone.data_config
    samples = pixels.to(backbone.device).float()
    return normalise(samples, *(samples.new_tensor(config[name]) for name in ("mean", "std")))


def _with_alpha(image: Image.Image, bits: int) -> Image.Image:
    """Return a PNG's image, in which one colour is transparent, with an alpha channel: RGBA.

    Pillow compares this colour, of `bits` a sample, with pixels of 8 bits, so most depths would match the wrong pixels.
    """
    colour = np.array(image.info["transparency"])
    pixels = np.asarray(image.convert("L") if bits < 8 else image)
    if image.mode == "1":
        colour = np.array(255 * bool(colour))
    elif bits < 8:
        colour = colour * 255 // (2**bits - 1)
    elif bits == 16 and image.mode == "RGB":
        colour = colour >> 8
    same = pixels == colour
    alpha = np.where(same if same.ndim == 2 else same.all(axis=2), 0, 255).astype(np.uint8)
    del image.info["transparency"]
    found = _to_rgb(image, None)
    found.putalpha(Image.fromarray(alpha))
    return found


def _to_rgb(image: Image.Image, background: Sequence[int] | None) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert("RGB") would clip values above 255
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    transparent = "transparency" in image.info or image.mode in ("RGBA", "LA", "PA")
    if transparent and (background is not None or image.mode == "P"):
        image = image.convert("RGBA")  # of a palette, Pillow warns about a direct conversion to RGB
    if image.mode == "RGBA" and background is not None:
        page = Image.new("RGB", image.size, tuple(background))
        page.paste(image, mask=image.getchannel("A"))
        return page
    return image.convert("RGB")
