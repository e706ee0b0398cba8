"""`adapters.fit`: labelled images in, an adapter file and its report out.

The steps: read the dataset, check it and prepare tensors, train, select an epoch, predict, write.
"""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..backbone import Backbone, load_backbone
from ..data.checks import CheckedDataset, check_dataset
from ..data.datasets import DatasetSplits, read_dataset, read_split
from ..data.errors import DataError
from ..data.images import preprocess_of
from ..format.file import Adapter
from ..method.config import KarstConfig
from ..method.karst import extract
from .devices import is_first_process
from .inference import Predictions, predict
from .linear_probe import linear_probe
from .recipe import Recipe
from .report import write_report
from .selection import EpochResult
from .train import TrainedModel, train_model

_DEFAULT_CONFIG = KarstConfig()
_DEFAULT_RECIPE = Recipe()
_VERSIONED_PACKAGES = ("karst-hub", "torch", "timm", "numpy", "pillow")  # versions in report.json


class Watch:
    """Progress callbacks of `fit`. Override any of them; each does nothing by default."""

    def reading(self, images: int) -> None:
        """Called before the images are decoded, with their number."""

    def image(self) -> None:
        """Called after each decoded image."""

    def checked(self, images: CheckedDataset) -> None:
        """Called when the dataset has passed the checks. Show `images.warnings` to the user."""

    def step(self, epoch: int, loss: float, accuracy: float) -> None:
        """Called after each optimiser step: epoch number from 1, the batch's mean loss and accuracy in [0, 1]."""

    def epoch(self, epoch: EpochResult) -> None:
        """Called after each epoch."""


@dataclass(frozen=True)
class Trained:
    """A trained adapter, its file, its report's folder, and the metrics in its metadata."""

    adapter: Adapter
    file: Path
    report: Path
    metrics: dict[str, Any]


def fit(
    data: str | Path,
    output: str | Path,
    *,
    backbone: str | Backbone = "demo",
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    config: KarstConfig = _DEFAULT_CONFIG,
    recipe: Recipe = _DEFAULT_RECIPE,
    validation: Path | None = None,
    test: Path | None = None,
    val_fraction: float = 0.2,
    shots: int | None = None,
    split_seed: int = 0,
    final: bool = False,
    skip_bad: bool = False,
    probe: bool = False,
    devices: int = 1,
    resume: bool = False,
    watch: Watch | None = None,
) -> Trained:
    """Train an adapter on labelled images. Write it to `output`, and its report to a folder beside it.

    During training `<output>.checkpoint` holds the state after the last epoch. It is deleted at the end.

    Args:
        data: a dataset in any layout that `data.datasets.read_dataset` reads. `shots`, `split_seed` and `final`
            select one of several lists.
        backbone: a timm name, `demo`, or a loaded backbone. `checkpoint` and `device` are those of `load_backbone`.
        validation, test: datasets that replace the validation and test splits of `data`.
        val_fraction: share of the training images to hold out if there is no validation split, in [0, 1). With 0
            the last epoch is selected.
        skip_bad: drop bad images instead of raising (`data.checks.check_dataset`).
        probe: also measure a linear probe on the test images.
        devices: GPUs or CPU processes that share each batch (`train.train_model`).
        resume: continue an interrupted training from its checkpoint.

    Raises:
        DataError: the images or labels cannot be used, the output cannot be written, or the checkpoint does not exist
            (with `resume`), exists (without), or belongs to another training.
        BackboneError, AdapterError, ConfigError, FloatingPointError: as `load_backbone`, `extract` and `train_model`.
    """
    output = Path(output)
    watch = watch or Watch()
    report = report_folder(output)
    state_file = checkpoint_file(output)
    if state_file.exists() and not resume:
        raise DataError(
            f"{state_file}: checkpoint of an interrupted training; continue with --resume, or delete the file"
        )
    splits = _read_splits(Path(data), validation, test, shots=shots, split_seed=split_seed, final=final, probe=probe)
    if isinstance(backbone, Backbone):
        frozen, device = backbone, str(backbone.device)
    else:  # with several devices, each process copies the backbone to its own device later
        frozen = load_backbone(backbone, checkpoint, device=device if devices == 1 else "cpu")
    watch.reading(sum(map(len, splits.by_name().values())))
    images = check_dataset(
        splits,
        preprocess_of(frozen),
        val_fraction=0 if final else val_fraction,
        seed=recipe.seed,
        skip_bad=skip_bad,
        on_image=watch.image,
    )
    watch.checked(images)
    metrics: dict[str, Any] = {"train_images": len(images.train)}
    if probe and images.test is not None and is_first_process(devices):
        metrics["linear_probe_test_accuracy"] = round(linear_probe(frozen, images.train, images.test), 4)
    trained = train_model(
        frozen,
        images.train,
        config,
        recipe,
        validation=images.validation,
        device=device,
        devices=devices,
        checkpoint=state_file,
        resume=resume,
        on_step=watch.step,
        on_epoch=watch.epoch,
    )
    predictions = _predict(trained, images)
    metrics |= _metrics(trained, images, predictions) | {"recipe": recipe.model_dump()}
    adapter = extract(trained.model, predictions.labels, preprocess=preprocess_of(frozen), metrics=metrics)
    if is_first_process(devices):
        adapter.write(output)
        metadata: dict[str, Any] = {"adapter": output.name, "data": str(data), "device": device, "seed": recipe.seed}
        metadata |= {"warnings": list(images.warnings), "versions": _versions()} | _described(adapter) | metrics
        write_report(report, predictions, trained, images.train.images.targets, metadata)
        state_file.unlink(missing_ok=True)
    return Trained(adapter, output, report, metrics)


def report_folder(output: Path) -> Path:
    """Return the folder of an adapter's report: `flowers.report` beside `flowers.safetensors`.

    Raises:
        DataError: the adapter or its report cannot be written there.
    """
    folder = output.with_name(f"{output.name.removesuffix('.safetensors')}.report")
    if not output.absolute().parent.is_dir():
        raise DataError(f"{output}: the folder {output.absolute().parent} does not exist; create it, or change --out")
    if output.is_dir():
        raise DataError(f"{output}: is a folder; --out must name a file")
    if folder.exists() and not folder.is_dir():
        raise DataError(
            f"{folder}: is a file, but the report needs a folder of this name; move the file, or change --out"
        )
    return folder


def checkpoint_file(output: Path) -> Path:
    """Return the checkpoint file of a training in progress: `flowers.checkpoint` beside `flowers.safetensors`."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.checkpoint")


def _read_splits(
    data: Path,
    validation: Path | None,
    test: Path | None,
    *,
    shots: int | None,
    split_seed: int,
    final: bool,
    probe: bool,
) -> DatasetSplits:
    splits = read_dataset(data, shots=shots, seed=split_seed, final=final)
    labels = splits.train.labels
    if validation is not None:
        splits = splits.with_split("validation", read_split(validation, "validation", labels))
    if test is not None:
        splits = splits.with_split("test", read_split(test, "test", labels))
    if probe and splits.test is None:
        raise DataError(f"{data}: no test split, which --probe needs; give test images with --test, or omit --probe")
    return splits


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


def _described(adapter: Adapter) -> dict[str, Any]:
    return {
        "digest": adapter.digest,
        "backbone": adapter.backbone,
        "fingerprint": adapter.fingerprint,
        "config": adapter.config.model_dump(mode="json"),
        "preprocess": adapter.preprocess,
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _VERSIONED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a source tree on the path, without an installed package
            versions[name] = "unknown"
    return versions
