"""Cached outputs of the frozen blocks before the first adapted block."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapters import Backbone, KarstConfig, attach, load_backbone
from adapters.data.image_set import ImageTensors
from adapters.method.frozen_prefix import find_prefix
from adapters.paper.recipe import Recipe
from adapters.paper.train import train_model
from tests.support.models import local_backbone, random_pixels

LAST_BLOCKS = KarstConfig(kernels=1, rank=4, sites=("blocks.[45].*",))
BLOCKS, ADAPTED = 6, 2  # of the demo ViT


def test_training_runs_frozen_blocks_once_when_they_precede_the_adapted_ones(
    backbone: Backbone, few: ImageTensors
) -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    recipe = Recipe(epochs=2, warmup_epochs=1, batch_size=4, lr=5e-3)
    steps = 2 * 3  # two epochs of 12 images in batches of 4
    trial = BLOCKS + ADAPTED + BLOCKS + BLOCKS  # one image, with and without the prefix, and once for its size
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *args: count() if type(module) is type(backbone.model.blocks[0]) else None
    )
    try:
        cached = train_model(backbone, few, LAST_BLOCKS, recipe)
        assert calls == ADAPTED * steps + trial + BLOCKS  # all 12 images fit in one batch
        calls = 0
        plain = train_model(backbone, few, LAST_BLOCKS, recipe, max_prefix_bytes=0)
        assert calls == BLOCKS * steps + trial
    finally:
        handle.remove()
    for one, other in zip(cached.history, plain.history, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-4)  # the two differ by rounding only


@pytest.mark.parametrize(
    ("sites", "count"),
    [(("blocks.2.*", "blocks.4.mlp.fc1"), 2), (("blocks.0.*", "blocks.3.*"), None), (("*.attn.proj",), None)],
)
def test_find_prefix_counts_blocks_when_the_first_is_not_adapted(
    backbone: Backbone, sites: tuple[str, ...], count: int | None
) -> None:
    prefix = find_prefix(attach(backbone, KarstConfig(sites=sites), 3), random_pixels(backbone, 1))
    assert (prefix.count if prefix else None) == count


def test_drop_path_applies_to_adapted_blocks_only_when_sites_exclude_blocks(backbone: Backbone) -> None:
    model = attach(backbone, LAST_BLOCKS, 3, drop_path=0.5).train()
    training = [
        block.drop_path1.training for block in model.frozen.blocks if not isinstance(block.drop_path1, nn.Identity)
    ]
    assert training == [False] * 3 + [True] * 2  # the first block has rate zero, an identity


def test_attach_refuses_sites_when_they_match_no_layer(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=r"sites is blocks.9.*, which matches no layer"):
        attach(backbone, KarstConfig(sites=("blocks.9.*",)), 3)


def test_find_prefix_keeps_block_indices_when_blocks_have_own_position_embeddings(tmp_path: Path) -> None:
    """In this ViT each block has its own rotary embeddings: block 3 must not get those of block 0."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
    backbone = local_backbone(tmp_path, "vit_small_patch16_rope_mixed_224", **sizes)
    prefix = find_prefix(attach(backbone, KarstConfig(sites=("blocks.3.*",)), 3), random_pixels(backbone, 1))
    assert prefix is not None
    assert prefix.count == 3


def test_find_prefix_returns_none_when_blocks_take_pairs() -> None:
    """TNT's blocks take and return pairs of tensors."""
    backbone = load_backbone("tnt_s_legacy_patch16_224", pretrained=False)
    assert find_prefix(attach(backbone, KarstConfig(sites=("blocks.11.*",)), 3), random_pixels(backbone, 1)) is None


def test_model_without_prefix_equals_the_whole_model_when_it_starts_from_cached_tokens(backbone: Backbone) -> None:
    model = attach(backbone, LAST_BLOCKS, 3).eval()
    pixels = random_pixels(backbone, 2)
    prefix = find_prefix(model, pixels[:1])
    assert prefix is not None
    tokens = prefix.run(pixels)
    with torch.inference_mode(), prefix.skipped():
        short = model(prefix.placeholder_pixels(tokens))
    with torch.inference_mode():
        torch.testing.assert_close(short, model(pixels))
