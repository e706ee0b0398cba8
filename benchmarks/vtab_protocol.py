"""Protocols of KARST's paper, without the execution: data sets, one trial, and the averages.

VTAB-1K: 19 tasks of 1,000 images. A trial selects the learning rate and the number of epochs on train800 / val200. It
then trains the model on train800val200 with these values, for the full schedule, and tests it once. Few-shot: 5 sets
with 1, 2, 4, 8 and 16 images per class and three lists of each. A trial selects on the set's own validation list. Every
run uses the model of its last step. Only the selection uses validation images, and only the final test uses test
images. With one rate and one number of epochs there is no selection and no validation.
"""

import dataclasses
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch

from adapters import Backbone, DataError, KarstConfig, load_backbone
from adapters.data.datasets import read_dataset
from adapters.data.image_set import DEFAULT_CACHE_BYTES, ImageSet, ImageTensors
from adapters.data.images import preprocess_of
from adapters.paper.recipe import Recipe
from adapters.paper.train import train_model
from adapters.training.inference import accuracy

from .common import machine

GROUPS = {
    "natural": ("caltech101", "cifar", "dtd", "oxford_flowers102", "oxford_iiit_pet", "sun397", "svhn"),
    "specialized": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    "structured": (
        "clevr_count",
        "clevr_dist",
        "dmlab",
        "kitti",
        "dsprites_loc",
        "dsprites_ori",
        "smallnorb_azi",
        "smallnorb_ele",
    ),
}
VTAB_TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
# Few-shot sets, and their folder names in NOAH's data and scripts.
FEW_SHOT_SETS = {
    "fgvc-aircraft": ("fgvc-aircraft", "fgvc_aircraft"),
    "food-101": ("food-101", "food101"),
    "oxford-flowers102": ("oxford-flowers102", "oxford_flowers", "oxford_flowers102"),
    "oxford-pets": ("oxford-pets", "oxford_pets"),
    "stanford-cars": ("stanford-cars", "stanford_cars"),
}
SHOTS = (1, 2, 4, 8, 16)
SEEDS = (0, 1, 2)
# The paper's images: resized to a square, not cropped, mean and standard deviation 0.5 (docs/method.md).
IMAGES = {
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "squash",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


@dataclass(frozen=True)
class Plan:
    """Settings shared by all trials. Results may be in one table only if these are equal.

    Attributes:
        backbone, checkpoint: as in `load_backbone`; `fingerprint` identifies the loaded weights.
        recipe: the candidates replace its `lr` and `epochs`.
        lrs, epochs: the candidates.
    """

    protocol: str
    backbone: str
    checkpoint: Path | None
    fingerprint: str
    config: KarstConfig
    recipe: Recipe
    lrs: tuple[float, ...]
    epochs: tuple[int, ...]

    def described(self) -> dict[str, Any]:
        """Return the plan as in a result, without the checkpoint's path; the fingerprint identifies the weights."""
        return {
            "protocol": self.protocol,
            "backbone": self.backbone,
            "fingerprint": self.fingerprint,
            "config": self.config.model_dump(mode="json") | {"gain": self.config.effective_gain},
            "recipe": self.recipe.model_dump(mode="json", exclude={"lr", "epochs", "seed"}),
            "lrs": list(self.lrs),
            "epochs": list(self.epochs),
        }


@dataclass(frozen=True)
class Trial:
    """One number of the table: a VTAB task, or a few-shot set with a number of shots and a list's seed."""

    data_set: str
    source: Path
    shots: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Return the name of its result file, without the suffix."""
        return self.data_set if self.shots is None else f"{self.data_set}.shots_{self.shots}.seed_{self.seed}"

    def digest(self) -> str:
        """Return sha256 (hex) over the lists of the data set: results of other lists belong to another table."""
        lists = sorted([*self.source.glob("*.txt"), *(self.source / "annotations").glob("*.list*")])
        digest = hashlib.sha256()
        for path in lists:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()


def vtab_trials(root: Path, tasks: Sequence[str] = ()) -> list[Trial]:
    """Return all 19 tasks, or the named ones."""
    return [Trial(task, root / task) for task in VTAB_TASKS if not tasks or task in tasks]


def few_shot_trials(root: Path, sets: Sequence[str] = ()) -> list[Trial]:
    """Return 5 sets x 5 shots x 3 seeds, or the named sets."""
    return [
        Trial(name, next((root / folder for folder in folders if (root / folder).is_dir()), root / name), shots, seed)
        for name, folders in FEW_SHOT_SETS.items()
        if not sets or name in sets
        for shots in SHOTS
        for seed in SEEDS
    ]


def run_trial(plan: Plan, trial: Trial, device: str) -> dict[str, Any]:
    """Select, train and test. The result contains everything that it depends on.

    Raises:
        DataError: a list or an image is missing or unusable.
        BackboneError: as `load_backbone`, or weights that are not the plan's.
        FloatingPointError: the loss of every candidate, or of the last run, is not finite.
    """
    backbone = _backbone(plan.backbone, plan.checkpoint, device)
    if backbone.fingerprint != plan.fingerprint:
        raise DataError(f"the weights on this machine ({backbone.fingerprint[:12]}) are not the ones that were planned")
    is_vtab = trial.shots is None
    lists = read_dataset(trial.source) if is_vtab else read_dataset(trial.source, shots=trial.shots, seed=trial.seed)
    last = read_dataset(trial.source, final=True) if is_vtab else lists
    if last.test is None:
        raise DataError(f"{trial.source}: no test list")
    recipes = [
        Recipe(**plan.recipe.model_dump() | {"lr": lr, "epochs": epochs, "seed": trial.seed})
        for lr in plan.lrs
        for epochs in plan.epochs
    ]
    validated = _validated(plan, backbone, trial, lists.train, lists.validation, recipes) if len(recipes) > 1 else []
    chosen = recipes[_best(validated)] if validated else recipes[0]
    model = train_model(backbone, _pixels(backbone, last.train), plan.config, chosen).model
    return {
        "trial": {"data_set": trial.data_set, "shots": trial.shots, "seed": trial.seed},
        "accuracy": accuracy(model, _pixels(backbone, last.test, cache_bytes=0)),
        "chosen": {"lr": chosen.lr, "epochs": chosen.epochs},
        "validation": [
            {"lr": recipe.lr, "epochs": recipe.epochs, "accuracy": found}
            for found, recipe in zip(validated, recipes, strict=True)
        ]
        if validated
        else None,
        "images": {"train": len(last.train), "test": len(last.test)},
        "classes": len(last.train.labels),
        "trained_numbers_without_head": sum(t.numel() for name, t in model.tensors().items() if "head." not in name),
        "preprocess": preprocess_of(backbone),
        "plan": plan.described(),
        "lists": trial.digest(),
        "timm": timm.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "machine": machine(),
    }


def vtab_summary(accuracies: Mapping[str, float]) -> dict[str, Any]:
    """Return the means of the groups, and both averages of VTAB-1K; None where a task is missing.

    Args:
        accuracies: task -> accuracy.
    """
    groups = {name: _mean([accuracies.get(task) for task in tasks]) for name, tasks in GROUPS.items()}
    return {
        "groups": groups,
        "mean_of_groups": _mean(list(groups.values())),
        "mean_of_tasks": _mean([accuracies.get(task) for task in VTAB_TASKS]),
    }


def few_shot_summary(accuracies: Mapping[tuple[str, int, int], float]) -> dict[str, Any]:
    """Return the mean over seeds per set and number of shots, and the mean over the sets per number of shots.

    Args:
        accuracies: (set, shots, seed) -> accuracy.
    """
    sets = {
        name: {shots: _mean([accuracies.get((name, shots, seed)) for seed in SEEDS]) for shots in SHOTS}
        for name in FEW_SHOT_SETS
    }
    return {"sets": sets, "mean_of_sets": {shots: _mean([means[shots] for means in sets.values()]) for shots in SHOTS}}


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if a value is missing: a mean over fewer values is another figure."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if len(there) == len(values) else None


def _best(validated: Sequence[float | None]) -> int:
    """Return the index of the best candidate, the first of equals.

    Raises:
        FloatingPointError: no candidate's loss stayed finite.
    """
    if all(value is None for value in validated):
        raise FloatingPointError("no candidate's loss stayed finite; try lower learning rates")
    return max(range(len(validated)), key=lambda i: -1.0 if (value := validated[i]) is None else value)


def _validated(
    plan: Plan,
    backbone: Backbone,
    trial: Trial,
    train: ImageSet,
    validation: ImageSet | None,
    recipes: Sequence[Recipe],
) -> list[float | None]:
    """Return the validation accuracy of each candidate at its last step; None for one whose loss diverged."""
    if validation is None:
        raise DataError(f"{trial.source}: no validation list to choose among {len(recipes)} candidates with")
    pixels, held = _pixels(backbone, train), _pixels(backbone, validation)
    found: list[float | None] = []
    for recipe in recipes:
        try:
            found.append(accuracy(train_model(backbone, pixels, plan.config, recipe).model, held))
        except FloatingPointError:
            found.append(None)
    return found


def _pixels(backbone: Backbone, images: ImageSet, cache_bytes: int = DEFAULT_CACHE_BYTES) -> ImageTensors:
    return ImageTensors(images, preprocess_of(backbone), cache_bytes)


@cache
def _backbone(name: str, checkpoint: Path | None, device: str) -> Backbone:
    """Load once per process: on CPUs Ray reuses a process for the next trial (on GPUs it starts a new one)."""
    backbone = load_backbone(name, checkpoint, device=device)
    return dataclasses.replace(backbone, data_config=backbone.data_config | IMAGES)
