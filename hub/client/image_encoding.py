"""What a client's caller has as an image -> encoded bytes, in portions that the hub takes. No HTTP."""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ..errors import InvalidImage, InvalidRequest
from ..schemas import MAX_IMAGES

if TYPE_CHECKING:  # both are loaded where a caller has such an image, not by every command
    import numpy as np
    from PIL import Image

T = TypeVar("T")
Picture: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray"
Pictures: TypeAlias = "Picture | Iterable[Picture]"

_AS_PNG = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}  # the other modes (CMYK, F, ...) go as TIFF


def each(pictures: Pictures) -> Iterable[Picture]:
    """The images one by one; an image that is given alone counts as a list of one."""
    given: Any = pictures
    alone = isinstance(given, str | bytes | os.PathLike) or not isinstance(given, Iterable)
    if alone or getattr(given, "ndim", 4) < 4:  # an array (H, W, 3), not its rows
        return [given]
    return given


def encode(picture: Picture, field: str) -> bytes:
    """An image as an encoded file; what is a file already stays as it is.

    Args:
        picture: a path, the bytes of a file, a PIL image (turned as its EXIF says, as the hub does with a file), or an
            array (H, W, 3) or (H, W), uint8.
        field: its name in errors.

    Raises:
        InvalidImage: something else.
        OSError: the path cannot be read.
    """
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | os.PathLike):
        return Path(picture).read_bytes()
    import numpy as np
    from PIL import Image, ImageOps

    try:
        if isinstance(picture, np.ndarray):
            image = Image.fromarray(_checked(picture))
        elif isinstance(picture, Image.Image):
            image = ImageOps.exif_transpose(picture)
        else:
            raise ValueError(f"{type(picture).__name__} is no path, bytes, PIL image or array")
        buffer = io.BytesIO()
        if image.mode in _AS_PNG:
            image.save(buffer, "PNG", compress_level=1)
        else:
            image.save(buffer, "TIFF")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's, of a lazily opened file too
        raise InvalidImage.at(field, str(error)) from error
    return buffer.getvalue()


def portions(items: Iterable[tuple[T, int]], most_bytes: int) -> Iterator[tuple[int, list[T]]]:
    """Items in order, at most `MAX_IMAGES` and `most_bytes` at once; one that is larger goes alone.

    Args:
        items: each with its bytes; taken one by one, when they are needed.

    Yields:
        The index of a portion's first item, and its items.

    Raises:
        InvalidRequest: there are none.
    """
    start, portion, portion_bytes = 0, list[T](), 0
    for item, item_bytes in items:
        if portion and (len(portion) == MAX_IMAGES or portion_bytes + item_bytes > most_bytes):
            yield start, portion
            start, portion, portion_bytes = start + len(portion), [], 0
        portion.append(item)
        portion_bytes += item_bytes
    if not portion:
        message = "there is no image; give at least one"
        raise InvalidRequest.at("images", message)
    yield start, portion


def _checked(array: "np.ndarray") -> "np.ndarray":
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not fits or array.dtype != "uint8" or array.size == 0:
        raise ValueError(f"an array {array.shape} of {array.dtype}; expected (H, W, 3) or (H, W) of uint8")
    return array
