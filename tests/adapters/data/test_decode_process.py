"""The decoder in a process of its own: the same pixels and errors, and an end when it takes too long."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adapters import ImageError, ImageTooLargeError
from adapters.data.decode_process import DecodeProcess
from adapters.data.images import WHITE, decode_image, eval_transform, needed_px
from adapters.data.transform import resize_of
from tests.support.models import PREPROCESS, encoded

OPTIONS: dict[str, Any] = {"max_pixels": 10**6, "needed_px": 40, "background": WHITE}
RESIZE: dict[str, Any] = {"shorter_px": 40, "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def process() -> Iterator[DecodeProcess]:
    process = DecodeProcess()
    yield process
    process.close()


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (size[1] // 8, size[0] // 8, len(mode)), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_pixels_are_those_of_the_thread_when_a_process_decodes_and_resizes(
    process: DecodeProcess, interpolation: str
) -> None:
    files = [
        encoded(picture((801, 350)), "JPEG", quality=90),
        encoded(picture((350, 801), "RGBA"), "PNG"),
        encoded(picture((400, 400)), "WEBP"),
    ]
    for side, crop_pct in ((32, 0.875), (37, 0.95)):
        preprocess = PREPROCESS | {"input_size": [3, side, side], "crop_pct": crop_pct, "interpolation": interpolation}
        options = OPTIONS | {"needed_px": needed_px(preprocess)}
        resize = resize_of(preprocess)
        assert resize is not None
        for file in files:
            wanted = eval_transform(preprocess)(decode_image(file, **options))
            shorter_px, name = resize
            found = process.decode(file, 60, shorter_px=shorter_px, interpolation=name, **options)
            assert min(found.size) == shorter_px
            assert (eval_transform(preprocess)(found) == wanted).all()


@pytest.mark.parametrize("change", [{"crop_mode": "squash"}, {"crop_mode": "border"}, {"input_size": [3, 32, 48]}])
def test_no_process_resizes_when_the_transform_is_not_a_resize_of_the_shorter_side(change: dict[str, Any]) -> None:
    assert resize_of(PREPROCESS | change) is None


def test_error_is_that_of_the_thread_when_an_image_is_bad(process: DecodeProcess) -> None:
    for file in (b"no image", encoded(picture((400, 400)), "PNG")[:900]):
        with pytest.raises(ImageError) as wanted:
            decode_image(file, **OPTIONS)
        with pytest.raises(ImageError) as found:
            process.decode(file, 60, **OPTIONS, **RESIZE)
        assert str(found.value) == str(wanted.value)
    with pytest.raises(ImageTooLargeError, match=r"^1200 x 1000 pixels"):
        process.decode(encoded(Image.new("RGB", (1200, 1000)), "PNG"), 60, **OPTIONS, **RESIZE)
    assert process.decode(encoded(picture((80, 80)), "PNG"), 60, **OPTIONS, **RESIZE).size == (40, 40)


def test_process_ends_when_an_image_takes_too_long() -> None:
    process = DecodeProcess()
    with pytest.raises(ImageError, match=r"took more than 0.001 s; save it in a simpler form$"):
        process.decode(encoded(picture((800, 800)), "PNG"), 0.001, **OPTIONS, **RESIZE)
    assert process.ended
    process.close()


def test_process_ends_when_its_input_ends() -> None:
    command = [sys.executable, "-m", "adapters.data.decode_process"]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True).stdout == b""


def test_module_loads_no_torch_when_a_process_starts() -> None:
    check = "import sys, adapters.data.decode_process; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
