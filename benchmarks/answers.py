"""Calibration, label sets, typicality and the times of the recipe `instant`, each against its target.

    python -m benchmarks.answers [--only answers foreign ...]

The backbone is that of `benchmarks.real_backbone` at 98 pixels; `auto` takes 112. The tasks and their cached features
are those of `benchmarks.accuracy`. A task's classifier is fitted to 20 or 50 images of each class, in five random
draws, and measured on all other images of the task, for probabilities also on images that the task leaves out
(`accuracy_tasks.further_images`). Each class has the same weight there, since it has the same number of training
images. The script prints a line per target, and writes the results and the machine to
`benchmarks/results/answers.json`. A part that is measured again replaces the old figures of that part.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from adapters import Backbone, Bank, fit
from adapters.data.images import preprocess_of
from adapters.evaluation.calibration import coverage_table, fit_temperature
from adapters.evaluation.evaluate import ECE_BINS
from adapters.evaluation.intervals import coverage_threshold
from adapters.format.atomic_write import write_atomically
from adapters.format.file import Adapter
from adapters.method.typicality import fit_typicality
from adapters.serving.typicality import DeviceTypicality, typicality_of
from adapters.training.auto import HEAD_ONLY
from adapters.training.instant import fit_head

from . import real_backbone
from .accuracy_frozen import backbone, frozen_features, further_features
from .accuracy_tasks import TASKS, balanced_accuracy, load_task
from .common import machine

PER_CLASS = (20, 50)
DRAWS = 5
MANY_DRAWS = 25  # for the mean gap of leave-one-out, which five draws leave within their noise
NOISE_SAMPLES = 5
COVERAGE = 0.95
FALSE_REFUSALS = 0.05
SAME_SUBJECT = {"orientation", "location"}  # both show the same sprites
PASS_IMAGES = 16
ROUNDS, REPEATS = 15, 20  # of a pass, and of typicality in each round
AUTO_SIDE_PX, AUTO_IMAGES, AUTO_BUDGET_S = 112, 200, 600
OUTPUT = Path(__file__).parent / "results" / "answers.json"

Row = dict[str, Any]


def main() -> None:
    """Measure the parts, print a line per target, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    for part in options.only:
        found = {"machine": machine(), **PARTS[part]()}
        results: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
        results[part] = found
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.output, (json.dumps(results, indent=1) + "\n").encode())
        print("\n".join(bars({part: found})), flush=True)


def draws(task: str, per_class: int, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the image numbers of each draw: the training images, and all others of their task.

    Args:
        count: of draws; None: `DRAWS`.
    """
    targets = load_task(task).targets
    for seed in range(DRAWS if count is None else count):
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
        classes = int(targets.max()) + 1
        train = torch.cat([order[targets[order] == k][:per_class] for k in range(classes)])
        others = torch.ones(len(targets), dtype=torch.bool)
        others[train] = False
        yield train, others.nonzero()[:, 0]


def worth() -> Row:
    """Return leave-one-out against held-out accuracy, calibration error and coverage, per task and number of images.

    `gap_error` is the standard error over the draws of leave-one-out minus held-out. `many_gap` and `many_gap_error`
    are of `MANY_DRAWS` draws. `calibration_noise` is the calibration error for labels drawn from the probabilities: the
    error that perfect probabilities have on as many images. `calibration_at_best` is the error with the temperature of
    the best likelihood on the held-out images themselves, which no method can know. `confidence_gap` is confidence
    minus accuracy.
    """
    torch.manual_seed(0)
    rows = []
    for name in TASKS:
        features, targets = frozen_features(name), load_task(name).targets
        further = further_features(name)
        for per_class in PER_CLASS:
            found = []
            for number, (train, others) in enumerate(draws(name, per_class, MANY_DRAWS)):
                held = torch.cat([features[others], further[0]]), torch.cat([targets[others], further[1]])
                found.append(_worth(features[train], targets[train], *held, whole=number < DRAWS))
            gaps = [one["leave_one_out"] - one["held_out"] for one in found]
            rows.append(
                {
                    "task": name,
                    "per_class": per_class,
                    "held_out_images": len(held[1]),
                    **_means(found[:DRAWS]),
                    "gap_error": _error_of_mean(gaps[:DRAWS]),
                    "many_gap": round(statistics.fmean(gaps), 4),
                    "many_gap_error": _error_of_mean(gaps),
                }
            )
    return {"draws": DRAWS, "many_draws": MANY_DRAWS, "rows": rows}


def _error_of_mean(values: list[float]) -> float:
    return round(statistics.stdev(values) / len(values) ** 0.5, 4)


def _worth(features: Tensor, own: Tensor, held_features: Tensor, held: Tensor, *, whole: bool) -> dict[str, float]:
    """Return the figures of one draw; only the two accuracies unless `whole`."""
    head = fit_head(features, own, int(own.max()) + 1)
    logits = held_features @ head.weight.T + head.bias
    probabilities = logits.softmax(1)
    figures = {
        "leave_one_out": balanced_accuracy(head.scores.argmax(1) == own, own),
        "held_out": balanced_accuracy(probabilities.argmax(1) == held, held),
    }
    if not whole:
        return figures
    weights = (1 / held.bincount().double())[held]
    weights = weights / weights.sum()
    threshold = coverage_threshold(coverage_table(head.scores.float().softmax(1), own), COVERAGE)
    sets = probabilities >= threshold
    sets[torch.arange(len(held)), probabilities.argmax(1)] = True  # as in a reply: a set is never empty
    drawn = [probabilities.multinomial(1)[:, 0] for _ in range(NOISE_SAMPLES)]
    best, _ = fit_temperature(logits.double(), held, weights)
    return figures | {
        "calibration_at_best": calibration_error((logits * best).softmax(1), held, weights),
        "calibration_error": calibration_error(probabilities, held, weights),
        "calibration_noise": statistics.fmean(calibration_error(probabilities, one, weights) for one in drawn),
        "confidence_gap": float(weights @ probabilities.double().amax(1)) - figures["held_out"],
        "coverage": float(weights @ sets[torch.arange(len(held)), held].double()),
        "set_size": float(weights @ sets.sum(1).double()),
    }


def calibration_error(probabilities: Tensor, targets: Tensor, weights: Tensor) -> float:
    """Return the expected calibration error in [0, 1]; the weights of the images, (n,), sum to 1."""
    confidence, predicted = probabilities.double().max(1)
    edges = torch.linspace(0, 1, ECE_BINS + 1, dtype=torch.float64)[1:-1]
    gap = ((predicted == targets).double() - confidence) * weights
    bins = torch.zeros(ECE_BINS, dtype=torch.float64)
    return float(bins.index_add_(0, torch.bucketize(confidence, edges), gap).abs().sum())


def foreign() -> Row:
    """Return the share of the other tasks' images that typicality refuses, per task and number of images.

    `refused` takes the distance beyond which 5 % of the task's held-out images are refused; a task's name has the share
    of its images. `refused_at_5` takes typicality below 0.05, and `false_refusals` is the share of the task's held-out
    images below it.
    """
    rows = []
    for name in TASKS:
        features = frozen_features(name)
        strangers = {other: frozen_features(other) for other in TASKS if other != name}
        for per_class in PER_CLASS:
            found = [_foreign(features, strangers, *draw) for draw in draws(name, per_class)]
            rows.append({"task": name, "per_class": per_class, **_means(found)})
    return {"draws": DRAWS, "rows": rows}


def _foreign(features: Tensor, strangers: dict[str, Tensor], train: Tensor, others: Tensor) -> dict[str, float]:
    model = fit_typicality(features[train])
    limit = model.distances(features[others]).quantile(1 - FALSE_REFUSALS)
    by_task = {name: float((model.distances(part) > limit).double().mean()) for name, part in strangers.items()}
    at_5 = [float((model(part) < FALSE_REFUSALS).double().mean()) for part in strangers.values()]
    return {
        "refused": statistics.fmean(by_task.values()),
        "refused_at_5": statistics.fmean(at_5),
        "false_refusals": float((model(features[others]) < FALSE_REFUSALS).double().mean()),
        **by_task,
    }


def _means(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.fmean(one[key] for one in found), 4) for key in found[0]}


def share() -> Row:
    """Return typicality's share of a pass of 16 images, in turn of the six tasks' head-only adapters."""
    frozen = backbone()
    bank = Bank(frozen, slots=len(TASKS))
    slots, models = [], []
    for name in TASKS:
        features, targets = frozen_features(name), load_task(name).targets
        train = next(draws(name, PER_CLASS[0]))[0]
        head = fit_head(features[train], targets[train], int(targets.max()) + 1)
        slots.append(bank.put(_adapter(frozen, {"head.weight": head.weight, "head.bias": head.bias})))
        models.append(DeviceTypicality(fit_typicality(features[train]), frozen.device))
    pixels = torch.randn(PASS_IMAGES, *frozen.input_size, generator=torch.Generator().manual_seed(0))
    pooled = frozen_features(next(iter(TASKS)))[:PASS_IMAGES]
    passes, own = [], []
    for _ in range(ROUNDS):  # in turns: otherwise other load on the machine could affect only one of the two
        began = time.process_time()
        bank.forward(pixels, [slots[i % len(slots)] for i in range(PASS_IMAGES)])
        between = time.process_time()
        for _ in range(REPEATS):
            typicality_of([models[i % len(models)] for i in range(PASS_IMAGES)], pooled)
        passes.append(between - began)
        own.append((time.process_time() - between) / REPEATS)
    whole, part = statistics.median(passes), statistics.median(own)
    return {
        "images": PASS_IMAGES,
        "pass_ms": round(1000 * whole, 2),
        "typicality_ms": round(1000 * part, 3),
        "share": round(part / whole, 5),
    }


def _adapter(frozen: Backbone, tensors: dict[str, Tensor]) -> Adapter:
    return Adapter.create(
        tensors,
        config=HEAD_ONLY,
        backbone=frozen.name,
        fingerprint=frozen.fingerprint,
        labels=[str(k) for k in range(len(tensors["head.bias"]))],
        preprocess=preprocess_of(frozen),
    )


def command() -> Row:
    """Return the time of `karst-hub train --recipe instant` on 200 digits of ten classes, after the imports.

    The backbone is `demo`, and the images are PNG files. The processor's time is part of the result, because other
    load on the machine does not change it.
    """
    code = (
        "import sys, time\n"
        "import adapters.training.fit, hub.cli.main, hub.cli.train\n"
        "wall, own = time.monotonic(), time.process_time()\n"
        "hub.cli.main.app(standalone_mode=False)\n"
        "print('\\ntimes', time.monotonic() - wall, time.process_time() - own)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", "digits", 20, 32)
        options = ["train", f"{folder}/images", "--out", f"{folder}/digits.safetensors"]
        options += ["--backbone", "demo", "--recipe", "instant"]
        done = subprocess.run([sys.executable, "-c", code, *options], check=True, capture_output=True, text=True)
    wall, own = map(float, done.stdout.split()[-2:])
    return {"images": 200, "seconds": round(wall, 2), "cpu_seconds": round(own, 2)}


def many() -> Row:
    """Return the time of the closed-form fit on 10,000 x 768 random features of ten classes."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(10_000) % 10
    features = torch.randn(len(targets), 768, generator=generator)
    features[:, :10] += torch.nn.functional.one_hot(targets).float()
    wall, own = time.monotonic(), time.process_time()
    fit_head(features, targets, 10)
    return {"seconds": round(time.monotonic() - wall, 2), "cpu_seconds": round(time.process_time() - own, 2)}


def auto() -> Row:
    """Return the result of `fit(recipe="auto")` on 200 images of `location` at 112 pixels, with a budget of 600 s."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", "location", AUTO_IMAGES // load_task("location").classes, AUTO_SIDE_PX)
        began = time.monotonic()
        done = fit(
            Path(folder) / "images",
            Path(folder) / "location.safetensors",
            backbone=real_backbone.load(AUTO_SIDE_PX),
            budget_s=AUTO_BUDGET_S,
        )
    metrics = {name: value for name, value in done.metrics.items() if name != "classes"}
    return {"images": AUTO_IMAGES, "seconds": round(time.monotonic() - began, 1), "metrics": metrics}


def write_images(folder: Path, name: str, per_class: int, side_px: int) -> None:
    """Write a training set as a folder of PNG files per class."""
    task = load_task(name, side_px)
    for number in next(draws(name, per_class))[0]:
        pixels = task.pixels(number[None])[0].permute(1, 2, 0).contiguous().numpy()
        target = folder / str(int(task.targets[number]))
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target / f"{int(number)}.png")


PARTS: dict[str, Callable[[], Row]] = {
    "answers": worth,
    "foreign": foreign,
    "share": share,
    "command": command,
    "many": many,
    "auto": auto,
}


def bars(results: dict[str, Any]) -> list[str]:
    """Return a line of Markdown per target whose part is measured, with its verdict."""
    lines = []
    if "answers" in results:
        lines += _answer_bars(results["answers"]["rows"])
    if "foreign" in results:
        lines += _foreign_bars(results["foreign"]["rows"])
    if "share" in results:
        found = results["share"]
        figures = f"{found['typicality_ms']:.2f} of {found['pass_ms']:.0f} ms for {found['images']} images"
        lines.append(_bar("Typicality takes at most 2 % of a pass", found["share"] <= 0.02, figures))
    times = {
        "command": (
            3,
            "`karst-hub train --recipe instant`, demo backbone, 200 images on the disk: 3 s after the imports",
        ),
        "many": (10, "10,000 x 768 features are fitted within 10 s"),
    }
    for part, (limit_s, target) in times.items():
        if part in results:
            own, wall = results[part]["cpu_seconds"], results[part]["seconds"]
            figures = f"{own:.1f} s of the processor with one thread; {wall:.1f} s by the clock of the shared machine"
            lines.append(_bar(target, own <= limit_s, figures))
    if "auto" in results:
        found = results["auto"]
        reached = "karst_accuracy" in found["metrics"]
        figures = f"{found['seconds']:.0f} s. {found['metrics']['comparison']}"
        lines.append(_bar("`auto` with 600 s trains and compares KARST on 200 images at 112 pixels", reached, figures))
    return lines


def _answer_bars(rows: list[Row]) -> list[str]:
    gaps = {(row["task"], row["per_class"]): 100 * (row["leave_one_out"] - row["held_out"]) for row in rows}
    (task, per_class), gap = max(gaps.items(), key=lambda item: abs(item[1]))
    errors = {(row["task"], row["per_class"]): 100 * row["gap_error"] for row in rows}
    many = [100 * row["many_gap"] for row in rows]
    clear = [row for row in rows if abs(row["many_gap"]) - 0.02 > 2 * row["many_gap_error"]]
    figures = (
        f"{sum(abs(one) <= 2 for one in gaps.values())} of {len(gaps)} with {DRAWS} draws; largest gap {gap:+.1f} "
        f"points, standard error over the draws {errors[task, per_class]:.1f}, on {task} with {per_class} images a "
        f"class; mean {statistics.fmean(gaps.values()):+.1f}. With {MANY_DRAWS} draws "
        f"{sum(abs(one) <= 2 for one in many)} of {len(many)}, mean {statistics.fmean(many):+.1f}; beyond 2 points by "
        f"more than two standard errors: {len(clear)}"
    )
    lines = [_bar("Leave-one-out within 2 points of held-out on each task", abs(gap) <= 2, figures)]
    for per_class in PER_CLASS:
        own = [row for row in rows if row["per_class"] == per_class]
        found, noise, best, covered = (
            statistics.fmean(row[key] for row in own)
            for key in ("calibration_error", "calibration_noise", "calibration_at_best", "coverage")
        )
        at = f"{per_class} images a class"
        figures = (
            f"{found:.4f}; perfect probabilities would have {noise:.4f} on as many images, and the temperature of the "
            f"best likelihood on the held-out images themselves {best:.4f}"
        )
        lines.append(_bar(f"Expected calibration error at most 0.03, {at}", found <= 0.03, figures))
        holds = abs(covered - COVERAGE) <= 0.015
        lines.append(_bar(f"Sets of 95 % cover 95 ± 1.5 %, {at}", holds, f"{covered:.1%}"))
    return lines


def _foreign_bars(rows: list[Row]) -> list[str]:
    """Return the lines of foreign images, over the pairs of tasks that show different subjects."""
    lines = []
    pairs = [set(pair) for pair in permutations(TASKS, 2)]
    possible = sum(pair != SAME_SUBJECT for pair in pairs)
    limit = (possible + (len(pairs) - possible) * FALSE_REFUSALS) / len(pairs)
    for per_class in PER_CLASS:
        own = [row for row in rows if row["per_class"] == per_class]
        every = statistics.fmean(row["refused"] for row in own)
        found = [row[name] for row in own for name in TASKS if name in row and {name, row["task"]} != SAME_SUBJECT]
        refused = statistics.fmean(found)
        figures = (
            f"{refused:.1%} over the {possible} of {len(pairs)} pairs of tasks for which it is possible in principle, "
            f"{sum(one >= 0.95 for one in found)} of them at least 95 %; over all {len(pairs)} pairs {every:.1%}, "
            f"where a perfect method would reach {limit:.1%}: orientation and location show the same images, so no "
            "method can refuse one for the other"
        )
        target = f"95 % of foreign images refused at 5 % false refusals, {per_class} images a class"
        lines.append(_bar(target, refused >= 0.95, figures))
    return lines


def _bar(target: str, holds: bool, figures: str) -> str:
    return f"- {target}: **{'holds' if holds else 'does not hold'}** ({figures})."


if __name__ == "__main__":
    main()
