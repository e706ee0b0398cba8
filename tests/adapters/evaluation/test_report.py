"""The training report: its numbers are counted again, its figures decode, and it accepts any label."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters import Backbone, KarstConfig, attach
from adapters.data.image_set import EncodedImage, ImageSet, ImageTensors
from adapters.data.images import decode_image
from adapters.data.layouts import Split
from adapters.evaluation.report import FILES, write_report
from adapters.paper.selection import EpochResult
from adapters.paper.train import TrainedModel
from adapters.training.inference import Predictions
from tests.support.models import PREPROCESS, png


def tensors(targets: list[int], labels: tuple[str, ...]) -> ImageTensors:
    images = tuple(EncodedImage(f"image {i}", partial(png, i, size=(8, 8))) for i in range(len(targets)))
    return ImageTensors(ImageSet(images, tuple(targets), labels), PREPROCESS)


def predictions(
    targets: list[int], predicted: list[int], labels: tuple[str, ...], split: Split = "test"
) -> Predictions:
    """Return predictions of increasing confidence."""
    logits = torch.zeros(len(targets), len(labels))
    logits[range(len(targets)), predicted] = torch.linspace(1, 3, len(targets))
    return Predictions(split, tensors(targets, labels), logits, torch.tensor(targets))


def trained(backbone: Backbone, classes: int, *val_accuracies: float | None) -> TrainedModel:
    history = tuple(EpochResult(i, 2.0 / i, 0.1 * i, val) for i, val in enumerate(val_accuracies, 1))
    return TrainedModel(attach(backbone, KarstConfig(kernels=1), classes).eval(), history[-1], history)


def read_report(folder: Path) -> dict[str, Any]:
    """Decode the figures, which must not be blank, and return the numbers."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for name in FILES[:3]:
        assert np.asarray(decode_image(folder / name)).std() > 1
    numbers: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return numbers


def test_report_counts_images_and_errors_when_predictions_are_mixed(backbone: Backbone, tmp_path: Path) -> None:
    labels = ("cat", "dog", "emu")
    measured = predictions([0, 0, 0, 1, 1], [0, 1, 0, 1, 2], labels)
    folder = tmp_path / "pets.report"
    write_report(folder, measured, trained(backbone, 3, 0.5, 0.75), [0, 0, 1, 2], {"seed": 7})
    numbers = read_report(folder)
    assert (numbers["seed"], numbers["epoch"], numbers["measured_on"]) == (7, 2, "test")
    assert numbers["accuracy"] == pytest.approx(3 / 5)
    assert numbers["confusion"] == [[2, 1, 0], [0, 1, 1], [0, 0, 0]]  # rows are true classes
    assert numbers["classes"] == [
        {"label": "cat", "train_images": 2, "images": 3, "accuracy": 0.6667},
        {"label": "dog", "train_images": 1, "images": 2, "accuracy": 0.5},
        {"label": "emu", "train_images": 1, "images": 0, "accuracy": None},
    ]
    assert numbers["history"] == [
        {"epoch": 1, "loss": 2.0, "train_accuracy": 0.1, "val_accuracy": 0.5},
        {"epoch": 2, "loss": 1.0, "train_accuracy": 0.2, "val_accuracy": 0.75},
    ]
    errors = [(e["image"], e["label"], e["predicted"]) for e in numbers["errors"]]
    assert errors == [("image 4", "dog", "emu"), ("image 1", "cat", "dog")]  # most confident first
    assert numbers["errors"][0]["score"] == pytest.approx(float(measured.logits[4].softmax(0)[2]), abs=1e-4)


@pytest.mark.parametrize("classes", [2, 397])
def test_report_is_complete_when_there_are_few_or_many_classes(
    backbone: Backbone, tmp_path: Path, classes: int
) -> None:
    labels = tuple(f"class {i}" for i in range(classes))
    targets = [i % classes for i in range(2 * classes)]
    predicted = [(t + i % 2) % classes for i, t in enumerate(targets)]
    write_report(tmp_path / "r", predictions(targets, predicted, labels), trained(backbone, classes, 0.5), targets, {})
    numbers = read_report(tmp_path / "r")
    assert np.shape(numbers["confusion"]) == (classes, classes)
    assert len(numbers["classes"]) == classes
    assert len(numbers["errors"]) == min(24, sum(p != t for p, t in zip(predicted, targets, strict=True)))
    assert max(decode_image(tmp_path / "r/confusion.png").size) < 2000


def test_report_is_complete_when_there_are_no_errors_and_no_validation_images(
    backbone: Backbone, tmp_path: Path
) -> None:
    measured = predictions([0, 1], [0, 1], ("a", "b"), split="train")
    write_report(tmp_path / "r", measured, trained(backbone, 2, None), [0, 1], {})
    numbers = read_report(tmp_path / "r")
    assert (numbers["measured_on"], numbers["accuracy"], numbers["errors"]) == ("train", 1.0, [])
    assert numbers["history"][0]["val_accuracy"] is None


def test_report_keeps_a_label_in_full_when_it_cannot_be_drawn(backbone: Backbone, tmp_path: Path) -> None:
    labels = ("$x_{", "猫 🐈", "a very long name of a class that does not fit", "with\nline")
    measured = predictions([0, 1, 2, 3], [1, 2, 3, 0], labels)
    write_report(tmp_path / "r", measured, trained(backbone, 4, 0.5), [0], {})
    assert [c["label"] for c in read_report(tmp_path / "r")["classes"]] == list(labels)


def test_report_replaces_an_older_one_when_the_folder_exists(backbone: Backbone, tmp_path: Path) -> None:
    model = trained(backbone, 2, 0.5)
    for predicted in ([1, 0], [0, 1]):
        write_report(tmp_path / "r", predictions([0, 1], predicted, ("a", "b")), model, [0, 1], {})
    assert read_report(tmp_path / "r")["accuracy"] == 1.0
