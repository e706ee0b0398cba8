"""Devices of a training: Lightning Fabric, the processes that share a batch, and their random seeds."""

import copy
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_fabric.utilities.rank_zero import rank_zero_only

from ..backbone import Backbone
from ..method.config import ConfigError


def launch_fabric(device: torch.device, devices: int) -> Fabric:
    """Return a started Lightning Fabric on this kind of device, with its log silenced below errors.

    On CUDA it computes in bfloat16 (mixed precision) if the GPU supports it.

    Raises:
        ConfigError: the devices do not exist, or `device` has an index and `devices` is more than one.
    """
    if devices > 1 and device.index is not None:
        raise ConfigError(
            f"device {device} is a single device, but {devices} devices are requested; "
            f"use device {device.type} without an index"
        )
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    precision: Any = "32-true"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        precision = "bf16-mixed"
    selected: Any = devices if devices > 1 or device.index is None else [device.index]
    strategy = "ddp" if devices > 1 else "auto"
    try:
        fabric = Fabric(accelerator=device.type, devices=selected, strategy=strategy, precision=precision)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())  # Fabric's message has several lines
        raise ConfigError(f"cannot train on {devices} devices of kind {device.type}: {reason}") from error
    fabric.launch()
    return fabric


def is_first_process(devices: int) -> bool:
    """Return whether this process prints and writes. The further processes of a multi-device training do not."""
    return devices == 1 or getattr(rank_zero_only, "rank", 0) == 0


def copy_to_device(backbone: Backbone, device: torch.device) -> Backbone:
    """Return the backbone on this process's device; the same object if it needs no copy."""
    if backbone.device == device or device.type == "cpu":
        return backbone
    return replace(backbone, model=copy.deepcopy(backbone.model).to(device))


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed torch's random numbers from the recipe's seed, the epoch (0: initial values) and the process's rank only.

    A resumed training therefore draws the same numbers as one that was never interrupted.
    """
    entropy = np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(entropy[0] >> np.uint64(1)))
