"""A ViT-S/14 of real size at 98 pixels: one mixed batch of the committed images equals each adapter's merged model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import adapters
from adapters import Adapter, Backbone, Bank, load_backbone
from adapters.data.images import decode_image, eval_transform, normalise_for, preprocess_of
from benchmarks.real_backbone import DEFAULT_OUTPUT, NAME
from tests.support.models import random_adapter

pytestmark = pytest.mark.slow

SIDE_PX = 98
SAMPLES = sorted((Path(adapters.__file__).parent / "demo" / "samples").rglob("*.png"))


def random_weights() -> Backbone:
    torch.manual_seed(0)
    return load_backbone(NAME, pretrained=False, image_size=SIDE_PX)


def real_weights() -> Backbone:
    if not DEFAULT_OUTPUT.exists():
        pytest.skip(f"{DEFAULT_OUTPUT} does not exist; `python -m benchmarks.real_backbone` writes it")
    return load_backbone(NAME, DEFAULT_OUTPUT, image_size=SIDE_PX)


@pytest.mark.parametrize("load", [random_weights, real_weights])
def test_mixed_batch_equals_the_merged_models(load: Callable[[], Backbone]) -> None:
    backbone = load()
    assert backbone.input_size == (3, SIDE_PX, SIDE_PX)
    files = [
        random_adapter(backbone, seed=0, classes=10),
        random_adapter(backbone, seed=1, classes=6, kernels=1, rank=4, rescale="none"),
        random_adapter(backbone, seed=2, classes=8, norms=True),
    ]
    transform = eval_transform(preprocess_of(backbone))
    pixels = normalise_for(backbone, torch.stack([transform(decode_image(path)) for path in SAMPLES]))
    chosen = [i % len(files) for i in range(len(SAMPLES))]
    bank = Bank(backbone, slots=4)
    slots = [bank.put(file) for file in files]
    mixed = bank.forward(pixels, [slots[i] for i in chosen])
    for number, file in enumerate(files):
        own = [i for i, adapter in enumerate(chosen) if adapter == number]
        _assert_same(torch.stack([mixed[i] for i in own]), file, backbone, pixels[own])


def _assert_same(found: torch.Tensor, file: Adapter, backbone: Backbone, pixels: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = file.merge(backbone)(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(found.argmax(1), expected.argmax(1))
