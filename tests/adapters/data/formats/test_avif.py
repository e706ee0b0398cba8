"""The size of an AVIF's AV1 frames is read from the frames themselves."""

import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adapters import ImageError, ImageTooLargeError
from adapters.data.formats.avif import av1_sizes
from adapters.data.images import decode_image
from tests.support.models import encoded


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 4 if mode == "RGBA" else 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8)).convert(mode)


@pytest.mark.parametrize("size", [(1, 1), (16, 9), (47, 33), (300, 200), (1000, 4)])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": "4:4:4"}, {"quality": 100}, {"speed": 10}, {"codec": "aom", "autotiling": True}]
)
def test_sizes_are_those_of_the_image_when_pillow_wrote_the_avif(
    size: tuple[int, int], options: dict[str, Any]
) -> None:
    assert av1_sizes(encoded(noise(*size), "AVIF", **options)) == [size]


def test_sizes_contain_the_alpha_channel_when_an_avif_has_one() -> None:
    assert av1_sizes(encoded(noise(20, 30, "RGBA"), "AVIF")) == [(20, 30)] * 2


def test_decode_refuses_an_avif_when_its_frame_is_larger_than_its_header_says() -> None:
    data = bytearray(encoded(Image.new("L", (1200, 1000)), "AVIF"))
    at = data.index(b"ispe") + 8
    data[at : at + 8] = struct.pack(">II", 10, 10)
    with pytest.raises(ImageTooLargeError, match=r"^1200 x 1000 pixels, but at most 1000000 are allowed"):
        decode_image(bytes(data), max_pixels=1_000_000)


def test_decode_refuses_an_avif_when_it_is_animated() -> None:
    first, second = noise(16, 16), noise(16, 17).resize((16, 16))
    with pytest.raises(ImageError, match=r"^an animated AVIF; save one frame as PNG or JPEG$"):
        decode_image(encoded(first, "AVIF", save_all=True, append_images=[second]))


def test_sizes_or_an_image_error_result_when_bytes_are_damaged() -> None:
    good = encoded(noise(24, 24), "AVIF", quality=30)
    random = np.random.default_rng(0)
    for i in range(3000):
        data = bytearray(good)
        for at in random.integers(0, min(len(good), 400), random.integers(1, 6)):
            data[at] = random.choice([0, 1, 2, 127, 128, 255, int(random.integers(256))])
        try:
            av1_sizes(bytes(data[: len(data) if i % 2 else random.integers(len(data))]))
        except ImageError:
            continue


def test_decode_refuses_an_avif_when_it_has_too_many_parts() -> None:
    good = encoded(noise(200, 200), "AVIF")
    # The AV1 data become empty temporal delimiters.
    at = good.index(b"mdat") + 4
    with pytest.raises(ImageError, match=r"^an AVIF with more than 1000 parts"):
        decode_image(good[:at] + b"\x12\x00" * ((len(good) - at) // 2) + b"\0" * ((len(good) - at) % 2))
