"""An adapter trained in seconds, and the worth of the hub's answers: typicality, unknown images, label sets."""

import re
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from adapters import Backbone, fit
from adapters.demo import draw
from adapters.demo.tasks import digits
from hub.client.client import Client
from tests.support.models import flat_png, wait_until

from .conftest import SharedHub

TRAIN, TEST, FOREIGN = 300, 100, 30


def test_own_digits_are_typical_foreign_images_are_unknown_and_sets_cover(
    hub: SharedHub, backbone: Backbone, tmp_path: Path
) -> None:
    images, labels = digits()
    for i, (image, label) in enumerate(zip(images[:TRAIN], labels, strict=False)):
        path = tmp_path / "digits" / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    trained = fit(tmp_path / "digits", tmp_path / "digits.safetensors", backbone=backbone, recipe="instant")
    own, truth = images[TRAIN : TRAIN + TEST], labels[TRAIN : TRAIN + TEST]
    rng = np.random.default_rng(0)
    shapes = [draw.shape_image(rng, draw.SHAPES[i % len(draw.SHAPES)]) for i in range(FOREIGN)]
    foreign: list[Image.Image | bytes] = [*shapes, flat_png(0), flat_png(255)]
    with Client(hub.url, hub.key) as client:
        registered = client.register("trusted", trained.adapter.data)
        assert registered.typicality is True
        reply = client.classify("trusted", own, top_k=1, coverage=0.95)
        assert reply.typicality is not None
        assert reply.unknown is not None
        assert reply.sets is not None
        assert sum(reply.unknown) <= 0.05 * TEST
        assert 0.4 < np.mean(reply.typicality) < 0.6  # a share of held-out images
        covered = [label in found for label, found in zip(truth, reply.sets, strict=True)]
        assert np.mean(covered) >= 0.9
        assert np.mean([len(found) for found in reply.sets]) < 3
        others = client.classify("trusted", foreign)
        assert others.unknown is not None
        assert sum(others.unknown) >= 0.9 * len(foreign)
        client.change_settings("trusted", unknown_below=0)
        again = client.classify("trusted", foreign)
        assert again.typicality == pytest.approx(others.typicality, rel=1e-2, abs=1e-6)
        client.delete_task("trusted")

    def counted() -> float:
        page = httpx.get(hub.metrics_url).text
        return sum(map(float, re.findall(r"^ray_karst_images_unknown_total\{.*\} (\S+)$", page, re.MULTILINE)))

    wait_until(lambda: counted() >= 0.9 * len(foreign), 60, lambda: counted())
