"""The training loop: repeatable, better than chance, selected on validation images, without effect on the backbone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from adapters import Adapter, Backbone, ConfigError, DataError, KarstConfig, attach, extract, load_backbone
from adapters.backbone import fingerprint
from adapters.data.image_set import ImageSet, ImageTensors
from adapters.data.images import preprocess_of
from adapters.paper.recipe import Recipe, steps_per_epoch
from adapters.paper.selection import EpochResult
from adapters.paper.train import TrainedModel, enable_grad_checkpointing, train_model
from adapters.training.inference import accuracy
from tests.support.image_sets import coloured_images, image_file
from tests.support.models import random_pixels

CONFIG = KarstConfig(kernels=2, rank=4)
RECIPE = Recipe(epochs=3, warmup_epochs=1, batch_size=8, lr=5e-3)


@pytest.fixture(scope="module")
def trained(backbone: Backbone, train: ImageTensors) -> TrainedModel:
    return train_model(backbone, train, CONFIG, RECIPE)


def same_bits(one: TrainedModel, other: TrainedModel) -> bool:
    ours, theirs = one.model.tensors(), other.model.tensors()
    return one.history == other.history and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_train_model_learns_when_the_task_is_easy(trained: TrainedModel, held_out: ImageTensors) -> None:
    assert accuracy(trained.model, held_out) > 0.9  # chance is 1 in 3
    assert trained.history[-1].loss < trained.history[0].loss
    assert trained.history[-1].train_accuracy > trained.history[0].train_accuracy


def test_train_model_gives_the_same_bits_when_the_seed_is_the_same(
    backbone: Backbone, train: ImageTensors, trained: TrainedModel
) -> None:
    torch.manual_seed(99)  # the caller's random state must not matter
    assert same_bits(train_model(backbone, train, CONFIG, RECIPE), trained)


def test_train_model_gives_another_adapter_when_the_seed_differs(
    backbone: Backbone, few: ImageTensors, trained: TrainedModel
) -> None:
    other = train_model(backbone, few, CONFIG, RECIPE.model_copy(update={"seed": 1, "epochs": 1})).model.tensors()
    ours = trained.model.tensors()
    assert not any(torch.equal(other[name], tensor) for name, tensor in ours.items() if name.endswith("karst_a"))


def test_train_model_restores_the_random_state_when_it_returns(backbone: Backbone, few: ImageTensors) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_model(backbone, few, CONFIG, RECIPE.model_copy(update={"epochs": 1}))
    assert torch.equal(torch.get_rng_state(), before)


def test_train_model_leaves_the_backbone_unchanged_when_it_returns(backbone: Backbone, trained: TrainedModel) -> None:
    assert trained.model.backbone is backbone
    assert fingerprint(backbone.model) == backbone.fingerprint
    assert not backbone.model.training
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())
    pixels = random_pixels(backbone, 2)
    with torch.inference_mode():
        torch.manual_seed(0)  # the weights that the fixture was loaded with
        fresh = load_backbone("demo", pretrained=False).model
        assert torch.equal(backbone.model(pixels), fresh(pixels))  # a hook that is left would change the output


def test_train_model_changes_every_parameter_that_starts_at_zero(trained: TrainedModel) -> None:
    assert not trained.model.training
    for name, parameter in trained.model.named_parameters():
        if name.rpartition(".")[2] in ("b", "s1", "s2", "in_s1", "in_s2"):
            assert parameter.abs().max() > 0, name


def test_train_model_selects_the_last_epoch_when_there_are_no_validation_images(trained: TrainedModel) -> None:
    assert [epoch.number for epoch in trained.history] == [1, 2, 3]
    assert [epoch.val_accuracy for epoch in trained.history] == [None] * 3
    assert trained.selected == trained.history[-1]


def test_train_model_selects_the_best_epoch_when_there_are_validation_images(
    backbone: Backbone, images: ImageSet, train: ImageTensors
) -> None:
    """With wrong validation labels, a model that starts by guessing gets worse: an early epoch is the best."""
    wrong = ImageSet(images.sources, tuple((t + 1) % 3 for t in images.targets), images.labels)
    validation = ImageTensors(wrong, preprocess_of(backbone))
    recipe = RECIPE.model_copy(update={"lr": 1e-3, "seed": 4})
    trained = train_model(backbone, train, CONFIG, recipe, validation=validation)
    accuracies = [epoch.val_accuracy or 0.0 for epoch in trained.history]
    assert accuracies[-1] < max(accuracies)
    assert trained.selected == max(trained.history, key=lambda epoch: (epoch.val_accuracy, epoch.number))
    assert accuracy(trained.model, validation) == trained.selected.val_accuracy


def test_train_model_calls_back_when_a_step_or_an_epoch_ends(backbone: Backbone, train: ImageTensors) -> None:
    steps: list[tuple[int, float, float]] = []
    epochs: list[EpochResult] = []
    recipe = RECIPE.model_copy(update={"epochs": 2})
    trained = train_model(
        backbone, train, CONFIG, recipe, on_step=lambda *step: steps.append(step), on_epoch=epochs.append
    )
    assert len(steps) == 2 * steps_per_epoch(len(train), recipe) == 2 * 4
    assert tuple(epochs) == trained.history
    last = steps[4:]
    assert [number for number, _, _ in steps] == [1] * 4 + [2] * 4
    assert np.mean([loss for _, loss, _ in last]) == pytest.approx(epochs[-1].loss)
    assert np.mean([accuracy for _, _, accuracy in last]) == pytest.approx(epochs[-1].train_accuracy)


def test_train_model_raises_when_the_loss_is_not_finite(backbone: Backbone, few: ImageTensors) -> None:
    with pytest.raises(FloatingPointError, match=r"^the loss is (nan|inf), not a finite number; use a lower learning"):
        train_model(backbone, few, CONFIG, Recipe(epochs=3, warmup_epochs=0, batch_size=4, lr=1e30))


def test_train_model_names_the_file_when_an_image_is_invalid(backbone: Backbone, tmp_path: Path) -> None:
    images = coloured_images(tmp_path, count=2, seed=0)
    image_file(images, 3).write_bytes(b"text")
    with pytest.raises(DataError, match=r"green/1.png: not an image"):
        train_model(backbone, ImageTensors(images, preprocess_of(backbone)), CONFIG, RECIPE)


def test_extracted_adapter_equals_the_trained_model_when_it_is_merged(
    backbone: Backbone, trained: TrainedModel, held_out: ImageTensors, tmp_path: Path
) -> None:
    path = tmp_path / "colours.safetensors"
    extract(trained.model, held_out.images.labels, metrics={"test_accuracy": 1.0}).write(path)
    adapter = Adapter.read(path)
    adapter.check(backbone)
    assert adapter.labels == ("blue", "green", "red")
    pixels = random_pixels(backbone, 4)
    with torch.inference_mode():
        torch.testing.assert_close(adapter.merge(backbone)(pixels), trained.model(pixels), atol=1e-4, rtol=0)


def test_train_model_gives_the_same_bits_when_activations_are_recomputed(backbone: Backbone, few: ImageTensors) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 1, "warmup_epochs": 0})
    recomputing = recipe.model_copy(update={"grad_checkpointing": True})
    config = KarstConfig(kernels=1, rank=4, norms=True)
    plain, recomputed = (train_model(backbone, few, config, each) for each in (recipe, recomputing))
    assert same_bits(plain, recomputed)


def test_grad_checkpointing_is_refused_when_timm_does_not_support_the_backbone() -> None:
    with pytest.raises(ConfigError, match="'convit_tiny' cannot recompute activations; leave out grad_checkpointing"):
        enable_grad_checkpointing(attach(load_backbone("convit_tiny", pretrained=False), KarstConfig(), 3))


def test_train_model_refuses_a_batch_when_devices_cannot_share_it_evenly(backbone: Backbone, few: ImageTensors) -> None:
    with pytest.raises(ConfigError, match="a batch of 8 images cannot be divided evenly among 3 devices; change"):
        train_model(backbone, few, CONFIG, RECIPE, devices=3)


def test_train_model_refuses_devices_when_they_do_not_exist(backbone: Backbone, few: ImageTensors) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"cannot train on 1 devices of kind cuda: [^\n]+$"):
            train_model(backbone, few, CONFIG, RECIPE, device="cuda")
    with pytest.raises(
        ConfigError, match=r"device cuda:3 is a single device, but 2 devices are requested; use .* cuda"
    ):
        train_model(backbone, few, CONFIG, RECIPE, device="cuda:3", devices=2)


def test_train_model_refuses_to_resume_when_no_checkpoint_is_given(backbone: Backbone, few: ImageTensors) -> None:
    with pytest.raises(ValueError, match="resume=True needs a checkpoint file"):
        train_model(backbone, few, CONFIG, RECIPE, resume=True)
