"""Images in: open any sane image file, bring it to what a backbone takes, read folders of labelled images.

This is the one place that opens images, for training and serving alike, so that a task meets the same pixels in
both. Pixels travel as uint8 and are normalised beside the model.
"""

import copy
import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..backbone import Backbone
from ..format.validate import PREPROCESS

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_IMAGE_PIXELS = 50_000_000
MAX_ASPECT = 100  # a line of 1 x 50,000,000 pixels, its shorter side brought to 224, would need terabytes


class ImageError(ValueError):
    """The bytes are no image that can be used; the message says why."""


class ImageTooLargeError(ImageError):
    """The image claims more pixels than are allowed; it was not decoded."""


class DataError(ValueError):
    """A data folder that cannot be used; the message names the folder or file."""


def decode_image(
    source: bytes | Path, *, max_pixels: int = MAX_IMAGE_PIXELS, needed_px: int | None = None
) -> Image.Image:
    """Open one image as upright 8-bit RGB: the first frame or page, turned as its EXIF says, 16 bits scaled to 8.

    Transparency is dropped (what lies under it shows), as torchvision's and timm's loaders do it.

    Args:
        source: a JPEG, PNG, WebP, BMP, GIF or TIFF, whole in memory or in a file.
        max_pixels: an image whose header claims more is refused before it is decoded.
        needed_px: the shorter side that the image will be brought to (`needed_px`). A JPEG of at least six times as
            much is decoded to a half, a quarter or an eighth of its size, but at least three times what is needed:
            several times as fast, and nearly the same pixels in the end (docs/performance.md has how nearly).

    Raises:
        ImageTooLargeError: more than `max_pixels`.
        ImageError: empty, no image, another format, truncated, all but a line, or of a mode without an 8-bit meaning.
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
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ImageError(
                    f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other; crop it first"
                )
            if needed_px is not None and image.format == "JPEG":
                image.draft(None, (3 * needed_px, 3 * needed_px))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    # Pillow warns from 89 million pixels on and raises from twice as many; a warning raises where filters say so.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"far more than the {max_pixels} pixels that are allowed; not decoded") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"not an image; expected one of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, IndexError, ...
        raise ImageError(f"the image cannot be decoded: {error}") from error


def preprocess_of(backbone: Backbone) -> dict[str, Any]:
    """What images a backbone takes, as it stands in an adapter's metadata: timm's data config."""
    config = backbone.data_config
    return {name: list(config[name]) if isinstance(config[name], tuple) else config[name] for name in PREPROCESS}


def eval_transform(preprocess: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """timm's own evaluation transform, up to normalisation: RGB image -> (3, H, W) uint8."""
    return timm.data.create_transform(
        input_size=tuple(preprocess["input_size"]),
        interpolation=preprocess["interpolation"],
        crop_pct=preprocess["crop_pct"],
        crop_mode=preprocess["crop_mode"],
        mean=tuple(preprocess["mean"]),  # crop_mode "border" fills with it
        is_training=False,
        normalize=False,
    )


def needed_px(preprocess: Mapping[str, Any]) -> int | None:
    """The shorter side, in pixels, that `eval_transform` brings an image to before it crops.

    None where it takes single pixels instead of means: of a smaller image those would be others.
    """
    if preprocess["interpolation"] == "nearest":
        return None
    return math.ceil(max(preprocess["input_size"][1:]) / preprocess["crop_pct"])


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32, bit-equal to torchvision's ToTensor and Normalize.

    Args:
        mean, std: (3,) for the batch, or (B, 3) for each image its own; float32.
    """
    mean, std = (t.reshape(-1, 3, 1, 1) for t in (mean, std))
    return pixels.float().div_(255).sub_(mean).div_(std)


def normalised(backbone: Backbone, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 as the backbone takes it, on its device."""
    config = backbone.data_config
    mean, std = (torch.tensor(config[name], device=backbone.device) for name in ("mean", "std"))
    return normalise(pixels.to(backbone.device), mean, std)


@dataclass(frozen=True)
class Encoded:
    """An image that is not a file of its own, such as a row of a table; its bytes are read when they are asked for."""

    name: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: `targets[i]` is the index in `labels` of what `paths[i]` shows."""

    paths: tuple[Path | Encoded, ...]
    targets: tuple[int, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> bytes:
        """The encoded image.

        Raises:
            ImageError: it is not there or cannot be read.
        """
        source = self.paths[i]
        try:
            return source.read_bytes() if isinstance(source, Path) else source.read()
        except OSError as error:
            raise ImageError(f"the image cannot be decoded: {error.strerror or error}") from error

    def subset(self, indices: Sequence[int]) -> "ImageSet":
        return ImageSet(tuple(self.paths[i] for i in indices), tuple(self.targets[i] for i in indices), self.labels)


def read_folder(root: Path, labels: Sequence[str] | None = None) -> ImageSet:
    """A folder with one folder of images a class; the folders' names are the labels, in natural order (9 before 10).

    Args:
        labels: the classes of an earlier folder, for a test set of the same task.

    Raises:
        DataError: no such folder, fewer than two classes, a class without images, or a class not in `labels`.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected one with a folder of images for each class")
    folders = sorted(
        (p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: natural(p.name)
    )
    names = tuple(labels) if labels is not None else tuple(f.name for f in folders)
    if labels is None and len(folders) < 2:
        raise DataError(f"{root}: {len(folders)} class folders, but a task needs at least 2")
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{root}: a class folder's name is not UTF-8; a label must be") from error
    unknown = [f.name for f in folders if f.name not in names]
    if unknown:
        raise DataError(f"{root}: classes {', '.join(unknown)} are not among the task's labels {', '.join(names)}")
    if not folders:
        raise DataError(f"{root}: no class folders in it; expected one for each of {', '.join(names)}")
    paths: list[Path | Encoded] = []
    targets: list[int] = []
    for folder in folders:
        images = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        if not images:
            raise DataError(f"{folder}: no images in it; expected files ending in {', '.join(SUFFIXES)}")
        paths += images
        targets += [names.index(folder.name)] * len(images)
    return ImageSet(tuple(paths), tuple(targets), names)


class Pixels(Dataset):
    """An image set as (uint8 (3, H, W), target) pairs; each image is decoded once while they fit in `cache_bytes`."""

    def __init__(self, images: ImageSet, preprocess: Mapping[str, Any], cache_bytes: int = 4 * 1024**3) -> None:
        self.images = images
        self._transform = eval_transform(preprocess)
        self._needed_px = needed_px(preprocess)
        self._cache: dict[int, Tensor] = {}
        self._digests: dict[int, bytes] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """
        Raises:
            DataError: the file is no usable image.
        """
        pixels = self._cache.get(i)
        if pixels is None:
            try:
                pixels = self.decode(i, self.images.read(i))
            except ImageError as error:
                raise DataError(f"{self.images.paths[i]}: {error}") from error
        return pixels, self.images.targets[i]

    def decode(self, i: int, data: bytes) -> Tensor:
        """Image `i` from its bytes, for who has read them already: uint8 (3, H, W), kept if there is room.

        Raises:
            ImageError: the bytes are no usable image.
        """
        pixels = self._transform(decode_image(data, needed_px=self._needed_px))
        if i not in self._digests:
            self._digests[i] = hashlib.sha256(data).digest()
        if i not in self._cache and self._room >= pixels.nbytes:
            self._room -= pixels.nbytes
            self._cache[i] = pixels
        return pixels

    def digest(self, i: int) -> bytes:
        """sha256 of the bytes of image `i`; they are read only if that was never done.

        Raises:
            ImageError: it is not there or cannot be read.
        """
        if i not in self._digests:
            self._digests[i] = hashlib.sha256(self.images.read(i)).digest()
        return self._digests[i]

    def subset(self, indices: Sequence[int]) -> "Pixels":
        """Some of the images, with what is decoded already."""
        part = copy.copy(self)
        part.images = self.images.subset(indices)
        part._cache = {new: self._cache[old] for new, old in enumerate(indices) if old in self._cache}
        part._digests = {new: self._digests[old] for new, old in enumerate(indices) if old in self._digests}
        return part


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key for names in natural order: 9 before 10."""
    parts = re.findall(r"\d+|\D+", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert("RGB") would clip to 255 instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"mode {image.mode!r} (32 bits a pixel) has no 8-bit meaning; save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same pixels in the end; Pillow warns about the direct way
    return image.convert("RGB")
