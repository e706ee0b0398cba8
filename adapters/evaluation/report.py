"""The report of a training: curves, confusion matrix, most confident errors, and all numbers as JSON.

Figures are drawn without pyplot, whose state is global.
"""

import io
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..format.atomic_write import write_atomically
from ..paper.train import TrainedModel
from ..training.inference import Predictions
from .figures import Png
from .numbers import describe_error

FILES = ("curves.png", "confusion.png", "errors.png", "report.json")
MAX_TICKS = 40  # class names per axis of the confusion matrix; with more classes, every n-th is named
MAX_CLASSES_WITH_COUNTS = 20  # with more classes, the counts in the confusion matrix are too small to read
MAX_LABEL_CHARACTERS = 20
ERROR_COLUMNS, ERROR_ROWS = 6, 4  # grid of errors.png
DPI = 110


def write_report(
    folder: Path,
    predictions: Predictions,
    trained: TrainedModel,
    train_targets: Sequence[int],
    metadata: Mapping[str, Any],
) -> dict[str, Png]:
    """Write `FILES` into a folder, each atomically, and return the figures by name.

    Args:
        folder: created if it does not exist.
        predictions: for the images that the confusion matrix and the errors show.
        train_targets: class index per training image.
        metadata: further entries of `report.json`, as JSON types.

    Raises:
        OSError: the folder or a file cannot be written.
    """
    folder.mkdir(exist_ok=True)
    drawn = {
        "curves": _draw_curves(trained),
        "confusion": draw_confusion(predictions),
        "errors": draw_errors(predictions),
    }
    figures = {name: png_of(figure) for name, figure in drawn.items()}
    for name, data in figures.items():
        write_atomically(folder / f"{name}.png", data)
    numbers = dict(metadata) | _numbers(predictions, trained, train_targets)
    text = json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False)
    # File names may contain bytes that are not UTF-8.
    write_atomically(folder / "report.json", text.encode(errors="backslashreplace"))
    return figures


def _numbers(predictions: Predictions, trained: TrainedModel, train_targets: Sequence[int]) -> dict[str, Any]:
    confusion = predictions.confusion()
    sources = predictions.images.images.sources
    worst = predictions.worst_errors(ERROR_COLUMNS * ERROR_ROWS)
    train_counts = Counter(train_targets)
    classes = []
    for k, label in enumerate(predictions.labels):
        images = int(confusion[k].sum())
        accuracy = round(float(confusion[k, k]) / images, 4) if images else None
        classes.append({"label": label, "train_images": train_counts[k], "images": images, "accuracy": accuracy})
    return {
        "epoch": trained.selected.number,
        "history": [
            {
                "epoch": epoch.number,
                "loss": epoch.loss,
                "train_accuracy": epoch.train_accuracy,
                "val_accuracy": epoch.val_accuracy,
            }
            for epoch in trained.history
        ],
        "measured_on": predictions.split,
        "accuracy": predictions.accuracy,
        "classes": classes,
        "confusion": confusion.tolist(),
        "errors": [describe_error(predictions, i, str(sources[i])) for i in worst],
    }


def _draw_curves(trained: TrainedModel) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    numbers = [epoch.number for epoch in trained.history]
    marker = "o" if len(numbers) == 1 else None  # otherwise a single point would be invisible
    losses.plot(numbers, [epoch.loss for epoch in trained.history], marker=marker, label="training")
    losses.set(xlabel="epoch", ylabel="loss (mean cross-entropy)")
    accuracies.plot(numbers, [epoch.train_accuracy for epoch in trained.history], marker=marker, label="training")
    validated = [epoch.val_accuracy for epoch in trained.history if epoch.val_accuracy is not None]
    if validated:
        accuracies.plot(numbers, validated, marker=marker, label="validation")
    accuracies.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02))
    reason = "best on validation images" if validated else "last epoch, no validation images"
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.axvline(
            trained.selected.number, color="grey", linestyle=":", label=f"epoch {trained.selected.number}: {reason}"
        )
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def draw_confusion(predictions: Predictions) -> Figure:
    counts = predictions.confusion()
    k = len(predictions.labels)
    side = min(max(4.5, 0.32 * k + 2.5), 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # per row, otherwise a large class would be darker
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set_title(_title(predictions))
    axes.set(xlabel="predicted", ylabel="true")
    step = -(-k // MAX_TICKS)
    ticks = range(0, k, step)
    names = [_short(predictions.labels[i]) for i in ticks]
    axes.set_xticks(ticks, names, rotation=90, parse_math=False, fontsize=8)
    axes.set_yticks(ticks, names, parse_math=False, fontsize=8)
    if k <= MAX_CLASSES_WITH_COUNTS:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def draw_errors(predictions: Predictions) -> Figure:
    worst = predictions.worst_errors(ERROR_COLUMNS * ERROR_ROWS)
    if not worst:
        figure = Figure(figsize=(6, 1.5))
        figure.text(0.5, 0.5, f"no errors: {_title(predictions)}", ha="center", va="center")
        return figure
    rows = -(-len(worst) // ERROR_COLUMNS)
    figure = Figure(figsize=(ERROR_COLUMNS * 2, rows * 2.6 + 0.5), layout="constrained")
    figure.suptitle(f"most confident errors; {_title(predictions)}")
    for position, axes in enumerate(figure.subplots(rows, ERROR_COLUMNS, squeeze=False).flat):
        axes.set_axis_off()
        if position < len(worst):
            _draw_error(axes, predictions, worst[position])
    return figure


def _draw_error(axes: Axes, predictions: Predictions, i: int) -> None:
    pixels, _ = predictions.images[i]
    error = describe_error(predictions, i, str(predictions.images.images.sources[i]))
    axes.imshow(pixels.permute(1, 2, 0).numpy())  # after resizing and cropping
    axes.set_title(
        f"true {_short(error['label'])}\npredicted {_short(error['predicted'])} ({error['score']:.0%})",
        fontsize=8,
        parse_math=False,
    )


def _title(predictions: Predictions) -> str:
    kind = {
        "test": "test images",
        "validation": "validation images",
        "train": "training images (none held out)",
        "left out": "left-out images",
        "held out": "held-out images",
    }
    return f"{predictions.accuracy:.1%} of {len(predictions.targets)} {kind[predictions.split]} correct"


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL_CHARACTERS else label[: MAX_LABEL_CHARACTERS - 1] + "…"


def png_of(figure: Figure) -> Png:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # matplotlib draws a box instead of a missing glyph; report.json has the label.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=DPI)
    return Png(buffer.getvalue())
