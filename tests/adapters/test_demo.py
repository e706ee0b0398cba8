"""The committed files of the demo: their sizes, and the accuracies in their metadata and in the docs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adapters import Adapter, Backbone, load_backbone
from adapters.data.images import decode_image, eval_transform, needed_px, normalise
from adapters.demo import draw
from adapters.demo.tasks import DIGITS_TRAIN, digits
from tests.support.models import encoded

DEMO = Path(__file__).parents[2] / "adapters" / "demo"
DOC = Path(__file__).parents[2] / "docs" / "demo.md"
TASKS = ("digits", "shapes", "count")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("demo")


@pytest.mark.parametrize("task", TASKS)
def test_demo_adapter_beats_the_linear_probe_when_it_fits_the_backbone(backbone: Backbone, task: str) -> None:
    adapter = Adapter.read(DEMO / f"{task}.safetensors")
    adapter.check(backbone)
    assert len(adapter.data) < 400_000
    assert adapter.metrics is not None
    accuracy, probe = (adapter.metrics[name] for name in ("test_accuracy", "linear_probe_test_accuracy"))
    assert accuracy > probe + 0.02
    assert f"{accuracy:.1%} | {probe:.1%} |" in DOC.read_text()
    samples = {path.stem.rpartition("-")[0] for path in (DEMO / "samples" / task).glob("*.png")}
    assert samples == set(adapter.labels)


@pytest.mark.parametrize("task", TASKS)
def test_demo_adapter_predicts_the_same_label_when_a_large_jpeg_is_decoded_smaller(
    task: str, backbone: Backbone
) -> None:
    adapter = Adapter.read(DEMO / f"{task}.safetensors")
    model, transform = adapter.merge(backbone), eval_transform(adapter.preprocess)
    mean, std = (torch.tensor(adapter.preprocess[name]) for name in ("mean", "std"))
    for path in sorted((DEMO / "samples" / task).glob("*.png")):
        large = decode_image(path).resize((800, 800), Image.Resampling.BICUBIC)
        data = encoded(large, "JPEG", quality=95)
        smaller = decode_image(data, needed_px=needed_px(adapter.preprocess))
        assert smaller.size == (100, 100)
        pixels = torch.stack([transform(decode_image(data)), transform(smaller)])
        with torch.inference_mode():
            scores = model(normalise(pixels, mean, std)).softmax(1)
        assert scores[0].argmax() == scores[1].argmax(), path.name


def test_demo_backbone_is_below_5_mb_when_committed() -> None:
    assert (DEMO / "backbone.safetensors").stat().st_size < 5_000_000


def test_digits_adapter_reaches_the_accuracy_in_its_metadata_when_tested_again(backbone: Backbone) -> None:
    adapter = Adapter.read(DEMO / "digits.safetensors")
    all_images, all_labels = digits()
    images, labels = all_images[DIGITS_TRAIN:], all_labels[DIGITS_TRAIN:]
    transform = eval_transform(adapter.preprocess)
    pixels = torch.stack([transform(image.convert("RGB")) for image in images])
    mean, std = (torch.tensor(adapter.preprocess[name]) for name in ("mean", "std"))
    with torch.inference_mode():
        predicted = adapter.merge(backbone)(normalise(pixels, mean, std)).argmax(1)
    correct = sum(adapter.labels[int(i)] == label for i, label in zip(predicted, labels, strict=True))
    assert adapter.metrics is not None
    assert correct / len(labels) == pytest.approx(adapter.metrics["test_accuracy"], abs=2e-3)
    assert correct / len(labels) >= 0.96


def test_drawing_is_the_same_when_the_seed_is_the_same() -> None:
    drawings: tuple[Callable[[np.random.Generator], Image.Image], ...] = (
        lambda rng: draw.shape_image(rng, "star"),
        lambda rng: draw.count_image(rng, 5),
    )
    for image in drawings:
        one, same, other = (np.asarray(image(np.random.default_rng(seed))) for seed in (3, 3, 4))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)
        assert one.shape == (32, 32, 3)
    with pytest.raises(ValueError, match="shape must be one of circle, cross"):
        draw.shape_image(np.random.default_rng(0), "heart")
    with pytest.raises(ValueError, match="count must be between 1 and 8, got 9"):
        draw.count_image(np.random.default_rng(0), 9)


def test_demo_samples_have_the_backbone_s_size_when_decoded() -> None:
    paths = sorted((DEMO / "samples").rglob("*.png"))
    assert len(paths) == 24
    assert {decode_image(path).size for path in paths} == {(32, 32)}
