"""Recipe `karst`: KARST starts from the instant head and is kept only if it is better on held-out images.

The steps:

1. Divide the images into folds, or take the validation set as the one fold. Each fold has its own instant head, fitted
   on the other folds.
2. Find the kinds of augmentation that keep the labels (`augmentation.py`).
3. Search the learning rate on the first fold, by the likelihood of its held-out images.
4. Train on each fold. The held-out images of all folds together say at which step to stop, and whether KARST is better
   than the instant head: by more than one standard error of the paired differences.
5. If it is, train on all images for that many steps. The held-out scores calibrate its probabilities.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone import Backbone
from ..data.image_set import ImageTensors
from ..data.splitting import Fold, stratified_folds
from ..evaluation.intervals import accuracy_interval, paired_gain
from ..method.config import KarstConfig
from ..method.karst import KarstModel
from ..short_repr import short_repr
from .instant import InstantHead, fit_head
from .steps import (
    CHECKPOINTS,
    RESERVE,
    SEARCH_PART,
    KarstRecipe,
    OutOfTimeError,
    Point,
    RefineWatch,
    StepTrainer,
    trainings,
)

OVERRUN = 1.1  # times the budget, after which a training ends without a result


@dataclass(frozen=True)
class HeldOut:
    """Held-out scores of one classifier, each image scored by a model that has not seen it.

    Attributes:
        index: int64 (m,), which images; all of them with cross-validation.
        logits: float32 (m, K).
        targets: int64 (m,).
    """

    index: Tensor
    logits: Tensor
    targets: Tensor

    __repr__ = short_repr

    @property
    def right(self) -> Tensor:
        """bool (m,), whether each image is recognised."""
        return self.logits.argmax(1) == self.targets

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in [0, 1]."""
        return float(self.right.double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return accuracy_interval(int(self.right.sum()), len(self.targets))


@dataclass(frozen=True)
class Refined:
    """The comparison of KARST with the instant head, and the trained model if KARST is better.

    Attributes:
        model: None if the instant head stays.
        reason: one sentence, for the user.
        instant, karst: held-out scores on the same images; `karst` is None if no training was possible.
        features: float32 (m, D), adapted features of the held-out images, each from its own fold's model.
        references: for each fold, adapted features of some of its training images.
        fold_sizes: held-out images of each fold, in the order of `features`.
        dtype: in which the training computed.
    """

    model: KarstModel | None
    reason: str
    instant: HeldOut
    karst: HeldOut | None = None
    learning_rate: float = 0.0
    steps: int = 0
    augmentation: tuple[str, ...] = ()
    curve: tuple[Point, ...] = ()
    diverged: tuple[float, ...] = ()
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    references: tuple[Tensor, ...] = ()
    fold_sizes: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    __repr__ = short_repr


def refine(
    backbone: Backbone,
    images: ImageTensors,
    frozen: Tensor,
    config: KarstConfig,
    recipe: KarstRecipe,
    *,
    budget_s: float,
    validation: ImageTensors | None = None,
    frozen_validation: Tensor | None = None,
    watch: RefineWatch | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Refined:
    """Train KARST and compare it with the instant head.

    Args:
        frozen: (n, D) pooled features of `images` from the frozen backbone.
        budget_s: seconds for everything here. The number of steps is chosen to fit.
        validation: held-out images of the caller; None: cross-validation on `images`.
        frozen_validation: (m, D) pooled features of `validation`.

    Raises:
        DataError: an image cannot be read.
        ConfigError: the config does not suit the backbone.
    """
    began = clock()
    watch = watch or RefineWatch()
    everything = images
    if validation is not None and frozen_validation is not None:
        everything = images.joined(validation)
        frozen = torch.cat([frozen, frozen_validation])
    trainer = StepTrainer(backbone, everything, config, recipe, watch)
    folds = list(
        _given_fold(len(images), len(everything))
        if validation is not None
        else stratified_folds(trainer.targets, recipe.folds, recipe.seed)
    )
    heads = [fit_head(frozen[kept], trainer.targets[kept], trainer.classes) for kept, _ in folds]
    instant = _held_out(
        folds,
        [frozen[held] @ head.weight.T + head.bias for (_, held), head in zip(folds, heads, strict=True)],
        trainer.targets,
    )
    trainer.kinds = trainer.suitable_augmentation(folds[0], heads[0], frozen)
    steps, step_s = trainer.plan(heads[0], folds, budget_s - (clock() - began), clock)
    if steps < CHECKPOINTS:
        needed = math.ceil((clock() - began + step_s * recipe.min_steps * trainings(len(folds), recipe)) / RESERVE)
        return Refined(
            None, f"the budget of {budget_s:.0f} s is too short for KARST; it needs about {needed} s", instant
        )
    watch.planned(round(steps * trainings(len(folds), recipe)), step_s * steps * trainings(len(folds), recipe))

    # The plan trusts the first steps; other load may slow the rest down.
    trainer.is_late = lambda: clock() - began > OVERRUN * budget_s
    try:
        return _compare(trainer, folds, heads, frozen, instant, recipe, steps)
    except OutOfTimeError:
        reason = f"KARST was stopped at the end of the budget of {budget_s:.0f} s: its steps became slower than planned"
        return Refined(None, reason, instant)


def _compare(
    trainer: StepTrainer,
    folds: Sequence[Fold],
    heads: Sequence[InstantHead],
    frozen: Tensor,
    instant: HeldOut,
    recipe: KarstRecipe,
    steps: int,
) -> Refined:
    """Search the learning rate, train on each fold, and on all images if the folds' held-out images are better.

    Raises:
        OutOfTimeError: the budget has ended.
    """
    rate, diverged = trainer.search(folds[0], heads[0], max(CHECKPOINTS, round(steps * SEARCH_PART)))
    if rate is None:
        return Refined(None, "KARST diverged at every learning rate", instant, diverged=diverged)
    runs = []
    for number, (fold, head) in enumerate(zip(folds, heads, strict=True), 1):
        run = trainer.train(fold, head, rate, steps, f"fold {number} of {len(folds)}")
        if run.diverged:
            return Refined(None, f"KARST diverged at learning rate {rate:g}", instant, diverged=(*diverged, rate))
        runs.append(run)
    scores = [_held_out(folds, [run.logits[i] for run in runs], trainer.targets) for i in range(CHECKPOINTS)]
    best = min(range(CHECKPOINTS), key=lambda i: float(F.cross_entropy(scores[i].logits, scores[i].targets)))
    karst = scores[best]
    chosen_steps = runs[0].points[best].step
    curve = tuple(
        Point(runs[0].points[i].step, sum(run.points[i].loss for run in runs) / len(runs), scores[i].accuracy)
        for i in range(CHECKPOINTS)
    )
    gain, error = paired_gain(instant.right.cpu().numpy(), karst.right.cpu().numpy())
    compared = Refined(
        None,
        "",
        instant,
        karst,
        rate,
        chosen_steps,
        augmentation=trainer.kinds,
        curve=curve,
        diverged=diverged,
        dtype=trainer.dtype,
    )
    figures = f"{karst.accuracy:.1%} against {instant.accuracy:.1%} on {len(karst.targets)} held-out images"
    if gain <= error:
        reason = f"KARST is not better than the instant head by more than one standard error: {figures}"
        return replace(compared, reason=reason)
    every = torch.arange(len(trainer.targets))
    head = fit_head(frozen, trainer.targets, trainer.classes)
    final = trainer.train((every, every[:0]), head, rate, chosen_steps, "all images")
    if final.diverged:
        return Refined(None, f"KARST diverged at learning rate {rate:g}", instant, diverged=(*diverged, rate))
    return replace(
        compared,
        model=final.model,
        reason=f"KARST is better than the instant head: {figures}",
        features=torch.cat([run.features[best] for run in runs]),
        references=tuple(run.references[best] for run in runs),
        fold_sizes=tuple(len(held) for _, held in folds),
    )


def _given_fold(train: int, total: int) -> Iterator[Fold]:
    yield torch.arange(train), torch.arange(train, total)


def _held_out(folds: Sequence[Fold], logits: Sequence[Tensor], targets: Tensor) -> HeldOut:
    index = torch.cat([held for _, held in folds])
    return HeldOut(index, torch.cat(list(logits)), targets[index])
