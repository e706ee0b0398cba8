"""The report of a training: curves, confusion matrix, worst errors, and every number as JSON.

It draws and writes; it decides nothing. Figures are made without pyplot, whose state is global.
"""

import io
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..data.images import Pixels
from ..format.file import write_atomically
from ..method.karst import KarstModel
from . import train

FILES = ("curves.png", "confusion.png", "errors.png", "report.json")
MAX_TICKS = 40  # names along an axis of the confusion matrix; of more classes every n-th is named
SHEET_COLUMNS, SHEET_ROWS = 6, 4


@dataclass(frozen=True)
class Answers:
    """A model's answers to a set of images: logits (n, K) float32 and targets (n,), on the CPU."""

    part: str
    data: Pixels
    logits: Tensor
    targets: Tensor

    @cached_property
    def predicted(self) -> np.ndarray:
        """(n,) the class with the highest score."""
        return self.logits.argmax(1).numpy()

    @cached_property
    def scores(self) -> np.ndarray:
        """(n,) the predicted class's probability."""
        return self.logits.softmax(1).amax(1).numpy()

    @property
    def accuracy(self) -> float:
        """Top-1, in [0, 1]."""
        return float((self.predicted == self.targets.numpy()).mean())

    @property
    def labels(self) -> tuple[str, ...]:
        return self.data.images.labels

    def confusion(self) -> np.ndarray:
        """(K, K) counts: a row is a true class, a column a predicted one."""
        k = len(self.labels)
        return np.bincount(self.targets.numpy() * k + self.predicted, minlength=k * k).reshape(k, k)

    def worst(self, most: int) -> list[int]:
        """Wrong answers, the most confident first."""
        wrong = np.flatnonzero(self.predicted != self.targets.numpy())
        return [int(i) for i in wrong[np.argsort(-self.scores[wrong], kind="stable")][:most]]


def answers(model: KarstModel, part: str, data: Pixels) -> Answers:
    """Run a trained model over a set of images; `part` says which: test, validation or train."""
    logits, targets = train.predict(model, data)
    return Answers(part, data, logits, targets)


def write_report(
    folder: Path, measured: Answers, fitted: train.Fitted, train_targets: Sequence[int], facts: Mapping[str, Any]
) -> None:
    """Write `FILES` into a folder, each completely or not at all; what is there from before is replaced.

    Args:
        folder: made if it is not there.
        measured: on the images that the confusion matrix and the errors are of.
        train_targets: classes of the training images, to count them.
        facts: more for `report.json`, as JSON takes it.

    Raises:
        OSError: the folder or a file cannot be written.
    """
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "curves.png", _png(_curves(fitted)))
    write_atomically(folder / "confusion.png", _png(_confusion(measured)))
    write_atomically(folder / "errors.png", _png(_errors(measured)))
    numbers = dict(facts) | _numbers(measured, fitted, train_targets)
    text = json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "report.json", text.encode(errors="backslashreplace"))  # names of files may be no UTF-8


def _numbers(measured: Answers, fitted: train.Fitted, train_targets: Sequence[int]) -> dict[str, Any]:
    confusion = measured.confusion()
    trained = Counter(train_targets)
    classes = []
    for k, label in enumerate(measured.labels):
        images = int(confusion[k].sum())
        right = round(float(confusion[k, k]) / images, 4) if images else None
        classes.append({"label": label, "train_images": trained[k], "images": images, "accuracy": right})
    return {
        "epoch": fitted.chosen.number,
        "history": [
            {
                "epoch": epoch.number,
                "loss": epoch.loss,
                "train_accuracy": epoch.train_accuracy,
                "val_accuracy": epoch.val_accuracy,
            }
            for epoch in fitted.history
        ],
        "measured_on": measured.part,
        "accuracy": measured.accuracy,
        "classes": classes,
        "confusion": confusion.tolist(),
        "errors": [_error(measured, i) for i in measured.worst(SHEET_COLUMNS * SHEET_ROWS)],
    }


def _error(measured: Answers, i: int) -> dict[str, Any]:
    return {
        "image": str(measured.data.images.paths[i]),
        "label": measured.labels[int(measured.targets[i])],
        "predicted": measured.labels[int(measured.predicted[i])],
        "score": round(float(measured.scores[i]), 4),
    }


def _curves(fitted: train.Fitted) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    numbers = [epoch.number for epoch in fitted.history]
    marker = "o" if len(numbers) == 1 else None  # one point is no line
    losses.plot(numbers, [epoch.loss for epoch in fitted.history], marker=marker, label="training")
    losses.set(xlabel="epoch", ylabel="loss (mean cross-entropy)")
    accuracies.plot(numbers, [epoch.train_accuracy for epoch in fitted.history], marker=marker, label="training")
    validated = [epoch.val_accuracy for epoch in fitted.history if epoch.val_accuracy is not None]
    if validated:
        accuracies.plot(numbers, validated, marker=marker, label="validation")
    accuracies.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02))
    how = "best on validation" if validated else "the last, nothing was validated"
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.axvline(fitted.chosen.number, color="grey", linestyle=":", label=f"epoch {fitted.chosen.number}: {how}")
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def _confusion(measured: Answers) -> Figure:
    counts = measured.confusion()
    k = len(measured.labels)
    side = min(max(4.5, 0.32 * k + 2.5), 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # rows: a large class is no darker than a small one
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="share of the true class", shrink=0.8)
    axes.set_title(_title(measured))
    axes.set(xlabel="predicted", ylabel="true")
    step = -(-k // MAX_TICKS)
    ticks = range(0, k, step)
    names = [_short(measured.labels[i]) for i in ticks]
    axes.set_xticks(ticks, names, rotation=90, parse_math=False, fontsize=8)
    axes.set_yticks(ticks, names, parse_math=False, fontsize=8)
    if k <= 20:  # more would be too small to read
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def _errors(measured: Answers) -> Figure:
    worst = measured.worst(SHEET_COLUMNS * SHEET_ROWS)
    if not worst:
        figure = Figure(figsize=(6, 1.5))
        figure.text(0.5, 0.5, f"no errors: {_title(measured)}", ha="center", va="center")
        return figure
    rows = -(-len(worst) // SHEET_COLUMNS)
    figure = Figure(figsize=(SHEET_COLUMNS * 2, rows * 2.6 + 0.5), layout="constrained")
    figure.suptitle(f"most confident errors; {_title(measured)}")
    for place, axes in enumerate(figure.subplots(rows, SHEET_COLUMNS, squeeze=False).flat):
        axes.set_axis_off()
        if place < len(worst):
            _show(axes, measured, worst[place])
    return figure


def _show(axes: Axes, measured: Answers, i: int) -> None:
    pixels, _ = measured.data[i]
    error = _error(measured, i)
    axes.imshow(pixels.permute(1, 2, 0).numpy())  # as the backbone sees it
    axes.set_title(
        f"true {_short(error['label'])}\npredicted {_short(error['predicted'])} ({error['score']:.0%})",
        fontsize=8,
        parse_math=False,
    )


def _title(measured: Answers) -> str:
    kind = {"test": "test images", "validation": "validation images", "train": "training images (nothing held out)"}
    return f"{measured.accuracy:.1%} of {len(measured.targets)} {kind[measured.part]} right"


def _short(label: str) -> str:
    return label if len(label) <= 20 else label[:19] + "…"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font"
        )  # a box stands for it; JSON has the label
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
