"""The numbers of a classifier's report, as JSON types. Figures are elsewhere, so this module needs no matplotlib."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .advice import advise

if TYPE_CHECKING:  # `auto` uses this room's calibration
    from ..training.auto import Classifier
    from ..training.inference import Predictions

MAX_ERRORS = 1000  # wrong answers that a report lists, the most confident first


def report_numbers(classifier: "Classifier", images: Sequence[str], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `report.json`.

    Args:
        images: name of each held-out image.
        metadata: further entries.
    """
    held_out = classifier.held_out
    return dict(metadata) | {
        "measured_on": held_out.split,
        "labels": list(held_out.labels),
        "accuracy": round(held_out.accuracy, 4),
        "interval": [round(value, 4) for value in held_out.interval],
        "chance": round(classifier.chance, 4),
        "learning_curve": [list(point) for point in classifier.learning_curve],
        "advice": list(advise(classifier)),
        "confusion": held_out.confusion().tolist(),
        "errors": [describe_error(held_out, i, images[i]) for i in held_out.worst_errors(MAX_ERRORS)],
    }


def describe_error(predictions: "Predictions", i: int, image: str) -> dict[str, Any]:
    """Return image `i` with its name, its label and the wrong answer."""
    return {
        "image": image,
        "label": predictions.labels[int(predictions.targets[i])],
        "predicted": predictions.labels[int(predictions.predicted[i])],
        "score": round(float(predictions.confidences[i]), 4),
    }
