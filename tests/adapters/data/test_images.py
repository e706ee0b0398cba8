"""Image decoding and preprocessing: pixels equal timm's; invalid images raise an error with the reason."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms_factory import create_transform

from adapters import Backbone, ImageError, ImageTooLargeError
from adapters.data.images import decode_image, eval_transform, needed_px, normalise, preprocess_of
from adapters.data.transform import pixel_transform
from tests.support.models import PREPROCESS

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    size = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size, np.uint8))


def two_halves(left: tuple[int, ...], right: tuple[int, ...]) -> Image.Image:
    """32 x 16 pixels of two colours."""
    image = Image.new("RGB", (32, 16), left)
    image.paste(right, (16, 0, 32, 16))
    return image


def png(width: int, height: int, lines: bytes = b"") -> bytes:
    """Return a grey 8-bit PNG whose header declares this size; its pixel data may have another."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_decode_keeps_every_pixel_when_the_format_is_lossless(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    image = noise(7, 5)
    data = encoded(image, kind, **options)
    assert decode_image(data).tobytes() == image.tobytes()
    path = tmp_path / "image"
    path.write_bytes(data)
    assert decode_image(path).tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_decode_gives_three_equal_channels_when_the_image_is_grey(kind: str) -> None:
    image = noise(7, 5, "L")
    decoded = decode_image(encoded(image, kind))
    assert decoded.mode == "RGB"
    assert all(np.array_equal(channel, np.asarray(image)) for channel in np.asarray(decoded).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_decode_gives_black_and_white_when_the_image_has_one_bit(kind: str) -> None:
    image = Image.new("1", (9, 1))
    image.putpixel((8, 0), 1)
    assert list(decode_image(encoded(image, kind)).tobytes()) == [0] * 24 + [255] * 3


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_decode_scales_when_the_image_has_16_bits(kind: str, dtype: str) -> None:
    image = Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], dtype))
    assert image.mode.startswith("I;16")
    assert list(decode_image(encoded(image, kind)).getchannel(0).tobytes()) == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_decode_gives_rgb_when_the_image_is_cmyk(kind: str) -> None:
    options = {"quality": 95} if kind == "JPEG" else {}
    data = encoded(Image.new("RGB", (16, 16), (200, 60, 30)).convert("CMYK"), kind, **options)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert decode_image(data).getpixel((8, 8)) == pytest.approx((200, 60, 30), abs=4)


def test_decode_reads_a_jpeg_when_it_is_progressive_and_grey() -> None:
    decoded = decode_image(encoded(Image.new("L", (16, 16), 90), "JPEG", progressive=True))
    assert decoded.getpixel((3, 3)) == pytest.approx((90, 90, 90), abs=2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(
    ("orientation", "size", "red"),
    [(1, (32, 16), (4, 8)), (3, (32, 16), (28, 8)), (6, (16, 32), (8, 4)), (8, (16, 32), (8, 28))],
)
def test_decode_rotates_an_image_when_exif_has_an_orientation(
    kind: str, orientation: int, size: tuple[int, int], red: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encoded(two_halves(RED, BLUE), kind, exif=exif))
    assert decoded.size == size
    blue = (size[0] - red[0], size[1] - red[1])
    assert decoded.getpixel(red) == pytest.approx(RED, abs=12)
    assert decoded.getpixel(blue) == pytest.approx(BLUE, abs=12)


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {})])
def test_decode_returns_the_first_frame_when_the_image_is_animated(kind: str, options: dict[str, Any]) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE))
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert decode_image(data).getcolors() == [(64, RED)]


@pytest.mark.parametrize("transparency", [0, b"\x00\x80"], ids=["one colour", "an alpha for each"])
def test_decode_ignores_transparency_when_the_image_has_a_palette(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    decoded = decode_image(encoded(image, "PNG", transparency=transparency))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [RED, BLUE]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_decode_drops_alpha_when_the_image_has_it(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    decoded = decode_image(encoded(Image.new("RGBA", (4, 4), (*RED, 0)), kind, **options))
    assert decoded.getcolors() == [(16, RED)]


GREEN = (0, 200, 0)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_decode_blends_with_the_background_when_it_is_given(kind: str) -> None:
    lossless: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100}}
    options = lossless.get(kind, {})
    image = Image.new("RGBA", (16, 8), (*RED, 0))
    image.paste((*RED, 128), (8, 0, 16, 8))
    decoded = decode_image(encoded(image, kind, **options), background=GREEN)
    assert decoded.getpixel((2, 2)) == pytest.approx(GREEN, abs=2)
    assert decoded.getpixel((12, 2)) == pytest.approx((128, 100, 0), abs=3)
    opaque = noise(7, 5)
    assert decode_image(encoded(opaque, "PNG"), background=GREEN).tobytes() == opaque.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_decode_blends_with_the_background_when_a_palette_has_a_transparent_colour(kind: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    decoded = decode_image(encoded(image, kind, transparency=1), background=GREEN)
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [RED, GREEN]


def png_of(bits: int, colour: int, lines: list[bytes], transparent: bytes) -> bytes:
    """Return a PNG of 2 pixels a line in which one colour is transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", 2, len(lines), bits, colour, 0, 0, 0)),
        chunk(b"tRNS", transparent),
        chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines))),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("data", "other"),
    [
        (png_of(1, 0, [b"\x40"], b"\0\1"), (0, 0, 0)),
        (png_of(2, 0, [b"\x60"], b"\0\2"), (85, 85, 85)),
        (png_of(4, 0, [b"\x17"], b"\0\7"), (17, 17, 17)),
        (png_of(8, 0, [b"\x10\x20"], b"\0\x20"), (16, 16, 16)),
        (png_of(16, 0, [b"\x10\0\x20\1"], b"\x20\1"), (16, 16, 16)),
        (png_of(8, 2, [bytes([*RED, *BLUE])], bytes([0, 0, 0, 0, 0, 255])), RED),
        (png_of(16, 2, [b"\xff\xff\0\0\0\0" + b"\0\1\0\2\xff\3"], b"\0\1\0\2\xff\3"), RED),
    ],
    ids=["1 bit", "2 bits", "4 bits", "8 bits", "16 bits", "RGB", "RGB of 16 bits"],
)
def test_decode_blends_with_the_background_when_a_png_has_a_transparent_colour(
    data: bytes, other: tuple[int, int, int]
) -> None:
    """Pillow compares the colour of the file with pixels of 8 bits, also in files of other depths."""
    decoded = decode_image(data, background=GREEN)
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [other, GREEN]
    assert decode_image(data).getpixel((0, 0)) == other


TRUNCATED = {kind: encoded(noise(64, 64), kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")}


@pytest.mark.parametrize(("kind", "data"), TRUNCATED.items(), ids=TRUNCATED.keys())
def test_decode_refuses_an_image_when_it_is_truncated(kind: str, data: bytes) -> None:
    assert decode_image(data).size == (64, 64)
    with pytest.raises(ImageError):
        decode_image(data[: len(data) // 2])


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(sorted(TRUNCATED)), changes=st.dictionaries(st.integers(0, 600), st.integers(0, 255)))
def test_decode_returns_an_image_or_raises_image_error_when_bytes_are_damaged(
    kind: str, changes: dict[int, int]
) -> None:
    damaged = bytearray(TRUNCATED[kind])
    for at, byte in changes.items():
        damaged[at] = byte
    try:
        image = decode_image(bytes(damaged), max_pixels=1_000_000)
    except ImageError as refusal:
        str(refusal).encode()
    else:
        assert image.mode == "RGB"
        assert 1 <= image.width * image.height <= 1_000_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"^0 bytes; expected an image file$"),
        (b"not an image, just text", r"^not an image; expected one of JPEG, PNG, WEBP, BMP, GIF, TIFF, AVIF$"),
        (b"\x89PNG\r\n\x1a\n", r"^a PNG that is damaged or truncated after 8 bytes; send the whole file$"),
        (png(0, 4), r"^a PNG that is damaged or truncated"),
        (encoded(Image.new("I", (2, 2)), "TIFF"), r"^a TIFF whose samples are signed integers of 32 bits"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), r"^a TIFF whose samples are floating-point numbers of 32 bits"),
    ],
    ids=["empty", "text", "PNG signature", "0 pixels", "32-bit integers", "floats"],
)
def test_decode_names_the_reason_when_bytes_are_not_a_supported_image(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(data)


def test_decode_refuses_an_image_when_its_pixel_data_is_damaged() -> None:
    with pytest.raises(ImageError, match=r"^the image cannot be decoded: .*; it may be damaged or truncated"):
        decode_image(png(4, 4, b"\0" * 7))


def test_decode_refuses_an_image_when_its_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^the image cannot be decoded: No such file or directory$"):
        decode_image(tmp_path / "none.png")


@pytest.fixture
def pillow_limit() -> Iterator[None]:
    before = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = before


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "WEBP"])
@pytest.mark.usefixtures("pillow_limit")
def test_decode_reads_an_image_when_max_pixels_is_above_pillow_s_own_limit(kind: str) -> None:
    """Pillow's limit is lowered here: 178 million real pixels would need 700 MB."""
    Image.MAX_IMAGE_PIXELS = 100  # Pillow warns above it, and raises above twice that
    data = encoded(noise(40, 30), kind)
    with pytest.raises(ImageTooLargeError, match=r"^40 x 30 pixels, but at most 99|^far more than the 99 pixels"):
        decode_image(data, max_pixels=99)
    assert decode_image(data, max_pixels=1200).size == (40, 30)


def test_decode_refuses_a_small_file_when_its_header_declares_too_many_pixels() -> None:
    bomb = png(50_000, 50_000)
    assert len(bomb) < 100
    with pytest.raises(
        ImageTooLargeError, match=r"^far more than the 50000000 pixels that are allowed; not decoded; reduce"
    ):
        decode_image(bomb)
    with pytest.raises(ImageTooLargeError, match=r"^8000 x 8000 pixels, but at most 50000000 are allowed; reduce"):
        decode_image(png(8000, 8000))


def test_decode_refuses_an_image_when_it_exceeds_max_pixels() -> None:
    data = encoded(noise(5, 4), "PNG")
    assert decode_image(data, max_pixels=20).size == (5, 4)
    with pytest.raises(ImageTooLargeError, match=r"^5 x 4 pixels, but at most 19 are allowed; reduce the image first$"):
        decode_image(data, max_pixels=19)


@pytest.mark.parametrize("size", [(1, 101), (101, 1), (2, 100_000)])
def test_decode_refuses_an_image_when_its_aspect_ratio_exceeds_100(size: tuple[int, int]) -> None:
    """Otherwise the resize of its shorter side would allocate gigabytes for the longer one."""
    data = encoded(Image.new("RGB", size), "PNG")
    with pytest.raises(ImageError, match=f"^{size[0]} x {size[1]} pixels: one side is more than 100 times the other"):
        decode_image(data)


def test_transform_accepts_an_image_when_its_aspect_ratio_is_100() -> None:
    assert eval_transform(PREPROCESS)(decode_image(encoded(Image.new("RGB", (1, 100)), "PNG"))).shape == (3, 8, 8)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    ("input_size", "crop_pct", "mean", "std"),
    [
        ((3, 32, 32), 1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((3, 48, 48), 0.875, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((3, 24, 40), 0.9, (0.0, 0.1, 1.0), (1.0, 0.3, 0.7)),
    ],
)
def test_transform_and_normalise_equal_timm_when_options_vary(
    input_size: tuple[int, int, int],
    crop_pct: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    crop_mode: str,
) -> None:
    shape: dict[str, Any] = {
        "input_size": input_size,
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }
    reference = create_transform(**shape, mean=mean, std=std, is_training=False)
    transform = eval_transform(shape | {"input_size": list(input_size), "mean": list(mean), "std": list(std)})
    arrays = pixel_transform(shape | {"mean": mean})
    for image in (noise(51, 37), noise(20, 90), noise(7, 300), noise(33, 33), noise(*input_size[:0:-1])):
        pixels = transform(image)
        assert torch.equal(torch.from_numpy(arrays(image)), pixels)
        assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, input_size)
        assert torch.equal(normalise(pixels[None], torch.tensor(mean), torch.tensor(std))[0], reference(image))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("side", [64, 191, 192, 300, 1200])
def test_decode_reduces_a_jpeg_with_small_differences_when_it_is_six_times_larger_than_needed(
    side: int, mode: str
) -> None:
    """For noise, the mean difference is below 1.5 of 255. Below six times the needed side there is none."""
    preprocess = PREPROCESS | {"input_size": [3, 32, 32], "crop_pct": 1.0, "interpolation": "bicubic"}
    photo = noise(24, 20).resize((side + side // 5, side), Image.Resampling.BICUBIC).convert(mode)
    data = encoded(photo, "JPEG", quality=90)
    full, fast = (decode_image(data, needed_px=needed) for needed in (None, needed_px(preprocess)))
    assert full.size == photo.size
    assert min(fast.size) == {64: 64, 191: 191, 192: 96, 300: 150, 1200: 150}[side]
    one, other = (eval_transform(preprocess)(image).int() for image in (full, fast))
    assert torch.equal(one, other) == (side < 192)
    assert (one - other).abs().float().mean() < 1.5
    assert (one - other).abs().max() < 10
    assert needed_px(preprocess | {"interpolation": "nearest"}) is None


def test_transform_gives_other_pixels_when_the_interpolation_differs() -> None:
    """Otherwise the comparison with timm would compare one interpolation six times."""
    image = noise(51, 37)
    names = ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
    assert len({eval_transform(PREPROCESS | {"interpolation": n})(image).numpy().tobytes() for n in names}) == 6


def test_normalise_uses_one_mean_and_std_per_image_when_given_a_row_each() -> None:
    pixels = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    mean, std = torch.tensor([[0.5] * 3, [0.1, 0.2, 0.3]]), torch.tensor([[0.5] * 3, [1.0, 2.0, 3.0]])
    together = normalise(pixels, mean, std)
    for i in range(2):
        assert torch.equal(together[i : i + 1], normalise(pixels[i : i + 1], mean[i], std[i]))
    assert pixels.dtype == torch.uint8  # the input is unchanged
    assert pixels.flatten().tolist() == list(range(24))


def test_preprocess_of_returns_json_types_when_given_a_backbone(backbone: Backbone) -> None:
    assert preprocess_of(backbone) == {
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop_pct": 1.0,
        "crop_mode": "center",
        "background": [255, 255, 255],
    }
    assert "background" not in preprocess_of(backbone, background=None)
