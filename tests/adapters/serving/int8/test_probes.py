"""Probe images are always the same, varied, and about as many as give 4,096 patches."""

import pytest
import torch

from adapters.serving.int8.probes import probe_images


@pytest.mark.parametrize(
    ("size", "count"), [((3, 98, 98), 109), ((3, 224, 224), 20), ((3, 448, 448), 16), ((1, 28, 20), 128)]
)
def test_probe_images_have_the_backbone_s_size(size: tuple[int, int, int], count: int) -> None:
    images = probe_images(size)
    assert images.shape == (count, *size)
    assert torch.equal(images, probe_images(size))
    assert images.isfinite().all()
    assert 0.3 < float(images.std()) < 2
    assert (images.flatten(1).std(1) > 0.05).all()
