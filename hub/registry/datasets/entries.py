"""Images as the index of a dataset takes and returns them."""

from dataclasses import dataclass
from typing import NamedTuple

from ...dataset_schemas import LabelCount, Split, Use

TEST_SHARE = 0.2  # of the images with the split `auto`


@dataclass(frozen=True)
class NewImage:
    """An image to add.

    Attributes:
        label: None leaves the label of a known image, and a new image without a label.
        split: None leaves the split of a known image, and means `auto` for a new one.
    """

    digest: str
    name: str
    size_bytes: int
    label: str | None = None
    split: Split | None = None


class ListedImage(NamedTuple):
    """An image of a whole dataset, as trainings and comparisons use it."""

    digest: str
    name: str
    label: str | None
    split: Split
    use: Use


@dataclass(frozen=True)
class AddStatus:
    """Result for one image.

    Attributes:
        status: `added`, `there`, `moved`, or the reason of a refusal: `limit`, `labels` (too many), or `removing` (the
            store is removing an old copy of the file).
        before: former label of a moved image.
        similar: older label that differs from a new one only in case, spaces or Unicode form.
        error: text of a refusal.
    """

    status: str
    before: str | None = None
    similar: str | None = None
    error: str = ""


@dataclass(frozen=True)
class DatasetContent:
    """Totals of a dataset, and its labels in order of their names; `unlabelled` counts the images without a label."""

    images: int
    image_bytes: int
    labels: list[LabelCount]
    unlabelled: LabelCount


def use_of(digest: str, split: Split) -> Use:
    """Return whether an image trains or tests. For `auto` the digest decides, so equal files are never in both."""
    if split != "auto":
        return split
    return "test" if int(digest[:8], 16) < TEST_SHARE * 2**32 else "train"
