"""Labels of one image: the best ones, and the smallest set that covers a share of a task's images."""

from collections.abc import Sequence

import numpy as np

from adapters.evaluation.calibration import coverage_threshold

from ..errors import InvalidRequest
from ..registry.versions import ServedVersion
from ..schemas import Prediction


def best(labels: Sequence[str], probabilities: np.ndarray, top_k: int) -> list[Prediction]:
    """Return the `top_k` labels with the highest probabilities, highest first. Equal scores keep the labels' order."""
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [Prediction(label=labels[i], score=float(probabilities[i])) for i in order]


def label_set(labels: Sequence[str], probabilities: np.ndarray, threshold: float) -> list[str]:
    """Return the labels whose probability is at least the threshold, most likely first; at least the best label."""
    order = np.argsort(-probabilities, kind="stable")
    return [labels[i] for rank, i in enumerate(order) if rank == 0 or probabilities[i] >= threshold]


def threshold_of(task: str, version: ServedVersion, coverage: float | None) -> float | None:
    """Return the threshold of a version's label sets at a coverage; None without a coverage.

    Raises:
        InvalidRequest: the adapter has no coverage data, or none for this coverage.
    """
    if coverage is None:
        return None
    if version.coverage is None:
        raise InvalidRequest.at(
            "coverage",
            f"version {version.version} of task {task!r} has no data for label sets; train the adapter again with "
            "recipe auto, instant or karst and register the new file, or omit coverage",
        )
    try:
        return coverage_threshold(version.coverage, coverage)
    except ValueError as error:
        low, high = version.coverage[0][0], version.coverage[-1][0]
        message = f"is {coverage:g}; version {version.version} of task {task!r} takes {low:g} to {high:g}"
        raise InvalidRequest.at("coverage", message) from error
