"""Answers to the images of a call, as the parts of a reply."""

from dataclasses import dataclass
from functools import cached_property

from ..registry.versions import ServedVersion
from ..schemas import Result
from ..worker_api import Answer
from .label_sets import best, label_set


@dataclass(frozen=True)
class Predicted:
    """Answers to the images of one call, and the version that computed them.

    Attributes:
        unknown_below: of the task; an image with a lower typicality is unknown.
        threshold: probability at or above which labels belong to an image's set; None: no sets.
        kept: digest of each image that the task's dataset keeps, else None; None: the task keeps no images.
    """

    version: ServedVersion
    answers: list[Answer]
    unknown_below: float
    threshold: float | None
    kept: list[str | None] | None = None

    @cached_property
    def typicality(self) -> list[float] | None:
        """Typicality of each image; None if the adapter has none."""
        found = [answer.typicality for answer in self.answers if answer.typicality is not None]
        return found if len(found) == len(self.answers) else None

    @cached_property
    def unknown(self) -> list[bool] | None:
        """Whether each image is unknown; None if the adapter has no typicality."""
        return None if self.typicality is None else [found < self.unknown_below for found in self.typicality]

    @cached_property
    def sets(self) -> list[list[str]] | None:
        """Label set of each image; None if the call has no coverage."""
        if self.threshold is None:
            return None
        return [label_set(self.version.labels, answer.probabilities, self.threshold) for answer in self.answers]


def result_of(task: str, predicted: Predicted, top_k: int) -> Result:
    """Return the reply to one input, from the answer to its image."""
    version = predicted.version
    return Result(
        task=task,
        version=version.version,
        digest=version.digest,
        predictions=best(version.labels, predicted.answers[0].probabilities, top_k),
        typicality=predicted.typicality[0] if predicted.typicality else None,
        unknown=predicted.unknown[0] if predicted.unknown else None,
        set=predicted.sets[0] if predicted.sets else None,
        image=predicted.kept[0] if predicted.kept else None,
    )
