"""Training of KARST in optimiser steps, from the instant head, on a part of an image set.

The head starts as the instant head, so step 0 has its accuracy. Steps count, not epochs: nothing is dropped, and a set
smaller than a batch is one batch. Every class has the same weight in the loss.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..backbone import Backbone, features
from ..data.image_set import ImageTensors
from ..data.images import normalise_for
from ..data.splitting import Fold
from ..method.config import KarstConfig
from ..method.karst import KarstModel, attach
from ..short_repr import short_repr
from .augmentation import KINDS, augment, keeps_labels
from .batches import VARIANTS, ModelRunner, TokenCache
from .inference import BATCH_SIZE as EVALUATION_BATCH
from .instant import InstantHead
from .precision import autocast_dtype, cpu_capabilities

CHECKPOINTS = 5  # evaluations of the held-out images in one training
SEARCH_PART = 0.5  # of the steps, for each learning rate of the search
MAX_PROBED = 500  # images for the test of augmentation
MAX_REFERENCE = 200  # training images per checkpoint whose adapted features are kept, for typicality
TIMED_STEPS = 3
RESERVE = 0.9  # share of the budget that is planned; the rest absorbs noise
DIVERGED = 3.0  # a mean loss above this many times 1 + ln(K) ends a training
WINDOW = 5  # steps of that mean


class KarstRecipe(BaseModel):
    """Hyperparameters of the recipe `karst`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rates: tuple[float, ...] = Field((1e-3, 4e-3), min_length=1, description="searched on the first fold")
    head_rate: float = Field(0.01, ge=0, description="learning rate of the head, relative to the size of its weights")
    batch_size: int = Field(16, ge=1, description="images per step")
    passes: float = Field(16, gt=0, description="steps times batch size, relative to the number of images, at most")
    min_steps: int = Field(60, ge=1, description="steps of one training, if the budget allows them")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay of AdamW")
    folds: int = Field(3, ge=2, description="parts of cross-validation")
    seed: int = Field(0, ge=0, description="seed of the initial values, the order of images and augmentation")


@dataclass(frozen=True)
class Point:
    """One evaluation: the optimiser steps so far, the mean training loss since the last one, held-out accuracy."""

    step: int
    loss: float
    accuracy: float


class OutOfTimeError(Exception):
    """The budget ended during a training."""


class RefineWatch:
    """Progress callbacks of `refine`. Override any of them; each does nothing by default."""

    def planned(self, steps: int, seconds: float) -> None:
        """Called when the first steps are timed: optimiser steps in all, and the seconds that they will take."""

    def stepped(self, stage: str, loss: float) -> None:
        """Called after each optimiser step: what the step belongs to, and its loss."""

    def evaluated(self, stage: str, accuracy: float) -> None:
        """Called after each evaluation of held-out images: what it belongs to, and the accuracy in [0, 1]."""


@dataclass
class Run:
    """One training, evaluated at `CHECKPOINTS` steps."""

    model: KarstModel
    diverged: bool = False
    points: list[Point] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # of the held-out images
    features: list[Tensor] = field(default_factory=list)  # (m, D), of the same images
    references: list[Tensor] = field(default_factory=list)  # features of training images

    __repr__ = short_repr


class StepTrainer:
    """Trains KARST on parts of one image set.

    Attributes:
        kinds: kinds of augmentation.
        is_late: called after each step of `train`; True ends the training.
    """

    def __init__(
        self, backbone: Backbone, images: ImageTensors, config: KarstConfig, recipe: KarstRecipe, watch: RefineWatch
    ) -> None:
        self.targets = torch.tensor(images.images.targets)
        self.classes = len(images.images.labels)
        self.kinds: tuple[str, ...] = ()
        self.is_late: Callable[[], bool] = lambda: False
        self.dtype = autocast_dtype(backbone.device, cpu_capabilities())
        self._backbone, self._config = backbone, config
        self._recipe, self._watch = recipe, watch
        self._cache = TokenCache(backbone, images, recipe.seed)

    def suitable_augmentation(self, fold: Fold, head: InstantHead, frozen: Tensor) -> tuple[str, ...]:
        """Return the kinds of augmentation after which the fold's head still recognises the held-out images."""
        held = fold[1][:MAX_PROBED]
        targets = self.targets[held]
        right = (frozen[held] @ head.weight.T + head.bias).argmax(1) == targets
        generator = torch.Generator().manual_seed(self._recipe.seed)
        found = []
        for kind in KINDS:

            def frozen_features(part: Tensor, kind: str = kind) -> Tensor:
                pixels = augment(self._cache.pixels(part), (kind,), generator)
                return features(self._backbone.model, normalise_for(self._backbone, pixels))

            augmented = _in_batches(frozen_features, held)
            if keeps_labels(right, (augmented @ head.weight.T + head.bias).argmax(1) == targets):
                found.append(kind)
        return tuple(found)

    def plan(
        self, head: InstantHead, folds: Sequence[Fold], left_s: float, clock: Callable[[], float]
    ) -> tuple[int, float]:
        """Return the steps of one training that fit into the time left, and the seconds of one step."""
        recipe = self._recipe
        kept = folds[0][0]
        batch = min(recipe.batch_size, len(kept))
        step_s, fill_s = self._step_times(kept, head, clock)
        wanted = max(recipe.min_steps, round(recipe.passes * len(kept) / batch))
        # An evaluation costs a third of a step per image; each fold is evaluated CHECKPOINTS times.
        evaluated = sum(len(held) + min(len(kept), MAX_REFERENCE) for kept, held in folds) + len(folds[0][1])
        evaluation_s = CHECKPOINTS * evaluated * step_s / batch / 3
        fits = (left_s * RESERVE - evaluation_s - fill_s) / step_s / trainings(len(folds), recipe)
        return min(wanted, int(fits)), step_s

    def _step_times(self, kept: Tensor, head: InstantHead, clock: Callable[[], float]) -> tuple[float, float]:
        """Return the seconds of one step, and the seconds that the outputs of a frozen prefix take in all trainings."""
        times = []
        cached = False
        for _ in range(2):  # the same images in both: the second time, their outputs of a frozen prefix are cached
            run = self._steps(kept, head, self._recipe.learning_rates[0], TIMED_STEPS + 1)
            cached = next(run)[0].prefix is not None  # the first step allocates memory
            began = clock()
            for _ in run:
                pass
            times.append((clock() - began) / TIMED_STEPS)
            if not cached:
                return times[0], 0.0
        per_image_s = max(times[0] - times[1], 0.0) / min(self._recipe.batch_size, len(kept))
        return times[1], per_image_s * len(self.targets) * (1 + VARIANTS if self.kinds else 1)

    def search(self, fold: Fold, head: InstantHead, steps: int) -> tuple[float | None, tuple[float, ...]]:
        """Return the learning rate with the best held-out likelihood, and those that diverged."""
        losses: dict[float, float] = {}
        diverged = []
        rates = self._recipe.learning_rates
        for rate in rates:
            if len(rates) == 1:
                return rate, ()
            run = self.train(fold, head, rate, steps, f"learning rate {rate:g}")
            if run.diverged:
                diverged.append(rate)
            else:
                losses[rate] = min(float(F.cross_entropy(x, self.targets[fold[1]])) for x in run.logits)
        return min(losses, key=lambda rate: losses[rate]) if losses else None, tuple(diverged)

    def train(self, fold: Fold, head: InstantHead, rate: float, steps: int, stage: str) -> Run:
        """Train on one part and evaluate the other.

        Raises:
            OutOfTimeError: `is_late` returned True.
        """
        kept, held = fold
        run: Run | None = None
        marks = {round(steps * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)}
        losses: list[float] = []
        since = 0
        reference = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[:MAX_REFERENCE]]
        for number, (runner, loss) in enumerate(self._steps(kept, head, rate, steps), 1):
            run = run or Run(runner.model)
            losses.append(loss)
            self._watch.stepped(stage, loss)
            if self.is_late():
                raise OutOfTimeError
            window = losses[-WINDOW:]
            limit = DIVERGED * (1 + math.log(max(self.classes, 2)))
            if not math.isfinite(loss) or (len(window) == WINDOW and sum(window) / WINDOW > limit):
                run.diverged = True
                break
            if number in marks and len(held):
                logits, pooled = _evaluate(runner, held)
                run.logits.append(logits)
                run.features.append(pooled)
                run.references.append(_evaluate(runner, reference)[1])
                accuracy = float((logits.argmax(1) == self.targets[held]).double().mean())
                run.points.append(Point(number, sum(losses[since:]) / len(losses[since:]), accuracy))
                self._watch.evaluated(stage, accuracy)
                since = len(losses)
                if not logits.isfinite().all():
                    run.diverged = True
                    break
        assert run is not None  # noqa: S101 (steps is at least 1)
        run.model.eval()
        return run

    def _steps(self, kept: Tensor, head: InstantHead, rate: float, steps: int) -> Iterator[tuple[ModelRunner, float]]:
        """Yield the model's runner and the loss after each optimiser step."""
        recipe, backbone = self._recipe, self._backbone
        generator = torch.Generator().manual_seed(recipe.seed)
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            model = attach(backbone, self._config, self.classes)
        with torch.no_grad():
            model.head.weight.copy_(head.weight)
            model.head.bias.copy_(head.bias)
        own = [p for name, p in model.named_parameters() if not name.startswith("head.")]
        head_rate = recipe.head_rate * float(head.weight.square().mean().sqrt())
        optimizer = torch.optim.AdamW(
            [{"params": own, "lr": rate}, {"params": list(model.head.parameters()), "lr": head_rate}],
            weight_decay=recipe.weight_decay,
        )
        warmup = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, 1) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))),
        )
        counts = torch.bincount(self.targets[kept], minlength=self.classes).float()
        weights = (len(kept) / (self.classes * counts.clamp_min(1))).to(backbone.device)
        batch = min(recipe.batch_size, len(kept))
        order = kept[:0]
        runner = ModelRunner(model, self._cache)
        model.train()
        for _ in range(steps):
            if len(order) < batch:
                order = torch.cat([order, kept[torch.randperm(len(kept), generator=generator)]])
            index, order = order[:batch], order[batch:]
            targets = self.targets[index].to(backbone.device)
            with torch.autocast(backbone.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits = runner.call(model, index, self.kinds, generator)
            loss = F.cross_entropy(logits.float(), targets, weights)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            yield runner, loss.item()


def _evaluate(runner: ModelRunner, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (m, K) and adapted features (m, D) of these images, in float32 as a hub computes them."""
    model = runner.model.eval()
    pooled = _in_batches(lambda part: runner.call(partial(features, model.frozen), part), index)
    with torch.no_grad():
        logits = model.head(pooled.to(model.head.weight)).float().cpu()
    model.train()
    return logits, pooled


@torch.no_grad()
def _in_batches(function: Callable[[Tensor], Tensor], index: Tensor) -> Tensor:
    """Return the rows that a function computes for these images, float32 on the CPU."""
    return torch.cat([function(part).float().cpu() for part in torch.split(index, EVALUATION_BATCH)])


def trainings(folds: int, recipe: KarstRecipe) -> float:
    """Return the work of all trainings, in units of one: the search, the folds and the final one."""
    search = SEARCH_PART * len(recipe.learning_rates) if len(recipe.learning_rates) > 1 else 0.0
    return search + folds + 1
