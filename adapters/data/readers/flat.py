"""Readers of images without class folders: Roboflow's `_classes.csv`, and labels in file names as on Kaggle."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import DataError
from ..files import LeftOutFiles, has_images, image_files, is_image, subfolders
from ..labels import label_text
from ..layouts import Rows, Split, SplitRows, are_split_names, by_split, split_of

CLASSES_FILE = "_classes.csv"
_LABELLED_NAME = re.compile(r"(?P<label>[^.]+)\.\d+\.[^.]+")  # cat.0.jpg
_SHOWN = 5  # examples in a message


def has_classes_file(folder: Path) -> bool:
    """Return whether the folder, or a folder of one of its splits, has Roboflow's `_classes.csv`."""
    return any((part / CLASSES_FILE).is_file() for part in _parts(folder).values())


def read_classes_files(folder: Path) -> SplitRows:
    """Read `_classes.csv` of each split: a column `filename`, and one column of 0 or 1 per class.

    Raises:
        DataError: a file cannot be read, the classes of two splits differ, or an image has several classes.
    """
    left_out = LeftOutFiles()
    rows: dict[Split, Rows] = {}
    labels: tuple[str, ...] | None = None
    parts = _parts(folder)
    for split, part in parts.items():
        path = part / CLASSES_FILE
        if not path.is_file():
            left_out.add(f"images in folders without {CLASSES_FILE}", image_files(part, left_out), matters=True)
            continue
        found, listed, rows[split] = _read_classes(path, left_out)
        if labels is not None and found != labels:
            raise DataError(
                f"{path}: its classes {', '.join(found)} differ from those of the other splits, {', '.join(labels)}; "
                "export all splits with the same classes"
            )
        labels = found
        unlisted = [image for image in image_files(part, left_out, own=[path]) if image not in listed]
        left_out.add(f"images that {CLASSES_FILE} does not list", unlisted, matters=True)
    _record_other_folders(folder, parts, left_out)
    return SplitRows(rows, labels, left_out.found())


def has_labelled_names(folder: Path) -> bool:
    """Return whether the training images are flat, and all of their names begin with a label, as in cat.0.jpg."""
    train = _parts(folder).get("train")
    if train is None or subfolders(train):
        return False
    names = [path.name for path in train.iterdir() if is_image(path)]
    labels = {found["label"] for name in names if (found := _LABELLED_NAME.fullmatch(name))}
    return len(labels) > 1 and all(map(_LABELLED_NAME.fullmatch, names))


def read_labelled_names(folder: Path) -> SplitRows:
    """Read images whose names are a label, a number and a suffix: cat.0.jpg.

    Raises:
        DataError: a label is not UTF-8.
    """
    left_out = LeftOutFiles()
    rows: dict[Split, Rows] = {}
    parts = _parts(folder)
    for split, part in parts.items():
        for image in image_files(part, left_out):
            if found := _LABELLED_NAME.fullmatch(image.name):
                rows.setdefault(split, []).append((image, label_text(found["label"], str(image))))
            else:
                left_out.add("images whose names have no label", [image], matters=True)
    _record_other_folders(folder, parts, left_out)
    return SplitRows(rows, left_out=left_out.found())


def refuse_split_names(folder: Path) -> None:
    """Refuse class folders whose names are all names of splits: the labels would be train and test.

    Raises:
        DataError: with the reason, and the files that may have the labels.
    """
    folders = subfolders(folder)
    if not folders or not are_split_names(path.name for path in folders):
        return
    names = ", ".join(path.name for path in folders)
    flat = next((path for path in folders if has_images(path)), folders[0])
    tables = _names(path for part in (folder, *folders) for path in sorted(part.glob("*.csv")))
    raise DataError(
        f"{folder}: {names} are splits, not classes, and {flat.name}/ has no class folders. Put the images of each "
        "class into a folder of its own, or give a table with the columns path and label"
        + (f" (the labels may be in {tables})" if tables else "")
    )


def _parts(folder: Path) -> dict[Split, Path]:
    """Return the folders of the splits, or the folder itself as the training split."""
    named = {path.name: path for path in subfolders(folder) if split_of(path.name)}
    return by_split(folder, named) if named else {"train": folder}


def _record_other_folders(folder: Path, parts: dict[Split, Path], left_out: LeftOutFiles) -> None:
    """Record the images beside the folders of the splits."""
    if folder in parts.values():
        return
    left_out.add(
        "images outside the folders of the splits", image_files(folder, left_out, recursive=False), matters=True
    )
    for other in subfolders(folder, left_out):
        if other not in parts.values():
            reason = f"images in {other.name}/, which is no split (train, val, test)"
            left_out.add(reason, image_files(other, left_out), matters=True)


def _read_classes(path: Path, left_out: LeftOutFiles) -> tuple[tuple[str, ...], set[Path], Rows]:
    """Return the classes, the listed files and the rows of one `_classes.csv`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            head, *lines = [[cell.strip() for cell in line] for line in csv.reader(file) if line] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from error
    labels = tuple(label_text(name, f"{path}, header") for name in head[1:])
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise DataError(f"{path}: expected the columns filename and at least 2 different classes, found {head}")
    rows: Rows = []
    several: list[Path] = []
    none: list[Path] = []
    for number, cells in enumerate(lines):
        if len(cells) != len(head) or not set(cells[1:]) <= {"0", "1"}:
            raise DataError(f"{path}, row {number}: expected a file name and 0 or 1 for each of {', '.join(labels)}")
        chosen = [label for label, cell in zip(labels, cells[1:], strict=True) if cell == "1"]
        image = path.parent / cells[0]
        if len(chosen) == 1:
            rows.append((image, chosen[0]))
        else:
            (several if chosen else none).append(image)
    if several:
        raise DataError(
            f"{path}: {len(several)} images have several classes ({_names(several)}), but a task gives one label per "
            "image; keep one class per image, or train one task per class"
        )
    if not rows:
        raise DataError(f"{path}: no row has a class; expected one row per image")
    left_out.add(f"images without a class in {CLASSES_FILE}", none, matters=True)
    return labels, {path.parent / cells[0] for cells in lines}, rows


def _names(paths: Iterable[Path]) -> str:
    found = [path.name for path in paths]
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
