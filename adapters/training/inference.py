"""Inference of a trained model, or of the frozen backbone, over a whole image set.

Axes: n images, K classes, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..backbone import Backbone, features
from ..data.image_set import ImageTensors
from ..data.images import normalise_for
from ..data.layouts import Split
from ..evaluation.intervals import accuracy_interval
from ..method.karst import KarstModel
from ..short_repr import short_repr

BATCH_SIZE = 64


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for a split.

    Attributes:
        split: "left out" is leave-one-out, "held out" the folds of cross-validation.
        logits: (n, K) float32 on the CPU.
        targets: (n,) int64 on the CPU.
    """

    split: Split | Literal["left out", "held out"]
    images: ImageTensors
    logits: Tensor
    targets: Tensor

    __repr__ = short_repr

    @cached_property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(n,) the class with the highest logit, per image."""
        return self.logits.argmax(1).numpy()

    @cached_property
    def confidences(self) -> npt.NDArray[np.float32]:
        """(n,) the softmax probability of the predicted class, per image."""
        return self.logits.softmax(1).amax(1).numpy()

    @property
    def correct(self) -> int:
        """Number of correct predictions."""
        return int((self.predicted == self.targets.numpy()).sum())

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in [0, 1]."""
        return self.correct / len(self.targets)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return accuracy_interval(self.correct, len(self.targets))

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, in the order of the logits."""
        return self.images.images.labels

    def confusion(self) -> npt.NDArray[np.int64]:
        """Return counts (K, K): a row per true class, a column per predicted class."""
        k = len(self.labels)
        return np.bincount(self.targets.numpy() * k + self.predicted, minlength=k * k).reshape(k, k)

    def worst_errors(self, limit: int) -> list[int]:
        """Return the indices of at most `limit` wrong predictions, the most confident first."""
        wrong = np.flatnonzero(self.predicted != self.targets.numpy())
        return [int(i) for i in wrong[np.argsort(-self.confidences[wrong], kind="stable")][:limit]]


def predict(model: KarstModel, images: ImageTensors, split: Split = "test") -> Predictions:
    """Run a model in eval mode over an image set.

    Raises:
        DataError: an image cannot be read or decoded.
    """
    logits, targets = map_images(model.backbone, images, model.eval())
    return Predictions(split, images, logits.float(), targets)


def accuracy(model: KarstModel, images: ImageTensors) -> float:
    """Return the top-1 accuracy in [0, 1].

    Raises:
        DataError: an image cannot be read or decoded.
    """
    return predict(model, images).accuracy


def pooled_features(backbone: Backbone, images: ImageTensors) -> tuple[Tensor, Tensor]:
    """Return the frozen backbone's pooled features, (n, D) float32 on the CPU, and targets (n,).

    Raises:
        DataError: an image cannot be read or decoded.
    """

    def pooled(pixels: Tensor) -> Tensor:
        return features(backbone.model, pixels.to(backbone.dtype)).float()

    return map_images(backbone, images, pooled)


def adapted_features(model: KarstModel, images: ImageTensors) -> Tensor:
    """Return the adapted backbone's pooled features, (n, D) float32 on the CPU.

    Raises:
        DataError: an image cannot be read or decoded.
    """
    model.eval()
    return map_images(model.backbone, images, lambda pixels: features(model.frozen, pixels).float())[0]


@torch.inference_mode()
def map_images(backbone: Backbone, images: ImageTensors, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Apply a function of normalised pixels (B, 3, H, W) to an image set, in batches.

    Returns:
        Outputs (n, ...) and targets (n,), on the CPU.

    Raises:
        DataError: an image cannot be read or decoded.
    """
    outputs, targets = [], []
    for pixels, target in DataLoader(images, BATCH_SIZE):
        outputs.append(function(normalise_for(backbone, pixels)).cpu())
        targets.append(target)
    return torch.cat(outputs), torch.cat(targets)
