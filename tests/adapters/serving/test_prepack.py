"""A model that only serves computes what it computed before, faster, and holds its weights once."""

import gc
import weakref

import pytest
import torch
from torch import nn

from adapters import Bank, load_backbone
from adapters.backbone import features
from adapters.serving.prepack import quicken
from tests.support.models import random_pixels, small_swin


@pytest.fixture
def quick(backbone):
    model = backbone.clone()
    quicken(model, backbone.sites)
    return model


@torch.inference_mode()
def test_features_are_those_of_the_original(backbone, quick) -> None:
    pixels = random_pixels(backbone, 5)
    right = features(backbone.model, pixels)
    torch.testing.assert_close(features(quick, pixels), right, atol=1e-5, rtol=0)
    torch.testing.assert_close(features(quick, pixels[2:3]), right[2:3], atol=1e-5, rtol=0)  # alone as in company


@torch.inference_mode()
def test_the_original_stays_as_it_was(backbone) -> None:
    pixels = random_pixels(backbone, 2)
    before = features(backbone.model, pixels)
    model = backbone.clone()
    quicken(model, backbone.sites)
    features(model, pixels)
    assert torch.equal(features(backbone.model, pixels), before)
    assert {type(backbone.model.get_submodule(site.name)) for site in backbone.sites} == {nn.Linear}


def test_every_site_and_every_activation_is_exchanged(backbone, quick) -> None:
    """Not silently left as it was: torch's operator has a name that may go one day."""
    assert not any(isinstance(quick.get_submodule(site.name), nn.Linear) for site in backbone.sites)
    assert not any(type(module) is nn.GELU for module in quick.modules())


@torch.inference_mode()
def test_rows_may_have_any_axes_and_lie_anywhere(backbone, quick) -> None:
    site = backbone.sites[0]
    linear, packed = backbone.model.get_submodule(site.name), quick.get_submodule(site.name)
    rows = torch.randn(site.d_in, 3, 4, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)
    torch.testing.assert_close(packed(rows), linear(rows), atol=1e-5, rtol=0)
    torch.testing.assert_close(packed(rows[0, 0]), linear(rows[0, 0]), atol=1e-5, rtol=0)
    assert packed(rows[:0]).shape == (0, 3, site.d_out)


@torch.inference_mode()
def test_another_dtype_keeps_its_layers() -> None:
    backbone = load_backbone("demo", dtype=torch.bfloat16)
    model = backbone.clone()
    quicken(model, backbone.sites)
    assert {type(model.get_submodule(site.name)) for site in backbone.sites} == {nn.Linear}
    pixels = random_pixels(backbone, 2).bfloat16()
    assert torch.equal(features(model, pixels), features(backbone.model, pixels))


@pytest.mark.parametrize("make", [lambda _: load_backbone("demo"), small_swin], ids=["demo", "swin"])
def test_a_bank_whose_backbone_is_let_go_of_holds_the_weights_once(tmp_path, make) -> None:
    backbone = make(tmp_path)
    weights = [weakref.ref(backbone.model.get_submodule(site.name).weight) for site in backbone.sites]
    bank = Bank(backbone, slots=1)
    del backbone
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    assert bank.free == 1
