"""Checkpoints: a resumed training ends with the same bits; a checkpoint of another training is refused."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import Backbone, DataError, KarstConfig, attach
from adapters.data.image_set import ImageTensors
from adapters.data.images import preprocess_of
from adapters.paper.checkpoint import load_checkpoint, training_identity
from adapters.paper.recipe import Recipe
from adapters.paper.selection import EpochResult
from adapters.paper.train import TrainedModel, train_model
from tests.support.image_sets import coloured_images

CONFIGS = {
    "every block": KarstConfig(kernels=1, rank=4, norms=True),
    "last blocks": KarstConfig(kernels=1, rank=4, sites=("blocks.[45].*",)),
}
CONFIG = CONFIGS["every block"]
RECIPE = Recipe(epochs=3, warmup_epochs=1, batch_size=4, lr=5e-3, drop_path=0.2)


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def checkpoint(backbone: Backbone, few: ImageTensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a training of one epoch."""
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint"
    train_model(backbone, few, CONFIG, RECIPE.model_copy(update={"epochs": 1}), checkpoint=path)
    return path


@pytest.fixture(scope="module")
def uninterrupted(backbone: Backbone, few: ImageTensors, held_out: ImageTensors) -> dict[str, TrainedModel]:
    return {name: train_model(backbone, few, config, RECIPE, validation=held_out) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stop_after", [1, 2])
def test_resumed_training_ends_with_the_same_bits_when_it_was_interrupted(
    backbone: Backbone,
    few: ImageTensors,
    held_out: ImageTensors,
    uninterrupted: dict[str, TrainedModel],
    tmp_path: Path,
    name: str,
    stop_after: int,
) -> None:
    path = tmp_path / "checkpoint"
    numbers: list[int] = []

    def interrupt(epoch: EpochResult) -> None:
        if epoch.number == stop_after:
            raise Interrupted

    def run(**options: Any) -> TrainedModel:
        return train_model(backbone, few, CONFIGS[name], RECIPE, validation=held_out, checkpoint=path, **options)

    with pytest.raises(Interrupted):
        run(on_epoch=interrupt)
    resumed = run(resume=True, on_epoch=lambda epoch: numbers.append(epoch.number))
    expected = uninterrupted[name]
    assert numbers == list(range(stop_after + 1, RECIPE.epochs + 1))
    assert (resumed.history, resumed.selected) == (expected.history, expected.selected)
    tensors = expected.model.tensors()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in resumed.model.tensors().items())


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"recipe": {"lr": 1e-4}}, "recipe"),
        ({"config": {"rank": 2}}, "config"),
        ({"devices": 2}, "number of devices"),
        ({"train": "held_out"}, "training images"),
        ({"validation": "held_out"}, "validation images"),
    ],
)
def test_checkpoint_is_refused_with_the_difference_when_it_belongs_to_another_training(
    backbone: Backbone,
    few: ImageTensors,
    held_out: ImageTensors,
    checkpoint: Path,
    change: dict[str, Any],
    difference: str,
) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 1, **change.get("recipe", {})})
    model = attach(backbone, CONFIG.model_copy(update=change.get("config", {})), 3)
    images = held_out if "train" in change else few
    validation = held_out if "validation" in change else None
    identity = training_identity(model, recipe, change.get("devices", 1), images, validation)
    message = f"the checkpoint belongs to another training: different {difference}; repeat the options"
    with pytest.raises(DataError, match=message):
        load_checkpoint(checkpoint, identity)


def test_training_refuses_to_resume_when_files_of_the_same_name_have_other_images(
    backbone: Backbone, checkpoint: Path, tmp_path: Path
) -> None:
    other = ImageTensors(coloured_images(tmp_path, count=4, seed=5), preprocess_of(backbone))
    with pytest.raises(DataError, match="different training images;"):
        train_model(
            backbone, other, CONFIG, RECIPE.model_copy(update={"epochs": 1}), checkpoint=checkpoint, resume=True
        )


def test_training_refuses_to_resume_when_the_checkpoint_does_not_exist(
    backbone: Backbone, few: ImageTensors, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"gone: no checkpoint to resume from; start without --resume"):
        train_model(backbone, few, CONFIG, RECIPE, checkpoint=tmp_path / "gone", resume=True)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps(Harmful()), pickle.dumps({"identity": 1})])
def test_file_is_refused_without_running_code_when_it_is_not_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a training checkpoint; delete the file"):
        load_checkpoint(path, {})
