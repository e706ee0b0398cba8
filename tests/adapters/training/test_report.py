"""The report says what happened: its numbers are recounted, its pictures are pictures, and any labels fit in."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters import KarstConfig, attach
from adapters.data.images import Encoded, ImageSet, Pixels, decode_image
from adapters.training.report import FILES, Answers, answers, write_report
from adapters.training.train import Epoch, Fitted, accuracy
from tests.support.models import PREPROCESS, png


def pixels(targets: list[int], labels: tuple[str, ...], preprocess: dict = PREPROCESS) -> Pixels:
    images = tuple(Encoded(f"image {i}", lambda i=i: png(i, size=(8, 8))) for i in range(len(targets)))
    return Pixels(ImageSet(images, tuple(targets), labels), preprocess)


def answered(targets: list[int], predicted: list[int], labels: tuple[str, ...], part: str = "test") -> Answers:
    """Answers with rising confidence."""
    logits = torch.zeros(len(targets), len(labels))
    logits[range(len(targets)), predicted] = torch.linspace(1, 3, len(targets))
    return Answers(part, pixels(targets, labels), logits, torch.tensor(targets))


def trained(backbone, classes: int, *val_accuracies: float | None) -> Fitted:
    history = tuple(Epoch(i, 2.0 / i, 0.1 * i, val) for i, val in enumerate(val_accuracies, 1))
    return Fitted(attach(backbone, KarstConfig(kernels=1), classes).eval(), history[-1], history)


def report(folder: Path) -> dict:
    """The numbers; the pictures must be there, and be pictures of something."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for name in FILES[:3]:
        assert np.asarray(decode_image(folder / name)).std() > 1
    return json.loads((folder / "report.json").read_text("utf-8"))


def test_the_numbers_are_what_they_are_called(backbone, tmp_path) -> None:
    labels = ("cat", "dog", "emu")
    measured = answered([0, 0, 0, 1, 1], [0, 1, 0, 1, 2], labels)
    folder = tmp_path / "pets.report"
    write_report(folder, measured, trained(backbone, 3, 0.5, 0.75), [0, 0, 1, 2], {"seed": 7})
    numbers = report(folder)
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
    assert errors == [("image 4", "dog", "emu"), ("image 1", "cat", "dog")]  # the most confident first
    assert numbers["errors"][0]["score"] == pytest.approx(float(measured.logits[4].softmax(0)[2]), abs=1e-4)


def test_answers_are_the_model_s(backbone) -> None:
    data = pixels([0, 1, 1, 0], ("a", "b"), {**PREPROCESS, "input_size": [3, 32, 32]})
    model = trained(backbone, 2, None).model
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    measured = answers(model, "test", data)
    assert (measured.logits.shape, measured.logits.dtype, measured.logits.device.type) == ((4, 2), torch.float32, "cpu")
    assert measured.targets.tolist() == [0, 1, 1, 0]
    assert measured.accuracy == accuracy(model, data)
    assert measured.confusion().sum() == 4


@pytest.mark.parametrize("classes", [2, 397])
def test_few_and_many_classes(backbone, tmp_path, classes) -> None:
    labels = tuple(f"class {i}" for i in range(classes))
    targets = [i % classes for i in range(2 * classes)]
    predicted = [(t + i % 2) % classes for i, t in enumerate(targets)]
    write_report(tmp_path / "r", answered(targets, predicted, labels), trained(backbone, classes, 0.5), targets, {})
    numbers = report(tmp_path / "r")
    assert np.shape(numbers["confusion"]) == (classes, classes)
    assert len(numbers["classes"]) == classes
    assert len(numbers["errors"]) == min(24, sum(p != t for p, t in zip(predicted, targets, strict=True)))
    assert max(decode_image(tmp_path / "r/confusion.png").size) < 2000


def test_nothing_wrong_and_nothing_validated(backbone, tmp_path) -> None:
    measured = answered([0, 1], [0, 1], ("a", "b"), part="train")
    write_report(tmp_path / "r", measured, trained(backbone, 2, None), [0, 1], {})
    numbers = report(tmp_path / "r")
    assert (numbers["measured_on"], numbers["accuracy"], numbers["errors"]) == ("train", 1.0, [])
    assert numbers["history"][0]["val_accuracy"] is None


def test_any_label_can_be_drawn_and_is_whole_in_the_json(backbone, tmp_path) -> None:
    labels = ("$x_{", "猫 🐈", "a very long name of a class that does not fit", "with\nline")
    measured = answered([0, 1, 2, 3], [1, 2, 3, 0], labels)
    write_report(tmp_path / "r", measured, trained(backbone, 4, 0.5), [0], {})
    assert [c["label"] for c in report(tmp_path / "r")["classes"]] == list(labels)


def test_a_report_takes_an_older_one_s_place(backbone, tmp_path) -> None:
    fitted = trained(backbone, 2, 0.5)
    for predicted in ([1, 0], [0, 1]):
        write_report(tmp_path / "r", answered([0, 1], predicted, ("a", "b")), fitted, [0, 1], {})
    assert report(tmp_path / "r")["accuracy"] == 1.0
