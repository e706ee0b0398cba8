"""Encoding of a client's images, and their split into batches that the hub accepts. No HTTP."""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias, TypeVar, cast

from ..errors import InvalidImage, InvalidRequest
from ..schemas import MAX_IMAGES

if TYPE_CHECKING:  # otherwise every command would load both packages
    import numpy as np
    from PIL import Image

T = TypeVar("T")
ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray"
)
ImageSources: TypeAlias = "ImageSource | Iterable[ImageSource]"

_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}  # PNG has no other modes (CMYK, F, ...): TIFF holds them


def iterate_images(images: ImageSources) -> Iterable[ImageSource]:
    """Return the images as an iterable; a single image becomes a list of one."""
    one = isinstance(images, str | bytes | bytearray | memoryview | os.PathLike) or hasattr(images, "read")
    if (
        one or not isinstance(images, Iterable) or getattr(images, "ndim", 4) < 4
    ):  # one array (H, W, 3): an iteration would give its rows
        return [cast("ImageSource", images)]
    return cast("Iterable[ImageSource]", images)


def encode(image: ImageSource, field: str) -> bytes:
    """Return an image as the bytes of an image file. The bytes of files stay unchanged.

    Args:
        image: path, bytes of an image file (also `bytearray`, `memoryview`), file open for reading bytes (read from its
            position to its end), PIL image, or uint8 array (H, W, 3) or (H, W). A PIL image is rotated according to its
            EXIF orientation, because the hub does the same with files.
        field: name of the image in errors.

    Raises:
        InvalidImage: The image has another type, dtype or shape, or cannot be encoded.
        OSError: The file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if hasattr(image, "read"):
        return _read(cast("IO[bytes]", image), field)
    import numpy as np
    from PIL import Image

    try:
        if isinstance(image, np.ndarray):
            pil_image = Image.fromarray(_checked(image))
        elif isinstance(image, Image.Image):
            pil_image = _upright(image)
        else:
            raise ValueError(
                f"unsupported type {type(image).__name__}; "
                "give a path, bytes, an open file, a PIL image or a numpy array"
            )
        buffer = io.BytesIO()
        if pil_image.mode in _PNG_MODES:
            pil_image.save(buffer, "PNG", compress_level=1)
        else:
            pil_image.save(buffer, "TIFF")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow decodes an opened file only now
        raise InvalidImage.at(field, str(error)) from error
    return buffer.getvalue()


def _read(file: IO[bytes], field: str) -> bytes:
    data = file.read()
    if isinstance(data, str):
        raise InvalidImage.at(field, "the file is open for text; open it with mode 'rb'")
    if not data:
        raise InvalidImage.at(field, "the file has no bytes behind its position; rewind it with seek(0)")
    return bytes(data)


def _upright(image: "Image.Image") -> "Image.Image":
    """Return a copy, rotated according to the EXIF orientation, with transparency and without other metadata.

    Pillow's `exif_transpose` writes the EXIF bytes again, which fails for odd entries; so would an encoder.
    """
    from PIL import Image

    image.load()
    try:
        orientation = int(image.getexif().get(274, 1))
    except Exception:  # Pillow raises struct.error, SyntaxError, ValueError and more for damaged EXIF
        orientation = 1
    turns = Image.Transpose
    turn = {
        **{2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE},
        **{6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90},
    }.get(orientation)
    copy = image.copy() if turn is None else image.transpose(turn)
    copy.info = {name: value for name, value in image.info.items() if name == "transparency"}
    return copy


def batches(items: Iterable[tuple[T, int]], max_bytes: int) -> Iterator[tuple[int, list[T]]]:
    """Split items into batches of at most `MAX_IMAGES` items and `max_bytes` bytes, in order.

    An item that is larger than `max_bytes` is a batch of its own.

    Args:
        items: each item with its size in bytes; read one at a time.

    Yields:
        The index of the batch's first item, and the items of the batch.

    Raises:
        InvalidRequest: There are no items.
    """
    start, batch, batch_bytes = 0, list[T](), 0
    for item, item_bytes in items:
        if batch and (len(batch) == MAX_IMAGES or batch_bytes + item_bytes > max_bytes):
            yield start, batch
            start, batch, batch_bytes = start + len(batch), [], 0
        batch.append(item)
        batch_bytes += item_bytes
    if not batch:
        raise InvalidRequest.at("images", "no images; give at least one")
    yield start, batch


def _checked(array: "np.ndarray") -> "np.ndarray":
    valid = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not valid or array.dtype != "uint8" or array.size == 0:
        raise ValueError(
            f"array has shape {array.shape} and dtype {array.dtype}; expected uint8 of shape (H, W, 3) or (H, W)"
        )
    return array
