"""JSON bodies of the routes for the use of a task in production: counts of answers, and drift, and back-tests."""

from typing import Literal

from pydantic import Field

from .field_types import Body as _Body

MAX_USAGE_DAYS = 400
MAX_BACKTEST_IMAGES = 1000


class UsageCounts(_Body):
    """Counts of answers to callers of the task's own tenant.

    `typicality` is the mean of `typicality_images` images; `unknown` images had a typicality below the task's
    `unknown_below`. `kept` images went to the dataset. Feedback `confirmed` an answer, or gave the image another label
    (`corrections`). Labels and versions beyond a limit are counted as `other`.
    """

    images: int
    by_label: dict[str, int]
    by_version: dict[str, int]
    typicality: float | None
    typicality_images: int
    typicality_tenths: list[int] = Field(description="images by tenth of typicality, from 0 to 0.1 upwards")
    unknown: int
    kept: int
    confirmed: int
    corrections: int


class UsageOfDay(UsageCounts):
    """Counts of one day (UTC)."""

    day: str


class LabelShare(_Body):
    """Share of a label in the training's snapshot, and among the answers."""

    label: str
    trained: float
    answered: float


class LabelDrift(_Body):
    """Distance between the labels of the training's images and those of the answers.

    `stability_index` is the population stability index. `limit` is what it would exceed by chance once in a thousand
    times with this number of images, and at least 0.25; above it, the labels drift. `shares` has the labels that differ
    most.
    """

    stability_index: float
    limit: float
    trained_images: int
    shares: list[LabelShare]
    drifts: bool


class TypicalityDrift(_Body):
    """Mean typicality of the answered images.

    It is 0.5 for images like those of the training. `standard_error` is that of the mean of as many such images. The
    typicality drifts if the mean is below `limit`.
    """

    mean: float
    standard_error: float
    limit: float
    images: int
    drifts: bool


class Drift(_Body):
    """Comparison of the images that a version has answered with those that trained it; `text` says it in a sentence.

    `few` images decide nothing. `labels` is null for a version without a known snapshot, `typicality` for one whose
    file has no data for it.
    """

    version: int
    images: int
    verdict: Literal["none", "few", "drift"]
    text: str
    labels: LabelDrift | None
    typicality: TypicalityDrift | None


class TaskUsage(_Body):
    """Counts of a task's answers by day, oldest first, their sums, and drift.

    `drift` is about the version that answered the most images, and null without one that still exists.
    """

    task: str
    days: list[UsageOfDay]
    total: UsageCounts
    drift: Drift | None


class ChangedLabels(_Body):
    """Number of images that one version labels `a` and the other `b`."""

    a: str
    b: str
    images: int


class RightAnswers(_Body):
    """Images with a label that trained neither version, as far as snapshots tell, and how many each labels so."""

    images: int
    a: int
    b: int


class BacktestImage(_Body):
    """A kept image that the versions label differently; `label` is its true label, where it has one."""

    digest: str
    name: str
    added: str
    label: str | None
    a: str
    b: str


class Backtest(_Body):
    """The newest kept images of a task, answered by version `b` and by version `a`.

    `a` is null where the answers are those that the callers got. `changed` of the `images` have another label; `share`
    is their part, with its 95 % `interval`. `left_out` images cannot be read, `beyond_limit` more are not in the sample
    that workers have answered. `changes` has the 100 most frequent changes, `differ` all changed images, newest first.
    """

    task: str
    a: int | None
    b: int
    images: int
    left_out: int
    beyond_limit: int
    changed: int
    share: float
    interval: tuple[float, float]
    labelled: RightAnswers
    changes: list[ChangedLabels]
    differ: list[BacktestImage]
