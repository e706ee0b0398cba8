"""A training that was interrupted ends in the same bits; frozen blocks are run once; memory may be traded for time."""

import pickle

import pytest
import torch
from torch import nn

from adapters import ConfigError, DataError, KarstConfig, attach, load_backbone
from adapters.data.images import Pixels, preprocess_of
from adapters.training.checkpoint import identity, load
from adapters.training.frozen_prefix import find_prefix
from adapters.training.train import Recipe, _recompute, train_model
from tests.adapters.training.test_train import make_task
from tests.support.models import local_backbone, random_pixels

CONFIG = KarstConfig(kernels=1, rank=4, norms=True)
LAST_BLOCKS = KarstConfig(kernels=1, rank=4, sites=("blocks.[45].*",))
RECIPE = Recipe(epochs=4, warmup_epochs=1, batch_size=8, lr=5e-3, drop_path=0.2)


@pytest.fixture(scope="module")
def train(backbone, tmp_path_factory) -> Pixels:
    return Pixels(make_task(tmp_path_factory.mktemp("train"), count=8, seed=0), preprocess_of(backbone))


@pytest.fixture(scope="module")
def held_out(backbone, tmp_path_factory) -> Pixels:
    return Pixels(make_task(tmp_path_factory.mktemp("test"), count=4, seed=1), preprocess_of(backbone))


class Interrupted(Exception):
    pass


def same(one, other) -> bool:
    theirs = other.model.tensors()
    return one.history == other.history and all(torch.equal(t, theirs[n]) for n, t in one.model.tensors().items())


@pytest.mark.parametrize("config", [CONFIG, LAST_BLOCKS], ids=["every block", "last blocks"])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_training_ends_in_the_same_bits(backbone, train, held_out, tmp_path, config, stop_after) -> None:
    whole = train_model(backbone, train, config, RECIPE, validation=held_out)
    path = tmp_path / "checkpoint"

    def interrupt(epoch) -> None:
        if epoch.number == stop_after:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_model(backbone, train, config, RECIPE, validation=held_out, checkpoint=path, on_epoch=interrupt)
    numbers = []
    resumed = train_model(
        backbone,
        train,
        config,
        RECIPE,
        validation=held_out,
        checkpoint=path,
        resume=True,
        on_epoch=lambda epoch: numbers.append(epoch.number),
    )
    assert numbers == list(range(stop_after + 1, 5))
    assert same(resumed, whole)
    assert resumed.chosen == whole.chosen


def test_a_checkpoint_of_another_training_is_refused_by_what_differs(backbone, train, held_out, tmp_path) -> None:
    path = tmp_path / "checkpoint"
    recipe = RECIPE.model_copy(update={"epochs": 1})
    train_model(backbone, train, CONFIG, recipe, checkpoint=path)
    for arguments, differs in (
        ((train, CONFIG, recipe.model_copy(update={"lr": 1e-4})), "another recipe;"),
        ((train, CONFIG.model_copy(update={"rank": 2}), recipe), "another config;"),
        ((held_out, CONFIG, recipe), "another training images;"),
    ):
        with pytest.raises(DataError, match=f"belongs to another training, with {differs}"):
            train_model(backbone, *arguments, checkpoint=path, resume=True)
    on_two = identity(attach(backbone, CONFIG, 3), recipe.model_dump(), 2, train, None)
    with pytest.raises(DataError, match="another number of devices;"):
        load(path, on_two)
    other = Pixels(make_task(tmp_path / "other", count=8, seed=5), preprocess_of(backbone))  # the same names
    with pytest.raises(DataError, match="another training images;"):
        train_model(backbone, other, CONFIG, recipe, checkpoint=path, resume=True)
    with pytest.raises(DataError, match="another validation images;"):
        train_model(backbone, train, CONFIG, recipe, validation=held_out, checkpoint=path, resume=True)


def test_a_checkpoint_that_is_not_there_is_named(backbone, train, tmp_path) -> None:
    with pytest.raises(DataError, match=r"gone: no checkpoint to go on from; start without --resume"):
        train_model(backbone, train, CONFIG, RECIPE, checkpoint=tmp_path / "gone", resume=True)


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps(Harmful()), pickle.dumps({"identity": 1})])
def test_anything_else_is_no_checkpoint_and_runs_no_code(tmp_path, content) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a checkpoint of a training"):
        load(path, {})


def test_blocks_before_the_first_adapted_one_are_run_once(backbone, train, monkeypatch) -> None:
    """The demo ViT has six blocks; four are kept, and training gives the same but for rounding."""
    calls = {"block": 0}
    block_type = type(backbone.model.blocks[0])
    forward = block_type.forward

    def counted(self, *args, **kwargs):
        calls["block"] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(block_type, "forward", counted)
    kept = train_model(backbone, train, LAST_BLOCKS, RECIPE)
    steps = 4 * 3  # four epochs of 24 images in batches of 8
    tried = 6 + 2 + 6 + 6  # the first image, with and without its first blocks, and once for its size
    assert calls["block"] == 2 * steps + tried + 6  # and all 24 images in one batch
    monkeypatch.setattr("adapters.training.train.MAX_PREFIX_BYTES", 0)
    calls["block"] = 0
    plain = train_model(backbone, train, LAST_BLOCKS, RECIPE)
    assert calls["block"] == 6 * steps + tried
    for one, other in zip(kept.history, plain.history, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-4)


@pytest.mark.parametrize(
    ("sites", "count"),
    [(("blocks.2.*", "blocks.4.mlp.fc1"), 2), (("blocks.0.*", "blocks.3.*"), None), (("*.attn.proj",), None)],
)
def test_the_prefix_ends_at_the_first_adapted_block(backbone, sites, count) -> None:
    prefix = find_prefix(attach(backbone, KarstConfig(sites=sites), 3), random_pixels(backbone, 1))
    assert (prefix.count if prefix else None) == count


def test_stochastic_depth_is_for_adapted_blocks_only(backbone) -> None:
    model = attach(backbone, LAST_BLOCKS, 3, drop_path=0.5).train()
    training = [
        block.drop_path1.training for block in model.frozen.blocks if not isinstance(block.drop_path1, nn.Identity)
    ]
    assert training == [False] * 3 + [True] * 2  # the first block's rate is zero


def test_patterns_that_name_no_layer_are_refused(backbone) -> None:
    with pytest.raises(ValueError, match=r"sites blocks.9.* name none of the layers, such as blocks.0.attn"):
        attach(backbone, KarstConfig(sites=("blocks.9.*",)), 3)


def test_gradient_checkpointing_changes_no_bit(backbone, train) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 2})
    saving = recipe.model_copy(update={"grad_checkpointing": True})
    assert same(train_model(backbone, train, CONFIG, recipe), train_model(backbone, train, CONFIG, saving))


def test_a_batch_that_devices_cannot_share_is_refused(backbone, train) -> None:
    with pytest.raises(ValueError, match="a batch of 8 images cannot be shared evenly by 3 devices"):
        train_model(backbone, train, CONFIG, RECIPE, devices=3)


def test_blocks_that_differ_by_their_number_keep_it(tmp_path) -> None:
    """Here each block has rotary embeddings of its own: the tenth must not get the second's."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
    backbone = local_backbone(tmp_path, "vit_small_patch16_rope_mixed_224", **sizes)
    prefix = find_prefix(attach(backbone, KarstConfig(sites=("blocks.3.*",)), 3), random_pixels(backbone, 1))
    assert prefix is not None
    assert prefix.count == 3


def test_a_model_whose_blocks_are_no_plain_sequence_is_run_as_a_whole() -> None:
    """TNT's blocks take pairs."""
    backbone = load_backbone("tnt_s_legacy_patch16_224", pretrained=False)
    assert find_prefix(attach(backbone, KarstConfig(sites=("blocks.11.*",)), 3), random_pixels(backbone, 1)) is None


def test_a_model_that_cannot_recompute_activations_says_so() -> None:
    with pytest.raises(ConfigError, match="'convit_tiny' cannot recompute activations"):
        _recompute(attach(load_backbone("convit_tiny", pretrained=False), KarstConfig(), 3))


def test_devices_that_are_not_there_are_said_in_one_line(backbone, train) -> None:
    with pytest.raises(ConfigError, match="cannot train on 1 devices of kind cuda: "):
        train_model(backbone, train, CONFIG, RECIPE, device="cuda")
    with pytest.raises(ConfigError, match="device cuda:3 is one device; give its kind, cuda, to train on 2"):
        train_model(backbone, train, CONFIG, RECIPE, device="cuda:3", devices=2)
