"""JSON bodies of the routes for datasets and trainings; see `schemas` for those of tasks."""

from typing import Annotated, Any, Literal

from pydantic import Field

from .field_types import DIGEST_PATTERN, Label
from .field_types import Body as _Body
from .schemas import Prediction

Split = Literal["auto", "train", "test"]
Use = Literal["train", "test"]
ReviewKind = Literal["unlabelled", "errors"]
PAGE_IMAGES, MAX_PAGE_IMAGES = 100, 1000
REVIEW_IMAGES, MAX_REVIEW_IMAGES = 20, 100
PAGE_GROUPS, MAX_PAGE_GROUPS = 20, 100  # of near-duplicates
GROUP_IMAGES = 20  # images that a reply lists of one group of near-duplicates
MAX_CHANGED = 200  # images of one change: one atomic step of some milliseconds
MAX_NAMED = 1000  # images that a reply names in each of its lists
MAX_NAME_CHARACTERS = 200  # of a file
MAX_BUDGET_S = 3600  # of one training


class KeptAnswer(_Body):
    """The answer to a classified image that the hub kept: version, best label with its score, and typicality."""

    version: int
    label: str
    score: float
    typicality: float | None = None


class DatasetImage(_Body):
    """One image of a dataset. `answer` is present if it was classified and kept, `expires` if it will be removed.

    `labels` has at most one label in this version. `split` is as it was set; `use` is `train` or `test`, which the
    digest decides for the split `auto`.
    """

    digest: str
    label: str | None
    labels: list[str]
    split: Split
    use: Use
    name: str
    size_bytes: int
    added: str
    answer: KeptAnswer | None = Field(None, exclude_if=lambda value: value is None)
    expires: str | None = Field(None, exclude_if=lambda value: value is None)


class ImagePage(_Body):
    """Images, newest first. `next` is the parameter `cursor` of the next page."""

    images: list[DatasetImage]
    next: str | None


class LabelCount(_Body):
    """Number of images of a label by use; the label is null for images without a label."""

    label: str | None
    train: int
    test: int


class DatasetInfo(_Body):
    """Contents of a task's dataset."""

    task: str
    images: int
    image_bytes: int
    labels: list[LabelCount]
    unlabelled: LabelCount
    similar_labels: list[list[str]] = Field(
        description="groups of labels that differ only in case, spaces or Unicode form"
    )


class ImageChange(_Body):
    """Change of an image. An omitted member keeps its value; a label of null removes the label."""

    label: Label | None = None
    split: Split | None = None


class ImagesChange(ImageChange):
    """The same change of several images, by their digests."""

    images: list[Annotated[str, Field(pattern=DIGEST_PATTERN)]] = Field(min_length=1, max_length=MAX_CHANGED)


class ImagesChanged(_Body):
    """Number of images that a change concerned, and the digests that the dataset does not have."""

    changed: int
    absent: list[str]


class Feedback(_Body):
    """The true label of an image, by the image's digest."""

    image: Annotated[str, Field(pattern=DIGEST_PATTERN)]
    label: Label


class FeedbackGiven(_Body):
    """The image with its label, and whether the hub's answer was this label; null for images never classified."""

    image: DatasetImage
    correct: bool | None


class ReviewImage(_Body):
    """An image to review, and labels with scores that a classifier of the other images suggests.

    `margin` is the difference between the two best scores; for `errors`, the score of the image's label minus the best
    score. It is null while too few images have labels.
    """

    image: DatasetImage
    suggestions: list[Prediction]
    margin: float | None


class ReviewQueue(_Body):
    """Images to review, most useful first, from the number of images that the hub considered."""

    task: str
    kind: ReviewKind
    images: list[ReviewImage]
    considered: int


class NearDuplicates(_Body):
    """A group of images that are near-duplicates, directly or through others. `images` has at most 20 of `size`.

    `similarity` is the cosine of the two most similar images' features, without the mean of all images.
    `across_splits`: labelled images of the group train, and others test.
    """

    size: int
    similarity: float
    across_splits: bool
    images: list[DatasetImage]


class NearDuplicatePage(_Body):
    """Groups of near-duplicates: those across splits first, then the most similar.

    `considered` is the number of images that the hub compared, the newest ones. `total` counts all groups,
    `total_across_splits` those across splits. `next` is the parameter `cursor` of the next page.
    """

    task: str
    considered: int
    total: int
    total_across_splits: int
    groups: list[NearDuplicates]
    next: str | None


class LabelRename(_Body):
    """A label and its new name. If the dataset has the new name already, both labels become one."""

    label: str
    to: Label


class LabelRenamed(_Body):
    label: str
    merged: bool
    counts: LabelCount


class AddedImage(_Body):
    """Image of a request: its name in the request and its digest."""

    name: str
    digest: str
    label: str | None


class MovedImage(AddedImage):
    """Image that was there with another label or split."""

    before: str | None


class RefusedImage(_Body):
    name: str
    reason: str


class AddCounts(_Body):
    added: int = 0
    already_there: int = 0
    moved: int = 0
    refused: int = 0


class ImagesAdded(_Body):
    """Result of an upload. Each list names at most 1,000 images; `counts` has all of them."""

    counts: AddCounts
    added: list[AddedImage]
    already_there: list[AddedImage]
    moved: list[MovedImage]
    refused: list[RefusedImage]
    warnings: list[str]


class TrainingRequest(_Body):
    """Request for a training.

    Recipe `instant` fits a classifier head to the stored features, and the reply has the version. `karst` and `auto`
    are queued: they also train KARST, and keep it if it is better on held-out images.
    """

    recipe: Annotated[str, Field(max_length=63)] = "instant"
    budget_s: Annotated[int, Field(ge=1, le=MAX_BUDGET_S)] = Field(
        600, description="seconds for KARST, of the recipes `karst` and `auto`"
    )


class SnapshotInfo(_Body):
    """Immutable list of the images that a training used, stored under the sha256 of its JSON text."""

    digest: str
    images: int
    train: int
    test: int


TrainingState = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: tuple[TrainingState, ...] = ("done", "failed", "cancelled")


class TrainingProgress(_Body):
    """Progress of a running training.

    `step` of `steps` counts images or optimiser steps of the stage; `steps` of 0 means that the stage has none. `loss`
    is the last step's, `accuracy` the last one on held-out images. `seconds_left` is an estimate for all optimiser
    steps.
    """

    stage: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    accuracy: float | None = None
    seconds_left: float | None = None


class Promotion(_Body):
    """Whether the alias `stable` moved to a new version by the task's rule, and why.

    The figures are those of a `Comparison` of the version that was stable (`a`) with the new one (`b`).
    """

    promoted: bool
    reason: str
    images: int | None = None
    stable_accuracy: float | None = None
    new_accuracy: float | None = None
    standard_error: float | None = None


class TrainingInfo(_Body):
    """One training and its result. `report` has the figures of the version's metrics.

    `attempt` counts starts: more than one means that an earlier one was interrupted.
    `report_files` are the names below `.../report/`.
    """

    id: str
    task: str
    recipe: str
    state: TrainingState
    created: str
    seconds: float
    snapshot: SnapshotInfo
    version: int | None
    report: dict[str, Any] | None
    warnings: list[str]
    error: str | None = None
    started: str | None = None
    attempt: int = 0
    progress: TrainingProgress | None = None
    report_files: list[str] = Field(default=[])
    promotion: Promotion | None = None


class TrainingList(_Body):
    """Trainings of a task, newest first."""

    trainings: list[TrainingInfo]


class ComparedVersion(_Body):
    """Answers of one version to the compared images. `interval` is the 95 % interval of the accuracy."""

    version: int
    right: int
    accuracy: float
    interval: tuple[float, float]


class ComparedClass(_Body):
    """Share of a label's images that each version recognises."""

    label: str
    images: int
    a: float
    b: float


class ComparedImage(_Body):
    """An image that the versions label differently."""

    digest: str
    name: str
    label: str
    a: str
    b: str


class Comparison(_Body):
    """Two versions of a task on the same test images of its dataset.

    `gain` is the accuracy of `b` minus that of `a`. `better` names the version that is better by more than one
    `standard_error` of the paired differences; null: neither. `left_out` test images trained one of the versions or
    cannot be read; `beyond_limit` more were not compared. `differ` lists at most 1,000 of the `differing` images.
    """

    task: str
    images: int
    left_out: int
    beyond_limit: int
    a: ComparedVersion
    b: ComparedVersion
    gain: float
    standard_error: float
    better: Literal["a", "b"] | None
    classes: list[ComparedClass]
    differing: int
    differ: list[ComparedImage]
