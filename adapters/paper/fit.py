"""Recipe `paper`: the epochs of the KARST paper, for reproduction (docs/method.md)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..backbone import Backbone
from ..data.checks import CheckedDataset
from ..data.images import preprocess_of
from ..format.file import Adapter
from ..method.config import KarstConfig
from ..method.karst import extract
from ..training.inference import Predictions, predict
from .recipe import Recipe
from .selection import EpochResult
from .train import TrainedModel, train_model


def fit_paper(
    backbone: Backbone,
    images: CheckedDataset,
    config: KarstConfig,
    recipe: Recipe,
    *,
    metrics: dict[str, Any],
    device: str,
    devices: int,
    checkpoint: Path,
    resume: bool,
    on_step: Callable[[int, float, float], None],
    on_epoch: Callable[[EpochResult], None],
) -> tuple[Adapter, TrainedModel, Predictions, dict[str, Any]]:
    """Train by epochs; return the adapter, the model, its predictions and the figures in its metadata.

    Args:
        metrics: further figures for the metadata.

    Raises:
        DataError, ConfigError, FloatingPointError: as `train_model`.
    """
    trained = train_model(
        backbone,
        images.train,
        config,
        recipe,
        validation=images.validation,
        device=device,
        devices=devices,
        checkpoint=checkpoint,
        resume=resume,
        on_step=on_step,
        on_epoch=on_epoch,
    )
    predictions = _predict(trained, images)
    metrics = metrics | _metrics(trained, images, predictions) | {"recipe": recipe.model_dump()}
    adapter = extract(trained.model, predictions.labels, preprocess=preprocess_of(backbone), metrics=metrics)
    return adapter, trained, predictions, metrics


def _predict(trained: TrainedModel, images: CheckedDataset) -> Predictions:
    """Predict the test images, else the validation images, else the training images."""
    if images.test is not None:
        return predict(trained.model, images.test, "test")
    if images.validation is not None:
        return predict(trained.model, images.validation, "validation")
    return predict(trained.model, images.train, "train")


def _metrics(trained: TrainedModel, images: CheckedDataset, predictions: Predictions) -> dict[str, Any]:
    selected = trained.selected
    metrics: dict[str, Any] = {"epoch": selected.number, "train_accuracy": round(selected.train_accuracy, 4)}
    if images.validation is not None and selected.val_accuracy is not None:
        metrics["val_images"] = len(images.validation)
        metrics["val_accuracy"] = round(selected.val_accuracy, 4)
    if predictions.split == "test":
        metrics["test_images"] = len(predictions.targets)
        metrics["test_accuracy"] = round(predictions.accuracy, 4)
    return metrics
