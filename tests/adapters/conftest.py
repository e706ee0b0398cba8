"""A small frozen backbone for every test of the library."""

import pytest
import torch

from adapters import Backbone, load_backbone


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """The demo architecture (ViT, width 128, depth 6) at seeded random weights."""
    torch.manual_seed(0)
    return load_backbone("demo", pretrained=False)
