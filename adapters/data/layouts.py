"""Readers of one layout each: class folders, VTAB-1K lists, few-shot lists, and tables.

A reader returns labelled rows per split. It opens lists, never images.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import DataError
from .image_set import EncodedImage, ImageSet

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

Split = Literal["train", "validation", "test"]
Rows = list[tuple[Path | EncodedImage, str]]  # an image and its label
T = TypeVar("T")

SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
VTAB_LISTS: Mapping[Split, str] = {"train": "train800.txt", "validation": "val200.txt", "test": "test.txt"}
VTAB_FINAL_LIST = "train800val200.txt"
FEW_SHOT_TRAIN_LIST = re.compile(r"train_meta\.list\.num_shot_(\d+)\.seed_(\d+)")
FEW_SHOT_LISTS: Mapping[Split, str] = {"validation": "val_meta.list", "test": "test_meta.list"}
_ROOT_PROBES = 100  # paths of a list that are looked up to find the folder of its images


def read_folder(root: Path, labels: Sequence[str] | None = None) -> ImageSet:
    """Read a folder with one folder of images per class. Folder names are the labels, in natural order (9 before 10).

    Args:
        labels: classes of the task, if they are known already. Otherwise the folders define them.

    Raises:
        DataError: the folder does not exist, has fewer than two classes, a class without images, a class that is not
            in `labels`, or a class name that is not UTF-8.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected a folder with one folder of images per class")
    folders = sorted(
        (p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")),
        key=lambda p: natural_sort_key(p.name),
    )
    names = tuple(labels) if labels is not None else tuple(f.name for f in folders)
    if labels is None and len(folders) < 2:
        raise DataError(f"{root}: {len(folders)} class folders, but a task needs at least 2; add folders of images")
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{root}: the name of a class folder is not UTF-8; rename the folder") from error
    unknown = [f.name for f in folders if f.name not in names]
    if unknown:
        raise DataError(
            f"{root}: classes {', '.join(unknown)} are not among the task's labels {', '.join(names)}; "
            "rename or remove these folders"
        )
    if not folders:
        raise DataError(f"{root}: no class folders; expected one for each of {', '.join(names)}")
    sources: list[Path | EncodedImage] = []
    targets: list[int] = []
    for folder in folders:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"{folder}: no images; expected files that end in {', '.join(SUFFIXES)}")
        sources += files
        targets += [names.index(folder.name)] * len(files)
    return ImageSet(tuple(sources), tuple(targets), names)


def has_folders(folder: Path) -> bool:
    """Return whether the folder contains a folder that is not hidden."""
    return any(p.is_dir() and not p.name.startswith(".") for p in folder.iterdir())


def split_folders(path: Path) -> dict[Split, Path]:
    """Return the folders `train`, `val`, `test` (or a synonym) of a folder, by split."""
    return by_split(path, {p.name: p for p in sorted(path.iterdir()) if p.is_dir() and p.name in SPLIT_NAMES})


def read_vtab(folder: Path, final: bool) -> dict[Split, Rows]:
    """Read the lists of a VTAB-1K data set.

    One folder per data set, with the lists beside `images/`: google-research/task_adaptation in the form of the SSF
    and NOAH repositories.

    Args:
        final: read train800val200.txt as the training list.

    Raises:
        DataError: a list cannot be read.
    """
    lists: dict[Split, str] = {**VTAB_LISTS, **({"train": VTAB_FINAL_LIST} if final else {})}
    return {split: _read_list(folder / name, [folder]) for split, name in lists.items() if (folder / name).is_file()}


def read_few_shot(folder: Path, shots: int | None, seed: int) -> dict[Split, Rows]:
    """Read the few-shot lists of NOAH (github.com/ZhangYuanhan-AI/NOAH, data/few-shot).

    The paths in these lists omit the folder of the images, which differs between data sets.

    Args:
        shots, seed: select the training list; without `shots` only the other lists are read.

    Raises:
        DataError: the training list does not exist, or a list cannot be read.
    """
    annotations = folder / "annotations"
    files = {split: annotations / name for split, name in FEW_SHOT_LISTS.items() if (annotations / name).is_file()}
    if shots is not None:
        files["train"] = annotations / f"train_meta.list.num_shot_{shots}.seed_{seed}"
        if not files["train"].is_file():
            raise DataError(
                f"{files['train']}: no such list; available: {few_shot_lists(folder) or 'no training lists'}"
            )
    roots = [folder, folder / "images", folder / "jpg"]
    if folder.parent.name == "few-shot_split":  # lists in FGFS/few-shot_split/<set>, images in FGFS/<set>
        roots.append(folder.parent.parent / folder.name)
    return {split: _read_list(path, roots) for split, path in files.items()}


def few_shot_lists(folder: Path) -> str:
    """Return the training lists of a few-shot folder as text for messages; empty if there are none."""
    matches = [m for p in folder.glob("annotations/*") if (m := FEW_SHOT_TRAIN_LIST.fullmatch(p.name))]
    return ", ".join(
        f"{shots} shots with seed {seed}" for shots, seed in sorted((int(m[1]), int(m[2])) for m in matches)
    )


def read_table(path: Path) -> dict[Split, Rows]:
    """Read a CSV or Parquet file with the columns `path`, `label` and, if there are several splits, `split`.

    Paths are relative to the file's folder.

    Raises:
        DataError: pandas is not installed, the file cannot be read, a column or value is missing, or a split has an
            unknown name.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: a table needs pandas: pip install 'karst-hub[train]'") from error
    try:
        if path.suffix == ".csv":  # read as text, otherwise label 007 would become 7 and label NA a missing value
            table = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        else:
            table = pandas.read_parquet(path)
    except (ValueError, OSError) as error:  # errors of pandas and pyarrow are ValueErrors
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error
    missing = [name for name in ("path", "label") if name not in table.columns]
    if missing:
        columns = ", ".join(map(str, table.columns))
        raise DataError(f"{path}: column {' and '.join(missing)} missing; columns found: {columns}")
    splits = table["split"] if "split" in table.columns else ["train"] * len(table)
    rows: dict[str, Rows] = {}
    for number, (name, label, split) in enumerate(zip(table["path"], table["label"], splits, strict=True)):
        for column, value in (("path", name), ("label", label), ("split", split)):
            if _is_missing(value):
                raise DataError(f"{path}, row {number}: {column} is empty; fill it in, or remove the row")
        if isinstance(label, float):
            raise DataError(f"{path}, row {number}: label {label} is a fraction; expected text or an integer")
        rows.setdefault(str(split), []).append((path.parent / str(name), str(label)))
    if not rows:
        raise DataError(f"{path}: no rows; expected one row per image")
    return by_split(path, rows)


def by_split(path: Path, named: Mapping[str, T]) -> dict[Split, T]:
    """Map split names to splits: `val`, `valid`, `validation` and `dev` are the same split.

    Raises:
        DataError: a name is unknown, or two names mean the same split.
    """
    splits: dict[Split, T] = {}
    for name, value in named.items():
        split = SPLIT_NAMES.get(name)
        if split is None:
            raise DataError(f"{path}: unknown split {name!r}; expected one of {', '.join(SPLIT_NAMES)}")
        if split in splits:
            raise DataError(f"{path}: split {name!r} is a second {split} split; merge the two, or remove one")
        splits[split] = value
    return splits


def natural_sort_key(text: str) -> list[tuple[int, int, str]]:
    """Return a sort key for names in natural order: 9 before 10."""
    parts = re.findall(r"\d+|\D+", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _read_list(path: Path, roots: Sequence[Path]) -> Rows:
    """Read lines `path label`. Paths may contain spaces. Their root is the first of `roots` with one of the images."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text; save it as UTF-8: {error}") from error
    rows: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not re.fullmatch(r"\d+", label):
            raise DataError(f"{path}, line {number}: expected a path, a space and a class number, found {line!r}")
        rows.append((name, str(int(label))))
    if not rows:
        raise DataError(f"{path}: no lines; expected a path and a class number per line")
    root = next((root for root in roots if any((root / name).is_file() for name, _ in rows[:_ROOT_PROBES])), None)
    if root is None:
        raise DataError(
            f"{path}: no image found for {rows[0][0]} and the paths after it; put the images into "
            f"{' or '.join(map(str, roots))}"
        )
    return [(root / name, label) for name, label in rows]


def _is_missing(value: Any) -> bool:
    return value is None or value != value or str(value) in ("", "<NA>")
