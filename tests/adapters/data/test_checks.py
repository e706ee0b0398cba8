"""Checks of a dataset: unreadable images, duplicates, conflicting labels, class coverage, held-out images."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import DataError
from adapters.data.checks import CheckedDataset, check_dataset
from adapters.data.datasets import DatasetSplits
from adapters.data.files import LeftOut
from adapters.data.image_set import ImageSet, ImageTensors
from adapters.data.images import decode_image, eval_transform
from tests.support.image_sets import image_file
from tests.support.models import PREPROCESS, png

LABELS = ("cat", "dog")


def images(root: Path, *named: tuple[str, int | bytes, str], labels: tuple[str, ...] = LABELS) -> ImageSet:
    """Write files below root: (name, its bytes or the seed of its image, label)."""
    paths = []
    for name, content, _ in named:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else png(content, size=(8, 8)))
        paths.append(path)
    return ImageSet(tuple(paths), tuple(labels.index(label) for _, _, label in named), labels)


def plain(root: Path, count: int, first: int = 0) -> ImageSet:
    """Write `count` distinct images per class."""
    return images(
        root, *((f"{label}{i}.png", first + 2 * i + n, label) for i in range(count) for n, label in enumerate(LABELS))
    )


def present(tensors: ImageTensors | None) -> ImageTensors:
    assert tensors is not None
    return tensors


def file_names(tensors: ImageTensors | None) -> list[str]:
    images = present(tensors).images
    return [image_file(images, i).name for i in range(len(images))]


def error_text(splits: DatasetSplits, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        check_dataset(splits, PREPROCESS, **options)
    return str(error.value)


def test_check_decodes_each_image_once_when_the_dataset_is_valid(tmp_path: Path) -> None:
    splits = DatasetSplits(
        plain(tmp_path / "train", 3), plain(tmp_path / "val", 1, 10), plain(tmp_path / "test", 2, 20)
    )
    seen: list[None] = []
    checked = check_dataset(splits, PREPROCESS, on_image=lambda: seen.append(None))
    assert (len(seen), checked.warnings) == (12, ())
    by_name = splits.by_name()
    for images_read, tensors in zip(by_name.values(), (checked.train, checked.validation, checked.test), strict=True):
        tensors = present(tensors)
        assert tensors.images == images_read
        for i in range(len(tensors)):
            path = image_file(tensors.images, i)
            expected = eval_transform(PREPROCESS)(decode_image(path))
            path.unlink()  # otherwise the test would also pass if the file were read again
            assert torch.equal(tensors[i][0], expected)


def test_check_lists_every_unreadable_image_or_drops_them_when_skip_bad(tmp_path: Path) -> None:
    train = images(
        tmp_path,
        *((f"{i}.png", i, LABELS[i % 2]) for i in range(4)),
        ("text.png", b"text", "cat"),
        ("empty.png", b"", "dog"),
        ("gone.png", 9, "dog"),
    )
    image_file(train, -1).unlink()
    found = error_text(DatasetSplits(train))
    assert found.startswith("3 of 7 images cannot be read (repair them, or leave them out with --skip-bad):\n")
    assert f"\n  {tmp_path}/text.png: not an image; expected one of JPEG" in found
    assert f"\n  {tmp_path}/empty.png: 0 bytes; expected an image file" in found
    assert f"\n  {tmp_path}/gone.png: the image cannot be decoded: No such file or directory" in found
    assert found.count("\n") == 3

    checked = check_dataset(DatasetSplits(train), PREPROCESS, skip_bad=True)
    assert file_names(checked.train) == ["0.png", "1.png", "2.png", "3.png"]
    assert checked.train.images.targets == (0, 1, 0, 1)
    assert [w.split("\n")[0] for w in checked.warnings] == ["3 of 7 images cannot be read, left out:"]
    image_file(train, 0).unlink()
    assert torch.equal(checked.train[0][0], eval_transform(PREPROCESS)(decode_image(png(0, size=(8, 8)))))


def test_check_names_20_images_when_more_are_unreadable(tmp_path: Path) -> None:
    train = images(tmp_path, *((f"{i}.png", b"text", LABELS[i % 2]) for i in range(25)))
    found = error_text(DatasetSplits(train))
    assert found.startswith("25 of 25 images cannot be read")
    assert found.endswith("\n  and 5 more")
    assert found.count("not an image") == 20
    assert error_text(DatasetSplits(train), skip_bad=True) == "no train images are left; add images that can be read"


def test_check_refuses_duplicates_across_splits_or_drops_the_earlier_copy_when_skip_bad(tmp_path: Path) -> None:
    train, test = plain(tmp_path / "train", 3), plain(tmp_path / "test", 2, 20)
    validation = images(tmp_path / "val", ("a.png", 20, "cat"), ("b.png", 1, "dog"), ("c.png", 50, "cat"))
    splits = DatasetSplits(train, validation, test)
    found = error_text(splits)
    assert found == (
        "2 images are in two splits (remove one copy, or leave out the earlier split's with --skip-bad):"
        f"\n  {tmp_path}/train/dog0.png (train, dog) = {tmp_path}/val/b.png (validation, dog)"
        f"\n  {tmp_path}/val/a.png (validation, cat) = {tmp_path}/test/cat0.png (test, cat)"
    )
    checked = check_dataset(splits, PREPROCESS, skip_bad=True)
    assert file_names(checked.train) == ["cat0.png", "cat1.png", "dog1.png", "cat2.png", "dog2.png"]
    assert file_names(checked.validation) == ["b.png", "c.png"]
    assert len(present(checked.test)) == 4
    assert len(checked.warnings) == 1


def test_check_refuses_an_image_with_two_labels_or_drops_all_copies_when_skip_bad(tmp_path: Path) -> None:
    train = images(
        tmp_path, ("a.png", 1, "cat"), ("b.png", 1, "dog"), *((f"{i}.png", 10 + i, LABELS[i % 2]) for i in range(4))
    )
    found = error_text(DatasetSplits(train))
    assert found.startswith("2 images have two labels (correct the labels, or leave the images out with --skip-bad):")
    assert f"\n  {tmp_path}/a.png (train, cat)\n  {tmp_path}/b.png (train, dog)" in found
    checked = check_dataset(DatasetSplits(train), PREPROCESS, skip_bad=True)
    assert file_names(checked.train) == ["0.png", "1.png", "2.png", "3.png"]


def test_check_warns_when_a_split_has_duplicates(tmp_path: Path) -> None:
    train = images(tmp_path, ("a.png", 1, "cat"), ("b.png", 1, "cat"), ("c.png", 2, "dog"), ("d.png", 3, "dog"))
    checked = check_dataset(DatasetSplits(train), PREPROCESS)
    assert file_names(checked.train) == ["a.png", "b.png", "c.png", "d.png"]
    assert checked.warnings == (
        f"1 images are duplicates within a split:\n  {tmp_path}/b.png (train, cat) = {tmp_path}/a.png",
    )


def test_check_keeps_published_lists_and_warns_when_they_have_duplicates(tmp_path: Path) -> None:
    train = images(
        tmp_path / "train", ("a.png", 1, "cat"), ("b.png", 1, "dog"), ("c.png", 2, "dog"), ("d.png", 3, "cat")
    )
    test = images(tmp_path / "test", ("a.png", 2, "dog"), labels=LABELS)
    checked = check_dataset(DatasetSplits(train, test=test, published=True), PREPROCESS, skip_bad=True)
    assert (len(checked.train), len(present(checked.test))) == (4, 1)
    assert [w.split(":")[0] for w in checked.warnings] == [
        "1 images are in two splits, kept because the lists are published",
        "2 images have two labels, kept because the lists are published",
    ]


def test_check_refuses_a_dataset_when_it_has_one_class(tmp_path: Path) -> None:
    train = images(tmp_path, ("a.png", 1, "cat"), ("b.png", 2, "cat"))
    assert error_text(DatasetSplits(train)) == (
        "all training images have the class 'cat'; a task needs at least 2 classes: add images of another class"
    )


def test_check_refuses_a_class_with_one_image_when_validation_images_are_held_out(tmp_path: Path) -> None:
    train = images(tmp_path, *((f"{i}.png", i, "cat") for i in range(4)), ("b.png", 9, "dog"))
    found = error_text(DatasetSplits(train), val_fraction=0.2)
    assert found.startswith("classes with one image, which is too few to train and validate: dog; add images")
    copied = images(tmp_path, *((f"{i}.png", i, "cat") for i in range(4)), ("b.png", 9, "dog"), ("c.png", 9, "dog"))
    assert "too few to train and validate: dog;" in error_text(DatasetSplits(copied), val_fraction=0.2)
    for splits in (DatasetSplits(train), DatasetSplits(train, plain(tmp_path / "val", 1, 20))):
        fraction = 0.2 if splits.validation else 0.0
        checked = check_dataset(splits, PREPROCESS, val_fraction=fraction)
        assert checked.warnings == ("classes with one training image: dog",)


def test_check_refuses_a_class_when_it_is_tested_but_not_trained(tmp_path: Path) -> None:
    labels = ("cat", "dog", "emu", "fox")
    train = images(
        tmp_path, ("a.png", 1, "cat"), ("b.png", 2, "cat"), ("c.png", 3, "dog"), ("d.png", 4, "dog"), labels=labels
    )
    test = images(tmp_path, ("e.png", 5, "emu"), labels=labels)
    line = "classes with validation or test images, but without training images: emu"
    error = error_text(DatasetSplits(train, test=test))
    assert error == f"{line}; add training images of these classes, or remove the others"
    published = check_dataset(DatasetSplits(train, test=test, published=True), PREPROCESS)
    assert published.warnings == (line, "classes without images: fox")


def test_check_reports_all_problems_when_there_are_several(tmp_path: Path) -> None:
    train = images(tmp_path / "train", ("a.png", 1, "cat"), ("b.png", b"text", "cat"), ("c.png", 2, "cat"))
    test = images(tmp_path / "test", ("a.png", 2, "cat"))
    found = error_text(DatasetSplits(train, test=test))
    assert "1 of 4 images cannot be read" in found
    assert "1 images are in two splits" in found
    assert "all training images have the class 'cat'" in found


def test_check_refuses_a_dataset_when_dropping_leaves_one_class(tmp_path: Path) -> None:
    train = images(tmp_path, ("a.png", 1, "cat"), ("b.png", 2, "cat"), ("c.png", b"text", "dog"), ("d.png", b"", "dog"))
    assert error_text(DatasetSplits(train), skip_bad=True).startswith("all training images have the class 'cat'")


def test_check_holds_out_validation_images_when_there_is_no_validation_split(tmp_path: Path) -> None:
    train = plain(tmp_path, 10)

    def held_out(**options: Any) -> CheckedDataset:
        return check_dataset(DatasetSplits(train), PREPROCESS, val_fraction=0.2, **options)

    checked = held_out(seed=1)
    assert sorted(file_names(checked.train) + file_names(checked.validation)) == sorted(
        image_file(train, i).name for i in range(len(train))
    )
    assert sorted(present(checked.validation).images.targets) == [0, 0, 1, 1]
    assert file_names(held_out(seed=1).validation) == file_names(checked.validation)
    assert file_names(held_out(seed=2).validation) != file_names(checked.validation)
    assert check_dataset(DatasetSplits(train), PREPROCESS).validation is None
    given = plain(tmp_path / "val", 1, 50)
    assert present(check_dataset(DatasetSplits(train, given), PREPROCESS, val_fraction=0.2).validation).images == given


def test_check_keeps_duplicates_together_when_it_holds_out_images(tmp_path: Path) -> None:
    train = images(tmp_path, *((f"{i}-{copy}.png", i, LABELS[i % 2]) for i in range(10) for copy in range(3)))
    for seed in range(3):
        checked = check_dataset(DatasetSplits(train), PREPROCESS, val_fraction=0.4, seed=seed)
        sides = [
            {name.split("-")[0] for name in file_names(tensors)} for tensors in (checked.train, checked.validation)
        ]
        assert [len(side) for side in sides] == [6, 4]
        assert not sides[0] & sides[1]
        assert len(checked.train) + len(present(checked.validation)) == 30


def test_check_accepts_a_file_when_it_is_listed_twice(tmp_path: Path) -> None:
    once = plain(tmp_path, 4)
    twice = ImageSet(once.sources * 2, once.targets * 2, once.labels)
    checked = check_dataset(DatasetSplits(twice), PREPROCESS, val_fraction=0.25)
    assert not set(file_names(checked.train)) & set(file_names(checked.validation))
    assert (len(checked.train), len(present(checked.validation))) == (12, 4)


def test_check_warns_of_files_left_out_and_of_labels_that_look_like_one_class(tmp_path: Path) -> None:
    labels = ("cat", "Cat", "dog")
    train = images(tmp_path, *((f"{i}.png", i, labels[i % 3]) for i in range(6)), labels=labels)
    left_out = (LeftOut("images of no class", 1, ("a.png",), True), LeftOut("hidden files", 1, (".b",), False))
    checked = check_dataset(DatasetSplits(train, left_out=left_out), PREPROCESS)
    assert checked.left_out == left_out
    assert checked.warnings == (
        "left out: 1 images of no class: a.png",
        "labels that differ only in case, spaces or Unicode form: 'cat', 'Cat'; merge them if they are one class",
    )


@pytest.mark.parametrize("label", ["", "\udcff"])
def test_check_refuses_a_label_that_no_file_can_hold_before_it_decodes_an_image(tmp_path: Path, label: str) -> None:
    train = images(tmp_path, ("a.png", 1, "cat"), ("b.png", 2, label), labels=("cat", label))
    seen: list[None] = []
    with pytest.raises(DataError, match=r"^labels: label .*(is empty|is not UTF-8)"):
        check_dataset(DatasetSplits(train), PREPROCESS, on_image=lambda: seen.append(None))
    assert seen == []
