"""Answers of heads to stored features: the same in parts, and without a score of each image and label in memory."""

import tracemalloc

import numpy as np

from adapters import Backbone
from hub.services.trainings.answers import SCORES_AT_ONCE, _labels_of_head
from tests.support.models import random_adapter

CLASSES, IMAGES = 20_000, 2_000


def test_scores_are_computed_in_parts_when_a_head_has_many_labels(backbone: Backbone) -> None:
    adapter = random_adapter(backbone, classes=CLASSES, labels=[str(k) for k in range(CLASSES)])
    weight, bias = adapter.head()
    random = np.random.default_rng(0)
    features = random.normal(size=(IMAGES, weight.shape[1])).astype(np.float16)
    rows = {str(i): row for i, row in enumerate(features)}
    tracemalloc.start()
    found = _labels_of_head(adapter, rows)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 * 4 * SCORES_AT_ONCE + 2 * weight.nbytes + 8_000_000  # all scores at once: 160 MB
    assert len(found) == IMAGES
    for digest in ("0", "999", "1999"):
        assert found[digest] == str((rows[digest].astype(np.float32) @ weight.T + bias).argmax())
