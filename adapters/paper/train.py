"""The training loop: KARST and a new head on labelled images, with the backbone frozen (docs/method.md)."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from ..backbone import Backbone
from ..data.image_set import ImageTensors
from ..data.images import normalise_for
from ..method.config import ConfigError, KarstConfig
from ..method.frozen_prefix import MAX_PREFIX_BYTES, FrozenPrefix, find_prefix
from ..method.karst import KarstModel, attach
from ..short_repr import short_repr
from ..training.inference import accuracy, map_images
from .checkpoint import load_checkpoint, save_checkpoint, training_identity
from .devices import copy_to_device, launch_fabric, seed_epoch
from .recipe import Recipe, learning_rate_schedule, steps_per_epoch
from .selection import BestEpoch, EpochResult


@dataclass(frozen=True)
class TrainedModel:
    """A trained model in eval mode, with the selected epoch and the results of all epochs."""

    model: KarstModel
    selected: EpochResult
    history: tuple[EpochResult, ...]

    __repr__ = short_repr


def train_model(
    backbone: Backbone,
    images: ImageTensors,
    config: KarstConfig,
    recipe: Recipe,
    *,
    validation: ImageTensors | None = None,
    device: str | None = None,
    devices: int = 1,
    checkpoint: Path | None = None,
    resume: bool = False,
    max_prefix_bytes: int = MAX_PREFIX_BYTES,
    on_step: Callable[[int, float, float], None] | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
) -> TrainedModel:
    """Train an adapter. On the CPU, equal arguments on the same machine give equal bits.

    On CUDA the frozen model computes in bfloat16 (mixed precision) if the GPU supports it.

    Args:
        device: training device; by default the backbone's.
        devices: GPUs (on the CPU: processes) that share each batch. For more than one, Lightning Fabric starts the
            calling script again in the further processes, and this function returns in all of them.
        checkpoint: file to write at the end of every epoch, for `resume`.
        resume: continue from that file. The result equals that of an uninterrupted training.
        max_prefix_bytes: limit on the cached outputs of a frozen prefix (`frozen_prefix.py`).
        on_step: called after every optimiser step with the epoch number, and the batch's mean loss and accuracy in
            [0, 1], in this process.
        on_epoch: called after every epoch, after its checkpoint is written.

    Raises:
        DataError: an image cannot be read, or the checkpoint does not exist or belongs to another training.
        ConfigError: the devices do not exist or cannot share a batch evenly, or the config or recipe does not suit
            the backbone (see `attach`).
        FloatingPointError: the loss is no longer finite.
    """
    batch_size = min(recipe.batch_size, len(images))
    if batch_size % devices:
        raise ConfigError(
            f"a batch of {batch_size} images cannot be divided evenly among {devices} devices; change the batch size"
        )
    fabric = launch_fabric(torch.device(device) if device is not None else backbone.device, devices)
    backbone = copy_to_device(backbone, fabric.device)
    with torch.random.fork_rng():
        seed_epoch(recipe.seed, 0, fabric.global_rank)
        model = attach(backbone, config, len(images.images.labels), drop_path=recipe.drop_path)
        if recipe.grad_checkpointing:
            enable_grad_checkpointing(model)
        run = _TrainingRun(fabric, model, recipe, steps_per_epoch(len(images), recipe))
        identity = training_identity(model, recipe, devices, images, validation) if checkpoint is not None else {}
        if resume:
            if checkpoint is None:
                raise ValueError("resume=True needs a checkpoint file; pass checkpoint=")
            run.load_state(load_checkpoint(checkpoint, identity))
        inputs: Dataset[Any] = run.cache_prefix(images, max_prefix_bytes) or images
        sampler: DistributedSampler[Any] = DistributedSampler(
            inputs, fabric.world_size, fabric.global_rank, seed=recipe.seed, drop_last=devices > 1
        )
        loader = DataLoader(inputs, batch_size // devices, sampler=sampler, drop_last=True)
        for number in range(len(run.history) + 1, recipe.epochs + 1):
            seed_epoch(recipe.seed, number, fabric.global_rank)
            sampler.set_epoch(number)
            loss, train_accuracy = run.train_epoch(loader, None if on_step is None else partial(on_step, number))
            val_accuracy = accuracy(model, validation) if validation is not None else None
            result = EpochResult(number, loss, train_accuracy, val_accuracy)
            run.history.append(result)
            run.best.update(result, model.state_dict())
            if checkpoint is not None and fabric.is_global_zero:
                save_checkpoint(checkpoint, identity, run.state())
            if on_epoch is not None:
                on_epoch(result)
        model.load_state_dict(run.best.parameters)
    return TrainedModel(model.eval(), run.best.result, tuple(run.history))


def enable_grad_checkpointing(model: KarstModel) -> None:
    """Make the frozen model recompute activations in the backward pass instead of storing them.

    Raises:
        ConfigError: timm cannot do this for the backbone.
    """
    try:
        model.frozen.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:  # timm raises these for unsupported models
        name = model.backbone.name
        raise ConfigError(f"backbone {name!r} cannot recompute activations; leave out grad_checkpointing") from error


class _TrainingRun:
    """The state of a training: everything that changes between epochs, and therefore belongs in a checkpoint."""

    def __init__(self, fabric: Fabric, model: KarstModel, recipe: Recipe, steps: int) -> None:
        self.history: list[EpochResult] = []
        self.best = BestEpoch()
        self._fabric = fabric
        self._model = model
        self._raw_optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.lr,
            weight_decay=recipe.lr / 10 if recipe.weight_decay is None else recipe.weight_decay,
        )
        self._schedule: LRScheduler = learning_rate_schedule(self._raw_optimizer, recipe, steps)
        self._wrapped, self._optimizer = fabric.setup(model, self._raw_optimizer, move_to_device=False)
        self._prefix: FrozenPrefix | None = None

    def cache_prefix(self, train: ImageTensors, max_bytes: int) -> "TensorDataset | None":
        """Compute the outputs of the frozen prefix, if the model has one and they fit in `max_bytes`.

        Returns:
            Pairs of tokens and target, which replace pixels and target, or None.
        """
        first = normalise_for(self._model.backbone, train[0][0][None])
        prefix = find_prefix(self._model, first)
        if prefix is None or prefix.run(first).nbytes * len(train) > max_bytes:
            return None
        self._prefix = prefix
        return TensorDataset(*map_images(self._model.backbone, train, prefix.run))

    def train_epoch(
        self, loader: "DataLoader[Any]", on_step: Callable[[float, float], None] | None
    ) -> tuple[float, float]:
        """Train for one epoch; return the mean loss and the accuracy in [0, 1] over all devices."""
        self._model.train()
        backbone = self._model.backbone
        loss_sum, correct_sum, seen = 0.0, 0, 0
        with self._prefix.skipped() if self._prefix else nullcontext():
            for inputs, targets in loader:
                inputs, targets = inputs.to(backbone.device), targets.to(backbone.device)
                pixels = self._prefix.placeholder_pixels(inputs) if self._prefix else normalise_for(backbone, inputs)
                logits = self._wrapped(pixels)
                loss = F.cross_entropy(logits.float(), targets)
                self._check_finite(loss)
                self._optimizer.zero_grad(set_to_none=True)
                self._fabric.backward(loss)
                self._optimizer.step()
                self._schedule.step()
                correct = int((logits.detach().argmax(1) == targets).sum())
                loss_sum += loss.item() * len(targets)
                correct_sum += correct
                seen += len(targets)
                if on_step is not None:
                    on_step(loss.item(), correct / len(targets))
        if self._fabric.world_size == 1:
            return loss_sum / seen, correct_sum / seen
        means = torch.tensor([loss_sum / seen, correct_sum / seen], device=backbone.device)
        # Every device has seen the same number of images, so the mean of the means is the mean over images.
        loss_mean, accuracy_mean = cast(Tensor, self._fabric.all_reduce(means, reduce_op="mean")).tolist()
        return loss_mean, accuracy_mean

    def _check_finite(self, loss: Tensor) -> None:
        # The mean over all devices: if one process raised alone, the others would wait for it forever.
        mean = cast(Tensor, self._fabric.all_reduce(loss.detach(), reduce_op="mean")).item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean}, not a finite number; use a lower learning rate")

    def state(self) -> dict[str, Any]:
        """Return the state as plain numbers and tensors, for a checkpoint."""
        return {
            "model": self._model.state_dict(),
            "optimizer": self._raw_optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "history": [asdict(epoch) for epoch in self.history],
            "best": self.best.result.number,
            "best_numbers": self.best.parameters,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Replace the state by one from `state()`."""
        self._model.load_state_dict(state["model"])
        self._raw_optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.history = [EpochResult(**epoch) for epoch in state["history"]]
        self.best.set(self.history[state["best"] - 1], state["best_numbers"])
