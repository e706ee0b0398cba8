"""Advice after a training: what would raise the accuracy most, from the figures of the report."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # `auto` uses this room's calibration
    from ..training.auto import Classifier

FEW_IMAGES = 20  # per class; below this, more images nearly always help
RISING = 0.02  # gain of accuracy by the second half of the images from which more are advised
HIGH_ACCURACY = 0.98


def advise(classifier: "Classifier") -> tuple[str, ...]:
    """Return sentences, the most useful first; at least one. They do not contradict each other."""
    held_out = classifier.held_out
    confusion = held_out.confusion()
    counts, hits = confusion.sum(1), confusion.diagonal()
    lines = []
    if not classifier.beats_chance:
        lines.append(
            "The accuracy is not clearly above chance: check that the labels belong to the images, and that the "
            "difference between the classes can be seen at the backbone's image size."
        )
    few = [held_out.labels[k] for k in np.flatnonzero(counts < FEW_IMAGES)]
    curve = classifier.learning_curve
    gain = curve[-1][1] - curve[-2][1] if len(curve) >= 2 else None
    flat = gain is not None and gain < RISING and not few
    wrong = counts - hits
    if wrong.sum() and held_out.accuracy < HIGH_ACCURACY:
        worst = int(np.argmax(wrong))
        others = confusion[worst].copy()
        others[worst] = 0
        with_class = held_out.labels[int(np.argmax(others))]
        most = (
            "Its labels are the first to check"
            if flat
            else f"More images of {held_out.labels[worst]!r} would help most"
        )
        lines.append(
            f"{held_out.labels[worst]!r} has the most errors: {wrong[worst]} of its {counts[worst]} images are wrong, "
            f"most often taken for {with_class!r}. {most}."
        )
    if few and held_out.accuracy < HIGH_ACCURACY:
        lines.append(f"Labels with fewer than {FEW_IMAGES} images, which more images help: {', '.join(few[:10])}.")
    if gain is not None and gain >= RISING:
        lines.append(
            f"The last doubling of the images, from {curve[-2][0]} to {curve[-1][0]}, raised the accuracy by "
            f"{100 * gain:.0f} points: expect more images to raise it further."
        )
    elif gain is not None and flat and held_out.accuracy < HIGH_ACCURACY:
        lines.append(
            "More images of the same kind would help little: the last doubling raised the accuracy by "
            f"{100 * max(gain, 0):.0f} points. Try a larger backbone, a larger image size, or clearer labels."
        )
    if classifier.refined is None and held_out.accuracy < HIGH_ACCURACY:
        lines.append("Train KARST, too: `--recipe auto` keeps it only if it is better.")
    if not lines:
        lines.append("No change is needed, since nearly every left-out image is right.")
    return tuple(lines)
