"""Any sane image becomes the right pixels, the same that timm would give; everything else is refused by name."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from timm.data.transforms import str_to_pil_interp

from adapters import DataError, ImageError, ImageTooLargeError
from adapters.data.images import Pixels, decode_image, eval_transform, needed_px, normalise, preprocess_of, read_folder
from tests.support.models import PREPROCESS

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
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
    """A grey 8-bit PNG by hand, whatever its header claims."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_keep_every_pixel(kind, options, tmp_path) -> None:
    image = noise(7, 5)
    data = encoded(image, kind, **options)
    assert decode_image(data).tobytes() == image.tobytes()
    path = tmp_path / "image"
    path.write_bytes(data)
    assert decode_image(path).tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_grey_becomes_three_equal_channels(kind) -> None:
    image = noise(7, 5, "L")
    decoded = decode_image(encoded(image, kind))
    assert decoded.mode == "RGB"
    assert all(np.array_equal(channel, np.asarray(image)) for channel in np.asarray(decoded).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_one_bit_is_black_and_white(kind) -> None:
    image = Image.new("1", (9, 1))
    image.putpixel((8, 0), 1)
    assert list(decode_image(encoded(image, kind)).tobytes()) == [0] * 24 + [255] * 3


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_16_bits_are_scaled_not_clipped(kind, dtype) -> None:
    image = Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], dtype))
    assert image.mode.startswith("I;16")
    assert list(decode_image(encoded(image, kind)).getchannel(0).tobytes()) == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind) -> None:
    options = {"quality": 95} if kind == "JPEG" else {}
    data = encoded(Image.new("RGB", (16, 16), (200, 60, 30)).convert("CMYK"), kind, **options)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert decode_image(data).getpixel((8, 8)) == pytest.approx((200, 60, 30), abs=4)


def test_a_progressive_grey_jpeg() -> None:
    decoded = decode_image(encoded(Image.new("L", (16, 16), 90), "JPEG", progressive=True))
    assert decoded.getpixel((3, 3)) == pytest.approx((90, 90, 90), abs=2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "size", "red"),
    [(1, (32, 16), (4, 8)), (3, (32, 16), (28, 8)), (6, (16, 32), (8, 4)), (8, (16, 32), (8, 28))],
)
def test_an_image_is_turned_as_its_exif_says(kind, orientation, size, red) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encoded(two_halves(RED, BLUE), kind, exif=exif))
    assert decoded.size == size
    blue = (size[0] - red[0], size[1] - red[1])
    assert decoded.getpixel(red) == pytest.approx(RED, abs=8)
    assert decoded.getpixel(blue) == pytest.approx(BLUE, abs=8)


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {})])
def test_the_first_frame_of_an_animation(kind, options) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE))
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert decode_image(data).getcolors() == [(64, RED)]


@pytest.mark.parametrize("transparency", [0, b"\x00\x80"], ids=["one colour", "an alpha for each"])
def test_a_palette_with_transparency_shows_what_lies_under_it(transparency) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    decoded = decode_image(encoded(image, "PNG", transparency=transparency))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [RED, BLUE]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_dropped(kind) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    decoded = decode_image(encoded(Image.new("RGBA", (4, 4), (*RED, 0)), kind, **options))
    assert decoded.getcolors() == [(16, RED)]


TRUNCATED = {kind: encoded(noise(64, 64), kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")}


@pytest.mark.parametrize(("kind", "data"), TRUNCATED.items(), ids=TRUNCATED.keys())
def test_a_truncated_image_is_refused(kind, data) -> None:
    assert decode_image(data).size == (64, 64)
    with pytest.raises(ImageError):
        decode_image(data[: len(data) // 2])


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(sorted(TRUNCATED)), changes=st.dictionaries(st.integers(0, 600), st.integers(0, 255)))
def test_any_damage_is_decoded_or_refused(kind, changes) -> None:
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
        (b"not an image, just text", r"^not an image; expected one of JPEG, PNG, WEBP, BMP, GIF, TIFF$"),
        (b"\x89PNG\r\n\x1a\n", r"^not an image; expected one of"),
        (encoded(noise(4, 4), "PPM"), r"^not an image; expected one of"),
        (encoded(noise(4, 4), "EPS"), r"^not an image; expected one of"),
        (encoded(noise(32, 32), "ICO"), r"^not an image; expected one of"),
        (png(0, 4), r"^not an image; expected one of"),
        (
            encoded(Image.new("I", (2, 2)), "TIFF"),
            r"^mode 'I' \(32 bits a pixel\) has no 8-bit meaning; save it with 8",
        ),
        (encoded(Image.new("F", (2, 2)), "TIFF"), r"^mode 'F' \(32 bits a pixel\) has no 8-bit meaning"),
    ],
    ids=["nothing", "text", "a signature", "PPM", "EPS", "ICO", "0 pixels", "32-bit integers", "floats"],
)
def test_what_is_no_image_is_refused(data, message) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(data)


def test_damaged_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match=r"^the image cannot be decoded: "):
        decode_image(png(4, 4, b"\0" * 7))


def test_a_small_file_that_claims_many_pixels_is_not_decoded() -> None:
    bomb = png(50_000, 50_000)
    assert len(bomb) < 100
    with pytest.raises(ImageTooLargeError, match=r"^far more than the 50000000 pixels that are allowed; not decoded$"):
        decode_image(bomb)
    with pytest.raises(ImageTooLargeError, match=r"^8000 x 8000 pixels, but at most 50000000 are allowed; reduce"):
        decode_image(png(8000, 8000))


def test_the_limit_of_pixels_is_the_callers() -> None:
    data = encoded(noise(5, 4), "PNG")
    assert decode_image(data, max_pixels=20).size == (5, 4)
    with pytest.raises(ImageTooLargeError, match=r"^5 x 4 pixels, but at most 19 are allowed; reduce the image first$"):
        decode_image(data, max_pixels=19)


@pytest.mark.parametrize("size", [(1, 101), (101, 1), (2, 100_000)])
def test_a_line_is_refused(size) -> None:
    """Its shorter side would be brought to the backbone's, and its longer side to gigabytes."""
    data = encoded(Image.new("RGB", size), "PNG")
    with pytest.raises(ImageError, match=f"^{size[0]} x {size[1]} pixels: one side is more than 100 times the other"):
        decode_image(data)


def test_a_narrow_image_is_an_image() -> None:
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
def test_pixels_are_timm_s_bit_for_bit(input_size, crop_pct, mean, std, interpolation, crop_mode) -> None:
    shape = {"input_size": input_size, "interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    timm_s = timm.data.create_transform(**shape, mean=mean, std=std, is_training=False)
    ours = eval_transform(shape | {"input_size": list(input_size), "mean": list(mean), "std": list(std)})
    for image in (noise(51, 37), noise(20, 90), noise(*input_size[:0:-1])):
        pixels = ours(image)
        assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, input_size)
        assert torch.equal(normalise(pixels[None], torch.tensor(mean), torch.tensor(std))[0], timm_s(image))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("side", [64, 191, 192, 300, 1200])
def test_large_jpegs_are_decoded_smaller_to_nearly_the_same_pixels(side, mode) -> None:
    """Of noise the mean difference is below 1.5 of 255; up to six times the needed side there is none."""
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


def test_the_interpolations_differ() -> None:
    """So that the test above compares what it says."""
    image = noise(51, 37)
    names = ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
    assert len({str_to_pil_interp(name) for name in names}) == 6
    assert len({eval_transform(PREPROCESS | {"interpolation": n})(image).numpy().tobytes() for n in names}) == 6


def test_every_image_may_have_its_own_normalisation() -> None:
    pixels = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    mean, std = torch.tensor([[0.5] * 3, [0.1, 0.2, 0.3]]), torch.tensor([[0.5] * 3, [1.0, 2.0, 3.0]])
    together = normalise(pixels, mean, std)
    for i in range(2):
        assert torch.equal(together[i : i + 1], normalise(pixels[i : i + 1], mean[i], std[i]))
    assert pixels.dtype == torch.uint8  # the input is left alone
    assert pixels.flatten().tolist() == list(range(24))


def test_preprocess_of_a_backbone_is_json(backbone) -> None:
    assert preprocess_of(backbone) == {
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def make_folder(root: Path, files: dict[str, int]) -> Path:
    """Class name -> how many images: numbered, each of a colour of its own."""
    for i, (label, count) in enumerate(files.items()):
        (root / label).mkdir(parents=True)
        for k in range(count):
            image = Image.new("RGB", (8, 8), (i * 40, k * 40, 0))
            ImageDraw.Draw(image).point((k, i), RED)
            image.save(root / label / f"{k}.png")
    return root


def test_a_folder_is_read_in_natural_order(tmp_path) -> None:
    root = make_folder(tmp_path, {"10": 1, "9": 2, "b10": 1, "b9": 1, "a": 1})
    images = read_folder(root)
    assert images.labels == ("9", "10", "a", "b9", "b10")
    assert images.targets == (0, 0, 1, 2, 3, 4)
    assert [str(path.relative_to(root)) for path in images.paths] == [
        *("9/0.png", "9/1.png", "10/0.png", "a/0.png", "b9/0.png", "b10/0.png"),
    ]
    assert len(images) == 6


def test_a_folder_s_other_files_are_left_out(tmp_path) -> None:
    root = make_folder(tmp_path, {"a": 1, "b": 1})
    (root / "README.txt").write_text("about")
    (root / "a" / "notes.txt").write_text("about")
    (root / ".cache").mkdir()
    (root / "b" / "UPPER.JPG").write_bytes(encoded(noise(8, 8), "JPEG"))
    assert [path.name for path in read_folder(root).paths] == ["0.png", "0.png", "UPPER.JPG"]


def test_a_test_folder_takes_the_task_s_labels(tmp_path) -> None:
    root = make_folder(tmp_path, {"c": 2, "a": 1})
    images = read_folder(root, labels=["c", "b", "a"])
    assert images.labels == ("c", "b", "a")
    assert images.targets == (2, 0, 0)


def test_a_subset_keeps_the_labels(tmp_path) -> None:
    images = read_folder(make_folder(tmp_path, {"a": 2, "b": 2}))
    part = images.subset([3, 0])
    assert (part.paths, part.targets) == ((images.paths[3], images.paths[0]), (1, 0))
    assert part.labels == images.labels


def test_a_folder_that_cannot_be_used_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"none: no such folder; expected one with a folder of images for each class$"):
        read_folder(tmp_path / "none")
    root = make_folder(tmp_path / "one", {"a": 1})
    with pytest.raises(DataError, match=r"one: 1 class folders, but a task needs at least 2$"):
        read_folder(root)
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=r"one/empty: no images in it; expected files ending in .jpg, .*, .tiff$"):
        read_folder(root)
    with pytest.raises(DataError, match=r"one: classes empty are not among the task's labels a, b$"):
        read_folder(root, labels=["a", "b"])


def test_a_test_folder_without_classes_is_refused(tmp_path) -> None:
    (tmp_path / "image.png").write_bytes(encoded(noise(8, 8), "PNG"))
    with pytest.raises(DataError, match=r": no class folders in it; expected one for each of a, b$"):
        read_folder(tmp_path, labels=["a", "b"])


def test_pixels_and_targets_of_a_folder(tmp_path) -> None:
    images = read_folder(make_folder(tmp_path, {"a": 1, "b": 2}))
    pixels = Pixels(images, PREPROCESS)
    assert len(pixels) == 3
    assert [target for _, target in (pixels[i] for i in range(3))] == [0, 1, 1]
    for i, path in enumerate(images.paths):
        expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(pixels[i][0].numpy(), expected)


def test_an_image_is_decoded_once_while_there_is_room(tmp_path) -> None:
    images = read_folder(make_folder(tmp_path, {"a": 1, "b": 1}))
    pixels = Pixels(images, PREPROCESS, cache_bytes=3 * 8 * 8)
    first, _ = pixels[0]
    _ = pixels[1]
    for path in images.paths:
        path.unlink()
    assert torch.equal(pixels[0][0], first)
    with pytest.raises(DataError, match=r"b/0.png: the image cannot be decoded: .*No such file"):
        pixels[1]


def test_an_unusable_image_is_named(tmp_path) -> None:
    images = read_folder(make_folder(tmp_path, {"a": 1, "b": 1}))
    images.paths[1].write_bytes(b"text")
    with pytest.raises(DataError, match=r"b/0.png: not an image; expected one of JPEG"):
        Pixels(images, PREPROCESS)[1]
