"""Recipes `instant`, `karst` and `auto`: from checked images to an adapter, without an epoch to choose.

`instant` fits a head on the frozen features (`instant.py`). `karst` and `auto` then train KARST and keep it only if it
is better on held-out images (`refine.py`). Probabilities, label sets and typicality are calibrated on images that the
classifier has not seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone import Backbone, BackboneInfo
from ..data.checks import CheckedDataset
from ..data.errors import DataError
from ..data.image_set import ImageSet, ImageTensors
from ..data.images import preprocess_of
from ..evaluation.calibration import coverage_table, fit_confidence
from ..format.file import Adapter
from ..method.config import KarstConfig
from ..method.karst import extract
from ..method.typicality import Typicality, distance_table, fit_gaussian, fit_typicality
from ..short_repr import short_repr
from .inference import Predictions, adapted_features, pooled_features, predict
from .instant import InstantHead, fit_head
from .refine import Refined, refine
from .steps import KarstRecipe, RefineWatch

HEAD_ONLY = KarstConfig(kernels=0, rescale="none")
CURVE_PARTS = (0.25, 0.5, 1.0)  # of the images, in the learning curve
NO_FIGURES: Mapping[str, Any] = {}
MIN_CURVE_IMAGES = 2  # per class and part
MIN_CURVE_TOTAL = 30  # with fewer, one image is more than three points: no curve
MAX_CURVE_IMAGES = 2000  # of an instant training from features: beyond, two more fits take seconds


@dataclass(frozen=True)
class Classifier:
    """A finished classifier, how it did on images that it has not seen, and its adapter.

    Attributes:
        held_out: predictions for left-out images: by leave-one-out, or by the folds of `refine`.
        test: predictions for the test images, or None.
        metrics: figures for the file's metadata.
        learning_curve: (images, leave-one-out accuracy of the instant head) for a quarter, half and all images. Empty
            for fewer than `MIN_CURVE_TOTAL` images.
        refined: the comparison with KARST; None for `instant`.
    """

    adapter: Adapter
    held_out: Predictions
    test: Predictions | None
    metrics: dict[str, Any]
    learning_curve: tuple[tuple[int, float], ...]
    refined: Refined | None = None

    __repr__ = short_repr

    @property
    def chance(self) -> float:
        """Accuracy of the best constant answer."""
        return float(self.held_out.targets.bincount().max()) / len(self.held_out.targets)

    @property
    def beats_chance(self) -> bool:
        """Whether the held-out accuracy is above chance by more than its interval."""
        return self.held_out.interval[0] > self.chance


class InstantWatch(RefineWatch):
    """Progress callbacks of `fit_auto`."""

    def instant(self, classifier: Classifier) -> None:
        """Called before KARST is trained. The instant adapter is written if `classifier.beats_chance`."""


@dataclass(frozen=True)
class Refinement:
    """A training of KARST.

    Attributes:
        images: the images of the instant fit, with their splits.
        config: its gain, if None, is 1 / kernels.
        budget_s: seconds.
    """

    images: CheckedDataset
    config: KarstConfig
    recipe: KarstRecipe
    budget_s: float

    __repr__ = short_repr


@dataclass
class InstantFit:
    """The instant classifier of one dataset, and the frozen features that it was fitted to."""

    backbone: Backbone
    images: ImageTensors
    test_images: ImageTensors | None
    head: InstantHead
    frozen: Tensor
    targets: Tensor
    extra: Mapping[str, Any] = field(default_factory=dict)

    __repr__ = short_repr

    @classmethod
    def of(cls, backbone: Backbone, checked: CheckedDataset, extra: Mapping[str, Any]) -> "InstantFit":
        """Fit the instant head to all images that are not test images.

        Args:
            extra: further figures for the metadata.

        Raises:
            DataError: no class has two images, or an image cannot be read.
        """
        images = checked.train if checked.validation is None else checked.train.joined(checked.validation)
        frozen, targets = pooled_features(backbone, images)
        try:
            head = fit_head(frozen, targets, len(images.images.labels))
        except ValueError as error:
            raise DataError(f"the images are too few: {error}") from error
        return cls(backbone, images, checked.test, head, frozen, targets, extra)

    def classifier(self) -> Classifier:
        """Return the classifier with its calibration."""
        held_out = Predictions("left out", self.images, self.head.scores.float(), self.targets)
        test = None
        if self.test_images is not None:
            features, targets = pooled_features(self.backbone, self.test_images)
            test = Predictions("test", self.test_images, features @ self.head.weight.T + self.head.bias, targets)
        metrics = _metrics("instant", held_out, test) | dict(self.extra)
        labels = self.images.images.labels
        adapter = _instant_adapter(self.head, self.frozen, self.backbone, labels, held_out, metrics)
        return Classifier(adapter, held_out, test, metrics, _learning_curve(self.frozen, self.targets, self.head))

    def refine(self, asked: Refinement, instant: Classifier, watch: RefineWatch | None = None) -> Classifier:
        """Train KARST within a budget; return its classifier if it is better, else the instant one with the report.

        Raises:
            ConfigError: the config does not suit the backbone.
        """
        checked, config = asked.images, asked.config
        if config.gain is None and config.kernels:
            # 1 / rank, the paper's, is too weak for a few hundred steps, and N kernels add up to N times the step.
            config = config.model_copy(update={"gain": 1 / config.kernels})
        train = len(checked.train)
        given = checked.validation is not None
        found = refine(
            self.backbone,
            checked.train,
            self.frozen[:train],
            config,
            asked.recipe,
            budget_s=asked.budget_s,
            validation=checked.validation,
            frozen_validation=self.frozen[train:] if given else None,
            watch=watch,
        )
        figures: dict[str, Any] = {"comparison": found.reason, "instant_accuracy": round(found.instant.accuracy, 4)}
        if found.karst is not None:
            figures["karst_accuracy"] = round(found.karst.accuracy, 4)
            figures["training_dtype"] = str(found.dtype).removeprefix("torch.")
        if found.model is None or found.karst is None:
            metrics = instant.metrics | figures
            return Classifier(
                instant.adapter, instant.held_out, instant.test, metrics, instant.learning_curve, refined=found
            )
        beta = fit_confidence(found.karst.logits.double(), found.karst.targets)
        with torch.no_grad():
            found.model.head.weight.mul_(beta)
            found.model.head.bias.mul_(beta)
        images = self.images.subset(found.karst.index.tolist())
        held_out = Predictions("held out", images, found.karst.logits * beta, found.karst.targets)
        test = predict(found.model, self.test_images, "test") if self.test_images is not None else None
        figures |= {
            "learning_rate": found.learning_rate,
            "steps": found.steps,
            "augmentation": list(found.augmentation),
        }
        metrics = _metrics("karst", held_out, test) | dict(self.extra) | figures
        adapter = extract(
            found.model,
            self.images.images.labels,
            preprocess=preprocess_of(self.backbone),
            metrics=metrics,
            typicality=_adapted_typicality(found, self.images),
            coverage=coverage_table(held_out.logits.softmax(1), held_out.targets),
        )
        return Classifier(adapter, held_out, test, metrics, instant.learning_curve, refined=found)


def instant_from_features(
    features: Tensor,
    targets: Tensor,
    labels: Sequence[str],
    backbone: BackboneInfo,
    *,
    test: tuple[Tensor, Tensor] | None = None,
    extra: Mapping[str, Any] = NO_FIGURES,
) -> Classifier:
    """Return the instant classifier of images whose pooled frozen features are known. It reads no image.

    Args:
        features: (n, D), any float dtype.
        targets: int64 (n,), the index of each image's label in `labels`; every label has an image.
        test: features and targets of the test images.
        extra: further figures for the metadata.

    Raises:
        DataError: a label has no image, or no label has two.
    """
    features = features.float()
    try:
        head = fit_head(features, targets, len(labels))
    except ValueError as error:
        raise DataError(f"the images are too few: {error}") from error
    names = ImageTensors(ImageSet((), (), tuple(labels)), preprocess_of(backbone))
    held_out = Predictions("left out", names, head.scores.float(), targets)
    tested = None
    if test is not None:
        tested = Predictions("test", names, test[0].float() @ head.weight.T + head.bias, test[1])
    metrics = _metrics("instant", held_out, tested) | dict(extra)
    adapter = _instant_adapter(head, features, backbone, labels, held_out, metrics)
    curve = _learning_curve(features, targets, head) if len(targets) <= MAX_CURVE_IMAGES else ()
    return Classifier(adapter, held_out, tested, metrics, curve)


def _learning_curve(features: Tensor, targets: Tensor, head: InstantHead) -> tuple[tuple[int, float], ...]:
    """Return (images, leave-one-out accuracy) for parts of the images with the same shares of the classes.

    Args:
        head: fitted to all images.
    """
    if len(targets) < MIN_CURVE_TOTAL:
        return ()
    rank = torch.empty_like(targets)
    counts = targets.bincount()
    generator = torch.Generator().manual_seed(0)
    for k, count in enumerate(counts):
        rank[targets == k] = torch.randperm(int(count), generator=generator)
    curve = []
    for part in CURVE_PARTS:
        kept = rank < (counts[targets] * part).ceil().clamp_min(1)
        chosen = targets[kept]
        if int(chosen.bincount().min()) < MIN_CURVE_IMAGES:
            continue
        scores = head.scores if part == 1 else fit_head(features[kept], chosen, len(counts)).scores
        curve.append((len(chosen), round(float((scores.argmax(1) == chosen).double().mean()), 4)))
    return tuple(curve)


def _instant_adapter(
    head: InstantHead,
    features: Tensor,
    backbone: BackboneInfo,
    labels: Sequence[str],
    held_out: Predictions,
    metrics: Mapping[str, Any],
) -> Adapter:
    return Adapter.create(
        {"head.weight": head.weight, "head.bias": head.bias} | fit_typicality(features).tensors,
        config=HEAD_ONLY,
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        labels=labels,
        preprocess=preprocess_of(backbone),
        metrics=metrics,
        coverage=coverage_table(held_out.logits.softmax(1), held_out.targets),
    )


def _adapted_typicality(found: Refined, images: ImageTensors) -> Typicality:
    """Return typicality on adapted features; its table comes from images that each fold's model has not seen."""
    assert found.model is not None  # noqa: S101 (the caller has checked)
    distances = []
    for reference, part in zip(found.references, found.features.split(list(found.fold_sizes)), strict=True):
        distances.append(fit_gaussian(reference).distances(part))
    model = fit_gaussian(adapted_features(found.model, images))
    return replace(model, table=distance_table(torch.cat(distances).double()))


def _metrics(recipe: str, held_out: Predictions, test: Predictions | None) -> dict[str, Any]:
    name = "leave_one_out" if held_out.split == "left out" else "held_out"
    confusion = torch.from_numpy(held_out.confusion())
    true, predicted, hit = confusion.sum(1), confusion.sum(0), confusion.diag()
    classes = {
        label: {
            "images": int(true[k]),
            "recall": round(float(hit[k]) / max(int(true[k]), 1), 4),
            "precision": round(float(hit[k]) / int(predicted[k]), 4) if predicted[k] else None,
        }
        for k, label in enumerate(held_out.labels)
    }
    metrics: dict[str, Any] = {
        "recipe": recipe,
        "train_images": len(held_out.targets),
        f"{name}_accuracy": round(held_out.accuracy, 4),
        f"{name}_interval": [round(value, 4) for value in held_out.interval],
        "chance": round(float(held_out.targets.bincount().max()) / len(held_out.targets), 4),
        "classes": classes,
    }
    if test is not None:
        metrics |= {
            "test_images": len(test.targets),
            "test_accuracy": round(test.accuracy, 4),
            "test_interval": [round(value, 4) for value in test.interval],
            "test_loss": round(float(F.cross_entropy(test.logits, test.targets)), 4),
        }
    return metrics
