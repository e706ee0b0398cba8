"""Accuracy of KARST's adapters beside a linear probe, LoRA, LoKr, bias tuning and full fine-tuning.

    python -m benchmarks.accuracy [--workers 2] [--search] [--tasks T ...] [--methods M ...] [--seeds S ...]

Every method starts from the same frozen backbone. For a seed, every method sees the same images in the same batches
under the same schedule. Each method has its own learning rate and gain. The gain multiplies dW; in peft it is
alpha / r. The search selects both on validation images of two tasks. The test images measure the model of the last
step once. Training runs under bfloat16 autocast and tests run in float32, for all methods.

A log has one line per finished run, and the benchmark skips the runs in it. You can stop and restart at any time. The
order is the search, the main methods over all tasks and seeds, then KARST's variants task by task. The benchmark
updates the results file after every run. `python -m benchmarks.accuracy_report` generates the report from it.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from adapters import Backbone, BackboneError, load_backbone
from adapters.backbone import features
from adapters.data.images import normalise_for
from adapters.format.file import write_atomically

from .accuracy_methods import (
    ABLATION,
    CONFIGS,
    GAINS,
    LEARNING_RATES,
    LINEAR,
    MAIN,
    METHODS,
    build,
    search_name,
    trainable,
)
from .accuracy_tasks import IMAGE_SIZE, TASKS, TEST, TRAIN, VALIDATION, Labelled, Task, TaskError, load_task
from .common import machine

BACKBONE = "local-dir:runs/vit-ti"
DEFAULT_TASKS = ("digits", "fashion", "elpv", "count", "orientation", "location")
SEARCH_TASKS = ("digits", "count")
SEEDS = (0, 1, 2)
BATCH = 32
WARM_UP = 0.1  # share of the steps, from lr / 100; then a cosine to lr / 10
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of the linear probe
LOG = Path("runs/accuracy.jsonl")
OUTPUT = Path(__file__).parent / "results" / "accuracy.json"


class Setting(NamedTuple):
    """The search's choice for a method; `gain` is None for a method without a dW."""

    lr: float
    gain: float | None


@dataclass(frozen=True)
class Run:
    """One training and one measurement. Equal runs give equal numbers.

    `lr` is None for the linear probe, and `gain` for every method without a dW. `part` is the measured part: "test", or
    "validation" in the search.
    """

    backbone: str
    method: str
    task: str
    seed: int
    steps: int
    lr: float | None
    gain: float | None
    part: str


def main() -> None:
    """Do the missing runs and keep the results file up to date."""
    options = _options()
    try:
        measure(options)
    except (BackboneError, TaskError, FloatingPointError) as error:
        raise SystemExit(f"stopped: {error}") from None


def measure(options: argparse.Namespace) -> None:
    """Run the benchmark.

    Raises:
        BackboneError: the backbone cannot be loaded.
        TaskError: a task's images are not installed, or do not have the backbone's size.
        FloatingPointError: the loss of a training is not finite.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers: two threads of one run are slower than two runs
    torch.set_num_threads(1)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    backbone = _backbone(options.backbone)
    if backbone.input_size != IMAGE_SIZE:
        raise TaskError(f"the tasks' images are {IMAGE_SIZE}, but {backbone.name} takes {backbone.input_size}")
    log = Log(options.log, backbone.fingerprint)

    log.fill(list(search_runs(options.backbone, options.search_steps)), options.workers, "search")
    chosen = chosen_settings(log.rows, options.search_steps)
    print("learning rates and gains:", ", ".join(f"{m} {s.lr:g} {s.gain or ''}".strip() for m, s in chosen.items()))
    if options.search:
        return
    runs = list(planned(options.backbone, options.steps, chosen, options.methods, options.tasks, options.seeds))
    for _ in log.finish(runs, options.workers, "runs"):
        write_results(options.output, options, log.rows, chosen)
    write_results(options.output, options, log.rows, chosen)
    print(f"written to {options.output}; python -m benchmarks.accuracy_report makes the report")


class Log:
    """Log of the finished runs of one backbone, one JSON line each. Lines of other backbones stay unchanged."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        self._path = path
        self._fingerprint = fingerprint
        self.rows = [row for row in map(json.loads, lines) if row["fingerprint"] == fingerprint]

    def fill(self, runs: list[Run], workers: int, title: str) -> None:
        """Do the missing runs of `runs`."""
        for _ in self.finish(runs, workers, title):
            pass

    def finish(self, runs: list[Run], workers: int, title: str) -> Iterator[dict[str, Any]]:
        """Do the missing runs of `runs`, `workers` at a time, and yield each row after it is in the file."""
        done = {_key(row) for row in self.rows}
        missing = [run for run in runs if _key(asdict(run)) not in done]
        print(f"{title}: {len(runs) - len(missing)} of {len(runs)} were there")
        for row in track(_results(missing, workers), title, total=len(missing)):
            row["fingerprint"] = self._fingerprint
            # One write of one line to a file in append mode: otherwise two benchmarks could mix their lines.
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.rows.append(row)
            print(f"{row['method']}, {row['task']}, seed {row['seed']}: {row['accuracy']:.1%}, {row['seconds']:.0f} s")
            yield row


def search_runs(backbone: str, steps: int) -> Iterator[Run]:
    """Search every learning rate and gain of every method on the validation images of two tasks, seed 0."""
    for task in SEARCH_TASKS:
        for method, settings in grid().items():
            for lr, gain in settings:
                yield Run(backbone, method, task, 0, steps, lr, gain, "validation")


def grid() -> dict[str, list[Setting]]:
    """Return the settings that the search tries for each method."""
    return {
        method: [Setting(lr, gain) for gain in GAINS.get(method, (None,)) for lr in rates]
        for method, rates in LEARNING_RATES.items()
    }


def chosen_settings(rows: list[dict[str, Any]], steps: int) -> dict[str, Setting]:
    """Return each method's setting of the best mean validation accuracy; in a tie, the one of the lowest rate."""
    chosen = {}
    for method, settings in grid().items():
        means = {
            setting: statistics.fmean(
                row["accuracy"]
                for row in rows
                if (row["part"], row["method"], row["steps"]) == ("validation", method, steps)
                and Setting(row["lr"], row["gain"]) == setting
            )
            for setting in settings
        }
        chosen[method] = max(means, key=lambda setting: (means[setting], -setting.lr))
    return chosen


def planned(
    backbone: str, steps: int, chosen: dict[str, Setting], methods: list[str], tasks: list[str], seeds: list[int]
) -> Iterator[Run]:
    """Return the runs in their order: the main methods first, then the ablation one whole task after another."""

    def run(method: str, task: str, seed: int) -> Run:
        # The linear probe takes no steps, so its run is the same for every number of steps.
        if method == LINEAR:
            return Run(backbone, method, task, seed, 0, None, None, "test")
        return Run(backbone, method, task, seed, steps, *chosen[search_name(method)], "test")

    yield from (run(m, task, seed) for seed in seeds for task in tasks for m in MAIN if m in methods)
    yield from (run(m, task, seed) for task in tasks for seed in seeds for m in ABLATION if m in methods)


def execute(run: Run) -> dict[str, Any]:
    """Train and measure. In the search, a rate at which the loss is not finite counts as accuracy 0.

    Raises:
        FloatingPointError: the loss is not finite at the learning rate that the search selected.
    """
    torch.set_num_threads(1)
    began = time.process_time()
    backbone, task = _backbone(run.backbone), load_task(run.task)
    if run.method == LINEAR:
        result: dict[str, Any] = {"accuracy": linear_probe(backbone, task, run.seed), "parameters": 0, "loss": None}
    else:
        train, validation = task.split(run.seed)
        assert run.lr is not None
        setting = Setting(run.lr, run.gain)
        measured = task.test if run.part == "test" else validation
        try:
            model, loss = fit(run.method, backbone, task.classes, train, setting, seed=run.seed, steps=run.steps)
        except FloatingPointError:
            if run.part == "test":
                raise
            result = {"accuracy": 0.0, "parameters": None, "loss": None}
        else:
            result = {"accuracy": accuracy(model, backbone, measured), "parameters": trainable(model), "loss": loss}
    result["head_parameters"] = (backbone.width + 1) * task.classes
    return asdict(run) | result | {"seconds": round(time.process_time() - began, 1)}


def fit(
    method: str, backbone: Backbone, classes: int, train: Labelled, setting: Setting, *, seed: int, steps: int
) -> tuple[nn.Module, float]:
    """Return the model of the last step and its last loss: AdamW, weight decay lr / 10, batches of 32, no augmentation.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    torch.manual_seed(seed)
    model = build(method, backbone, classes, setting.gain).train()
    lr = setting.lr
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=lr / 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    for index in batches(len(train), steps, seed):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(normalise_for(backbone, train.images[index]))
        loss = F.cross_entropy(logits.float(), train.targets[index])
        if not loss.isfinite():
            raise FloatingPointError(f"{method}, seed {seed}: the loss is {loss.item()} at learning rate {lr:g}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), round(loss.item(), 4)


def rate_factor(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a linear rise from 0.01 to 1, then a cosine down to 0.1."""
    warm_up = max(round(WARM_UP * steps), 1)
    if step < warm_up:
        return 0.01 + 0.99 * step / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


def batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of each step's images. Each pass has a new order and drops its last partial batch."""
    generator = torch.Generator().manual_seed(seed)
    left = steps
    while left:
        for index in torch.randperm(count, generator=generator).split(BATCH)[: min(count // BATCH, left)]:
            left -= 1
            yield index


@torch.inference_mode()
def accuracy(model: nn.Module, backbone: Backbone, data: Labelled) -> float:
    """Return top-1 accuracy in [0, 1], computed in float32."""
    right = sum(
        int((model(normalise_for(backbone, images)).argmax(1) == targets).sum())
        for images, targets in zip(data.images.split(100), data.targets.split(100), strict=True)
    )
    return right / len(data)


def linear_probe(backbone: Backbone, task: Task, seed: int) -> float:
    """Return the test accuracy of logistic regression on the frozen features; validation images select its penalty."""
    (x, y), (val_x, val_y), (test_x, test_y) = (
        (pooled(backbone, data), data.targets.numpy()) for data in (*task.split(seed), task.test)
    )
    probes = []
    for penalty in PENALTIES:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=5000)).fit(x, y)
        probes.append((probe.score(val_x, val_y), -penalty, probe))
    best = max(probes, key=lambda scored: scored[:2])[2]
    return float(best.score(test_x, test_y))


@torch.inference_mode()
def pooled(backbone: Backbone, data: Labelled) -> Any:
    """Return the frozen features, (n, D) float32 numpy."""
    return torch.cat([features(backbone.model, normalise_for(backbone, x)) for x in data.images.split(100)]).numpy()


def write_results(
    path: Path, options: argparse.Namespace, rows: list[dict[str, Any]], chosen: dict[str, Setting]
) -> None:
    """Return the committed file: the runs of this backbone and these steps, and everything that they depend on."""
    backbone = _backbone(options.backbone)
    tests = [row for row in rows if row["part"] == "test" and row["steps"] in (0, options.steps)]
    tests = [r for r in tests if r["lr"] is None or (r["lr"], r["gain"]) == chosen[search_name(r["method"])]]
    result = {
        "machine": machine(),
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint, "width": backbone.width},
        "images": {"train": TRAIN, "validation": VALIDATION, "test": TEST},
        "steps": options.steps,
        "batch": BATCH,
        "search": {"tasks": SEARCH_TASKS, "seed": 0, "steps": options.search_steps, "grid": grid()},
        "chosen": {method: setting._asdict() for method, setting in chosen.items()},
        "karst": {name: config.model_dump(include={"kernels", "rank", "rescale"}) for name, config in CONFIGS.items()},
        "tasks": {
            name: {"classes": load_task(name).classes, "test": len(load_task(name).test)}
            | {"largest_class": load_task(name).largest_class()}
            for name in TASKS
            if any(row["task"] == name for row in tests)
        },
        "runs": tests,
        "search_runs": [r for r in rows if r["part"] == "validation" and r["steps"] == options.search_steps],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def _results(runs: list[Run], workers: int) -> Iterator[dict[str, Any]]:
    """Yield rows in the order in which they finish."""
    if workers == 1:
        yield from map(execute, runs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures: list[Future[dict[str, Any]]] = [pool.submit(execute, run) for run in runs]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:  # After a failure or Ctrl-C: otherwise the pool would start the remaining runs.
            pool.shutdown(cancel_futures=True)
            raise


@cache
def _backbone(name: str) -> Backbone:
    return load_backbone(name)


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    """Return the identity of a run. The log identifies the backbone by its fingerprint, not by its name."""
    return tuple(run[name] for name in ("method", "task", "seed", "steps", "lr", "gain", "part"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=BACKBONE, help="for images of 32 x 32 pixels")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=DEFAULT_TASKS, metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=100, help=f"of {BATCH} images")
    parser.add_argument("--search", action="store_true", help="stop once the learning rates are chosen")
    parser.add_argument("--search-steps", type=int, default=100, help="steps of a run of the search")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--log", type=Path, default=LOG, help="finished runs, a JSON line each")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
