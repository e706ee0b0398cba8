"""Images as base64 text: decoding, and refusal of such text in place of an image file."""

import base64
from collections.abc import Sequence

from ..errors import InvalidImage

# Starts of PNG, JPEG, GIF, WebP and TIFF as base64, and of a data URL. No image file starts with these bytes.
BASE64_STARTS = (b"iVBORw0KGgo", b"/9j/", b"R0lGOD", b"UklGR", b"SUkqA", b"TU0AK", b"data:image/")
FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")

NamedImage = tuple[str, bytes]  # field name for errors, encoded image


def decode_base64(images: Sequence[tuple[str, str]]) -> list[NamedImage]:
    """Return base64 texts as bytes: either alphabet of RFC 4648, with or without line breaks and padding.

    The header of a `data:` URL is skipped.

    Raises:
        InvalidImage: a text is not base64; the error names its field.
    """
    decoded = []
    for field, text in images:
        try:
            decoded.append((field, _decode_base64(text.partition(",")[2] if text.startswith("data:") else text)))
        except ValueError as error:  # binascii.Error, or a character outside of ASCII
            raise InvalidImage.at(field, f"not base64 (RFC 4648): {error}") from error
    return decoded


def _decode_base64(text: str) -> bytes:
    encoded = text.strip().encode("ascii").translate(None, b"\r\n")
    if b" " in encoded:
        raise ValueError("has a space; decoding of a URL or a form turns + into a space")
    if b"-" in encoded or b"_" in encoded:
        if b"+" in encoded or b"/" in encoded:
            raise ValueError("mixes the standard and the URL-safe alphabet")
        encoded = encoded.translate(FROM_URL_SAFE)
    if b"=" not in encoded:  # the URL-safe form is often sent without padding
        encoded += b"=" * (-len(encoded) % 4)
    return base64.b64decode(encoded, validate=True)


def refuse_base64(field: str, data: bytes) -> None:
    """Refuse base64 text in place of an image file.

    Raises:
        InvalidImage: the data start as the base64 text of an image, or as a `data:` URL.
    """
    if data.startswith(BASE64_STARTS):
        message = "is base64 text of an image; send the bytes of the image file, or base64 text in JSON"
        raise InvalidImage.at(field, message)
