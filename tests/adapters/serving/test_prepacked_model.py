"""A prepacked model has the features of the original, and its bank holds the weights once."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from adapters import Backbone, Bank, load_backbone
from adapters.backbone import features
from adapters.serving.frozen_forms import prepack_layers, unmeasured_forms
from tests.support.models import random_pixels, small_swin


@pytest.fixture
def prepacked(backbone: Backbone) -> nn.Module:
    model: nn.Module = backbone.clone()
    prepack_layers(model, backbone, unmeasured_forms(backbone))
    return model


@torch.inference_mode()
def test_features_equal_the_original_s(backbone: Backbone, prepacked: nn.Module) -> None:
    pixels = random_pixels(backbone, 5)
    right = features(backbone.model, pixels)
    torch.testing.assert_close(features(prepacked, pixels), right, atol=1e-5, rtol=0)
    torch.testing.assert_close(features(prepacked, pixels[2:3]), right[2:3], atol=1e-5, rtol=0)  # one image alone


@torch.inference_mode()
def test_the_original_model_is_not_changed(backbone: Backbone) -> None:
    pixels = random_pixels(backbone, 2)
    before = features(backbone.model, pixels)
    model = backbone.clone()
    prepack_layers(model, backbone, unmeasured_forms(backbone))
    features(model, pixels)
    assert torch.equal(features(backbone.model, pixels), before)
    assert {type(backbone.model.get_submodule(site.name)) for site in backbone.sites} == {nn.Linear}


def test_every_site_and_activation_is_replaced(backbone: Backbone, prepacked: nn.Module) -> None:
    """torch may rename the oneDNN operator, and the layers would then silently stay slow."""
    assert not any(isinstance(prepacked.get_submodule(site.name), nn.Linear) for site in backbone.sites)
    assert not any(type(module) is nn.GELU for module in prepacked.modules())


@torch.inference_mode()
def test_a_prepacked_layer_accepts_any_leading_axes_and_strides(backbone: Backbone, prepacked: nn.Module) -> None:
    site = backbone.sites[0]
    linear, packed = backbone.model.get_submodule(site.name), prepacked.get_submodule(site.name)
    rows = torch.randn(site.d_in, 3, 4, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)
    torch.testing.assert_close(packed(rows), linear(rows), atol=1e-5, rtol=0)
    torch.testing.assert_close(packed(rows[0, 0]), linear(rows[0, 0]), atol=1e-5, rtol=0)
    assert packed(rows[:0]).shape == (0, 3, site.d_out)


@pytest.mark.parametrize("make", [lambda _: load_backbone("demo"), small_swin], ids=["demo", "swin"])
def test_a_bank_holds_the_weights_once_when_the_backbone_is_dropped(
    tmp_path: Path, make: Callable[[Path], Backbone]
) -> None:
    backbone = make(tmp_path)
    weights = [weakref.ref(backbone.model.get_submodule(site.name).weight) for site in backbone.sites]
    bank = Bank(backbone, slots=1)
    del backbone
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    assert bank.free == 1
