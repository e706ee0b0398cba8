"""The paper's recipe: fit KARST and a new head on labelled images, everything else frozen (KARST.md).

AdamW, weight decay lr / 10, a cosine schedule after a linear warm-up, stochastic depth 0.1, cross-entropy.
One thing differs from the official scripts on purpose: the best epoch is chosen on validation images, never on
the test split. Without validation images the last epoch is taken.
"""

import copy
import logging
import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pydantic import BaseModel, ConfigDict, Field
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from ..backbone import Backbone, features
from ..data.images import DataError, ImageSet, Pixels, normalised
from ..method.config import ConfigError, KarstConfig
from ..method.karst import KarstModel, attach
from .checkpoint import identity, load, save
from .frozen_prefix import Prefix, find_prefix

EVAL_BATCH = 64
MAX_PREFIX_BYTES = 4 * 1024**3  # of activations that are kept in memory (`prefix.py`)


class Recipe(BaseModel):
    """How to train; the defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(100, ge=1, description="passes over the training images, warm-up included")
    warmup_epochs: int = Field(10, ge=0, description="of them with a rising learning rate")
    batch_size: int = Field(32, ge=1, description="images a step; a last partial batch is dropped")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float | None = Field(None, ge=0, description="AdamW's; None means lr / 10")
    lr_start: float = Field(0.01, gt=0, le=1, description="where the warm-up starts, in parts of lr")
    lr_end: float = Field(0.1, ge=0, le=1, description="where the cosine ends, in parts of lr")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth of the frozen blocks while training")
    grad_checkpointing: bool = Field(False, description="recompute activations: less memory, more time, same numbers")
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


def train_model(
    backbone: Backbone,
    images: Pixels,
    config: KarstConfig,
    recipe: Recipe,
    *,
    validation: Pixels | None = None,
    device: str | None = None,
    devices: int = 1,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, float, float], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Fitted:
    """Train an adapter; the same arguments on the same machine give the same numbers, bit by bit on the CPU.

    On CUDA the frozen model computes in bfloat16 (mixed precision) if the GPU has it.

    Args:
        device: where to train, if not where the backbone is.
        devices: how many GPUs (or, on the CPU, processes) share each batch. With more than one, Lightning Fabric
            starts the calling script again in the others, and all of them come back from here.
        checkpoint: file that is written at the end of every epoch, for `resume`.
        resume: go on from that file; the result is the one of a training that was never interrupted.
        on_step: called after every optimiser step with the epoch's number, and the mean loss and the accuracy in
            [0, 1] of the batch (of this process's share of it).
        on_epoch: called after every epoch.

    Raises:
        DataError: an image that cannot be read, or a checkpoint that is not there or is of another training.
        ConfigError: devices that are not there or cannot share `recipe.batch_size` evenly, or a config or recipe
            that does not suit the backbone (as `attach`).
        FloatingPointError: the loss is no longer finite.
    """
    batch_size = min(recipe.batch_size, len(images))
    if batch_size % devices:
        raise ConfigError(f"a batch of {batch_size} images cannot be shared evenly by {devices} devices")
    fabric = _fabric(torch.device(device) if device is not None else backbone.device, devices)
    backbone = _on(backbone, fabric.device)
    with torch.random.fork_rng():
        _seed(recipe, 0, fabric.global_rank)
        model = attach(backbone, config, len(images.images.labels), drop_path=recipe.drop_path)
        if recipe.grad_checkpointing:
            _recompute(model)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.lr,
            weight_decay=recipe.lr / 10 if recipe.weight_decay is None else recipe.weight_decay,
        )
        schedule = _schedule(optimizer, recipe, steps_per_epoch(len(images), recipe))
        run = _Run(fabric, model, optimizer, schedule)
        own = identity(model, recipe.model_dump(), devices, images, validation) if checkpoint is not None else {}
        if resume:
            if checkpoint is None:
                raise ValueError("resume needs the checkpoint file to go on from")
            run.load(load(checkpoint, own))
        source: Dataset = run.keep_prefix(images) or images
        sampler: DistributedSampler = DistributedSampler(
            source, fabric.world_size, fabric.global_rank, seed=recipe.seed, drop_last=devices > 1
        )
        loader = DataLoader(source, batch_size // devices, sampler=sampler, drop_last=True)
        for number in range(len(run.history) + 1, recipe.epochs + 1):
            _seed(recipe, number, fabric.global_rank)
            sampler.set_epoch(number)
            loss, train_accuracy = run.epoch(loader, None if on_step is None else partial(on_step, number))
            epoch = Epoch(number, loss, train_accuracy, accuracy(model, validation) if validation else None)
            run.finish(epoch)
            if checkpoint is not None and fabric.is_global_zero:
                save(checkpoint, own, run.state())
            if on_epoch is not None:
                on_epoch(epoch)
        model.load_state_dict(run.best_numbers)
    return Fitted(model.eval(), run.best, tuple(run.history))


class _Run:
    """A training under way: everything that changes, and so everything that a checkpoint holds."""

    def __init__(self, fabric: Fabric, model: KarstModel, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        self.model, self.schedule = model, schedule
        self.history: list[Epoch] = []
        self.best: Epoch
        self.best_numbers: dict[str, Tensor]
        self._fabric = fabric
        self._raw_optimizer = optimizer
        self._wrapped, self._optimizer = fabric.setup(model, optimizer, move_to_device=False)
        self._prefix: Prefix | None = None

    def keep_prefix(self, train: Pixels) -> Dataset | None:
        """Run the blocks that come before anything adapted once and for all, if there are any and the results fit.

        Returns:
            (tokens, target) pairs in the place of (pixels, target), or None.
        """
        first = normalised(self.model.backbone, train[0][0][None])
        prefix = find_prefix(self.model, first)
        if prefix is None or prefix.run(first).nbytes * len(train) > MAX_PREFIX_BYTES:
            return None
        self._prefix = prefix
        return TensorDataset(*_run(self.model.backbone, train, prefix.run))

    def epoch(self, loader: DataLoader, on_step: Callable[[float, float], None] | None) -> tuple[float, float]:
        """One pass over the training images; mean loss and accuracy over all devices."""
        self.model.train()
        backbone = self.model.backbone
        loss_sum, right_sum, seen = 0.0, 0, 0
        with self._prefix.skipped() if self._prefix else nullcontext():
            for inputs, targets in loader:
                inputs, targets = inputs.to(backbone.device), targets.to(backbone.device)
                pixels = self._prefix.blank(inputs) if self._prefix else normalised(backbone, inputs)
                logits = self._wrapped(pixels)
                loss = F.cross_entropy(logits.float(), targets)
                # Of all devices: if one must stop, all do.
                finite = cast(Tensor, self._fabric.all_reduce(loss.detach(), reduce_op="mean")).item()
                if not math.isfinite(finite):
                    raise FloatingPointError(f"the loss is {finite}; try a lower learning rate than the present one")
                self._optimizer.zero_grad(set_to_none=True)
                self._fabric.backward(loss)
                self._optimizer.step()
                self.schedule.step()
                right = int((logits.detach().argmax(1) == targets).sum())
                loss_sum += loss.item() * len(targets)
                right_sum += right
                seen += len(targets)
                if on_step is not None:
                    on_step(loss.item(), right / len(targets))
        means = torch.tensor([loss_sum / seen, right_sum / seen], device=backbone.device)  # equal shares
        if self._fabric.world_size == 1:
            return loss_sum / seen, right_sum / seen
        loss_mean, accuracy_mean = cast(Tensor, self._fabric.all_reduce(means, reduce_op="mean")).tolist()
        return loss_mean, accuracy_mean

    def finish(self, epoch: Epoch) -> None:
        """Note an epoch, and its numbers if it is the best so far."""
        self.history.append(epoch)
        if len(self.history) == 1 or _is_better(epoch, self.best):
            self.best = epoch
            self.best_numbers = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Plain numbers and tensors, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._raw_optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": [asdict(epoch) for epoch in self.history],
            "best": self.best.number,
            "best_numbers": self.best_numbers,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.model.load_state_dict(state["model"])
        self._raw_optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self.best = self.history[state["best"] - 1]
        self.best_numbers = state["best_numbers"]


def predict(model: KarstModel, data: Pixels) -> tuple[Tensor, Tensor]:
    """Logits over a whole set, (n, K) float32 on the CPU, and its targets (n,)."""
    logits, targets = _run(model.backbone, data, model.eval())
    return logits.float(), targets


def is_first_process(devices: int) -> bool:
    """False in the further processes that a training on several devices has started: they say and write nothing."""
    return devices == 1 or getattr(rank_zero_only, "rank", 0) == 0


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
    logits, targets = predict(model, data)
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
        outputs.append(function(normalised(backbone, pixels)).cpu())
        targets.append(target)
    return torch.cat(outputs), torch.cat(targets)


def _fabric(device: torch.device, devices: int) -> Fabric:
    """Lightning Fabric on this kind of device, started; it says nothing of its own.

    Raises:
        ConfigError: devices that are not there.
    """
    if devices > 1 and device.index is not None:
        raise ConfigError(f"device {device} is one device; give its kind, {device.type}, to train on {devices}")
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    precision: Any = "32-true"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        precision = "bf16-mixed"
    which: Any = devices if devices > 1 or device.index is None else [device.index]
    strategy = "ddp" if devices > 1 else "auto"
    try:
        fabric = Fabric(accelerator=device.type, devices=which, strategy=strategy, precision=precision)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot train on {devices} devices of kind {device.type}: {reason}") from error
    fabric.launch()
    return fabric


def _recompute(model: KarstModel) -> None:
    try:
        model.frozen.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:  # timm's way to say so
        name = model.backbone.name
        raise ConfigError(f"backbone {name!r} cannot recompute activations: leave out grad_checkpointing") from error


def _on(backbone: Backbone, device: torch.device) -> Backbone:
    """The same backbone on the device of this process."""
    if backbone.device == device or device.type == "cpu":
        return backbone
    return replace(backbone, model=copy.deepcopy(backbone.model).to(device))


def _seed(recipe: Recipe, epoch: int, rank: int) -> None:
    """Random numbers that depend on nothing but the recipe, the epoch (0: the start) and the process."""
    entropy = np.random.SeedSequence([recipe.seed, epoch, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(entropy[0] >> np.uint64(1)))


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> Any:
    """From lr_start up to lr over the warm-up, then down to lr_end along a cosine; counted in steps."""
    warmup = min(recipe.warmup_epochs, recipe.epochs - 1) * steps
    cosine = CosineAnnealingLR(optimizer, max(recipe.epochs * steps - warmup, 1), eta_min=recipe.lr * recipe.lr_end)
    if not warmup:
        return cosine
    return SequentialLR(
        optimizer, [LinearLR(optimizer, recipe.lr_start, total_iters=warmup), cosine], milestones=[warmup]
    )


def _is_better(epoch: Epoch, than: Epoch) -> bool:
    """Later epochs win ties, and always win where nothing was validated."""
    return epoch.val_accuracy is None or epoch.val_accuracy >= cast(float, than.val_accuracy)
