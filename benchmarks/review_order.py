"""Labels that the review order saves, and wrong labels that it finds, on the six tasks of the accuracy benchmark.

    python -m benchmarks.review_order [--seeds 3] [--output FILE]

The features are the frozen ones of `benchmarks.real_backbone` at 98 pixels. A run labels ten images at a time, either
in random order or as the review queue does, fits the instant head, and counts the labels until it has 95 % of the test
accuracy that all labels give. For wrong labels, 5 % of all labels are changed at random; the measure is the share of
them among the first suspects, as many as keep half of the suspects truly wrong.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.training.instant import fit_head
from hub.services.datasets.review_order import FEW, suspects_first, typical_first, uncertain_first, unit_rows

from .accuracy_frozen import SIDE_PX, frozen_features
from .accuracy_tasks import load_task
from .common import machine, markdown_table

TASKS = ("digits", "fashion", "elpv", "location", "orientation", "count")
STEP = 10
TARGET = 0.95
FLIPPED = 0.05
PRECISION = 0.5
MAX_POOL = 1000  # images of a task
OUTPUT = Path(__file__).parent / "results" / "review_order.json"


def main() -> None:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    found = {}
    for name in TASKS:
        runs = [measure(name, seed) for seed in range(options.seeds)]
        found[name] = {key: round(fmean(run[key] for run in runs), 4) for key in runs[0]}
        found[name]["ratio"] = round(found[name]["review_labels"] / found[name]["random_labels"], 3)
        print(name, found[name], flush=True)
    columns = ("full_accuracy", "random_labels", "review_labels", "ratio", "wrong_found")
    print(markdown_table(("task", *columns), [(name, *(str(row[c]) for c in columns)) for name, row in found.items()]))
    result = {"machine": machine(), "side_px": SIDE_PX, "seeds": options.seeds, "pool": MAX_POOL, "tasks": found}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(name: str, seed: int) -> dict[str, float]:
    """Return one run's full accuracy, labels by both orders, and the share of wrong labels that are found."""
    task, features = load_task(name, SIDE_PX), frozen_features(name)
    free = torch.ones(len(task.targets), dtype=torch.bool)
    free[task.test] = False
    pool = free.nonzero()[:, 0]
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:MAX_POOL]]
    x, y, test = features[pool], task.targets[pool], (features[task.test], task.targets[task.test])
    full = accuracy(x, y, *test)
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(pool))
    return {
        "full_accuracy": full,
        "random_labels": labels_needed(x, y, test, full, lambda labelled: shuffled[~labelled[shuffled]][:STEP]),
        "review_labels": labels_needed(x, y, test, full, lambda labelled: review(x, y, labelled, seed)),
        "wrong_found": wrong_found(x, y, generator),
    }


def review(x: Tensor, y: Tensor, labelled: np.ndarray, seed: int) -> np.ndarray:
    """Return the next images by the review order."""
    rows = unit_rows(x.numpy())
    known = y[torch.from_numpy(labelled)]
    labels = known.unique()
    if len(labels) < 2 or len(known) < FEW * len(labels):
        return typical_first(rows, labelled, STEP, seed)
    fitted = fit_head(x[torch.from_numpy(labelled)], torch.searchsorted(labels, known), len(labels))
    free = np.flatnonzero(~labelled)
    probabilities = (x[free] @ fitted.weight.T + fitted.bias).softmax(1).numpy()
    return free[uncertain_first(rows[free], probabilities, STEP, seed)]


def labels_needed(x: Tensor, y: Tensor, test: tuple[Tensor, Tensor], full: float, choose: Any) -> int:
    """Return the number of labels at which the test accuracy first is `TARGET` of the full one."""
    labelled = np.zeros(len(x), bool)
    while not labelled.all():
        labelled[choose(labelled)] = True
        part = torch.from_numpy(labelled)
        if accuracy(x[part], y[part], *test) >= TARGET * full:
            break
    return int(labelled.sum())


def accuracy(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Return the instant head's accuracy; 0 if it cannot be fitted."""
    labels = y.unique()
    targets = torch.searchsorted(labels, y)
    if len(labels) < 2 or int(targets.bincount().max()) < 2:
        return 0.0
    fitted = fit_head(x, targets, len(labels))
    return float((labels[(test_x @ fitted.weight.T + fitted.bias).argmax(1)] == test_y).float().mean())


def wrong_found(x: Tensor, y: Tensor, generator: np.random.Generator) -> float:
    """Return the largest share of changed labels among first suspects of which at least `PRECISION` are changed."""
    classes = int(y.max()) + 1
    wrong = generator.choice(len(y), max(1, round(FLIPPED * len(y))), replace=False)
    given = y.clone()
    given[wrong] = (y[wrong] + torch.from_numpy(generator.integers(1, classes, len(wrong)))) % classes
    scores = fit_head(x, given, classes).scores
    order = suspects_first(scores.softmax(1).float().numpy(), given.numpy())
    hits = np.cumsum(np.isin(order, wrong))
    precise = hits >= PRECISION * np.arange(1, len(order) + 1)
    return float(hits[precise].max(initial=0) / len(wrong))


if __name__ == "__main__":
    main()
