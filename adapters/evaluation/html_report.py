"""The report of the recipes `instant`, `karst` and `auto`: one HTML page that needs no network, PNGs and JSON.

Every figure is measured on images that the classifier has not seen.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from ..data.files import LeftOut
from ..format.atomic_write import write_atomically
from .advice import advise
from .figures import Png, image_tag
from .numbers import report_numbers
from .outputs import AccuracyInUse, described
from .report import draw_confusion, draw_errors, png_of

if TYPE_CHECKING:  # `auto` uses this room's calibration
    from ..training.auto import Classifier
    from ..training.inference import Predictions
    from ..training.refine import HeldOut

FILES = ("report.html", "report.json", "curves.png", "confusion.png", "errors.png")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: left; border-bottom: 1px solid #ddd; }
td.number { text-align: right; } img { max-width: 100%; } .lead { font-size: 1.4rem; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } img { background: #fff; } }
"""


class HtmlReport:
    """The report of one training. It is written for the instant classifier, and again when KARST is trained."""

    def __init__(self, folder: Path, metadata: Mapping[str, Any], in_use: AccuracyInUse | None = None) -> None:
        """
        Args:
            folder: created when the report is written.
            metadata: further entries of `report.json`, as JSON types.
            in_use: accuracy of the classifier in use; None: unknown.
        """
        self.folder = folder
        self._metadata = dict(metadata) | ({} if in_use is None else {"in_use": asdict(in_use)})
        self._in_use = in_use
        self._drawn: tuple[Predictions, dict[str, Png]] | None = None
        self.figures: dict[str, Png] = {}  # of the last report

    def write(self, classifier: "Classifier") -> None:
        """Write `FILES` into the folder. Each file is replaced atomically.

        Raises:
            OSError: the folder or a file cannot be written.
        """
        figures = {"curves": png_of(_draw_curves(classifier))} | self._predictions(classifier.held_out)
        metadata = self._metadata | described(classifier.adapter) | classifier.metrics
        advice = advise(classifier)
        text = json.dumps(_numbers(classifier, metadata), indent=2, ensure_ascii=False, allow_nan=False)
        page = _page(classifier, figures, advice, metadata, self._in_use)
        self.figures = figures
        self.folder.mkdir(exist_ok=True)
        for name, data in figures.items():
            write_atomically(self.folder / f"{name}.png", data)
        # File names may contain bytes that are not UTF-8.
        write_atomically(self.folder / "report.json", text.encode(errors="backslashreplace"))
        write_atomically(self.folder / "report.html", page.encode(errors="xmlcharrefreplace"))

    def _predictions(self, held_out: "Predictions") -> dict[str, Png]:
        """Return the figures of these predictions, which are drawn once."""
        if self._drawn is None or self._drawn[0] is not held_out:
            figures = {"confusion": png_of(draw_confusion(held_out)), "errors": png_of(draw_errors(held_out))}
            self._drawn = held_out, figures
        return self._drawn[1]


def _numbers(classifier: "Classifier", metadata: Mapping[str, Any]) -> dict[str, Any]:
    numbers = report_numbers(classifier, [str(x) for x in classifier.held_out.images.images.sources], metadata)
    if classifier.refined is not None:
        numbers["curve"] = [
            {"step": point.step, "loss": point.loss, "accuracy": point.accuracy} for point in classifier.refined.curve
        ]
    return numbers


def _page(
    classifier: "Classifier",
    figures: Mapping[str, bytes],
    advice: Sequence[str],
    metadata: Mapping[str, Any],
    in_use: AccuracyInUse | None,
) -> str:
    held_out, test = classifier.held_out, classifier.test
    rows = [("chance (the largest class)", f"{classifier.chance:.1%}", "")]
    if classifier.refined is None:
        rows.append((f"instant head, {len(held_out.targets)} left-out images", *_shown(held_out)))
    else:
        compared = {"instant head": classifier.refined.instant, "KARST": classifier.refined.karst}
        rows += [(f"{name}, {len(x.targets)} held-out images", *_shown(x)) for name, x in compared.items() if x]
    if test is not None:
        rows.append((f"{len(test.targets)} test images", *_shown(test)))
    if "linear_probe_test_accuracy" in metadata:
        rows.append(("linear probe, test images", f"{metadata['linear_probe_test_accuracy']:.1%}", ""))
    if in_use is not None:
        interval = "" if in_use.interval is None else "{:.1%} to {:.1%}".format(*in_use.interval)
        rows.append((f"in use: {in_use.name}, {in_use.measurement}", f"{in_use.accuracy:.1%}", interval))
    classes = []
    for label, own in classifier.metrics["classes"].items():
        precision = "-" if own["precision"] is None else f"{own['precision']:.0%}"
        classes.append((label, str(own["images"]), f"{own['recall']:.0%}", precision))
    accuracy, interval = _shown(held_out)
    sections = [
        f"<p class=lead>{accuracy} of {len(held_out.targets)} {held_out.split.replace(' ', '-')} images are right "
        f"(95 % interval {interval}).</p>",
        _table(("measured", "accuracy", "95 % interval"), rows),
    ]
    if classifier.refined is not None:
        sections.append(f"<p>{html.escape(classifier.refined.reason)}.</p>")
    sections += [
        "<h2>What would help most</h2>",
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in advice) + "</ul>",
        "<h2>Classes</h2>",
        _table(("class", "images", "recall", "precision"), classes),
        "<h2>Learning curve</h2>",
        *(() if classifier.learning_curve else ["<p>These images are too few for a curve by number of images.</p>"]),
        image_tag(figures["curves"], "accuracy against the number of images and optimiser steps"),
        "<h2>Confusions</h2>",
        image_tag(figures["confusion"], "confusion matrix"),
        "<h2>Most confident errors</h2>",
        image_tag(figures["errors"], "the most confident errors"),
    ]
    if metadata.get("warnings"):
        listed = "".join(f"<li>{html.escape(str(line))}</li>" for line in metadata["warnings"])
        sections.append(f"<h2>Warnings</h2><ul>{listed}</ul>")
    if left_out := [entry for entry in metadata.get("left_out", []) if not entry["matters"]]:
        listed = "".join(f"<li>{html.escape(str(LeftOut(**entry)))}</li>" for entry in left_out)
        sections.append(f"<h2>Files left out</h2><ul>{listed}</ul>")
    title = html.escape(str(metadata.get("adapter", "adapter")))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1>{''.join(sections)}</html>\n"
    )


def _shown(scores: "HeldOut | Predictions") -> tuple[str, str]:
    low, high = scores.interval
    return f"{scores.accuracy:.1%}", f"{low:.1%} to {high:.1%}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>"
        + f"<td>{html.escape(row[0])}</td>"
        + "".join(f"<td class=number>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{cells}</tr>{body}</table>"


def _draw_curves(classifier: "Classifier") -> Figure:
    """Draw accuracy against images, and, where KARST was trained, loss and accuracy against steps."""
    points = classifier.refined.curve if classifier.refined is not None else ()
    figure = Figure(figsize=(10, 4) if points else (6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if points else 1, squeeze=False)[0]
    counts = [images for images, _ in classifier.learning_curve]
    axes[0].plot(counts, [accuracy for _, accuracy in classifier.learning_curve], marker="o")
    axes[0].set(xlabel="images", ylabel="leave-one-out accuracy of the instant head", ylim=(0, 1.02))
    axes[0].grid(alpha=0.3)
    if points and classifier.refined is not None:
        steps = [point.step for point in points]
        axes[1].plot(steps, [point.accuracy for point in points], marker="o", label="KARST, held-out accuracy")
        axes[1].axhline(classifier.refined.instant.accuracy, color="grey", linestyle=":", label="instant head")
        axes[1].plot(steps, [point.loss for point in points], color="tab:red", alpha=0.6, label="training loss")
        axes[1].set(xlabel="optimiser steps", ylim=(0, max(1.02, *(point.loss for point in points))))
        axes[1].legend()
        axes[1].grid(alpha=0.3)
    return figure
