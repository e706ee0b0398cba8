"""How good an adapter is: accuracy, calibration, throughput, and whether its merged form agrees.

Two halves. `evaluate` and `compare_merged` run an adapter over labelled images; the rest are pure functions of
logits and targets. Nothing here trains, and nothing here reads folders or lists.

Axes: n images, K classes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..backbone import Backbone
from ..data.images import DataError, ImageSet, Pixels, normalise
from ..format.file import Adapter
from ..serving.bank import Bank

BATCH = 64
TOP_K = 5
ECE_BINS = 15
RESAMPLES = 1000
LEVEL = 0.95
# Of the largest merged logit. Demo adapters differ by 4e-7, 9e-4 and 8e-3: a change of the sums' order, no more.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Outputs:
    """What an adapter said about a set of images.

    Attributes:
        logits: (n, K) float32 on the CPU.
        targets: (n,) int64 on the CPU.
        images_per_s: of the forward passes alone: no reading, decoding or normalising of images.
    """

    logits: Tensor
    targets: Tensor
    images_per_s: float


@dataclass(frozen=True)
class Scores:
    """The figures of one adapter on one set; accuracies in [0, 1].

    Attributes:
        images: n.
        top1, top1_interval: accuracy, and its bootstrap interval (`bootstrap_interval`).
        top5: None with 5 classes or fewer, where it would be 1 whatever the adapter says.
        per_class: label -> accuracy over the images of that class; None where there is none.
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
    """Merged against unmerged.

    Attributes:
        largest_difference: of any logit, absolute.
        largest_logit: absolute, of the merged form.
        label_changes: images whose best label differs.
        tolerance: the share of `largest_logit` that `largest_difference` may reach.
    """

    largest_difference: float
    largest_logit: float
    label_changes: int
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the largest difference is within the tolerance; a NaN never is."""
        return self.largest_difference <= self.tolerance * self.largest_logit


def evaluate(bank: Bank, adapter: Adapter, images: ImageSet) -> Outputs:
    """Run an adapter unmerged, by the bank's mixed pass, as the hub serves it.

    It takes one free slot of the bank and gives it back. Images are prepared as the adapter's metadata says.

    Args:
        images: with the adapter's labels, as `sources.read_part(..., labels=adapter.labels)` gives them.

    Raises:
        AdapterError, BankFullError: as `Bank.put`.
        DataError: no images, other labels than the adapter's, or an image that cannot be read.
    """
    if images.labels != adapter.labels:
        other = [label for label in images.labels if label not in adapter.labels] or images.labels
        raise DataError(f"the images' labels {', '.join(other)} are not the adapter's, {', '.join(adapter.labels)}")
    if not len(images):
        raise DataError("no images to evaluate on")
    slot = bank.put(adapter)
    try:
        return _run(bank.device, adapter, images, lambda pixels: bank.forward(pixels, [slot] * len(pixels)))
    finally:
        bank.evict(slot)


def compare_merged(backbone: Backbone, adapter: Adapter, images: ImageSet, unmerged: Outputs) -> Agreement:
    """Run an adapter folded into the backbone's weights over the same images, and compare.

    Raises:
        AdapterError: the adapter does not fit the backbone.
        DataError: an image that cannot be read.
    """
    model = adapter.merge(backbone)
    merged = _run(backbone.device, adapter, images, lambda pixels: model(pixels.to(backbone.dtype)))
    return agreement(unmerged.logits, merged.logits, TOLERANCE[backbone.dtype])


def scores(logits: Tensor, targets: Tensor, labels: tuple[str, ...], *, seed: int = 0) -> Scores:
    """Every figure of one set of answers.

    Args:
        logits: (n, K), n >= 1.
        targets: (n,) indices of classes.
        labels: K names.
        seed: of the bootstrap.
    """
    right = logits.argmax(1) == targets
    return Scores(
        images=len(targets),
        top1=float(right.double().mean()),
        top1_interval=bootstrap_interval(right, seed=seed),
        top5=top_k_accuracy(logits, targets, TOP_K) if len(labels) > TOP_K else None,
        per_class=dict(zip(labels, per_class_accuracy(logits, targets), strict=True)),
        ece=expected_calibration_error(logits, targets),
        nll=negative_log_likelihood(logits, targets),
    )


def top_k_accuracy(logits: Tensor, targets: Tensor, k: int) -> float:
    """The share of images whose target is among the k best answers: (n, K), (n,) -> [0, 1]; 1 <= k <= K."""
    best = logits.topk(k, dim=1).indices  # (n, k)
    return float((best == targets[:, None]).any(1).double().mean())


def per_class_accuracy(logits: Tensor, targets: Tensor) -> list[float | None]:
    """For each of K classes, the share of its images that are classified right; None for a class without images."""
    classes = logits.shape[1]
    total = torch.bincount(targets, minlength=classes)
    right = torch.bincount(targets[logits.argmax(1) == targets], minlength=classes)
    return [r / t if t else None for r, t in zip(right.tolist(), total.tolist(), strict=True)]


def bootstrap_interval(
    right: Tensor, *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """The percentile interval of an accuracy over images drawn with replacement (Efron 1979).

    n images drawn from n of which k are right hold Binomial(n, k / n) right ones: that number is drawn, not the
    images.

    Args:
        right: (n,) bool, n >= 1.
    """
    n, k = len(right), int(right.sum())
    drawn = np.random.default_rng(seed).binomial(n, k / n, resamples) / n
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def expected_calibration_error(logits: Tensor, targets: Tensor, bins: int = ECE_BINS) -> float:
    """The mean gap between confidence and accuracy: (n, K), (n,) -> [0, 1] (Guo et al. 2017, arXiv 1706.04599).

    Confidence is the largest softmax probability, binned into equal widths (a, b]; each bin weighs as many images
    as it holds.
    """
    confidence, answer = logits.double().softmax(1).max(1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    which = torch.bucketize(confidence, edges)  # (n,): 0 .. bins - 1
    gap = (answer == targets).double() - confidence
    return float(torch.zeros(bins, dtype=torch.float64).index_add_(0, which, gap).abs().sum() / len(targets))


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """The mean cross-entropy, in nats."""
    return float(F.cross_entropy(logits.double(), targets))


def agreement(unmerged: Tensor, merged: Tensor, tolerance: float) -> Agreement:
    """How far two sets of logits (n, K) are apart."""
    return Agreement(
        largest_difference=float((unmerged.double() - merged.double()).abs().max()),
        largest_logit=float(merged.abs().max()),
        label_changes=int((unmerged.argmax(1) != merged.argmax(1)).sum()),
        tolerance=tolerance,
    )


@torch.inference_mode()
def _run(
    device: torch.device, adapter: Adapter, images: ImageSet, forward: Callable[[Tensor], Tensor | list[Tensor]]
) -> Outputs:
    mean, std = (torch.tensor(adapter.preprocess[name], device=device) for name in ("mean", "std"))
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    seconds = 0.0
    for pixels, target in DataLoader(Pixels(images, adapter.preprocess, cache_bytes=0), BATCH):
        prepared = normalise(pixels.to(device), mean, std)
        if not logits:
            forward(prepared)  # the first pass of a size allocates memory and, on a GPU, chooses kernels
        _finish(device)
        start = time.perf_counter()
        answers = forward(prepared)
        _finish(device)
        seconds += time.perf_counter() - start
        logits.append((answers if isinstance(answers, Tensor) else torch.stack(answers)).float().cpu())
        targets.append(target)
    return Outputs(torch.cat(logits), torch.cat(targets), len(images) / seconds)


def _finish(device: torch.device) -> None:
    """Wait for a GPU, which runs behind the caller."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
