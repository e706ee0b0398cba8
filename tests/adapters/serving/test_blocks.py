"""The last block of a bank's model computes only the tokens that the pooled features read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adapters import Backbone, Bank, ImageTasks
from adapters.backbone import features
from adapters.serving.blocks import class_token_layers
from adapters.serving.frozen_forms import FrozenForms, kind_of
from tests.support.models import local_backbone, random_adapter, random_pixels

BLOCKS = 3


def small(folder: Path, architecture: str, **model_args: Any) -> Backbone:
    patch = 14 if "14" in architecture else 16
    return local_backbone(folder, architecture, depth=BLOCKS, img_size=4 * patch, **model_args)


def flops(run: Any, pixels: torch.Tensor) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        run(pixels)
    return int(counter.get_total_flops())


def share_of_work(backbone: Backbone) -> float:
    """Return a bank's operations for the frozen features, as a share of timm's."""
    linear = FrozenForms({kind_of(site): "linear" for site in backbone.sites}, {})  # the others' are not counted
    pixels = random_pixels(backbone, 2)
    bank = Bank(backbone, slots=1, forms=linear)
    return flops(bank.frozen_features, pixels) / flops(lambda x: features(backbone.model, x), pixels)


@pytest.mark.parametrize(
    "architecture",
    [
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "deit3_small_patch16_224",
        "vit_tiny_patch16_224",
        "eva02_base_patch16_clip_224",
    ],
)
def test_a_class_token_s_bank_leaves_out_the_last_block_s_other_tokens(tmp_path: Path, architecture: str) -> None:
    backbone = small(tmp_path, architecture)
    saved = 9 / 12 * 16 / 17 / BLOCKS  # `proj` and the MLP have 9 of the 12 d x d products of a block
    assert share_of_work(backbone) == pytest.approx(1 - saved, abs=0.03)


@pytest.mark.parametrize(
    ("architecture", "pooling"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"global_pool": "map"}),
        ("deit_tiny_distilled_patch16_224", {}),  # pools by two tokens
        ("eva02_tiny_patch14_224", {}),  # by the mean
    ],
)
def test_a_model_that_pools_other_tokens_computes_them_all(
    tmp_path: Path, architecture: str, pooling: dict[str, str]
) -> None:
    assert share_of_work(small(tmp_path, architecture, **pooling)) == 1


def test_a_last_block_that_needs_all_tokens_gets_them(tmp_path: Path) -> None:
    model = small(tmp_path, "vit_tiny_patch16_224").model
    pixels = torch.randn(1, 3, 64, 64)
    tokens = 1 + 4 * 4
    model.blocks[-1].mlp = nn.Sequential(nn.Unflatten(1, (tokens, 1)), nn.Flatten(1, 2))
    assert class_token_layers(model, pixels, torch.equal) == []


def test_every_adapted_layer_of_the_last_block_counts_for_the_class_token(tmp_path: Path) -> None:
    backbone = small(tmp_path, "vit_tiny_patch16_224")
    last = f"blocks.{BLOCKS - 1}"
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    made = [random_adapter(backbone, seed=0, kernels=2, rank=4, sites=(f"{last}.{layer}",)) for layer in layers]
    made += [
        random_adapter(backbone, seed=1, kernels=1, rank=2, sites=(f"{last}.norm2", "norm"), norms=True),
        random_adapter(backbone, seed=2, kernels=2, rank=4, norms=True),
    ]
    head = random_adapter(backbone, seed=3, kernels=0, rescale="none")
    bank = Bank(backbone, slots=len(made), max_rank=4, max_kernels=2)
    slots, heads = [bank.put(adapter) for adapter in made], bank.heads([bank.pack(head)])
    pixels = random_pixels(backbone, 2)
    found = bank.score_images(pixels, [ImageTasks(slots, heads), ImageTasks(slots[::-1])])
    for image, scores, adapters in zip(pixels, found, (made, made[::-1]), strict=True):
        with torch.inference_mode():
            frozen = features(backbone.model, image[None])
            for adapter, score in zip(adapters, scores.scores, strict=True):
                merged = adapter.merge(backbone)
                torch.testing.assert_close(score.logits, merged(image[None])[0], atol=1e-4, rtol=0)
                assert not torch.allclose(features(merged, image[None]), frozen, atol=1e-3)
    assert found[0].heads is not None
    with torch.inference_mode():
        torch.testing.assert_close(found[0].heads.logits, head.merge(backbone)(pixels[:1])[0], atol=1e-4, rtol=0)
