"""Labelled image sets, and the same images as prepared tensors."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ..short_repr import short_repr
from .errors import DataError, ImageError
from .files import LeftOut
from .images import MAX_IMAGE_PIXELS, background_of, decode_image, eval_transform, needed_px

DEFAULT_CACHE_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class EncodedImage:
    """An image without a file of its own, such as a row of a table. `read` returns its bytes on demand."""

    name: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, still encoded.

    Attributes:
        sources: one file path or encoded image per image.
        targets: per image, the index of its class in `labels`.
        labels: class names.
        left_out: files of the dataset that its reader did not take.
    """

    sources: tuple[Path | EncodedImage, ...]
    targets: tuple[int, ...]
    labels: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

    __repr__ = short_repr

    def __len__(self) -> int:
        return len(self.sources)

    def read(self, i: int) -> bytes:
        """Return the encoded bytes of image `i`.

        Raises:
            ImageError: the file does not exist or cannot be read.
        """
        source = self.sources[i]
        try:
            return source.read_bytes() if isinstance(source, Path) else source.read()
        except OSError as error:
            raise ImageError(f"the image cannot be decoded: {error.strerror or error}") from error

    def subset(self, indices: Sequence[int]) -> "ImageSet":
        """Return the images at these indices, in this order, with all labels."""
        return ImageSet(tuple(self.sources[i] for i in indices), tuple(self.targets[i] for i in indices), self.labels)


class ImageTensors(Dataset[tuple[Tensor, int]]):
    """An image set as pairs of pixels, uint8 (3, H, W), and target.

    Decoded images are cached until `cache_bytes` is used up. Digests of the encoded bytes are cached without limit.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocess: Mapping[str, Any],
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        *,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        self.images = images
        self._max_pixels = max_pixels
        self._background = background_of(preprocess)
        self._transform = eval_transform(preprocess)
        self._needed_px = needed_px(preprocess)
        self._cache: dict[int, Tensor] = {}
        self._digests: dict[int, bytes] = {}
        self._free_cache_bytes = cache_bytes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Return the pixels and the target of image `i`.

        Raises:
            DataError: the image cannot be read or decoded.
        """
        pixels = self._cache.get(i)
        if pixels is None:
            try:
                pixels = self.decode(i, self.images.read(i))
            except ImageError as error:
                raise DataError(f"{self.images.sources[i]}: {error}") from error
        return pixels, self.images.targets[i]

    def decode(self, i: int, data: bytes) -> Tensor:
        """Decode image `i` from bytes that the caller has read: uint8 (3, H, W). Cache the pixels and the digest.

        Raises:
            ImageError: the bytes cannot be decoded.
        """
        image = decode_image(data, max_pixels=self._max_pixels, needed_px=self._needed_px, background=self._background)
        pixels = self._transform(image)
        if i not in self._digests:
            self._digests[i] = hashlib.sha256(data).digest()
        if i not in self._cache and self._free_cache_bytes >= pixels.nbytes:
            self._free_cache_bytes -= pixels.nbytes
            self._cache[i] = pixels
        return pixels

    def digest(self, i: int) -> bytes:
        """Return the sha256 of the encoded bytes of image `i`, from the cache if `decode` has run.

        Raises:
            ImageError: the image cannot be read.
        """
        if i not in self._digests:
            self._digests[i] = hashlib.sha256(self.images.read(i)).digest()
        return self._digests[i]

    def subset(self, indices: Sequence[int]) -> "ImageTensors":
        """Return the images at these indices, with their cached pixels and digests."""
        part = copy.copy(self)
        part.images = self.images.subset(indices)
        part._cache = {new: self._cache[old] for new, old in enumerate(indices) if old in self._cache}
        part._digests = {new: self._digests[old] for new, old in enumerate(indices) if old in self._digests}
        return part

    def joined(self, more: "ImageTensors") -> "ImageTensors":
        """Return these images followed by others of the same labels, with the cached pixels and digests of both."""
        both = copy.copy(self)
        both.images = ImageSet(
            self.images.sources + more.images.sources, self.images.targets + more.images.targets, self.images.labels
        )
        start = len(self)
        both._cache = self._cache | {start + i: pixels for i, pixels in more._cache.items()}
        both._digests = self._digests | {start + i: digest for i, digest in more._digests.items()}
        return both
