"""Augmentation keeps shape and type; the test for labels refuses kinds that change them."""

import pytest
import torch

from adapters.training.augmentation import KINDS, augment, keeps_labels


@pytest.mark.parametrize("kind", KINDS)
def test_kind_changes_images_and_keeps_their_form(kind: str) -> None:
    pixels = torch.randint(0, 256, (6, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, again = (augment(pixels, [kind], torch.Generator().manual_seed(1)) for _ in range(2))
    assert (one.shape, one.dtype) == (pixels.shape, torch.uint8)
    assert torch.equal(one, again)
    assert not torch.equal(one, pixels)


def test_kind_is_refused_when_it_changes_labels() -> None:
    right = torch.ones(60, dtype=torch.bool)
    assert keeps_labels(right, right)
    assert keeps_labels(right, right & (torch.arange(60) != 3))  # one of sixty is noise
    assert not keeps_labels(right, torch.arange(60) % 2 == 0)


def test_kind_is_allowed_when_recognition_grows() -> None:
    half = torch.arange(60) % 2 == 0
    assert keeps_labels(half, torch.ones(60, dtype=torch.bool))
