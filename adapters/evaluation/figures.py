"""Figures of a report in memory: a notebook shows one at the end of a cell."""

import base64
import html


class Png(bytes):
    """The bytes of a PNG file. A notebook shows the picture."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<PNG, {len(self):,} bytes>"

    def _repr_png_(self) -> bytes:
        return bytes(self)


def image_tag(data: bytes, text: str) -> str:
    """Return an HTML image that contains the bytes of a PNG file."""
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
