"""Images through a frozen prefix: its blocks run once per image and variant, and the results stay the same."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from adapters import Backbone, KarstConfig, attach
from adapters.backbone import features
from adapters.data.image_set import ImageTensors
from adapters.training import batches
from adapters.training.batches import VARIANTS, ModelRunner, TokenCache
from adapters.training.inference import pooled_features
from adapters.training.refine import refine
from adapters.training.steps import KarstRecipe

LAST_BLOCKS = KarstConfig(kernels=1, rank=4, sites=("blocks.[45].*",))
INDEX = torch.tensor([3, 0, 7, 3])
BLOCKS = 6  # of the demo ViT


class BlockCalls:
    """Count of the calls of the backbone's blocks, in images."""

    def __init__(self, backbone: Backbone) -> None:
        self.images = 0
        kind = type(backbone.model.blocks[0])

        def count(module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            self.images += len(output) if type(module) is kind else 0

        self.handle = nn.modules.module.register_module_forward_hook(count)


def test_features_through_the_prefix_equal_the_whole_model_s(backbone: Backbone, train: ImageTensors) -> None:
    model = attach(backbone, LAST_BLOCKS, 3).eval()
    cache = TokenCache(backbone, train, 0)
    runner, whole = ModelRunner(model, cache), ModelRunner(attach(backbone, KarstConfig(kernels=1), 3), cache)
    assert runner.prefix is not None
    assert whole.prefix is None
    with torch.no_grad():
        found = [each.call(partial(features, each.model.frozen), INDEX) for each in (runner, whole)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)  # untrained: both are the backbone's features


def test_prefix_runs_once_per_image_over_several_models(backbone: Backbone, train: ImageTensors) -> None:
    cache = TokenCache(backbone, train, 0)
    runners = [ModelRunner(attach(backbone, LAST_BLOCKS, 3), cache) for _ in range(2)]
    calls = BlockCalls(backbone)
    try:
        for runner in runners:
            runner.call(runner.model, INDEX)
    finally:
        calls.handle.remove()
    assert calls.images == 3 * BLOCKS + 2 * 4 * 2  # three images once; two calls of four images through two blocks


def test_augmented_images_have_a_fixed_number_of_variants(backbone: Backbone, train: ImageTensors) -> None:
    runner = ModelRunner(attach(backbone, LAST_BLOCKS, 3).eval(), TokenCache(backbone, train, 0))
    generator = torch.Generator().manual_seed(0)
    same = torch.zeros(64, dtype=torch.int64)
    with torch.no_grad():
        rows = runner.call(partial(features, runner.model.frozen), same, ("shift",), generator)
    assert len(torch.unique(rows.round(decimals=3), dim=0)) == VARIANTS


def test_results_stay_the_same_when_the_cache_is_full(
    backbone: Backbone, train: ImageTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_PREFIX_BYTES", 0)
    model = attach(backbone, LAST_BLOCKS, 3).eval()
    full = ModelRunner(model, TokenCache(backbone, train, 0))
    monkeypatch.undo()
    free = ModelRunner(model, TokenCache(backbone, train, 0))
    with torch.no_grad():
        torch.testing.assert_close(*(runner.call(model, INDEX) for runner in (full, free)))


def test_call_keeps_the_mode_of_the_model(backbone: Backbone, train: ImageTensors) -> None:
    runner = ModelRunner(attach(backbone, LAST_BLOCKS, 3), TokenCache(backbone, train, 0))
    runner.model.train()
    runner.call(runner.model, INDEX)
    assert runner.model.training


def test_bfloat16_and_float32_reach_the_same_accuracy(
    backbone: Backbone, train: ImageTensors, held_out: ImageTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = KarstRecipe(min_steps=8, passes=1, learning_rates=(3e-3,))
    found = {}
    for name in ("amx_bf16", "avx2"):
        monkeypatch.setattr("adapters.training.steps.cpu_capabilities", lambda name=name: {name: True})
        found[name] = refine(
            backbone,
            train,
            pooled_features(backbone, train)[0],
            LAST_BLOCKS,
            recipe,
            budget_s=3600,
            validation=held_out,
            frozen_validation=pooled_features(backbone, held_out)[0],
        )
    half, single = found["amx_bf16"], found["avx2"]
    assert (half.dtype, single.dtype) == (torch.bfloat16, torch.float32)
    assert half.karst is not None
    assert single.karst is not None
    assert half.karst.logits.dtype == torch.float32
    assert abs(half.karst.accuracy - single.karst.accuracy) <= 1 / len(held_out)
    assert not torch.equal(half.karst.logits, single.karst.logits)
    torch.testing.assert_close(half.karst.logits, single.karst.logits, rtol=0.3, atol=0.3)
