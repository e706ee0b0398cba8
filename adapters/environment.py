"""The backbone that `HUB_*` variables name: a notebook then trains for the backbone of the hub, as the command does."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .timm_models import DEMO_NAME, BackboneError


@dataclass(frozen=True)
class BackboneChoice:
    """Arguments of `load_backbone`, and a phrase about where the name is from."""

    name: str
    checkpoint: Path | None
    image_size: int | None
    origin: str


def chosen_backbone() -> BackboneChoice:
    """Return the choice of HUB_BACKBONE, HUB_CHECKPOINT and HUB_IMAGE_SIZE; the demo backbone without HUB_BACKBONE.

    Raises:
        BackboneError: HUB_IMAGE_SIZE is no number of pixels.
    """
    name = os.environ.get("HUB_BACKBONE")
    checkpoint = os.environ.get("HUB_CHECKPOINT")
    side = os.environ.get("HUB_IMAGE_SIZE")
    if side and not (side.isdecimal() and int(side) > 0):
        raise BackboneError(f"HUB_IMAGE_SIZE is {side!r}; set it to the side of the backbone's images in pixels")
    origin = "from HUB_BACKBONE" if name else "the default; HUB_BACKBONE or `backbone=` selects another one"
    return BackboneChoice(
        name or DEMO_NAME, Path(checkpoint) if checkpoint else None, int(side) if side else None, origin
    )


def chosen_device() -> str:
    """Return HUB_DEVICE, with `auto` resolved on this machine; `cpu` without it."""
    device = os.environ.get("HUB_DEVICE") or "cpu"
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
