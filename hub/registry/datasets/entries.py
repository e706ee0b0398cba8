"""Images as the index of a dataset takes and returns them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ...dataset_schemas import MAX_NAME_CHARACTERS, KeptAnswer, LabelCount, Split, Use
from ...field_types import DIGEST_PATTERN, MAX_LABEL_CHARACTERS, Body, Label, VersionNumber

TEST_SHARE = 0.2  # of the images with the split `auto`
Finite = Annotated[float, Field(allow_inf_nan=False)]
Time = Annotated[int, Field(ge=0, le=10**13)]  # milliseconds since 1970


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


class StoredRecord(NamedTuple):
    """An image of a whole dataset as Redis stores it; `lua/dataset_records.lua` has the members of `record`."""

    digest: str
    record: Mapping[str, Any]
    label: str | None


class ArchivedAnswer(KeptAnswer):
    """The answer to a kept image, in an archive."""

    version: VersionNumber
    label: Annotated[str, Field(max_length=MAX_LABEL_CHARACTERS)]
    score: Finite
    typicality: Finite | None = None


class ArchivedImage(Body):
    """An image of a dataset, in an archive.

    Attributes:
        added: when, in milliseconds since 1970.
        answer: to a classified image that was kept.
        expires: when such an image is removed without a label, in milliseconds since 1970.
    """

    digest: Annotated[str, Field(pattern=DIGEST_PATTERN)]
    name: Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]
    size_bytes: Annotated[int, Field(ge=1, le=2**40)]
    added: Time
    split: Split
    label: Label | None = None
    answer: ArchivedAnswer | None = None
    expires: Time | None = None

    @classmethod
    def of(cls, stored: StoredRecord) -> "ArchivedImage":
        """Return an image as the archive has it."""
        digest, record, label = stored
        # Without checks: an image that an older hub accepted is exported as it is.
        return cls.model_construct(
            digest=digest,
            name=record["name"],
            size_bytes=int(record["size"]),
            added=int(record["at"]),
            split=record["s"],
            label=label,
            answer=ArchivedAnswer.model_construct(**record["p"]) if record.get("p") else None,
            expires=int(record["k"]) if record.get("k") else None,
        )


class StagedDataset(NamedTuple):
    """A dataset of an import that no task has yet: its name in Redis and its number of images."""

    name: str
    images: int


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
