"""Tasks of the accuracy benchmark: each has a fixed pool of 1,000 labelled images and at most 500 fixed test images.

Two are sets of photographs (`fashion`, `elpv`). One is scanned handwriting (`digits`). This module draws the other
four from a seed. A seed of the benchmark splits the pool into 800 training and 200 validation images. The test images
are the same for every seed. The module writes no file: all images stay in memory. It is not part of the library.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from adapters.demo import draw
from adapters.demo.pretrain import FASHION_DIR, read_fashion
from adapters.demo.tasks import digits as digit_images

SIDE_PX = draw.SIDE_PX
IMAGE_SIZE = (3, SIDE_PX, SIDE_PX)
TRAIN, VALIDATION, TEST = 800, 200, 500
POOL = TRAIN + VALIDATION
BINS = 8
SPRITES = ("heart", "ellipse", "bar")
_OVERSAMPLE = 4


@dataclass(frozen=True)
class Labelled:
    """Images (n, 3, 32, 32) uint8 and their class numbers (n,) int64."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Tensor | slice) -> "Labelled":
        return Labelled(self.images[index], self.targets[index])


@dataclass(frozen=True)
class Task:
    """One classification task: 1,000 images to train and validate on, and the test images."""

    name: str
    classes: int
    pool: Labelled
    test: Labelled

    def split(self, seed: int) -> tuple[Labelled, Labelled]:
        """Split the pool into 800 training and 200 validation images. A seed gives every method the same split."""
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))
        return self.pool[order[:TRAIN]], self.pool[order[TRAIN:]]

    def largest_class(self) -> float:
        """Return the share of the test images in their largest class: the accuracy of the best constant prediction."""
        return float(self.test.targets.bincount().max() / len(self.test))


class TaskError(ValueError):
    """Missing images of a task (the message says what to install), or images that do not fit the backbone."""


@cache
def load_task(name: str, side_px: int = SIDE_PX) -> Task:
    """Return one of `TASKS` with images of this side, enlarged (bicubic) if the originals are smaller.

    Each process makes a task once.

    Raises:
        TaskError: `TASKS` has no such task, or its data set is not installed.
    """
    if name not in TASKS:
        raise TaskError(f"no task {name!r}; the tasks are {', '.join(TASKS)}")
    images, targets = TASKS[name](side_px) if name in NATIVE else TASKS[name]()
    everything = Labelled(_to_rgb(_resized(images, side_px)), torch.as_tensor(targets))
    pool, test = everything[:POOL], everything[POOL : POOL + TEST]
    return Task(name, int(everything.targets.max()) + 1, pool, test)


def digits() -> tuple[np.ndarray, list[int]]:
    """Return scikit-learn's digits, 10 classes, enlarged from 8 x 8 pixels."""
    images, labels = digit_images()
    return np.stack([np.asarray(image) for image in images]), [int(label) for label in labels]


def fashion() -> tuple[np.ndarray, np.ndarray]:
    """Return Fashion-MNIST, 10 classes: 1,000 of its training images as the pool, 500 of its test images.

    Raises:
        TaskError: the files are missing.
    """
    parts = []
    for split, count in (("train", POOL), ("t10k", TEST)):
        try:
            images, targets = read_fashion(FASHION_DIR, split)
        except FileNotFoundError as error:
            raise TaskError(f"{error.filename} is missing; `apt-get install dataset-fashion-mnist` has it") from error
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
        parts.append((images[chosen].numpy(), targets[chosen].numpy()))
    (pool, pool_targets), (test, test_targets) = parts
    return np.concatenate([pool, test]), np.concatenate([pool_targets, test_targets])


def elpv(side_px: int = SIDE_PX) -> tuple[np.ndarray, np.ndarray]:
    """Return electroluminescence images of solar cells with the four grades of defect probability: 0, 1/3, 2/3, 1.

    Source: Deitsch et al., "Segmentation of photovoltaic module cells in uncalibrated electroluminescence images",
    2021; PyPI's `elpv-dataset`. The data set does not name the module of a cell, so a module may have cells on both
    sides of the split.

    Raises:
        TaskError: the package is not installed.
    """
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError as error:
        raise TaskError("task elpv needs the package elpv-dataset: pip install elpv-dataset") from error
    images, probability, _ = load_dataset()
    order = np.random.default_rng(0).permutation(len(images))[: POOL + TEST]
    side = (side_px, side_px)
    small = [np.asarray(Image.fromarray(images[i]).resize(side, Image.Resampling.BICUBIC)) for i in order]
    return np.stack(small), np.rint(3 * probability[order]).astype(np.int64)


def shapes() -> tuple[np.ndarray, list[int]]:
    """Draw six geometric shapes (`adapters.demo.draw`)."""
    return _drawn(len(draw.SHAPES), 11, lambda rng, k: draw.shape_image(rng, draw.SHAPES[k]))


def count() -> tuple[np.ndarray, list[int]]:
    """Draw one to eight dots (`adapters.demo.draw`)."""
    return _drawn(len(draw.COUNTS), 12, lambda rng, k: draw.count_image(rng, k + 1))


def orientation() -> tuple[np.ndarray, list[int]]:
    """Draw a sprite at one of eight angles within half a turn, 22.5 degrees apart, with jitter of at most 6 degrees."""

    def image(rng: np.random.Generator, k: int) -> Image.Image:
        angle = math.radians(180 / BINS * k + rng.uniform(-6, 6))
        return sprite_image(rng, rng.uniform(0.35, 0.65), angle)

    return _drawn(BINS, 13, image)


def location() -> tuple[np.ndarray, list[int]]:
    """Draw a sprite; the class is its horizontal position in eight bins of 2.4 pixels."""

    def image(rng: np.random.Generator, k: int) -> Image.Image:
        return sprite_image(rng, 0.2 + 0.6 * (k + rng.random()) / BINS, rng.uniform(0, 2 * math.pi))

    return _drawn(BINS, 14, image)


NATIVE = ("elpv",)  # tasks whose originals are larger than any side here
TASKS: dict[str, Callable[..., tuple[np.ndarray, object]]] = {
    "digits": digits,
    "fashion": fashion,
    "elpv": elpv,
    "count": count,
    "orientation": orientation,
    "location": location,
    "shapes": shapes,
}


def sprite_image(rng: np.random.Generator, x: float, angle: float) -> Image.Image:
    """Draw a white sprite on black as in dSprites, of a random kind, size and height; `x` in [0, 1] is its centre.

    A bar replaces dSprites' square, because a square looks the same after a quarter turn.
    """
    t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    outline = {
        "heart": np.stack(
            [16 * np.sin(t) ** 3, -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)], 1
        )
        / 17,
        "ellipse": np.stack([np.cos(t), 0.5 * np.sin(t)], 1),
        "bar": np.array([(-0.9, -0.4), (0.9, -0.4), (0.9, 0.4), (-0.9, 0.4)]),
    }[str(rng.choice(SPRITES))]
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    centre = np.array([x, rng.uniform(0.25, 0.75)])
    side = SIDE_PX * _OVERSAMPLE
    points = side * (centre + rng.uniform(0.12, 0.2) * outline @ turn)
    image = Image.new("L", (side, side), 0)
    ImageDraw.Draw(image).polygon([(float(u), float(v)) for u, v in points], fill=255)
    return image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)


def _drawn(
    classes: int, seed: int, image: Callable[[np.random.Generator, int], Image.Image]
) -> tuple[np.ndarray, list[int]]:
    """Return the pool and the test images, with equally many images per class."""
    rng = np.random.default_rng(seed)
    targets = [i % classes for i in range(POOL + TEST)]
    return np.stack([np.asarray(image(rng, k)) for k in targets]), targets


def _resized(images: np.ndarray, side_px: int) -> np.ndarray:
    """Return images (n, H, W) or (n, H, W, 3) with this side."""
    if images.shape[1] == side_px:
        return images
    size = (side_px, side_px)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images])


def _to_rgb(images: np.ndarray) -> Tensor:
    """Convert (n, 32, 32) or (n, 32, 32, 3) uint8 to (n, 3, 32, 32)."""
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    if pixels.ndim == 3:
        return pixels[:, None].repeat(1, 3, 1, 1)
    return pixels.permute(0, 3, 1, 2).contiguous()
