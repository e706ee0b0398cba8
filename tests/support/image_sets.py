"""Labelled image sets for tests."""

from pathlib import Path

from adapters.data.image_set import ImageSet
from adapters.data.readers.folders import read_folder
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
