"""Roboflow's `_classes.csv`, labels in file names, and exports that are refused by name."""

import json
from pathlib import Path

import pytest

from adapters import DataError
from adapters.data.datasets import read_dataset, read_split
from tests.support.models import png


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(sum(name.encode()), size=(8, 8)))


def roboflow(root: Path, rows: dict[str, str], head: str = "filename, cat, dog") -> None:
    """Write the images and `_classes.csv` of one split, in the form of Roboflow's export."""
    write(root, *rows)
    lines = [head, *(f"{name}, {', '.join(cells)}" for name, cells in rows.items())]
    (root / "_classes.csv").write_text("\n".join(lines) + "\n")


def test_read_dataset_reads_roboflow_s_classes(tmp_path: Path) -> None:
    roboflow(tmp_path / "train", {"a_jpg.rf.1.png": "10", "b_jpg.rf.2.png": "01", "none.png": "00"})
    roboflow(tmp_path / "valid", {"c.png": "01"})
    roboflow(tmp_path / "test", {"d.png": "10"})
    write(tmp_path, "train/unlisted.png", "extra/e.png")
    (tmp_path / "README.roboflow.txt").write_text("about")
    splits = read_dataset(tmp_path)
    assert (splits.train.labels, splits.train.targets) == (("cat", "dog"), (0, 1))
    assert splits.validation is not None
    assert splits.test is not None
    assert (splits.validation.targets, splits.test.targets) == ((1,), (0,))
    assert {entry.reason: entry.count for entry in splits.left_out} == {
        "images without a class in _classes.csv": 1,
        "images that _classes.csv does not list": 1,
        "images in extra/, which is no split (train, val, test)": 1,
        "files that are not images": 1,
    }
    assert read_split(tmp_path, "test", ("dog", "cat")).targets == (1,)
    assert read_dataset(tmp_path / "train").train.targets == (0, 1)


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        ({"a.png": "11"}, "filename, cat, dog", r"1 images have several classes \(a.png\), but a task gives one label"),
        ({"a.png": "00"}, "filename, cat, dog", r"_classes.csv: no row has a class; expected one row per image"),
        ({"a.png": "2"}, "filename, cat, dog", r"_classes.csv, row 0: expected a file name and 0 or 1 for each of cat"),
        ({"a.png": "1"}, "filename, cat", r"expected the columns filename and at least 2 different classes, found"),
    ],
)
def test_read_dataset_names_the_problem_of_roboflow_s_classes(
    tmp_path: Path, rows: dict[str, str], head: str, message: str
) -> None:
    roboflow(tmp_path / "train", rows, head)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path)


def test_read_dataset_refuses_roboflow_s_classes_when_splits_differ(tmp_path: Path) -> None:
    roboflow(tmp_path / "train", {"a.png": "10"})
    roboflow(tmp_path / "test", {"b.png": "10"}, "filename, cat, emu")
    with pytest.raises(DataError, match=r"its classes cat, dog differ from those of the other splits, cat, emu"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("below", ["", "train/"])
def test_read_dataset_reads_labels_in_file_names(tmp_path: Path, below: str) -> None:
    write(tmp_path, *(f"{below}{label}.{i}.png" for label in ("cat", "dog") for i in range(3)))
    if below:
        write(tmp_path, "test/1.png", "test/2.png", "train/.DS_Store")
    splits = read_dataset(tmp_path)
    assert (splits.train.labels, splits.train.targets) == (("cat", "dog"), (0, 0, 0, 1, 1, 1))
    assert splits.test is None
    reasons = {entry.reason: entry.count for entry in splits.left_out if entry.matters}
    assert reasons == ({"images whose names have no label": 2} if below else {})


def test_read_dataset_refuses_file_names_when_not_all_have_a_label(tmp_path: Path) -> None:
    write(tmp_path, "train/cat.0.png", "train/dog.1.png", "train/IMG_0002.png", "test/3.png")
    with pytest.raises(DataError, match=r"test, train are splits, not classes"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ("train/_annotations.coco.json",),
            r": a COCO export \(train/_annotations.coco.json\), whose labels belong to",
        ),
        (("annotations/instances_train2017.json",), r": a COCO export \(annotations/instances_train2017.json\)"),
        (("train/images/0.png", "train/labels/0.txt"), r": a YOLO export \(train/labels\)"),
        (("images/train/0.png", "labels/train/0.txt"), r": a YOLO export \(labels\)"),
        (("JPEGImages/0.png", "Annotations/0.xml"), r": a Pascal VOC export \(Annotations\)"),
        (("train/_annotations.createml.json",), r": a Create ML export"),
        (("train/cats.tfrecord",), r": TensorFlow records \(train/cats.tfrecord\), which are not read"),
    ],
)
def test_read_dataset_names_an_export_that_it_does_not_read(
    tmp_path: Path, files: tuple[str, ...], message: str
) -> None:
    write(tmp_path, "train/0.png", "val/1.png", *files)
    with pytest.raises(DataError, match=message + r".*; export it as class folders .*, or give a table"):
        read_dataset(tmp_path)


def test_read_dataset_names_an_archive_and_a_coco_file(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(b"PK\3\4")
    with pytest.raises(DataError, match=r"set.zip: an archive; unpack it, and give the folder$"):
        read_dataset(tmp_path / "set.zip")
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    with pytest.raises(DataError, match=r"coco.json: a COCO export"):
        read_dataset(tmp_path / "coco.json")
