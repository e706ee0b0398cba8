"""Stratified splits and folds of image sets."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import DataError
from .image_set import ImageSet

Fold = tuple[Tensor, Tensor]  # int64 indices of the training images, and of the held-out images
SINGLE_FOLD_IMAGES = 1500  # from here on one held-out part is enough
SINGLE_FOLD_SHARE = 0.2


def stratified_split(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split images into training and validation images, with the same class proportions in both.

    Args:
        fraction: share of the images that goes to validation, in (0, 1).
        seed: selects the images.

    Raises:
        DataError: a class has too few images for both sides, or `fraction` leaves one side empty.
    """
    from sklearn.model_selection import train_test_split  # here: gateways start without it

    try:
        kept, held_out = train_test_split(
            range(len(images)), test_size=fraction, random_state=seed, stratify=images.targets
        )
    except ValueError as error:
        raise DataError(
            f"cannot hold out {fraction:.0%} of {len(images)} images for validation; add images, or change "
            f"--val-fraction: {error}"
        ) from error
    return images.subset(sorted(kept)), images.subset(sorted(held_out))


def stratified_folds(targets: Tensor, count: int, seed: int) -> Iterator[Fold]:
    """Yield stratified folds. An image that is alone in its class is in every training part and in no held-out part."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.full((len(targets),), -1)
    start = 0
    for k in range(int(targets.max()) + 1):
        members = (targets == k).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        if len(members) > 1:
            place[members] = (torch.arange(len(members)) + start) % count
            start += len(members)  # small classes do not all begin with the first fold
    if len(targets) >= SINGLE_FOLD_IMAGES:
        parts = round(1 / SINGLE_FOLD_SHARE)
        for k in range(int(targets.max()) + 1):
            members = (targets == k).nonzero()[:, 0]
            members = members[torch.randperm(len(members), generator=generator)]
            if len(members) > 1:
                place[members] = torch.arange(len(members)) % parts
        count = 1
    for fold in range(count):
        held = (place == fold).nonzero()[:, 0]
        if len(held):
            yield (place != fold).nonzero()[:, 0], held
