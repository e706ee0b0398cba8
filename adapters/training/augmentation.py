"""Light augmentation of training images, and the test that finds which kinds keep a task's labels.

A flip turns a left shoe into a right one, and a shift moves an object from one bin to the next. Whether a kind of
augmentation suits a task is measured: held-out images are augmented, and a classifier of frozen features that has not
seen them must recognise them as well as the originals.

Images are uint8 (B, 3, H, W), after preprocessing.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluation.intervals import paired_gain

MAX_SHIFT = 1 / 12  # of the side
MAX_ZOOM = 0.15
MAX_LIGHT = 0.2  # relative change of brightness and contrast

Augment = Callable[[Tensor, torch.Generator], Tensor]


def shift_and_zoom(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image moved by up to a twelfth of its side and enlarged or reduced by up to 15 %."""
    count = len(images)
    scale = 1 + MAX_ZOOM * (2 * torch.rand(count, generator=generator) - 1)
    shift = 2 * MAX_SHIFT * (2 * torch.rand(count, 2, generator=generator) - 1)  # the side is 2 in grid units
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale, scale, shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8)


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images, each mirrored left to right with probability one half."""
    chosen = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def light(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image with its brightness and contrast changed by up to 20 %."""
    brightness, contrast = (
        1 + MAX_LIGHT * (2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1) for _ in range(2)
    )
    x = images.float()
    mean = x.mean((1, 2, 3), keepdim=True)
    return ((x - mean) * contrast + mean * brightness).round().clamp(0, 255).to(torch.uint8)


KINDS: Mapping[str, Augment] = MappingProxyType({"shift": shift_and_zoom, "mirror": mirror, "light": light})


def augment(images: Tensor, kinds: Sequence[str], generator: torch.Generator) -> Tensor:
    """Apply these kinds of `KINDS`, one after another."""
    for kind in kinds:
        images = KINDS[kind](images, generator)
    return images


def keeps_labels(right: Tensor, right_augmented: Tensor) -> bool:
    """Return whether a kind of augmentation may be used.

    It may if the share of held-out images that are recognised falls by no more than one standard error of the paired
    differences.

    Args:
        right: bool (n,), whether each original is recognised.
        right_augmented: bool (n,), the same of the augmented images.
    """
    gain, error = paired_gain(right.cpu().numpy(), right_augmented.cpu().numpy())
    return -gain <= error
