"""Advice after a training, and the learning curve behind it."""

import pytest
import torch

from adapters.backbone import load_backbone
from adapters.evaluation.advice import advise
from adapters.training.auto import Classifier, instant_from_features


def noisy_classifier(images: int, seed: int) -> Classifier:
    """Return a classifier of two labels whose features are mostly noise."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(images) % 2
    features = torch.randn(images, 8, generator=generator) + 0.3 * targets[:, None]
    return instant_from_features(features, targets, ["crack", "fine"], load_backbone("demo"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("images", [30, 60, 120])
def test_advice_does_not_contradict_itself(images: int, seed: int) -> None:
    text = " ".join(advise(noisy_classifier(images, seed)))
    helps = text.count("would help most") + text.count("expect more images") + text.count("more images help")
    assert not (helps and "would help little" in text)
    assert helps or "would help little" in text


def test_learning_curve_needs_thirty_images() -> None:
    assert noisy_classifier(28, 0).learning_curve == ()
    assert [images for images, _ in noisy_classifier(32, 0).learning_curve] == [8, 16, 32]
