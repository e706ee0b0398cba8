"""Label problems are found before training, all at once; what is left out, is what was said."""

from pathlib import Path

import pytest
import torch

from adapters import DataError
from adapters.data.checks import Checked, check
from adapters.data.datasets import Splits
from adapters.data.images import ImageSet, Pixels, decode_image, eval_transform
from tests.support.models import PREPROCESS, png

LABELS = ("cat", "dog")


def images(root: Path, *named: tuple[str, int | bytes, str], labels: tuple[str, ...] = LABELS) -> ImageSet:
    """(file, its bytes or the picture's number, label) -> files below root."""
    paths = []
    for name, content, _ in named:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else png(content, size=(8, 8)))
        paths.append(path)
    return ImageSet(tuple(paths), tuple(labels.index(label) for _, _, label in named), labels)


def plain(root: Path, count: int, first: int = 0) -> ImageSet:
    """`count` different pictures of each class."""
    return images(
        root, *((f"{label}{i}.png", first + 2 * i + n, label) for i in range(count) for n, label in enumerate(LABELS))
    )


def kept(pixels: Pixels | None) -> list[str]:
    assert pixels is not None
    return [path.name for path in pixels.images.paths]


def problems(splits: Splits, **options) -> str:
    with pytest.raises(DataError) as error:
        check(splits, PREPROCESS, **options)
    return str(error.value)


def test_a_sound_set_is_decoded_once_and_left_as_it_is(tmp_path) -> None:
    splits = Splits(plain(tmp_path / "train", 3), plain(tmp_path / "val", 1, 10), plain(tmp_path / "test", 2, 20))
    seen: list[None] = []
    checked = check(splits, PREPROCESS, on_image=lambda: seen.append(None))
    assert (len(seen), checked.warnings) == (12, ())
    for part, pixels in (("train", checked.train), ("validation", checked.validation), ("test", checked.test)):
        assert pixels.images == splits.parts()[part]
        for i, path in enumerate(pixels.images.paths):
            right = eval_transform(PREPROCESS)(decode_image(path))
            path.unlink()  # the file is not read again
            assert torch.equal(pixels[i][0], right)


def test_all_unreadable_images_are_listed(tmp_path) -> None:
    train = images(
        tmp_path,
        *((f"{i}.png", i, LABELS[i % 2]) for i in range(4)),
        ("text.png", b"text", "cat"),
        ("empty.png", b"", "dog"),
        ("gone.png", 9, "dog"),
    )
    train.paths[-1].unlink()
    found = problems(Splits(train))
    assert found.startswith("3 of 7 images cannot be read (leave them out with --skip-bad):\n")
    assert f"\n  {tmp_path}/text.png: not an image; expected one of JPEG" in found
    assert f"\n  {tmp_path}/empty.png: 0 bytes; expected an image file" in found
    assert f"\n  {tmp_path}/gone.png: the image cannot be decoded: No such file or directory" in found
    assert found.count("\n") == 3

    checked = check(Splits(train), PREPROCESS, skip_bad=True)
    assert kept(checked.train) == ["0.png", "1.png", "2.png", "3.png"]
    assert checked.train.images.targets == (0, 1, 0, 1)
    assert [w.split("\n")[0] for w in checked.warnings] == ["3 of 7 images cannot be read, left out:"]
    train.paths[0].unlink()
    assert torch.equal(checked.train[0][0], eval_transform(PREPROCESS)(decode_image(png(0, size=(8, 8)))))


def test_a_long_list_is_cut_short(tmp_path) -> None:
    train = images(tmp_path, *((f"{i}.png", b"text", LABELS[i % 2]) for i in range(25)))
    found = problems(Splits(train))
    assert found.startswith("25 of 25 images cannot be read")
    assert found.endswith("\n  and 5 more")
    assert found.count("not an image") == 20
    assert problems(Splits(train), skip_bad=True) == "no train images are left"


def test_the_same_image_in_two_parts_is_refused_and_the_earlier_copy_can_be_left_out(tmp_path) -> None:
    train, test = plain(tmp_path / "train", 3), plain(tmp_path / "test", 2, 20)
    validation = images(tmp_path / "val", ("a.png", 20, "cat"), ("b.png", 1, "dog"), ("c.png", 50, "cat"))
    splits = Splits(train, validation, test)
    found = problems(splits)
    assert found == (
        "2 images are in two parts (leave out the earlier part's with --skip-bad):"
        f"\n  {tmp_path}/train/dog0.png (train, dog) = {tmp_path}/val/b.png (validation, dog)"
        f"\n  {tmp_path}/val/a.png (validation, cat) = {tmp_path}/test/cat0.png (test, cat)"
    )
    checked = check(splits, PREPROCESS, skip_bad=True)
    assert kept(checked.train) == ["cat0.png", "cat1.png", "dog1.png", "cat2.png", "dog2.png"]
    assert kept(checked.validation) == ["b.png", "c.png"]
    assert len(checked.test) == 4
    assert len(checked.warnings) == 1


def test_an_image_under_two_labels_is_refused_and_all_its_copies_can_be_left_out(tmp_path) -> None:
    train = images(
        tmp_path, ("a.png", 1, "cat"), ("b.png", 1, "dog"), *((f"{i}.png", 10 + i, LABELS[i % 2]) for i in range(4))
    )
    found = problems(Splits(train))
    assert found.startswith("2 images are there under two labels (leave them out with --skip-bad):")
    assert f"\n  {tmp_path}/a.png (train, cat)\n  {tmp_path}/b.png (train, dog)" in found
    checked = check(Splits(train), PREPROCESS, skip_bad=True)
    assert kept(checked.train) == ["0.png", "1.png", "2.png", "3.png"]


def test_copies_in_one_part_are_a_warning(tmp_path) -> None:
    train = images(tmp_path, ("a.png", 1, "cat"), ("b.png", 1, "cat"), ("c.png", 2, "dog"), ("d.png", 3, "dog"))
    checked = check(Splits(train), PREPROCESS)
    assert kept(checked.train) == ["a.png", "b.png", "c.png", "d.png"]
    assert checked.warnings == (
        f"1 images are copies of others in the same part:\n  {tmp_path}/b.png (train, cat) = {tmp_path}/a.png",
    )


def test_published_lists_are_kept_with_a_warning(tmp_path) -> None:
    train = images(
        tmp_path / "train", ("a.png", 1, "cat"), ("b.png", 1, "dog"), ("c.png", 2, "dog"), ("d.png", 3, "cat")
    )
    test = images(tmp_path / "test", ("a.png", 2, "dog"), labels=LABELS)
    checked = check(Splits(train, test=test, published=True), PREPROCESS, skip_bad=True)
    assert (len(checked.train), len(checked.test)) == (4, 1)
    assert [w.split(":")[0] for w in checked.warnings] == [
        "1 images are in two parts, kept because the lists are published",
        "2 images are there under two labels, kept because the lists are published",
    ]


def test_one_class_only(tmp_path) -> None:
    train = images(tmp_path, ("a.png", 1, "cat"), ("b.png", 2, "cat"))
    assert problems(Splits(train)) == "every training image is of class 'cat'; a task needs at least 2 classes"


def test_a_class_with_one_image_cannot_both_train_and_validate(tmp_path) -> None:
    train = images(tmp_path, *((f"{i}.png", i, "cat") for i in range(4)), ("b.png", 9, "dog"))
    found = problems(Splits(train), val_fraction=0.2)
    assert found.startswith("classes with one image, which cannot both train and validate: dog; add images")
    copied = images(tmp_path, *((f"{i}.png", i, "cat") for i in range(4)), ("b.png", 9, "dog"), ("c.png", 9, "dog"))
    assert "train and validate: dog;" in problems(Splits(copied), val_fraction=0.2)
    for splits in (Splits(train), Splits(train, plain(tmp_path / "val", 1, 20))):
        fraction = 0.2 if splits.validation else 0.0
        checked = check(splits, PREPROCESS, val_fraction=fraction)
        assert checked.warnings == ("classes with one training image: dog",)


def test_a_class_that_is_tested_but_never_trained(tmp_path) -> None:
    labels = ("cat", "dog", "emu", "fox")
    train = images(
        tmp_path, ("a.png", 1, "cat"), ("b.png", 2, "cat"), ("c.png", 3, "dog"), ("d.png", 4, "dog"), labels=labels
    )
    test = images(tmp_path, ("e.png", 5, "emu"), labels=labels)
    line = "classes without a training image, but with validation or test images: emu"
    assert problems(Splits(train, test=test)) == line
    published = check(Splits(train, test=test, published=True), PREPROCESS)
    assert published.warnings == (line, "classes without any image: fox")


def test_all_problems_come_at_once(tmp_path) -> None:
    train = images(tmp_path / "train", ("a.png", 1, "cat"), ("b.png", b"text", "cat"), ("c.png", 2, "cat"))
    test = images(tmp_path / "test", ("a.png", 2, "cat"))
    found = problems(Splits(train, test=test))
    assert "1 of 4 images cannot be read" in found
    assert "1 images are in two parts" in found
    assert "every training image is of class 'cat'" in found


def test_what_is_left_after_skipping_is_checked_again(tmp_path) -> None:
    train = images(tmp_path, ("a.png", 1, "cat"), ("b.png", 2, "cat"), ("c.png", b"text", "dog"), ("d.png", b"", "dog"))
    assert problems(Splits(train), skip_bad=True).startswith("every training image is of class 'cat'")


def test_validation_images_are_held_out_where_none_are_given(tmp_path) -> None:
    train = plain(tmp_path, 10)

    def held(**options) -> Checked:
        return check(Splits(train), PREPROCESS, val_fraction=0.2, **options)

    checked = held(seed=1)
    assert sorted(kept(checked.train) + kept(checked.validation)) == sorted(path.name for path in train.paths)
    assert sorted(checked.validation.images.targets) == [0, 0, 1, 1]
    assert kept(held(seed=1).validation) == kept(checked.validation)
    assert kept(held(seed=2).validation) != kept(checked.validation)
    assert check(Splits(train), PREPROCESS).validation is None
    given = plain(tmp_path / "val", 1, 50)
    assert check(Splits(train, given), PREPROCESS, val_fraction=0.2).validation.images == given


def test_copies_of_an_image_stay_on_one_side(tmp_path) -> None:
    train = images(tmp_path, *((f"{i}-{copy}.png", i, LABELS[i % 2]) for i in range(10) for copy in range(3)))
    for seed in range(3):
        checked = check(Splits(train), PREPROCESS, val_fraction=0.4, seed=seed)
        sides = [{name.split("-")[0] for name in kept(part)} for part in (checked.train, checked.validation)]
        assert [len(side) for side in sides] == [6, 4]
        assert not sides[0] & sides[1]
        assert len(checked.train) + len(checked.validation) == 30


def test_the_same_file_may_be_listed_twice(tmp_path) -> None:
    once = plain(tmp_path, 4)
    twice = ImageSet(once.paths * 2, once.targets * 2, once.labels)
    checked = check(Splits(twice), PREPROCESS, val_fraction=0.25)
    assert not set(kept(checked.train)) & set(kept(checked.validation))
    assert (len(checked.train), len(checked.validation)) == (12, 4)
