"""Files of the recipes `instant`, `karst` and `auto`: the instant adapter first, then KARST if it is better."""

from pathlib import Path
from typing import NoReturn

from ..data.errors import DataError
from ..evaluation.html_report import HtmlReport
from ..evaluation.outputs import rejected_file
from .auto import Classifier, InstantFit, InstantWatch, Refinement


class NotBetterThanChance(DataError):
    """The adapter is not clearly better than a constant answer; the message names the file that was kept.

    Attributes:
        reason: the figures, without the names of files.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class AutoFiles:
    """The adapter file of a training and the report beside it."""

    def __init__(self, output: Path, report: HtmlReport) -> None:
        self._output, self._report = output, report
        self._written = ""  # digest

    def write(self, classifier: Classifier) -> None:
        """Write the adapter, unless the file has it already, and the report."""
        if classifier.adapter.digest != self._written:
            classifier.adapter.write(self._output)
            self._written = classifier.adapter.digest
        self._report.write(classifier)

    def reject(self, classifier: Classifier) -> NoReturn:
        """Write the report, and the adapter under another name. A file that this training wrote does not remain.

        Raises:
            NotBetterThanChance: always.
        """
        rejected = rejected_file(self._output)
        classifier.adapter.write(rejected)
        self._report.write(classifier)
        if self._written:
            self._output.unlink(missing_ok=True)
        held_out = classifier.held_out
        low, high = held_out.interval
        reason = (
            "The adapter is not clearly better than a constant answer, so it is not used. It is right for "
            f"{held_out.accuracy:.1%} of {len(held_out.targets)} {held_out.split.replace(' ', '-')} images (95 % "
            f"interval {low:.1%} to {high:.1%}); always naming the most frequent label is right for "
            f"{classifier.chance:.1%}. "
        )
        height, width = classifier.adapter.preprocess["input_size"][-2:]
        advice = (
            "Add images of each label, check the labels, or use a larger backbone: this one sees images at "
            f"{width} x {height} pixels."
        )
        files = f"The file is kept as {rejected}; the report: {self._report.folder}. "
        raise NotBetterThanChance(f"{reason}{files}{advice}", f"{reason}{advice}")


def fit_auto(fitted: InstantFit, refinement: Refinement | None, files: AutoFiles, watch: InstantWatch) -> Classifier:
    """Write the instant adapter, then the one of KARST if it is better; return the classifier of the written file.

    Args:
        refinement: the training of KARST; None keeps the instant adapter.

    Raises:
        NotBetterThanChance: neither is clearly better than a constant answer.
        ConfigError: the config does not suit the backbone.
    """
    classifier = fitted.classifier()
    if classifier.beats_chance:
        files.write(classifier)
    watch.instant(classifier)
    if refinement is not None:
        classifier = fitted.refine(refinement, classifier, watch)
    if not classifier.beats_chance:
        files.reject(classifier)
    if refinement is not None:
        files.write(classifier)
    return classifier
