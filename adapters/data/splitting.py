"""Stratified splits of image sets."""

from sklearn.model_selection import train_test_split

from .errors import DataError
from .image_set import ImageSet


def stratified_split(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split images into training and validation images, with the same class proportions in both.

    Args:
        fraction: share of the images that goes to validation, in (0, 1).
        seed: selects the images.

    Raises:
        DataError: a class has too few images for both sides, or `fraction` leaves one side empty.
    """
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
