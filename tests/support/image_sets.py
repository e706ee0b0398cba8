"""Labelled image sets for tests."""

from pathlib import Path

from adapters.data.image_set import ImageSet
from adapters.data.readers.folders import read_folder
from adapters.demo.tasks import digits
from tests.support.models import coloured_noise

COLOURS = {"blue": (40, 40, 220), "green": (40, 220, 40), "red": (220, 40, 40)}


def coloured_images(root: Path, count: int, seed: int) -> ImageSet:
    """Write and read an easy task: three classes, each noise around one colour, `count` images per class."""
    return read_folder(coloured_noise(root, COLOURS, count, seed))


def image_file(images: ImageSet, i: int) -> Path:
    """Return the file of image `i`, which must be a file and not an encoded image."""
    source = images.sources[i]
    assert isinstance(source, Path)
    return source


def write_digits(root: Path, start: int, count: int) -> Path:
    """Write some of scikit-learn's digits 0, 1 and 4 as class folders. The demo backbone tells them apart."""
    images, labels = digits()
    for label in ("0", "1", "4"):
        (root / label).mkdir(parents=True)
        chosen = [image for image, own in zip(images, labels, strict=True) if own == label]
        for i, image in enumerate(chosen[start : start + count]):
            image.save(root / label / f"{i}.png")
    return root
