"""Generator of docs/accuracy.md and docs/img/accuracy.png from the accuracy benchmark's JSON file.

    python -m benchmarks.accuracy_report [--results FILE] [--docs FOLDER]

The script computes every number and every verdict in the text from the file.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .accuracy import OUTPUT
from .accuracy_methods import ABLATION, KARST, LINEAR, MAIN
from .common import markdown_table

DOCS = Path(__file__).parent.parent / "docs"
# The paper's three ablations: title -> runs, from the least to the most parameters.
ABLATIONS = {
    "N, the number of kernels (r = 8, re-scaling per channel)": ("KARST N=1", KARST, "KARST N=4", "KARST N=8"),
    "r, the rank (N = 2, re-scaling per channel)": ("KARST r=2", "KARST r=4", KARST),
    "Re-scaling (N = 2, r = 8)": ("KARST none", "KARST scalar", KARST),
}
ORIGIN = {
    "digits": "scikit-learn's handwritten digits",
    "fashion": "Fashion-MNIST",
    "elpv": "electroluminescence images of solar cells, four grades of defect probability (`elpv-dataset`)",
    "count": "drawn: one to eight dots",
    "orientation": "drawn: a sprite at one of eight angles",
    "location": "drawn: a sprite's horizontal position in eight bins",
    "shapes": "drawn: geometric shapes",
}


class ReportError(ValueError):
    """Too few runs in a results file for a report. The message names the missing ones."""


@dataclass(frozen=True)
class Results:
    """The runs of a results file: accuracy in percent by (method, task, seed), and the file itself."""

    file: dict[str, Any]
    accuracy: dict[tuple[str, str, int], float]
    seeds: tuple[int, ...]

    def complete_tasks(self, methods: Iterable[str]) -> tuple[str, ...]:
        """Return the tasks with a run of every method and seed."""
        methods = tuple(methods)
        return tuple(
            task
            for task in self.file["tasks"]
            if all((method, task, seed) in self.accuracy for method in methods for seed in self.seeds)
        )

    def by_seed(self, method: str, tasks: Sequence[str]) -> list[float]:
        """Return the mean accuracy over tasks, per seed."""
        return [statistics.fmean(self.accuracy[method, task, seed] for task in tasks) for seed in self.seeds]

    def parameters(self, method: str) -> int:
        """Return the number of trained parameters without the head."""
        return next(run["parameters"] for run in self.file["runs"] if run["method"] == method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=OUTPUT, help="output of benchmarks.accuracy")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    try:
        results = read(options.results)
    except (OSError, ReportError) as error:
        raise SystemExit(f"no report: {error}") from None
    (options.docs / "img").mkdir(parents=True, exist_ok=True)
    (options.docs / "accuracy.md").write_text(report(results))
    plot(results, options.docs / "img" / "accuracy.png")
    print("\n".join(bars(results)))
    print(f"written to {options.docs / 'accuracy.md'} and {options.docs / 'img' / 'accuracy.png'}")


def read(path: Path) -> Results:
    """Read a results file.

    Raises:
        ReportError: fewer than two seeds, or no task with all the main methods.
    """
    file = json.loads(path.read_text())
    accuracy = {(run["method"], run["task"], run["seed"]): 100 * run["accuracy"] for run in file["runs"]}
    results = Results(file, accuracy, tuple(sorted({seed for _, _, seed in accuracy})))
    if len(results.seeds) < 2:
        raise ReportError(
            f"{path} has the seeds {results.seeds}; without two the standard error is unknown; run more seeds"
        )
    if not results.complete_tasks(MAIN):
        raise ReportError(f"{path}: no task has runs of {', '.join(MAIN)} with each of the seeds {results.seeds}")
    return results


def bars(results: Results) -> list[str]:
    """Return a line of Markdown per target of KARST, with its verdict."""
    tasks = results.complete_tasks(MAIN)
    lines = []
    for rival in ("LoRA", "LoKr"):
        gap, error = _gap(results, KARST, rival, tasks)
        shortfall = "holds within the noise" if gap >= -error else "does not hold"
        verdict = "holds" if gap >= 0 else shortfall
        lines.append(
            f"- KARST at least {rival} in the mean over tasks: **{verdict}**. "
            f"KARST minus {rival} is {gap:+.2f} points, pooled standard error over seeds {error:.2f}."
        )
    for task in tasks:
        gap = statistics.fmean(results.by_seed(KARST, [task])) - statistics.fmean(results.by_seed(LINEAR, [task]))
        verdict = "**holds**" if gap > 0 else "**does not hold**"
        lines.append(f"- KARST above the linear probe on {task}: {verdict} ({gap:+.1f} points).")
    return lines


def report(results: Results) -> str:
    """Return the text of docs/accuracy.md."""
    file, tasks = results.file, results.complete_tasks(MAIN)
    images, search, seeds = file["images"], file["search"], len(results.seeds)
    parts = [
        "# Accuracy",
        "Generated by `python -m benchmarks.accuracy_report`; do not edit.",
        f"This page compares KARST with other methods on one frozen backbone (`{file['backbone']['name']}`, width "
        f"{file['backbone']['width']}, fingerprint `{file['backbone']['fingerprint'][:12]}`). The backbone is small, "
        "takes 32 x 32 pixels, and was pre-trained on drawings only (`benchmarks/pretrain.py`). The figures are this "
        "project's measurements. None is from the paper.",
        f"Every task has {images['train']} training images, {images['validation']} validation images and at most "
        f"{images['test']} test images. The seed selects the training and validation images from a fixed set of "
        "1,000, the initial values of head and adapter, and the order of the batches. The test images are the same "
        f"for all seeds. All methods train for {file['steps']} steps of {file['batch']} images: AdamW, weight decay "
        "lr / 10, linear warm-up over the first tenth, cosine to lr / 10, no augmentation, no drop path, bfloat16 "
        "autocast. The model of the last step is tested once, in float32. The linear probe is a logistic regression. "
        "Its penalty is selected on the validation images.",
        "## Tasks",
        markdown_table(
            ["task", "images", "classes", "largest class in the test images"],
            [[t, ORIGIN[t], str(v["classes"]), f"{v['largest_class']:.1%}"] for t, v in file["tasks"].items()],
        ),
        "`elpv` does not name the module of a cell. Training and test images may therefore show cells of one module.",
        "## Methods",
        f"Top-1 test accuracy in percent: mean and standard deviation over {seeds} seeds. The last column is the "
        "same over each seed's mean over tasks. Parameters are the trained ones without the head, which is equal for "
        "all methods.",
        _accuracy_table(results, MAIN, tasks),
        *_incomplete(results, MAIN),
        f"LoRA and LoKr are those of Hugging Face's peft, on KARST's sites (attn.qkv, attn.proj, mlp.fc1, mlp.fc2). "
        f"Their ranks give the numbers of parameters nearest to KARST's {results.parameters(KARST):,}: LoRA "
        f"{_relative(results, 'LoRA')} (one rank per kind of layer), LoKr {_relative(results, 'LoKr')}. The gain of "
        "all three methods is searched. Bias tuning trains every bias of the backbone.",
        "![Accuracy against trained parameters](img/accuracy.png)",
        "## Targets",
        "Noise is one pooled standard error: the square root of (variance over seeds of KARST's mean over tasks + "
        "that of the other method) / seeds. With three seeds it is a rough estimate.",
        "\n".join(bars(results)),
        *_ablation(results),
        *_claims(results),
        "## Learning rates and gains",
        "The gain multiplies dW. It is 1 / r in the published KARST code (here 1/8) and usually 1 in peft (alpha / r). "
        "With AdamW the gain acts as a separate learning rate for dW, so each of the three methods is tried with both.",
        "Each method has one setting: the one with the best mean accuracy on the **validation** images of "
        f"{_words(search['tasks'])} (seed {search['seed']}, {search['steps']} steps per run; the lowest rate in a "
        "tie). All KARST variants use KARST's setting. Mean validation accuracy in percent:",
        _search_table(file),
        *_edges(file),
        "## Reproduction",
        f"```\npython -m benchmarks.pretrain\npython -m benchmarks.accuracy --workers 2 --steps {file['steps']} "
        f"--search-steps {file['search']['steps']}\n"
        "python -m benchmarks.accuracy_report\n```",
        f"{len(file['runs'])} runs took {sum(r['seconds'] for r in file['runs']) / 3600:.1f} hours of one core "
        f"({file['machine']['cpu']}, torch {file['machine']['torch']}, {file['machine']['date'][:10]}). All runs are "
        "in `benchmarks/results/accuracy.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def plot(results: Results, path: Path) -> None:
    """Plot accuracy against trained parameters: all methods, and KARST's variants for tasks with all of them."""
    ablation_tasks = results.complete_tasks((KARST, *ABLATION))
    figure = Figure(figsize=(11 if ablation_tasks else 6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if ablation_tasks else 1, squeeze=False)[0]
    tasks = results.complete_tasks(MAIN)
    linear = statistics.fmean(results.by_seed(LINEAR, tasks))
    panels[0].axhline(linear, color="gray", linestyle="--", label=LINEAR)
    for method in MAIN[1:]:
        _points(panels[0], results, [method], tasks, method)
    _finish(panels[0], f"All methods, mean over {len(tasks)} tasks")
    if ablation_tasks:
        for title, methods in ABLATIONS.items():
            _points(panels[1], results, methods, ablation_tasks, title.partition(" (")[0])
        _finish(panels[1], f"KARST's variants, mean over {len(ablation_tasks)} tasks")
    figure.savefig(path, dpi=120)


def _points(axes: Axes, results: Results, methods: Sequence[str], tasks: Sequence[str], label: str) -> None:
    values = [results.by_seed(method, tasks) for method in methods]
    axes.errorbar(
        [results.parameters(method) for method in methods],
        [statistics.fmean(v) for v in values],
        [statistics.stdev(v) for v in values],
        marker="o",
        capsize=3,
        label=label,
    )


def _finish(axes: Axes, title: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters without the head")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _ablation(results: Results) -> list[str]:
    tasks = results.complete_tasks((KARST, *ABLATION))
    if not tasks:
        return ["## KARST's parts", "No task has runs of all variants with all seeds yet."]
    parts = [
        "## KARST's parts",
        "As in the paper, one setting varies and the others keep their defaults (N = 2, r = 8).",
    ]
    for title, methods in ABLATIONS.items():
        parts += [f"### {title}", _accuracy_table(results, methods, tasks)]
    return parts + _incomplete(results, (KARST, *ABLATION))


def _claims(results: Results) -> list[str]:
    """Return the section on the paper's claims. Its verdicts follow from the figures."""
    tasks = results.complete_tasks((KARST, *ABLATION))
    if not tasks:
        return []
    claims = (
        ("Several kernels are better than one", "KARST N=8", "KARST N=1"),
        ("Two kernels are better than one", KARST, "KARST N=1"),
        ("Re-scaling helps", KARST, "KARST none"),
        ("KARST is better than LoRA at equal parameters", KARST, "LoRA"),
        ("KARST is better than LoKr, one kernel of higher rank, at equal parameters", KARST, "LoKr"),
    )
    lines = []
    for claim, one, other in claims:
        gap, error = _gap(results, one, other, tasks)
        verdict = "confirmed here" if gap > error else "contradicted here" if gap < -error else "undecided here"
        lines.append(f"- {claim}: {verdict} ({one} minus {other} {gap:+.2f} points, standard error {error:.2f}).")
    return [
        "## The paper's claims",
        f"On {_words(tasks)}:",
        "\n".join(lines),
        "These verdicts apply to a small backbone, pre-trained on drawings for less than an hour, to short trainings, "
        "and to one learning rate for all variants. With many kernels a run at that rate may diverge; its accuracy "
        "counts nevertheless. The paper trains ViT-B/16 of ImageNet-21k for 100 epochs, with a rate searched per "
        "task. The figures therefore neither confirm nor refute the paper. They show that its claims do not hold for "
        "every recipe.",
    ]


def _gap(results: Results, one: str, other: str, tasks: Sequence[str]) -> tuple[float, float]:
    """Return the difference of two methods' means over tasks, in points, and its pooled standard error over seeds."""
    ours, theirs = results.by_seed(one, tasks), results.by_seed(other, tasks)
    error = math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / len(results.seeds))
    return statistics.fmean(ours) - statistics.fmean(theirs), error


def _incomplete(results: Results, methods: Sequence[str]) -> list[str]:
    """Return a sentence on the tasks that are left out."""
    left = [task for task in results.file["tasks"] if task not in results.complete_tasks(methods)]
    return [f"Left out for lack of runs: {_words(left)}."] if left else []


def _accuracy_table(results: Results, methods: Sequence[str], tasks: Sequence[str]) -> str:
    rows = []
    for method in methods:
        cells = [_spread(results.by_seed(method, [task])) for task in tasks]
        rows.append([method, f"{results.parameters(method):,}", *cells, _spread(results.by_seed(method, tasks))])
    return markdown_table(["method", "parameters", *tasks, "mean"], rows)


def _search_table(file: dict[str, Any]) -> str:
    rows = []
    for method, settings in file["search"]["grid"].items():
        for gain in dict.fromkeys(gain for _, gain in settings):
            cells = []
            for lr in (lr for lr, g in settings if g == gain):
                runs = [r for r in file["search_runs"] if (r["method"], r["lr"], r["gain"]) == (method, lr, gain)]
                text = f"{lr:g}: {100 * statistics.fmean(r['accuracy'] for r in runs):.1f}"
                cells.append(f"**{text}**" if {"lr": lr, "gain": gain} == file["chosen"][method] else text)
            rows.append([method, "" if gain is None else f"{gain:g}", *cells])
    return markdown_table(["method", "gain", "lowest", "second", "third", "highest"], rows)


def _edges(file: dict[str, Any]) -> list[str]:
    """Return a sentence on rates at an end of the grid, beyond which a better one may exist."""
    edges = [
        method
        for method, settings in file["search"]["grid"].items()
        if file["chosen"][method]["lr"] in (min(settings)[0], max(settings)[0])
    ]
    if not edges:
        return []
    return [f"The selected rate is at an end of the grid, so a better one may exist beyond it: {_words(edges)}."]


def _relative(results: Results, method: str) -> str:
    count = results.parameters(method)
    return f"{count:,} ({count / results.parameters(KARST) - 1:+.1%})"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def _words(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else ", ".join(names[:-1]) + " and " + names[-1]


if __name__ == "__main__":
    main()
