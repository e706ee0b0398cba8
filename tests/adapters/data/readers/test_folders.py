"""Class folders and split folders: the images that a reader takes, the files that it leaves, and refusals."""

import os
import sys
from pathlib import Path

import pytest

from adapters import DataError
from adapters.data.datasets import read_dataset, read_split
from tests.support.models import png


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(sum(name.encode()), size=(8, 8)))


def left_out(root: Path) -> dict[str, int]:
    return {entry.reason: entry.count for entry in read_dataset(root).left_out}


def test_read_dataset_takes_images_in_subfolders_of_a_class(tmp_path: Path) -> None:
    write(tmp_path, "cat/0.png", "cat/2023/1.png", "cat/2023/may/2.png", "dog/0.png", "dog/more/1.png")
    splits = read_dataset(tmp_path)
    assert (splits.train.labels, splits.train.targets) == (("cat", "dog"), (0, 0, 0, 1, 1))
    assert splits.left_out == ()


def test_read_dataset_takes_a_class_when_each_class_has_one_folder_inside(tmp_path: Path) -> None:
    write(tmp_path, "cat/images/0.png", "dog/images/0.png")
    assert read_dataset(tmp_path).train.labels == ("cat", "dog")


def test_read_dataset_counts_the_files_outside_the_classes(tmp_path: Path) -> None:
    write(tmp_path, "cat/0.png", "dog/0.png", "loose.png", "__MACOSX/cat/._0.png", ".cache/0.png")
    (tmp_path / "new").mkdir()
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"")
    assert read_dataset(tmp_path).train.labels == ("cat", "dog")
    assert left_out(tmp_path) == {
        "images outside the class folders": 1,
        "class folders without images": 1,
        "files that macOS, Windows or a NAS added": 2,
        "hidden files": 1,
        "files that are not images": 1,
    }


@pytest.mark.parametrize("name", ["test", "Test", "TEST", "testing", "eval"])
def test_read_dataset_uses_a_test_folder_when_its_name_has_another_form(tmp_path: Path, name: str) -> None:
    write(tmp_path, "train/cat/0.png", "train/dog/1.png", f"{name}/cat/2.png")
    splits = read_dataset(tmp_path)
    assert splits.test is not None
    assert (len(splits.test), splits.left_out) == (1, ())
    assert len(read_split(tmp_path, "test", ("cat", "dog"))) == 1


def test_read_dataset_uses_split_folders_when_they_begin_with_a_capital(tmp_path: Path) -> None:
    write(tmp_path, "Train/cat/0.png", "Train/dog/1.png", "Test/cat/2.png")
    assert sorted(read_dataset(tmp_path).by_name()) == ["test", "train"]


def test_read_dataset_counts_images_beside_the_splits(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/0.png", "train/dog/1.png", "holdout/cat/2.png", "holdout/dog/3.png", "loose.png")
    assert left_out(tmp_path) == {
        "images in holdout/, which is no split (train, val, test) beside the others": 2,
        "images outside the folders of the splits": 1,
    }
    write(tmp_path, "test/cat/4.png", "test/stray.png")
    reasons = {entry.reason for entry in read_split(tmp_path, "test", ("cat", "dog")).left_out}
    assert "images outside the class folders" in reasons


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("val/cat/0.png", "test/cat/1.png"), r": no training split; splits found: test, val"),
        (("train/0.png", "test/1.png"), r": test, train are splits, not classes, and test/ has no class folders. Put "),
        (("train/0.png", "test1/1.png"), r": test1, train are splits, not classes"),
        (("train2017/0.png", "val2017/1.png"), r": train2017, val2017 are splits, not classes"),
        (("one/cat/0.png", "one/dog/0.png", "two/a/0.png", "two/b/0.png"), r"If the folders are datasets, give one of"),
        (
            ("one/train/cat/0.png", "one/train/dog/0.png", "two/train/a/0.png", "two/train/b/0.png"),
            r": its folders are datasets of their own: one, two; give one of them, such as .*one$",
        ),
        (("set/cat/0.png", "set/dog/0.png"), r"1 class folders .* has the folders cat, dog: give it instead$"),
        (("cat/train/0.png", "cat/test/0.png", "dog/train/0.png", "dog/test/0.png"), r"such as cat/test, cat/train"),
    ],
)
def test_read_dataset_refuses_folders_that_are_no_classes(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    write(tmp_path, *files)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path)


def test_read_dataset_names_the_table_when_the_labels_of_flat_splits_may_be_in_it(tmp_path: Path) -> None:
    write(tmp_path, "train/0.png", "test/1.png")
    (tmp_path / "train.csv").write_text("id,breed\n0,pug\n")
    with pytest.raises(DataError, match=r"a table with the columns path and label \(the labels may be in train.csv\)$"):
        read_dataset(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS refuses such a name")
def test_read_dataset_names_a_class_folder_when_its_name_is_not_utf_8(tmp_path: Path) -> None:
    write(tmp_path, "cat/0.png", "dog/0.png")
    os.rename(tmp_path / "dog", os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(DataError, match=r"label 'caf\\udce9' is not UTF-8; rename it$"):
        read_dataset(tmp_path)
