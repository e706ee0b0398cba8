"""Frozen features of the accuracy benchmark's tasks, and the methods that need no training beside instant."""

import os
from functools import cache

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from adapters import Backbone
from adapters.backbone import features
from adapters.data.images import normalise_for
from adapters.evaluation.linear_probe import INVERSE_PENALTIES, MAX_FOLDS, MAX_ITERATIONS

from . import real_backbone
from .accuracy_methods import NEIGHBOURS, PROBE
from .accuracy_tasks import Task, further_images, load_task

SIDE_PX = 98
NEIGHBOUR_COUNTS = (1, 3, 5, 9)  # cross-validated, for kNN
FEATURE_BATCH = 64


def head_only(method: str, x: Tensor, y: Tensor, held: Tensor) -> Tensor:
    """Return the predicted classes of `held` features by a linear probe or by nearest neighbours.

    Three-fold cross-validation on the training images selects the penalty, or the number of neighbours (cosine).

    Raises:
        ValueError: another method.
    """
    folds = min(MAX_FOLDS, int(y.bincount().min()))
    if method == PROBE:
        search = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS)),
            {"logisticregression__C": INVERSE_PENALTIES},
            cv=folds,
        )
    elif method == NEIGHBOURS:
        counts = [n for n in NEIGHBOUR_COUNTS if n <= len(y) * (folds - 1) // folds]
        search = GridSearchCV(KNeighborsClassifier(metric="cosine"), {"n_neighbors": counts}, cv=folds)
    else:
        raise ValueError(f"method {method!r} is not one of {PROBE}, {NEIGHBOURS}")
    return torch.from_numpy(search.fit(x.numpy(), y.numpy()).predict(held.numpy()))


@cache
def backbone() -> Backbone:
    """Return the ViT-S/14 at 98 pixels."""
    return real_backbone.load(SIDE_PX)


@cache
def frozen_features(name: str) -> Tensor:
    """Return the frozen features of all images of a task, float32 (n, D), from a file beside the checkpoint."""
    return _cached(name, load_task(name, SIDE_PX))


@cache
def further_features(name: str) -> tuple[Tensor, Tensor]:
    """Return the frozen features of a task's further images, float32 (m, D), and their classes; m is 0 without any."""
    task = further_images(name, SIDE_PX)
    if task is None:
        known = frozen_features(name)
        return known[:0], torch.empty(0, dtype=torch.long)
    return _cached(f"{name}-further", task), task.targets


def _cached(name: str, task: Task) -> Tensor:
    path = real_backbone.DEFAULT_OUTPUT.parent / f"features-{name}-{SIDE_PX}.pt"
    if path.exists():
        found: Tensor = torch.load(path, weights_only=True)
        return found
    frozen = backbone()
    with torch.inference_mode():
        found = torch.cat(
            [
                features(frozen.model, normalise_for(frozen, task.pixels(part)))
                for part in torch.arange(len(task.targets)).split(FEATURE_BATCH)
            ]
        )
    part = path.with_suffix(f".{os.getpid()}.part")  # two workers may compute the same features
    torch.save(found, part)
    part.rename(path)
    return found
