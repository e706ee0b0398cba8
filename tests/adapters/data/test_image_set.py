"""Class folders as image sets, and image sets as prepared tensors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from adapters import DataError
from adapters.data.image_set import ImageTensors
from adapters.data.readers.folders import read_folder
from tests.support.image_sets import image_file
from tests.support.models import PREPROCESS

RED = (255, 0, 0)


def make_folder(root: Path, files: dict[str, int]) -> Path:
    """Write images of distinct colours; `files` maps a class to its number of images."""
    for i, (label, count) in enumerate(files.items()):
        (root / label).mkdir(parents=True)
        for k in range(count):
            image = Image.new("RGB", (8, 8), (i * 40, k * 40, 0))
            ImageDraw.Draw(image).point((k, i), RED)
            image.save(root / label / f"{k}.png")
    return root


def test_read_folder_sorts_labels_naturally_when_they_contain_numbers(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"10": 1, "9": 2, "b10": 1, "b9": 1, "a": 1})
    images = read_folder(root)
    assert images.labels == ("9", "10", "a", "b9", "b10")
    assert images.targets == (0, 0, 1, 2, 3, 4)
    assert [str(image_file(images, i).relative_to(root)) for i in range(6)] == [
        *("9/0.png", "9/1.png", "10/0.png", "a/0.png", "b9/0.png", "b10/0.png"),
    ]
    assert len(images) == 6


def test_read_folder_ignores_a_file_when_it_is_not_an_image(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"a": 1, "b": 1})
    (root / "README.txt").write_text("about")
    (root / "a" / "notes.txt").write_text("about")
    (root / ".cache").mkdir()
    Image.new("RGB", (8, 8)).save(root / "b" / "UPPER.JPG")
    images = read_folder(root)
    assert [image_file(images, i).name for i in range(len(images))] == ["0.png", "0.png", "UPPER.JPG"]


def test_read_folder_uses_the_labels_when_they_are_given(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"c": 2, "a": 1})
    images = read_folder(root, labels=["c", "b", "a"])
    assert images.labels == ("c", "b", "a")
    assert images.targets == (2, 0, 0)


def test_subset_keeps_all_labels_when_it_drops_images(tmp_path: Path) -> None:
    images = read_folder(make_folder(tmp_path, {"a": 2, "b": 2}))
    part = images.subset([3, 0])
    assert (part.sources, part.targets) == ((images.sources[3], images.sources[0]), (1, 0))
    assert part.labels == images.labels


def test_read_folder_names_the_folder_when_it_is_invalid(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"none: no such folder; expected a folder with one folder of images per class$"
    ):
        read_folder(tmp_path / "none")
    root = make_folder(tmp_path / "one", {"a": 1})
    with pytest.raises(
        DataError, match=r"one: 1 class folders with images, but a task needs at least 2; add folders of images$"
    ):
        read_folder(root)
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=r"one: 1 class folders with images, .*. Without images: empty$"):
        read_folder(root)
    (root / "empty" / "scan.dcm").write_bytes(b"DICM")
    with pytest.raises(
        DataError, match=r"one/empty: no images, only scan.dcm; expected files that end in .jpg, .*tiff"
    ):
        read_folder(root)
    with pytest.raises(
        DataError, match=r"two: classes a are not among the task's labels b, c; rename or remove these folders$"
    ):
        read_folder(make_folder(tmp_path / "two", {"a": 1, "b": 1}), labels=["b", "c"])


def test_read_folder_refuses_a_folder_when_it_has_no_class_folders(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(DataError, match=r": no class folders; expected one for each of a, b$"):
        read_folder(tmp_path, labels=["a", "b"])


def test_image_tensors_give_pixels_and_targets_when_indexed(tmp_path: Path) -> None:
    images = read_folder(make_folder(tmp_path, {"a": 1, "b": 2}))
    pixels = ImageTensors(images, PREPROCESS)
    assert len(pixels) == 3
    assert [target for _, target in (pixels[i] for i in range(3))] == [0, 1, 1]
    for i in range(len(images)):
        expected = np.asarray(Image.open(image_file(images, i)).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(pixels[i][0].numpy(), expected)


def test_image_tensors_decode_an_image_once_when_the_cache_has_room(tmp_path: Path) -> None:
    images = read_folder(make_folder(tmp_path, {"a": 1, "b": 1}))
    pixels = ImageTensors(images, PREPROCESS, cache_bytes=3 * 8 * 8)
    first, _ = pixels[0]
    _ = pixels[1]
    for i in range(2):
        image_file(images, i).unlink()
    assert torch.equal(pixels[0][0], first)
    with pytest.raises(DataError, match=r"b/0.png: the image cannot be decoded: .*No such file"):
        pixels[1]


def test_image_tensors_name_the_file_when_an_image_is_invalid(tmp_path: Path) -> None:
    images = read_folder(make_folder(tmp_path, {"a": 1, "b": 1}))
    image_file(images, 1).write_bytes(b"text")
    with pytest.raises(DataError, match=r"b/0.png: not an image; expected one of JPEG"):
        ImageTensors(images, PREPROCESS)[1]
