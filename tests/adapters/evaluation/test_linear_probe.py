"""The linear probe on frozen features."""

import pytest

from adapters import Backbone, DataError
from adapters.data.image_set import ImageSet, ImageTensors
from adapters.data.images import preprocess_of
from adapters.evaluation.linear_probe import linear_probe


def test_linear_probe_returns_the_test_accuracy_when_labels_are_right_or_wrong(
    backbone: Backbone, train: ImageTensors, images: ImageSet, held_out: ImageTensors
) -> None:
    assert linear_probe(backbone, train, held_out) > 0.9
    wrong = ImageSet(images.sources, tuple((t + 1) % 3 for t in images.targets), images.labels)
    assert linear_probe(backbone, train, ImageTensors(wrong, preprocess_of(backbone))) < 0.1


def test_linear_probe_refuses_training_images_when_a_class_has_one(
    backbone: Backbone, train: ImageTensors, held_out: ImageTensors
) -> None:
    with pytest.raises(DataError, match="at least two training images per class; add images, or omit --probe"):
        linear_probe(backbone, train.subset([0, 1, 12, 13, 24]), held_out)
