"""Splits of a dataset, their names, and the rows that a reader of a layout returns."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from ..short_repr import short_repr
from .errors import DataError
from .files import LeftOut
from .image_set import EncodedImage

Split = Literal["train", "validation", "test"]
Rows = list[tuple[Path | EncodedImage, str]]  # an image and its label
T = TypeVar("T")

# The names that Hugging Face's `datasets` knows, in any case.
SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_NUMBERED = re.compile(rf"({'|'.join(SPLIT_NAMES)}|holdout)[ _-]?\d*")
_NAMED = re.compile(rf"({'|'.join(SPLIT_NAMES)})([ _-]?20\d\d)?")


@dataclass(frozen=True)
class SplitRows:
    """The rows of each split that a reader took, and the files that it left out.

    Attributes:
        labels: class names in the order of the dataset; None is the natural order of the labels in the rows.
    """

    rows: dict[Split, Rows]
    labels: tuple[str, ...] | None = None
    left_out: tuple[LeftOut, ...] = ()

    __repr__ = short_repr


def split_of(name: str) -> Split | None:
    """Return the split that a name means, in any case, or None."""
    return SPLIT_NAMES.get(name.strip().casefold())


def are_split_names(names: Iterable[str]) -> bool:
    """Return whether all names are those of splits, such as train and test1, or train2017 and val2017."""
    found = [name.casefold() for name in names]
    return any(_NAMED.fullmatch(name) for name in found) and all(_NUMBERED.fullmatch(name) for name in found)


def by_split(path: Path, named: Mapping[str, T]) -> dict[Split, T]:
    """Map split names to splits: `val`, `valid`, `validation` and `dev` are the same split.

    Raises:
        DataError: a name is unknown, or two names mean the same split.
    """
    splits: dict[Split, T] = {}
    for name, value in named.items():
        split = split_of(name)
        if split is None:
            raise DataError(f"{path}: unknown split {name!r}; expected one of {', '.join(SPLIT_NAMES)}")
        if split in splits:
            raise DataError(f"{path}: split {name!r} is a second {split} split; merge the two, or remove one")
        splits[split] = value
    return splits
