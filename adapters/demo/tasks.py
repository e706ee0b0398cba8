"""Write the demo's three tasks as image folders: `python -m adapters.demo.tasks OUT`.

`digits` are scikit-learn's handwritten digits; `shapes` and `count` are drawn by `draw.py`. The backbone was
pre-trained on none of them. Each task is written to OUT/TASK/train and OUT/TASK/test, with one folder of PNGs per
class, as `karst-hub train` reads them. Seeded: the same command writes the same images.
"""

import argparse
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track
from sklearn.datasets import load_digits

from . import draw

DIGITS_TRAIN = 1000  # of 1,797; the rest are test images
DRAWN_TRAIN = 4000
DRAWN_TEST = 800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=Path, help="also copy the first test image of each class here")
    options = parser.parse_args()
    tasks = {
        "digits": (*digits(), DIGITS_TRAIN),
        "shapes": (*drawn(draw.SHAPES, draw.shape_image, seed=1), DRAWN_TRAIN),
        "count": (*drawn(draw.COUNTS, lambda rng, label: draw.count_image(rng, int(label)), seed=2), DRAWN_TRAIN),
    }
    for name, (images, labels, train) in tasks.items():
        write(options.out / name, images, labels, train)
        if options.samples is not None:
            copy_samples(options.out / name / "test", options.samples / name)


def digits() -> tuple[list[Image.Image], list[str]]:
    """Return all 1,797 digits and labels in a seeded order, enlarged from 8 x 8 to 32 x 32 pixels."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    images = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)) for image in data.images[order]]
    side = (draw.SIDE_PX, draw.SIDE_PX)
    return [image.resize(side, Image.Resampling.BICUBIC) for image in images], [str(t) for t in data.target[order]]


def drawn(
    labels: Sequence[str], image: Callable[[np.random.Generator, str], Image.Image], seed: int
) -> tuple[list[Image.Image], list[str]]:
    """Return seeded drawings and their labels. All labels are equally frequent."""
    rng = np.random.default_rng(seed)
    order = [labels[i % len(labels)] for i in range(DRAWN_TRAIN + DRAWN_TEST)]
    return [image(rng, label) for label in order], order


def write(folder: Path, images: Sequence[Image.Image], labels: Sequence[str], train: int) -> None:
    """Write the first `train` images to folder/train, the rest to folder/test."""
    numbers: Counter[tuple[str, str]] = Counter()
    for i, (image, label) in enumerate(track(list(zip(images, labels, strict=True)), description=folder.name)):
        split = "train" if i < train else "test"
        path = folder / split / label / f"{numbers[split, label]:04d}.png"
        numbers[split, label] += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def copy_samples(test: Path, folder: Path) -> None:
    """Copy the first image of each class to `<folder>/<label>-0.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    for label in test.iterdir():
        shutil.copyfile(label / "0000.png", folder / f"{label.name}-0.png")


if __name__ == "__main__":
    main()
