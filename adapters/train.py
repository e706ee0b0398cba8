"""The paper's recipe: fit KARST and a new head on labelled images, everything else frozen (KARST.md).

AdamW, weight decay lr / 10, a cosine schedule after a linear warm-up, stochastic depth 0.1, cross-entropy.
One thing differs from the official scripts on purpose: the best epoch is chosen on validation images, never on
the test split. Without validation images the last epoch is taken.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader

from .backbone import Backbone, features
from .config import KarstConfig
from .data import DataError, ImageSet, Pixels, normalise, preprocess_of
from .karst import KarstModel, attach

EVAL_BATCH = 64


class Recipe(BaseModel):
    """How to train; the defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(100, ge=1, description="passes over the training images, warm-up included")
    warmup_epochs: int = Field(10, ge=0, description="of them with a rising learning rate, from lr / 100")
    batch_size: int = Field(32, ge=1, description="images a step; a last partial batch is dropped")
    lr: float = Field(1e-3, gt=0, description="peak learning rate; falls to lr / 10")
    weight_decay: float | None = Field(None, ge=0, description="AdamW's; None means lr / 10")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth of the frozen blocks while training")
    seed: int = Field(0, ge=0, description="start, order of images and stochastic depth")


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave: its number from 1, the mean training loss, and accuracies in [0, 1]."""

    number: int
    loss: float
    train_accuracy: float
    val_accuracy: float | None


@dataclass(frozen=True)
class Fitted:
    """A trained model in eval mode, the epoch it was taken from, and every epoch's numbers."""

    model: KarstModel
    chosen: Epoch
    history: tuple[Epoch, ...]


def fit(
    backbone: Backbone,
    train: Pixels,
    config: KarstConfig,
    recipe: Recipe,
    *,
    validation: Pixels | None = None,
    on_step: Callable[[], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Fitted:
    """Train an adapter; the same arguments on the same machine give the same numbers.

    Args:
        on_step, on_epoch: called after every optimiser step and every epoch, for progress.

    Raises:
        DataError: an image that cannot be read.
        FloatingPointError: the loss is no longer finite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = attach(backbone, config, len(train.images.labels), drop_path=recipe.drop_path)
        batch_size = min(recipe.batch_size, len(train))
        loader = DataLoader(train, batch_size, shuffle=True, drop_last=True)
        steps = steps_per_epoch(len(train), recipe)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.lr,
            weight_decay=recipe.lr / 10 if recipe.weight_decay is None else recipe.weight_decay,
        )
        schedule = _schedule(optimizer, recipe, steps)
        history: list[Epoch] = []
        best: tuple[Epoch, dict[str, Tensor]] | None = None
        for number in range(1, recipe.epochs + 1):
            loss, train_accuracy = _train_epoch(model, loader, optimizer, schedule, on_step)
            epoch = Epoch(number, loss, train_accuracy, accuracy(model, validation) if validation else None)
            history.append(epoch)
            if best is None or _is_better(epoch, best[0]):
                best = epoch, {name: tensor.clone() for name, tensor in model.state_dict().items()}
            if on_epoch is not None:
                on_epoch(epoch)
    assert best is not None  # noqa: S101 (there is at least one epoch)
    model.load_state_dict(best[1])
    return Fitted(model.eval(), best[0], tuple(history))


def steps_per_epoch(images: int, recipe: Recipe) -> int:
    """Optimiser steps of one epoch over so many training images."""
    return images // min(recipe.batch_size, images)


def split(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Training and validation images, every class in both in the same proportion.

    Raises:
        DataError: too few images of a class for both parts.
    """
    try:
        kept, held = train_test_split(
            range(len(images)), test_size=fraction, random_state=seed, stratify=images.targets
        )
    except ValueError as error:
        raise DataError(f"cannot hold out {fraction:.0%} of {len(images)} images for validation: {error}") from error
    return images.subset(sorted(kept)), images.subset(sorted(held))


def accuracy(model: KarstModel, data: Pixels) -> float:
    """Top-1 accuracy in [0, 1]."""
    logits, targets = _run(model.backbone, data, model.eval())
    return float((logits.argmax(1) == targets).float().mean())


def linear_probe(backbone: Backbone, train: Pixels, test: Pixels) -> float:
    """Accuracy in [0, 1] of the best logistic regression on the frozen backbone's pooled features.

    The strength of its penalty is chosen by three-fold cross-validation on the training images (two-fold where a
    class has two): a probe as good as it gets is the fair one to compare with.

    Raises:
        DataError: a class with one training image, or an image that cannot be read.
    """
    folds = min(3, *Counter(train.images.targets).values())
    if folds < 2:
        raise DataError("a linear probe needs at least two training images of each class")

    def probed(pixels: Tensor) -> Tensor:
        return features(backbone.model, pixels.to(backbone.dtype)).float()

    (x, y), (test_x, test_y) = (_run(backbone, data, probed) for data in (train, test))
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)),
        {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1, 10]},
        cv=folds,
    )
    search.fit(x.numpy(), y.numpy())
    return float(search.score(test_x.numpy(), test_y.numpy()))


@torch.inference_mode()
def _run(backbone: Backbone, data: Pixels, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs of a function of normalised pixels over a whole set, on the CPU: (n, ...), and targets (n,)."""
    outputs, targets = [], []
    for pixels, target in DataLoader(data, EVAL_BATCH):
        outputs.append(function(_normalised(backbone, pixels)).cpu())
        targets.append(target)
    return torch.cat(outputs), torch.cat(targets)


def _train_epoch(
    model: KarstModel,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    on_step: Callable[[], None] | None,
) -> tuple[float, float]:
    model.train()
    total = torch.zeros(2)  # loss and right answers, summed
    seen = 0
    for pixels, targets in loader:
        targets = targets.to(model.backbone.device)
        logits = model(_normalised(model.backbone, pixels))
        loss = F.cross_entropy(logits.float(), targets)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()}; try a lower learning rate than the present one")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        right = (logits.detach().argmax(1) == targets).sum()
        total += torch.stack([loss.detach() * len(targets), right]).cpu()
        seen += len(targets)
        if on_step is not None:
            on_step()
    loss_sum, right_sum = total.tolist()
    return loss_sum / seen, right_sum / seen


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> Any:
    """lr / 100 up to lr over the warm-up, then down to lr / 10 along a cosine; counted in steps."""
    warmup = min(recipe.warmup_epochs, recipe.epochs - 1) * steps
    cosine = CosineAnnealingLR(optimizer, max(recipe.epochs * steps - warmup, 1), eta_min=recipe.lr / 10)
    if not warmup:
        return cosine
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.01, total_iters=warmup), cosine], milestones=[warmup])


def _is_better(epoch: Epoch, than: Epoch) -> bool:
    """Later epochs win ties, and always win where nothing was validated."""
    return epoch.val_accuracy is None or epoch.val_accuracy >= cast(float, than.val_accuracy)


def _normalised(backbone: Backbone, pixels: Tensor) -> Tensor:
    preprocess = preprocess_of(backbone)
    mean, std = (torch.tensor(preprocess[name], device=backbone.device) for name in ("mean", "std"))
    return normalise(pixels.to(backbone.device), mean, std)
