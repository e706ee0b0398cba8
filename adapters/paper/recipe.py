"""The training recipe and its learning rate schedule (docs/method.md).

AdamW, weight decay lr / 10, a cosine schedule after a linear warm-up, stochastic depth 0.1, cross-entropy.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


class Recipe(BaseModel):
    """Training hyperparameters. The defaults are those of the KARST paper."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(100, ge=1, description="passes over the training images, warm-up included")
    warmup_epochs: int = Field(10, ge=0, description="epochs with a rising learning rate")
    batch_size: int = Field(32, ge=1, description="images per step; the last partial batch of an epoch is dropped")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float | None = Field(None, ge=0, description="weight decay of AdamW; None means lr / 10")
    lr_start: float = Field(0.01, gt=0, le=1, description="learning rate at the start of the warm-up, relative to lr")
    lr_end: float = Field(0.1, ge=0, le=1, description="learning rate at the end of the cosine, relative to lr")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth of the frozen blocks while training")
    grad_checkpointing: bool = Field(
        False, description="recompute activations: less memory, more time, the same result"
    )
    seed: int = Field(0, ge=0, description="seed of the initial values, the order of images and stochastic depth")


def steps_per_epoch(images: int, recipe: Recipe) -> int:
    """Return the optimiser steps of one epoch over this many training images."""
    return images // min(recipe.batch_size, images)


def learning_rate_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """Return the schedule: linear warm-up from lr_start to lr, then a cosine to lr_end. It advances once per step.

    Args:
        steps: optimiser steps per epoch.
    """
    warmup = min(recipe.warmup_epochs, recipe.epochs - 1) * steps
    cosine = CosineAnnealingLR(optimizer, max(recipe.epochs * steps - warmup, 1), eta_min=recipe.lr * recipe.lr_end)
    if not warmup:
        return cosine
    return SequentialLR(
        optimizer, [LinearLR(optimizer, recipe.lr_start, total_iters=warmup), cosine], milestones=[warmup]
    )
