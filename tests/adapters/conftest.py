"""Fixtures: a small frozen backbone, and an easy task of three classes of coloured noise."""

import pytest
import torch

from adapters import Backbone, load_backbone
from adapters.data.image_set import ImageSet, ImageTensors
from adapters.data.images import preprocess_of
from tests.support.image_sets import coloured_images


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """Return the demo architecture (ViT, width 128, depth 6) with seeded random weights."""
    torch.manual_seed(0)
    return load_backbone("demo", pretrained=False)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """36 training images: 4 batches of 8 and 4 left over."""
    return coloured_images(tmp_path_factory.mktemp("train"), count=12, seed=0)


@pytest.fixture(scope="session")
def train(backbone: Backbone, images: ImageSet) -> ImageTensors:
    return ImageTensors(images, preprocess_of(backbone))


@pytest.fixture(scope="session")
def few(train: ImageTensors) -> ImageTensors:
    """12 of the training images, four per class."""
    return train.subset([i for i in range(len(train)) if i % 12 < 4])


@pytest.fixture(scope="session")
def held_out(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> ImageTensors:
    return ImageTensors(coloured_images(tmp_path_factory.mktemp("test"), count=4, seed=1), preprocess_of(backbone))
