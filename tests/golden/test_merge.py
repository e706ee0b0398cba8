"""`Adapter.merge` against the formulas of docs/method.md, written out with numpy in float64."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adapters import Backbone, extract, load_backbone
from tests.support.models import random_adapter, random_model, random_pixels, small_swin
from tests.support.reference import written_out


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("demo", pretrained=False, dtype=torch.float64)


@pytest.mark.parametrize("rescale", ["none", "scalar", "channel"])
@pytest.mark.parametrize("layer", ["blocks.1.attn.qkv", "blocks.2.attn.proj", "blocks.0.mlp.fc1", "blocks.5.mlp.fc2"])
def test_a_merged_layer_equals_the_formula(backbone: Backbone, layer: str, rescale: str) -> None:
    adapter = random_adapter(backbone, rescale=rescale, kernels=3, rank=4, gain=0.5)
    parts = {name: t.double().numpy() for name, t in adapter.layers[layer].items()}
    frozen = backbone.model.get_submodule(layer)
    assert isinstance(frozen, nn.Linear)
    w0, b0 = frozen.weight.double().numpy(), frozen.bias.double().numpy()
    merged = adapter.merge(backbone).get_submodule(layer)
    assert isinstance(merged, nn.Linear)

    x = np.random.default_rng(1).normal(size=(6, w0.shape[1]))
    adapted = x
    if "in_scale" in parts:
        adapted = parts["in_scale"] * x + parts["in_shift"]
    dw = written_out(parts["karst_c"], parts["karst_a"], parts["karst_b"], gain=0.5)
    y = adapted @ (w0 + dw).T + b0
    if "scale" in parts:
        y = parts["scale"] * y + parts["shift"]
    rescaled_out = layer.endswith(("attn.proj", "mlp.fc2")) and rescale != "none"
    assert ("scale" in parts) == rescaled_out
    assert ("in_scale" in parts) == (rescaled_out and layer.endswith("attn.proj"))

    result = x @ merged.weight.double().numpy().T + merged.bias.double().numpy()
    np.testing.assert_allclose(result, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [{}, {"rescale": "scalar", "norms": True}, {"stage_ranks": (1, 2, 3, 8)}])
def test_the_training_model_equals_the_merged_model(tmp_path: Path, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    backbone = small_swin(tmp_path) if "stage_ranks" in config else load_backbone("demo", pretrained=False)
    model = random_model(backbone, kernels=2, **config)
    merged = extract(model, ["a", "b", "c", "d", "e"]).merge(backbone)
    pixels = random_pixels(backbone, 3)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), merged(pixels), atol=1e-4, rtol=0)


def test_a_deep_copy_of_the_training_model_shares_no_numbers() -> None:
    """A training loop that averages weights or keeps the best epoch needs such a copy."""
    torch.manual_seed(0)
    backbone = load_backbone("demo", pretrained=False)
    model = random_model(backbone, kernels=2)
    pixels = random_pixels(backbone, 2)
    with torch.no_grad():
        before = model(pixels)
        kept = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.add_(0.1)
        assert torch.equal(kept(pixels), before)
        assert not torch.equal(model(pixels), before)
