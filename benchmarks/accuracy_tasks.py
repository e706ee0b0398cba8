"""Tasks of the accuracy benchmark: labelled images, a fixed test part, and seeded training sets of n images a class.

Two are sets of photographs (`fashion`, `elpv`). One is scanned handwriting (`digits`). This module draws the other
three from a seed. The test part is the same for every seed: up to 500 images, equally many of each class where the
class has them, and never more than a third of a class. The module writes no file: all images stay in memory.
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

SIDE_PX = draw.SIDE_PX  # of the drawings
TEST = 500
TEST_SHARE = 1 / 3  # of a class, at most
VALIDATION = 25  # images a class, at most
FASHION_IMAGES = 3000
DRAWN_IMAGES = 1600
ELPV_IMAGES = 400  # of a grade, at most
FURTHER_IMAGES = 4000  # of Fashion-MNIST's test part, and of each drawn task
BINS = 8
SPRITES = ("heart", "ellipse", "bar")
_OVERSAMPLE = 4


@dataclass(frozen=True)
class Draw:
    """Image numbers of one training set and its validation set, int64 each."""

    train: Tensor
    validation: Tensor


@dataclass(frozen=True)
class Task:
    """One classification task.

    Attributes:
        images: uint8 (n, 1, H, W) if grey, else (n, 3, H, W).
        targets: int64 (n,).
        test: int64 (m,), numbers of the test images.
    """

    name: str
    images: Tensor
    targets: Tensor
    test: Tensor

    @property
    def classes(self) -> int:
        """K."""
        return int(self.targets.max()) + 1

    def pixels(self, index: Tensor) -> Tensor:
        """Return these images as uint8 (b, 3, H, W)."""
        return self.images[index].expand(-1, 3, -1, -1)

    def draw(self, per_class: int, seed: int) -> Draw:
        """Return a training set of `per_class` images of each class, or all of a smaller class, without test images.

        A seed's training sets are nested: the set of ten images a class is part of the set of twenty. Validation
        images are neither in the training set nor in the test part.
        """
        free = torch.ones(len(self.targets), dtype=torch.bool)
        free[self.test] = False
        order = torch.randperm(len(self.targets), generator=torch.Generator().manual_seed(seed))
        train, validation = [], []
        for k in range(self.classes):
            members = order[free[order] & (self.targets[order] == k)]
            train.append(members[:per_class])
            validation.append(members[per_class:].flip(0)[:VALIDATION])
        return Draw(torch.cat(train), torch.cat(validation))


class TaskError(ValueError):
    """Missing images of a task; the message says what to install."""


@cache
def load_task(name: str, side_px: int = SIDE_PX) -> Task:
    """Return one of `TASKS` with images of this side, enlarged (bicubic) if the originals are smaller.

    Each process makes a task once.

    Raises:
        TaskError: `TASKS` has no such task, or its data set is not installed.
    """
    if name not in TASKS:
        raise TaskError(f"no task {name!r}; the tasks are {', '.join(TASKS)}")
    images, labels = TASKS[name](side_px) if name in NATIVE else TASKS[name]()
    targets = torch.as_tensor(np.asarray(labels)).long()
    return Task(name, _resized(images, side_px), targets, chosen_for_test(targets))


@cache
def further_images(name: str, side_px: int = SIDE_PX) -> Task | None:
    """Return images of a task that `load_task` leaves out, as one held-out part; None where it has all of them.

    Raises:
        TaskError: as in `load_task`.
    """
    if name not in FURTHER:
        return None
    images, labels = FURTHER[name](side_px)
    targets = torch.as_tensor(np.asarray(labels)).long()
    return Task(name, _resized(images, side_px), targets, torch.arange(len(targets)))


def chosen_for_test(targets: Tensor) -> Tensor:
    """Return the numbers of the test images: the first ones of each class."""
    classes = int(targets.max()) + 1
    members = [(targets == k).nonzero()[:, 0] for k in range(classes)]
    return torch.cat([own[: min(TEST // classes, int(len(own) * TEST_SHARE))] for own in members])


def balanced_accuracy(right: Tensor, targets: Tensor) -> float:
    """Return the mean over classes of the share of images that are recognised, from bool (n,) and int64 (n,).

    Training sets have equally many images of each class, so this is the accuracy at the training set's class shares.
    """
    counts = targets.bincount().double()
    hits = targets[right].bincount(minlength=len(counts)).double()
    return float((hits / counts)[counts > 0].mean())


def digits() -> tuple[np.ndarray, list[int]]:
    """Return scikit-learn's digits, 10 classes, enlarged from 8 x 8 pixels."""
    images, labels = digit_images()
    return np.stack([np.asarray(image) for image in images]), [int(label) for label in labels]


def fashion() -> tuple[np.ndarray, np.ndarray]:
    """Return Fashion-MNIST, 10 classes: 3,000 images of its training part.

    Raises:
        TaskError: the files are missing.
    """
    return _fashion("train", FASHION_IMAGES)


def _fashion(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        images, targets = read_fashion(FASHION_DIR, split)
    except FileNotFoundError as error:
        raise TaskError(f"{error.filename} is missing; `apt-get install dataset-fashion-mnist` has it") from error
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return images[chosen].numpy(), targets[chosen].numpy()


def elpv(side_px: int = SIDE_PX, further: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return electroluminescence images of solar cells with the four grades of defect probability: 0, 1/3, 2/3, 1.

    Source: Deitsch et al., "Segmentation of photovoltaic module cells in uncalibrated electroluminescence images",
    2021; PyPI's `elpv-dataset`. The data set does not name the module of a cell, so training and test images may show
    cells of one module. The two middle grades have 295 and 106 images; of the others 400 each are taken.

    Args:
        further: return all other images instead, which are of the first and the last grade.

    Raises:
        TaskError: the package is not installed.
    """
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError as error:
        raise TaskError("task elpv needs the package elpv-dataset: pip install elpv-dataset") from error
    images, probability, _ = load_dataset()
    grades = np.rint(3 * probability).astype(np.int64)
    order = np.random.default_rng(0).permutation(len(images))
    part = slice(ELPV_IMAGES, None) if further else slice(ELPV_IMAGES)
    order = np.concatenate([order[grades[order] == grade][part] for grade in range(4)])
    side = (side_px, side_px)
    small = [np.asarray(Image.fromarray(images[i]).resize(side, Image.Resampling.BICUBIC)) for i in order]
    return np.stack(small), grades[order]


def count(seed: int = 12, images: int = DRAWN_IMAGES) -> tuple[np.ndarray, list[int]]:
    """Draw one to eight dots (`adapters.demo.draw`)."""
    return _drawn(len(draw.COUNTS), seed, images, lambda rng, k: draw.count_image(rng, k + 1))


def orientation(seed: int = 13, images: int = DRAWN_IMAGES) -> tuple[np.ndarray, list[int]]:
    """Draw a sprite at one of eight angles within half a turn, 22.5 degrees apart, with jitter of at most 6 degrees."""

    def image(rng: np.random.Generator, k: int) -> Image.Image:
        angle = math.radians(180 / BINS * k + rng.uniform(-6, 6))
        return sprite_image(rng, rng.uniform(0.35, 0.65), angle)

    return _drawn(BINS, seed, images, image)


def location(seed: int = 14, images: int = DRAWN_IMAGES) -> tuple[np.ndarray, list[int]]:
    """Draw a sprite; the class is its horizontal position in eight bins of 2.4 pixels."""

    def image(rng: np.random.Generator, k: int) -> Image.Image:
        return sprite_image(rng, 0.2 + 0.6 * (k + rng.random()) / BINS, rng.uniform(0, 2 * math.pi))

    return _drawn(BINS, seed, images, image)


NATIVE = ("elpv",)  # tasks whose originals are larger than any side here
TASKS: dict[str, Callable[..., tuple[np.ndarray, object]]] = {
    "digits": digits,
    "fashion": fashion,
    "elpv": elpv,
    "count": count,
    "orientation": orientation,
    "location": location,
}
# By task, from the side in pixels; other seeds draw other images. `digits` has no images beyond those of the task.
FURTHER: dict[str, Callable[[int], tuple[np.ndarray, object]]] = {
    "fashion": lambda side_px: _fashion("t10k", FURTHER_IMAGES),
    "elpv": lambda side_px: elpv(side_px, further=True),
    "count": lambda side_px: count(112, FURTHER_IMAGES),
    "orientation": lambda side_px: orientation(113, FURTHER_IMAGES),
    "location": lambda side_px: location(114, FURTHER_IMAGES),
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
    classes: int, seed: int, images: int, image: Callable[[np.random.Generator, int], Image.Image]
) -> tuple[np.ndarray, list[int]]:
    """Return drawings with equally many images per class."""
    rng = np.random.default_rng(seed)
    targets = [i % classes for i in range(images)]
    return np.stack([np.asarray(image(rng, k)) for k in targets]), targets


def _resized(images: np.ndarray, side_px: int) -> Tensor:
    """Return images (n, H, W) or (n, H, W, 3) with this side, as a tensor (n, 1 or 3, H, W)."""
    if images.shape[1] != side_px:
        size = (side_px, side_px)
        images = np.stack(
            [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
