"""Labels of one image: the best ones, the smallest set that covers a share of a task's images, and their bytes."""

from collections.abc import Iterable, Sequence

import numpy as np

from adapters.evaluation.intervals import coverage_threshold

from ..errors import InvalidRequest
from ..registry.versions import ServedVersion
from ..schemas import MAX_REPLY_BYTES, Prediction

ENTRY_BYTES = 48  # of a label's score and of the JSON around both


def best(labels: Sequence[str], probabilities: np.ndarray, top_k: int) -> list[Prediction]:
    """Return the `top_k` labels with the highest probabilities, highest first. Equal scores keep the labels' order."""
    # The best one alone is found several times faster.
    order = probabilities.argmax(0, keepdims=True) if top_k == 1 else np.argsort(-probabilities, kind="stable")[:top_k]
    return [Prediction(label=labels[i], score=float(probabilities[i])) for i in order.tolist()]


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


def require_small_labels(labels: Sequence[Sequence[str]], top_k: int, unit: str = "images") -> None:
    """Refuse a call whose reply would be a large multiple of its request.

    Args:
        labels: of the version that classifies each image.
        unit: what a call may have fewer of: images, or tasks.

    Raises:
        InvalidRequest: the reply may have more than `MAX_REPLY_BYTES`.
    """
    if len(labels) == 1:  # a version's labels are fewer bytes than the limit
        return
    different = {id(names): names for names in labels}
    for count in (None, top_k):  # all labels first: that bound is cheaper, and it is enough for most calls
        sizes = {key: _largest_bytes(names, count or len(names)) for key, names in different.items()}
        image_bytes = [sizes[id(names)] for names in labels]
        if sum(image_bytes) <= MAX_REPLY_BYTES:
            return
    require_small_reply(image_bytes, "top_k", "lower top_k", unit)


def _largest_bytes(labels: Sequence[str], top_k: int) -> int:
    """Return the bytes of one image's `top_k` labels with their scores, if the longest labels are the best ones."""
    if top_k >= len(labels):
        return len("".join(labels).encode(errors="replace")) + ENTRY_BYTES * len(labels)
    sizes = sorted((len(label.encode(errors="replace")) for label in labels), reverse=True)
    return sum(sizes[:top_k]) + ENTRY_BYTES * top_k


def require_small_reply(image_bytes: Sequence[int], field: str, remedy: str, unit: str = "images") -> None:
    """Refuse a call whose reply would be a large multiple of its request.

    Args:
        image_bytes: bytes of the reply to each image.
        field: option that the reply's size depends on.
        remedy: the end of the message, such as "lower top_k".
        unit: as in `require_small_labels`.

    Raises:
        InvalidRequest: the reply would have more than `MAX_REPLY_BYTES`.
    """
    total = sum(image_bytes)
    if len(image_bytes) > 1 and total > MAX_REPLY_BYTES:
        images = max(1, MAX_REPLY_BYTES // max(image_bytes))
        message = f"the reply to {len(image_bytes)} {unit} may have {total} bytes of labels and numbers"
        raise InvalidRequest.at(
            field, f"{message} (limit {MAX_REPLY_BYTES}); send at most {images} {unit} in a call, or {remedy}"
        )


def require_small_sets(sets: Iterable[Sequence[str]], unit: str = "images") -> None:
    """Refuse label sets that would make a reply a large multiple of its request.

    Raises:
        InvalidRequest: the sets have more than `MAX_REPLY_BYTES`.
    """
    require_small_reply(
        [len("".join(labels).encode(errors="replace")) + ENTRY_BYTES * len(labels) for labels in sets],
        "coverage",
        "lower the coverage",
        unit,
    )
