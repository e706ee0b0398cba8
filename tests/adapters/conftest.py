"""Fixture: a small frozen backbone for the tests of the library."""

import pytest
import torch

from adapters import Backbone, load_backbone


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """Return the demo architecture (ViT, width 128, depth 6) with seeded random weights."""
    torch.manual_seed(0)
    return load_backbone("demo", pretrained=False)
