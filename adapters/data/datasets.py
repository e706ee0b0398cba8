"""Recognition and reading of labelled image datasets on this machine, in any layout.

Only lists are read here. `checks.py` opens the images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from . import huggingface
from .errors import DataError
from .image_set import ImageSet
from .layouts import (
    FEW_SHOT_LISTS,
    SPLIT_NAMES,
    VTAB_FINAL_LIST,
    VTAB_LISTS,
    Rows,
    Split,
    by_split,
    few_shot_lists,
    has_folders,
    natural_sort_key,
    read_few_shot,
    read_folder,
    read_table,
    read_vtab,
    split_folders,
)

LAYOUTS = """a folder with one folder of images per class, or such folders inside train/ and optionally val/ and test/
a .csv or .parquet file with the columns path and label, and optionally split
a VTAB-1K folder with train800.txt, val200.txt, train800val200.txt and test.txt
a few-shot folder with annotations/train_meta.list.num_shot_K.seed_S, val_meta.list and test_meta.list
a local Hugging Face dataset: saved with save_to_disk, Parquet files, or images with a metadata file"""

Layout = Literal["class folders", "split folders", "table", "vtab", "few-shot", "huggingface"]
T = TypeVar("T")


@dataclass(frozen=True)
class DatasetSplits:
    """The images of a task, by split. All splits have the same labels.

    Attributes:
        published: the splits are the lists of a benchmark, which must stay as published.
    """

    train: ImageSet
    validation: ImageSet | None = None
    test: ImageSet | None = None
    published: bool = False

    def by_name(self) -> dict[Split, ImageSet]:
        """Return the splits that exist, training first."""
        splits: dict[Split, ImageSet | None] = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: images for name, images in splits.items() if images is not None}

    def with_split(self, split: Literal["validation", "test"], images: ImageSet) -> "DatasetSplits":
        """Return a copy with another validation or test split. The copy does not count as published."""
        changed = replace(self, validation=images) if split == "validation" else replace(self, test=images)
        return replace(changed, published=False)


def read_dataset(path: Path, *, shots: int | None = None, seed: int = 0, final: bool = False) -> DatasetSplits:
    """Read the lists of a dataset on this machine. Its layout is recognised (see `LAYOUTS`).

    Args:
        shots, seed: select the training list of a few-shot folder.
        final: train on the train800val200 list of VTAB-1K, without validation: the last run of its protocol.

    Raises:
        DataError: nothing exists at the path, the layout is unknown, a list cannot be read, or an option belongs to
            another layout.
    """
    layout = recognise(path)
    if final and layout != "vtab":
        raise DataError(f"{path}: --final needs a VTAB-1K folder with {VTAB_FINAL_LIST}; leave out --final")
    if shots is None and layout == "few-shot":
        available = few_shot_lists(path) or "no training lists"
        raise DataError(f"{path}: choose a few-shot list with --shots and --split-seed; available: {available}")
    if shots is not None and layout != "few-shot":
        raise DataError(
            f"{path}: --shots needs a few-shot folder with annotations/train_meta.list.*; leave out --shots"
        )
    if layout == "class folders":
        return DatasetSplits(read_folder(path))
    if layout == "split folders":
        folders = split_folders(path)
        train = read_folder(folders["train"])
        others = {name: read_folder(folders[name], train.labels) for name in folders if name != "train"}
        return DatasetSplits(train, others.get("validation"), others.get("test"))
    rows, names = _read_rows(path, layout, shots=shots, seed=seed, final=final)
    labels = names or tuple(sorted({label for split in rows.values() for _, label in split}, key=natural_sort_key))
    if final:
        rows.pop("validation", None)  # its images are in the training list too
    if "train" not in rows:
        expected = f"; expected {VTAB_FINAL_LIST if final else VTAB_LISTS['train']}" if layout == "vtab" else ""
        raise DataError(f"{path}: no training split; splits found: {', '.join(rows) or 'none'}{expected}")
    sets = {name: _image_set(path, split, labels) for name, split in rows.items()}
    published = layout in ("vtab", "few-shot")
    return DatasetSplits(sets["train"], sets.get("validation"), sets.get("test"), published)


def read_split(path: Path, split: Literal["validation", "test"], labels: Sequence[str]) -> ImageSet:
    """Read one more split of a task whose labels are known, from any layout that `read_dataset` reads.

    A dataset with splits gives its own validation or test split. A dataset without splits gives all its images.

    Raises:
        DataError: as `read_dataset`; a label is not among `labels`; the dataset has splits, but not this one.
    """
    layout = recognise(path)
    if layout == "class folders":
        return read_folder(path, labels)
    if layout == "split folders":
        return read_folder(_select(path, split, split_folders(path)), labels)
    rows, _ = _read_rows(path, layout)
    return _image_set(path, _select(path, split, rows), labels)


def recognise(path: Path) -> Layout:
    """Return the layout of a dataset, from the files that exist.

    Raises:
        DataError: nothing exists at the path, or the layout is unknown.
    """
    if path.is_file():
        if path.suffix == ".parquet":
            return "huggingface" if huggingface.is_local_dataset(path) else "table"
        if path.suffix == ".csv":
            return "table"
    elif path.is_dir():
        if any((path / name).is_file() for name in (VTAB_LISTS["train"], VTAB_FINAL_LIST)):
            return "vtab"
        if few_shot_lists(path) or any((path / "annotations" / name).is_file() for name in FEW_SHOT_LISTS.values()):
            return "few-shot"
        if huggingface.is_local_dataset(path):
            return "huggingface"
        if (path / "train").is_dir() and has_folders(path / "train"):
            return "split folders"
        if has_folders(path):
            return "class folders"
    else:
        raise DataError(f"{path}: no such folder or file; datasets are read from this machine, never downloaded")
    layouts = "".join(f"\n  {line}" for line in LAYOUTS.splitlines())
    raise DataError(f"{path}: unknown dataset layout; expected one of:{layouts}")


def _read_rows(
    path: Path, layout: Layout, *, shots: int | None = None, seed: int = 0, final: bool = False
) -> tuple[dict[Split, Rows], tuple[str, ...] | None]:
    """Return the rows of each split and, if the layout defines them, the class names in their order."""
    if layout == "vtab":
        return read_vtab(path, final), None
    if layout == "few-shot":
        return read_few_shot(path, shots, seed), None
    if layout == "table":
        return read_table(path), None
    rows, names = huggingface.read_local_dataset(path)
    if len(rows) == 1:
        return {SPLIT_NAMES.get(name, "train"): split for name, split in rows.items()}, names
    return by_split(path, rows), names


def _select(path: Path, split: Split, splits: Mapping[Split, T]) -> T:
    if split in splits:
        return splits[split]
    if set(splits) == {"train"}:
        return splits["train"]
    raise DataError(f"{path}: no {split} split; splits found: {', '.join(splits)}")


def _image_set(path: Path, rows: Rows, labels: Sequence[str]) -> ImageSet:
    index = {label: i for i, label in enumerate(labels)}
    unknown = sorted({label for _, label in rows} - set(index), key=natural_sort_key)
    if unknown:
        raise DataError(
            f"{path}: labels {', '.join(unknown)} are not among the task's labels {', '.join(labels)}; "
            "correct or remove these rows"
        )
    return ImageSet(tuple(image for image, _ in rows), tuple(index[label] for _, label in rows), tuple(labels))
