"""From labelled images to an adapter file and its report: `adapters.fit`, and all that `karst-hub train` does.

Reads, checks, trains, measures and writes. `Watch` is told how it goes, for whoever shows progress.
"""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..backbone import Backbone, load_backbone
from ..data.checks import Checked, check
from ..data.datasets import Splits, read, read_part
from ..data.images import DataError, preprocess_of
from ..format.file import Adapter
from ..method.config import KarstConfig
from ..method.karst import extract
from .report import Answers, answers, write_report
from .train import Epoch, Fitted, Recipe, is_first_process, linear_probe, train_model

_NO_CONFIG = KarstConfig()
_NO_RECIPE = Recipe()


class Watch:
    """What happens while an adapter is made; every method may be overridden, and does nothing here."""

    def reading(self, images: int) -> None:
        """So many images are about to be opened."""

    def image(self) -> None:
        """One of them was."""

    def checked(self, images: Checked) -> None:
        """All were, and they can be trained on; `images.warnings` are for a person to read."""

    def step(self, epoch: int, loss: float, accuracy: float) -> None:
        """One batch was trained on, in the epoch of this number: its mean loss, and its accuracy in [0, 1]."""

    def epoch(self, epoch: Epoch) -> None:
        """One pass over the training images has ended."""


@dataclass(frozen=True)
class Trained:
    """An adapter, where it and its report are, and the figures that are also in its metadata."""

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
    config: KarstConfig = _NO_CONFIG,
    recipe: Recipe = _NO_RECIPE,
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
    """Train an adapter on labelled images; write it to `output`, and a report in a folder beside it.

    While it trains, `<output>.checkpoint` holds the last epoch's state; it is deleted in the end.

    Args:
        data: images of any kind that `adapters.sources` reads; `shots`, `split_seed` and `final` choose among lists.
        backbone: a timm name, `demo`, or a backbone that is loaded already; `checkpoint` and `device` as
            `load_backbone` takes them.
        validation, test: sets that take the place of those in `data`.
        val_fraction: of the training images, held out where there is no validation set; 0 takes the last epoch.
        skip_bad: leave bad images out instead of refusing the set.
        probe: measure a linear probe on the test images, too.
        devices: how many GPUs or CPU processes share each batch (`train.train_model`).
        resume: go on from the checkpoint of a training that was interrupted.

    Raises:
        DataError: images or labels that cannot be used, an output that cannot be written, or a checkpoint that is
            not there (with `resume`), is there (without), or is of another training.
        BackboneError, AdapterError, ConfigError, FloatingPointError: as `load_backbone`, `extract` and `train_model`.
    """
    output = Path(output)
    watch = watch or Watch()
    report = report_folder(output)
    interrupted = checkpoint_file(output)
    if interrupted.exists() and not resume:
        raise DataError(f"{interrupted}: a training was interrupted; go on with --resume, or delete this file")
    splits = _read(Path(data), validation, test, shots=shots, split_seed=split_seed, final=final, probe=probe)
    if isinstance(backbone, Backbone):
        frozen, device = backbone, str(backbone.device)
    else:  # several processes come by here: each moves its copy to its own device later
        frozen = load_backbone(backbone, checkpoint, device=device if devices == 1 else "cpu")
    watch.reading(sum(map(len, splits.parts().values())))
    images = check(
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
    fitted = train_model(
        frozen,
        images.train,
        config,
        recipe,
        validation=images.validation,
        device=device,
        devices=devices,
        checkpoint=interrupted,
        resume=resume,
        on_step=watch.step,
        on_epoch=watch.epoch,
    )
    measured = _measure(fitted, images)
    metrics |= _figures(fitted, images, measured) | {"recipe": recipe.model_dump()}
    adapter = extract(fitted.model, measured.labels, preprocess=preprocess_of(frozen), metrics=metrics)
    if is_first_process(devices):
        adapter.write(output)
        facts = {"adapter": output.name, "data": str(data), "device": device, "seed": recipe.seed}
        facts |= {"warnings": list(images.warnings), "versions": _versions()} | _facts(adapter) | metrics
        write_report(report, measured, fitted, images.train.images.targets, facts)
        interrupted.unlink(missing_ok=True)
    return Trained(adapter, output, report, metrics)


def report_folder(output: Path) -> Path:
    """Where the report of an adapter goes: `flowers.report` beside `flowers.safetensors`.

    Raises:
        DataError: the adapter or its report cannot be written there.
    """
    folder = output.with_name(f"{output.name.removesuffix('.safetensors')}.report")
    if not output.absolute().parent.is_dir():
        raise DataError(f"{output}: the folder {output.absolute().parent} does not exist")
    if output.is_dir():
        raise DataError(f"{output}: is a folder; --out names the file to write")
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file, but the report's folder goes there; move it or change --out")
    return folder


def checkpoint_file(output: Path) -> Path:
    """Where the state of a training that is not done yet is kept: `flowers.checkpoint`."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.checkpoint")


def _read(
    data: Path,
    validation: Path | None,
    test: Path | None,
    *,
    shots: int | None,
    split_seed: int,
    final: bool,
    probe: bool,
) -> Splits:
    splits = read(data, shots=shots, seed=split_seed, final=final)
    labels = splits.train.labels
    if validation is not None:
        splits = splits.with_part("validation", read_part(validation, "validation", labels))
    if test is not None:
        splits = splits.with_part("test", read_part(test, "test", labels))
    if probe and splits.test is None:
        raise DataError(f"{data}: has no test images, and --probe needs some (--test): a probe is measured on them")
    return splits


def _measure(fitted: Fitted, images: Checked) -> Answers:
    """On test images if there are some, else on validation images, else on what it was trained on."""
    if images.test is not None:
        return answers(fitted.model, "test", images.test)
    if images.validation is not None:
        return answers(fitted.model, "validation", images.validation)
    return answers(fitted.model, "train", images.train)


def _figures(fitted: Fitted, images: Checked, measured: Answers) -> dict[str, Any]:
    chosen = fitted.chosen
    figures: dict[str, Any] = {"epoch": chosen.number, "train_accuracy": round(chosen.train_accuracy, 4)}
    if images.validation is not None and chosen.val_accuracy is not None:
        figures["val_images"] = len(images.validation)
        figures["val_accuracy"] = round(chosen.val_accuracy, 4)
    if measured.part == "test":
        figures["test_images"] = len(measured.targets)
        figures["test_accuracy"] = round(measured.accuracy, 4)
    return figures


def _facts(adapter: Adapter) -> dict[str, Any]:
    return {
        "digest": adapter.digest,
        "backbone": adapter.backbone,
        "fingerprint": adapter.fingerprint,
        "config": adapter.config.model_dump(mode="json"),
        "preprocess": adapter.preprocess,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("karst-hub", "torch", "timm", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a source tree on the path, not installed
            found[name] = "unknown"
    return found
