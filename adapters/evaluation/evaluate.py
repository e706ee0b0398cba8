"""Evaluation of an adapter: accuracy, calibration, throughput, and agreement with its merged form.

`evaluate` and `compare_merged` run an adapter over labelled images. The metrics are pure functions of logits and
targets.

Axes: n images, K classes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..backbone import Backbone
from ..data.errors import DataError
from ..data.image_set import ImageSet, ImageTensors
from ..data.images import MAX_IMAGE_PIXELS, normalise
from ..format.file import Adapter
from ..method.config import KarstConfig
from ..serving.bank import Bank
from ..serving.frozen_forms import unmeasured_forms
from ..short_repr import short_repr

BATCH_SIZE = 64
TOP_K = 5
ECE_BINS = 15
RESAMPLES = 1000
CONFIDENCE_LEVEL = 0.95
# Relative to the largest merged logit. The demo adapters differ by 4e-7, 9e-4 and 8e-3, from the order of summation.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Outputs:
    """An adapter's outputs for an image set.

    Attributes:
        logits: (n, K) float32 on the CPU.
        targets: (n,) int64 on the CPU.
        images_per_s: images per second of the forward passes, without reading, decoding and normalisation.
    """

    logits: Tensor
    targets: Tensor
    images_per_s: float

    __repr__ = short_repr


@dataclass(frozen=True)
class Scores:
    """The metrics of one adapter on one image set. Accuracies are in [0, 1].

    Attributes:
        images: n.
        top1, top1_interval: accuracy and its confidence interval (`bootstrap_interval`).
        top5: None with 5 classes or fewer, where it is always 1.
        per_class: label -> accuracy over the images of the class; None for a class without images.
        ece, nll: `expected_calibration_error` and `negative_log_likelihood`.
    """

    images: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float | None
    per_class: dict[str, float | None]
    ece: float
    nll: float


@dataclass(frozen=True)
class Agreement:
    """Comparison of merged and unmerged logits.

    Attributes:
        largest_difference: largest absolute difference of a logit.
        largest_logit: largest absolute logit of the merged form.
        label_changes: images whose predicted label differs.
        tolerance: limit on `largest_difference`, relative to `largest_logit`.
    """

    largest_difference: float
    largest_logit: float
    label_changes: int
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the largest difference is within the tolerance. False if a logit is NaN."""
        return self.largest_difference <= self.tolerance * self.largest_logit


def bank_for(backbone: Backbone, configs: Sequence[KarstConfig], *, int8: bool = False) -> Bank:
    """Return a bank with one slot, which takes adapters with these settings; their factors are equal.

    Args:
        int8: compute all frozen layers in int8, where the machine can (`can_int8`).
    """
    return Bank(
        backbone,
        slots=1,
        max_rank=max(config.rank for config in configs),
        max_kernels=max(1, *(config.kernels for config in configs)),  # an adapter may be a head alone
        factor=configs[0].factor,
        forms=unmeasured_forms(backbone, int8=int8),
    )


def evaluate(bank: Bank, adapter: Adapter, images: ImageSet, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Outputs:
    """Run an adapter unmerged through the bank, as the hub serves it.

    One slot of the bank is used and released. Images are preprocessed according to the adapter's metadata.

    Args:
        images: with the adapter's labels, as `datasets.read_split(..., labels=adapter.labels)` returns them.
        max_pixels: limit on an image's width times height.

    Raises:
        AdapterError, BankFullError: as `Bank.put`.
        DataError: the set is empty, its labels differ from the adapter's, or an image cannot be read.
    """
    if images.labels != adapter.labels:
        different = [label for label in images.labels if label not in adapter.labels] or images.labels
        raise DataError(
            f"the images have the labels {', '.join(different)}; expected the adapter's labels in its order: "
            f"{', '.join(adapter.labels)}"
        )
    if not len(images):
        raise DataError("no images to evaluate on; expected at least 1")
    slot = bank.put(adapter)
    try:
        return _run(bank.device, adapter, images, lambda pixels: bank.forward(pixels, [slot] * len(pixels)), max_pixels)
    finally:
        bank.evict(slot)


def compare_merged(
    backbone: Backbone, adapter: Adapter, images: ImageSet, unmerged: Outputs, *, max_pixels: int = MAX_IMAGE_PIXELS
) -> Agreement:
    """Merge an adapter into a copy of the backbone's weights, run the same images, and compare the logits.

    Args:
        unmerged: what `evaluate` returned for the same adapter and images.
        max_pixels: limit on an image's width times height.

    Raises:
        AdapterError: the adapter does not fit the backbone.
        DataError: an image cannot be read.
    """
    model = adapter.merge(backbone)
    merged = _run(backbone.device, adapter, images, lambda pixels: model(pixels.to(backbone.dtype)), max_pixels)
    return agreement(unmerged.logits, merged.logits, TOLERANCE[backbone.dtype])


def scores(logits: Tensor, targets: Tensor, labels: tuple[str, ...], *, seed: int = 0) -> Scores:
    """Return all metrics of one image set.

    Args:
        logits: (n, K), n >= 1.
        targets: (n,) class indices.
        labels: K class names.
        seed: seed of the bootstrap.
    """
    correct = logits.argmax(1) == targets
    return Scores(
        images=len(targets),
        top1=float(correct.double().mean()),
        top1_interval=bootstrap_interval(correct, seed=seed),
        top5=top_k_accuracy(logits, targets, TOP_K) if len(labels) > TOP_K else None,
        per_class=dict(zip(labels, per_class_accuracy(logits, targets), strict=True)),
        ece=expected_calibration_error(logits, targets),
        nll=negative_log_likelihood(logits, targets),
    )


def top_k_accuracy(logits: Tensor, targets: Tensor, k: int) -> float:
    """Return the share of images whose target is among the k largest logits: (n, K), (n,) -> [0, 1]; 1 <= k <= K."""
    best = logits.topk(k, dim=1).indices  # (n, k)
    return float((best == targets[:, None]).any(1).double().mean())


def per_class_accuracy(logits: Tensor, targets: Tensor) -> list[float | None]:
    """Return the accuracy over the images of each of K classes; None for a class without images."""
    classes = logits.shape[1]
    total = torch.bincount(targets, minlength=classes)
    correct = torch.bincount(targets[logits.argmax(1) == targets], minlength=classes)
    return [c / t if t else None for c, t in zip(correct.tolist(), total.tolist(), strict=True)]


def bootstrap_interval(
    correct: Tensor, *, seed: int, resamples: int = RESAMPLES, level: float = CONFIDENCE_LEVEL
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of an accuracy (Efron 1979).

    Resampling n images with replacement, of which k are classified correctly, gives Binomial(n, k / n) correct ones.
    That number is sampled directly.

    Args:
        correct: (n,) bool, n >= 1.
        level: confidence level in (0, 1).
    """
    n, k = len(correct), int(correct.sum())
    samples = np.random.default_rng(seed).binomial(n, k / n, resamples) / n
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def expected_calibration_error(logits: Tensor, targets: Tensor, bins: int = ECE_BINS) -> float:
    """Return the mean gap between confidence and accuracy: (n, K), (n,) -> [0, 1].

    Confidence is the largest softmax probability. Bins (a, b] have equal widths and are weighted by their images
    (Guo et al. 2017, arXiv 1706.04599).
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    bin_index = torch.bucketize(confidence, edges)  # (n,): 0 .. bins - 1
    gap = (predicted == targets).double() - confidence
    return float(torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_index, gap).abs().sum() / len(targets))


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Return the mean cross-entropy, in nats."""
    return float(F.cross_entropy(logits.double(), targets))


def agreement(unmerged: Tensor, merged: Tensor, tolerance: float) -> Agreement:
    """Compare two sets of logits (n, K)."""
    return Agreement(
        largest_difference=float((unmerged.double() - merged.double()).abs().max()),
        largest_logit=float(merged.abs().max()),
        label_changes=int((unmerged.argmax(1) != merged.argmax(1)).sum()),
        tolerance=tolerance,
    )


@torch.inference_mode()
def _run(
    device: torch.device,
    adapter: Adapter,
    images: ImageSet,
    forward: Callable[[Tensor], Tensor | list[Tensor]],
    max_pixels: int,
) -> Outputs:
    mean, std = (torch.tensor(adapter.preprocess[name], device=device) for name in ("mean", "std"))
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    seconds = 0.0
    tensors = ImageTensors(images, adapter.preprocess, cache_bytes=0, max_pixels=max_pixels)
    for pixels, target in DataLoader(tensors, BATCH_SIZE):
        prepared = normalise(pixels.to(device), mean, std)
        if not logits:
            forward(prepared)  # not timed: the first pass allocates memory and, on a GPU, selects kernels
        _synchronize(device)
        start = time.perf_counter()
        outputs = forward(prepared)
        _synchronize(device)
        seconds += time.perf_counter() - start
        logits.append((outputs if isinstance(outputs, Tensor) else torch.stack(outputs)).float().cpu())
        targets.append(target)
    return Outputs(torch.cat(logits), torch.cat(targets), len(images) / seconds)


def _synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished, otherwise the timer would measure only the launch."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
