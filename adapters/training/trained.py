"""The result of `fit`, and its display at the end of a notebook's cell."""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.figures import Png, image_tag
from ..format.file import Adapter

# Accuracies in `metrics`, the most telling first: name of the accuracy, its number of images, a phrase.
ACCURACIES = (
    ("test_accuracy", "test_images", "test images"),
    ("held_out_accuracy", "train_images", "held-out images"),
    ("leave_one_out_accuracy", "train_images", "left-out images"),
    ("val_accuracy", "val_images", "validation images"),
    ("train_accuracy", "train_images", "training images, none held out"),
)
SHOWN_FIGURES = ("curves", "confusion")


@dataclass(frozen=True)
class Trained:
    """A trained adapter, its file, its report's folder, and the metrics in its metadata.

    Attributes:
        figures: the report's figures by name: `curves`, `confusion` and `errors`. A notebook shows one at the end of a
            cell. Empty in the further processes of a training on several devices.
    """

    adapter: Adapter
    file: Path
    report: Path
    metrics: dict[str, Any]
    figures: Mapping[str, Png]

    def __repr__(self) -> str:
        """Return one line with file, size and accuracy; the generated text would contain every tensor."""
        return f"<Trained {self._summary()}; report: {self.report}>"

    def _repr_html_(self) -> str:
        """Return the summary, the curves and the confusion matrix, which a notebook shows without any file."""
        shown = "".join(image_tag(self.figures[name], name) for name in SHOWN_FIGURES if name in self.figures)
        report = f"report: <code>{html.escape(str(self.report))}</code>"
        return f"<p>{html.escape(self._summary())}<br>{report}</p>{shown}"

    def _summary(self) -> str:
        found = [
            f"{self.metrics[name]:.1%} of {self.metrics[images]} {phrase}"
            for name, images, phrase in ACCURACIES
            if name in self.metrics
        ]
        sizes = f"{self.adapter.num_classes} labels, {len(self.adapter.data):,} bytes, backbone {self.adapter.backbone}"
        return ", ".join([f"{self.file}: {sizes}", *found[:1]])
