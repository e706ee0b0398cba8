"""Recognition and reading of labelled image datasets on this machine, in any layout.

Only lists are read here. `checks.py` opens the images.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

from ..short_repr import short_repr
from .errors import DataError
from .files import LeftOut, LeftOutFiles, subfolders
from .image_set import ImageSet
from .labels import sorted_labels
from .layouts import Rows, Split, SplitRows, are_split_names, split_of
from .readers import flat, huggingface, metadata
from .readers.folders import read_folder, split_folders
from .readers.foreign import refuse_foreign
from .readers.lists import (
    FEW_SHOT_LISTS,
    VTAB_FINAL_LIST,
    VTAB_LISTS,
    few_shot_lists,
    read_few_shot,
    read_vtab,
)
from .readers.tables import read_table

LAYOUTS = """a folder with one folder of images per class, or such folders inside train/ and optionally val/ and test/
a .csv or .parquet file with the columns path and label, and optionally split
a folder whose train/ (and optionally valid/ and test/) has Roboflow's _classes.csv
a folder of images whose names begin with the label, such as cat.0.jpg, alone or inside train/
a VTAB-1K folder with train800.txt, val200.txt, train800val200.txt and test.txt
a few-shot folder with annotations/train_meta.list.num_shot_K.seed_S, val_meta.list and test_meta.list
a local Hugging Face dataset: saved with save_to_disk, Parquet files, or images with a metadata file"""

Layout = Literal[
    "class folders",
    "split folders",
    "table",
    "classes files",
    "labelled names",
    "metadata",
    "vtab",
    "few-shot",
    "huggingface",
]
T = TypeVar("T")


@dataclass(frozen=True)
class DatasetSplits:
    """The images of a task, by split. All splits have the same labels.

    Attributes:
        published: the splits are the lists of a benchmark, which must stay as published.
        left_out: files of the dataset that its readers did not take.
    """

    train: ImageSet
    validation: ImageSet | None = None
    test: ImageSet | None = None
    published: bool = False
    left_out: tuple[LeftOut, ...] = ()

    __repr__ = short_repr

    def by_name(self) -> dict[Split, ImageSet]:
        """Return the splits that exist, training first."""
        splits: dict[Split, ImageSet | None] = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: images for name, images in splits.items() if images is not None}

    def with_split(self, split: Literal["validation", "test"], images: ImageSet) -> "DatasetSplits":
        """Return a copy with another validation or test split. The copy does not count as published."""
        changed = replace(self, validation=images) if split == "validation" else replace(self, test=images)
        return replace(changed, published=False, left_out=self.left_out + images.left_out)


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
        images = read_folder(path)
        return DatasetSplits(images, left_out=images.left_out)
    if layout == "split folders":
        return _read_split_folders(path)
    found = _read_rows(path, layout, shots=shots, seed=seed, final=final)
    rows = found.rows
    labels = found.labels or sorted_labels(label for split in rows.values() for _, label in split)
    if final:
        rows.pop("validation", None)  # its images are in the training list too
    if "train" not in rows:
        expected = f"; expected {VTAB_FINAL_LIST if final else VTAB_LISTS['train']}" if layout == "vtab" else ""
        raise _no_training_split(path, rows, expected)
    sets = {name: _image_set(path, split, labels) for name, split in rows.items()}
    published = layout in ("vtab", "few-shot")
    return DatasetSplits(sets["train"], sets.get("validation"), sets.get("test"), published, found.left_out)


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
        left_out = LeftOutFiles()
        images = read_folder(_select(path, split, split_folders(path, left_out)), labels)
        return replace(images, left_out=left_out.found() + images.left_out)
    found = _read_rows(path, layout)
    return replace(_image_set(path, _select(path, split, found.rows), labels), left_out=found.left_out)


def recognise(path: Path) -> Layout:
    """Return the layout of a dataset, from the files that exist.

    Raises:
        DataError: nothing exists at the path, or the layout is unknown or not read.
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
        return _recognise_folder(path) or _unknown(path)
    else:
        raise DataError(f"{path}: no such folder or file; datasets are read from this machine, never downloaded")
    refuse_foreign(path)
    return _unknown(path)


def _recognise_folder(path: Path) -> Layout | None:
    """Return the layout of a folder without lists of a benchmark, or None."""
    if metadata.has_metadata(path):
        return "metadata"
    if huggingface.is_local_dataset(path):
        return "huggingface"
    if flat.has_classes_file(path):
        return "classes files"
    refuse_foreign(path)
    folders = subfolders(path)
    splits = [folder for folder in folders if split_of(folder.name) and subfolders(folder)]
    if any(split_of(folder.name) == "train" for folder in splits):
        return "split folders"
    if splits and are_split_names(folder.name for folder in folders):
        return "split folders"
    if flat.has_labelled_names(path):
        return "labelled names"
    flat.refuse_split_names(path)
    return "class folders" if folders else None


def _unknown(path: Path) -> NoReturn:
    layouts = "".join(f"\n  {line}" for line in LAYOUTS.splitlines())
    raise DataError(f"{path}: unknown dataset layout; expected one of:{layouts}")


def _read_split_folders(path: Path) -> DatasetSplits:
    left_out = LeftOutFiles()
    folders = split_folders(path, left_out)
    if "train" not in folders:
        raise _no_training_split(path, folders)
    train = read_folder(folders["train"])
    sets = {name: read_folder(folders[name], train.labels) for name in folders if name != "train"}
    for images in (train, *sets.values()):
        left_out.add_all(images.left_out)
    return DatasetSplits(train, sets.get("validation"), sets.get("test"), left_out=left_out.found())


def _read_rows(
    path: Path, layout: Layout, *, shots: int | None = None, seed: int = 0, final: bool = False
) -> SplitRows:
    """Return the rows of each split of a layout that is no folder of class folders."""
    if layout == "vtab":
        return read_vtab(path, final)
    if layout == "few-shot":
        return read_few_shot(path, shots, seed)
    if layout == "table":
        return read_table(path)
    if layout == "metadata":
        return metadata.read_metadata(path)
    if layout == "classes files":
        return flat.read_classes_files(path)
    if layout == "labelled names":
        return flat.read_labelled_names(path)
    return huggingface.read_local_dataset(path)


def _no_training_split(path: Path, found: Iterable[str], expected: str = "") -> DataError:
    return DataError(f"{path}: no training split; splits found: {', '.join(found) or 'none'}{expected}")


def _select(path: Path, split: Split, splits: Mapping[Split, T]) -> T:
    if split in splits:
        return splits[split]
    if set(splits) == {"train"}:
        return splits["train"]
    raise DataError(f"{path}: no {split} split; splits found: {', '.join(splits)}")


def _image_set(path: Path, rows: Rows, labels: Sequence[str]) -> ImageSet:
    index = {label: i for i, label in enumerate(labels)}
    unknown = sorted_labels({label for _, label in rows} - set(index))
    if unknown:
        raise DataError(
            f"{path}: labels {', '.join(unknown)} are not among the task's labels {', '.join(labels)}; "
            "correct or remove these rows"
        )
    return ImageSet(tuple(image for image, _ in rows), tuple(index[label] for _, label in rows), tuple(labels))
