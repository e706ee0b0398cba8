"""Results of the accuracy benchmark for its report: cells by place, and paired differences of methods."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .accuracy import SEARCH_PER_CLASS, selected_rate
from .accuracy_methods import INSTANT, KARST, METHODS, VARIANTS
from .accuracy_tasks import TASKS

AUTO = "auto"
PER_TASK = ", rate per task"
EACH = KARST + PER_TASK
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

        A name that ends in `PER_TASK` is a method at the rate with the better validation accuracy on this task. `AUTO`
        is KARST at that rate, or KARST where one rate ran, if it is better than instant on validation images by more
        than one standard error; else instant.
        """
        if method.endswith(PER_TASK):
            name = method.removesuffix(PER_TASK)
            found = self._cells(name, task, per_class, seed)
            if len(found) < len(METHODS[name].rates):
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


def complete(results: Results, methods: Iterable[str], per_class: int) -> list[str]:
    """Return the tasks with a cell of every method at seed 0."""
    return [task for task in TASKS if 0 in results.seeds(methods, task, per_class)]


def difference(results: Results, one: str, other: str, tasks: Sequence[str], per_class: int = SEARCH_PER_CLASS) -> Gap:
    """Return the difference of two methods over tasks at seed 0, in points, and its standard error.

    The error is that of the paired differences over the test images. It says nothing of other training images.
    """
    total, variance = 0.0, 0.0
    for task in tasks:
        ours, theirs = (results.right(method, task, per_class, 0) for method in (one, other))
        each = ours - theirs
        total += (results.accuracy(one, task, per_class, 0) or 0.0) - (
            results.accuracy(other, task, per_class, 0) or 0.0
        )
        variance += float(each.var()) / len(each)
    return total / len(tasks), 100 * math.sqrt(variance) / len(tasks)


def over_seeds(results: Results, one: str, other: str, tasks: Sequence[str], per_class: int = SEARCH_PER_CLASS) -> Gap:
    """Return the mean difference of two methods over tasks and their common seeds, in points, and its standard error.

    The error is that of the mean over the seeds, each of which draws other training images; infinite for one seed.
    """
    seeds = sorted(set.intersection(*(set(results.seeds((one, other), task, per_class)) for task in tasks)))
    gaps = [
        statistics.fmean(
            (results.accuracy(one, task, per_class, seed) or 0.0)
            - (results.accuracy(other, task, per_class, seed) or 0.0)
            for task in tasks
        )
        for seed in seeds
    ]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
    return statistics.fmean(gaps), error
