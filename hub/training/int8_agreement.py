"""Agreement of a new adapter in int8 with float32, which a training of an int8 hub reports."""

import dataclasses

from adapters import Adapter, Backbone, BackboneError
from adapters.data.datasets import DatasetSplits
from adapters.data.image_set import ImageSet
from adapters.evaluation.evaluate import bank_for, evaluate
from adapters.serving.frozen_forms import can_int8

IMAGES = 200  # of the comparison, at most: a share of labels is then known to a percent


def with_int8_agreement(adapter: Adapter, backbone: Backbone, splits: DatasetSplits, max_pixels: int) -> Adapter:
    """Return the adapter with `int8_images` and `int8_same_labels` in its metrics.

    `int8_same_labels` is the share of images with the same label in int8 as in float32. The images are test
    images, or training images of a dataset without any.

    Args:
        max_pixels: limit on an image's width times height.

    Raises:
        BackboneError: this machine cannot compute in int8.
        DataError: an image cannot be read.
    """
    if not can_int8(backbone):
        raise BackboneError("the training does not run on a CPU with VNNI")
    chosen = _some(splits.train if splits.test is None else splits.test)
    int8, exact = (
        evaluate(bank_for(backbone, [adapter.config], int8=form), adapter, chosen, max_pixels=max_pixels)
        for form in (True, False)
    )
    same = (int8.logits.argmax(1) == exact.logits.argmax(1)).double().mean()
    found = {"int8_images": len(chosen), "int8_same_labels": round(float(same), 4)}
    return Adapter.create(
        adapter.tensors,
        config=adapter.config,
        backbone=adapter.backbone,
        fingerprint=adapter.fingerprint,
        labels=adapter.labels,
        preprocess=adapter.preprocess,
        metrics=(adapter.metrics or {}) | found,
        created=adapter.created,
        coverage=adapter.coverage,
    )


def _some(images: ImageSet) -> ImageSet:
    """Return evenly spaced images: a set is often in the order of its labels."""
    step = -(-len(images) // IMAGES)
    return dataclasses.replace(images, sources=images.sources[::step], targets=images.targets[::step])
