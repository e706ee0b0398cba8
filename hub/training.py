"""`karst-hub train`: a folder of class folders -> one adapter file, with a progress bar."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from adapters import Adapter, KarstConfig, extract, load_backbone
from adapters.data import DataError, Pixels, preprocess_of, read_folder
from adapters.train import Epoch, Recipe, accuracy, fit, linear_probe, split, steps_per_epoch

__all__ = ["KarstConfig", "Recipe", "run"]


def run(
    console: Console,
    *,
    data: Path,
    output: Path,
    backbone: str,
    checkpoint: Path | None,
    device: str,
    test: Path | None,
    probe: bool,
    val_fraction: float,
    config: KarstConfig,
    recipe: Recipe,
) -> dict[str, Any]:
    """Train, measure and write; returns the figures that are also in the file's metadata.

    Raises:
        DataError: a folder or image that cannot be used, or an output folder that is not there.
        BackboneError, AdapterError, FloatingPointError: as `load_backbone`, `extract` and `fit`.
    """
    if not output.absolute().parent.is_dir():
        raise DataError(f"{output}: the folder {output.absolute().parent} does not exist")
    if output.is_dir():
        raise DataError(f"{output}: is a folder; --out names the file to write")
    images = read_folder(data)
    tests = read_folder(test, images.labels) if test is not None else None
    kept, held = split(images, val_fraction, recipe.seed) if val_fraction else (images, None)
    console.print(
        f"{len(kept)} training images, {len(held) if held else 0} for validation, {len(tests) if tests else 0} "
        f"held out; {len(images.labels)} classes"
    )
    frozen = load_backbone(backbone, checkpoint, device=device)
    preprocess = preprocess_of(frozen)
    pixels = Pixels(kept, preprocess)
    validation, held_out = (Pixels(part, preprocess) if part is not None else None for part in (held, tests))
    metrics: dict[str, Any] = {"train_images": len(kept)}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        for part in filter(None, (pixels, validation, held_out)):  # a bad image ends it now, not after training
            for i in progress.track(range(len(part)), description="reading images"):
                part[i]
        if probe and held_out is not None:
            metrics["linear_probe_test_accuracy"] = round(linear_probe(frozen, pixels, held_out), 4)
        bar = progress.add_task("training", total=steps_per_epoch(len(kept), recipe) * recipe.epochs)

        def show(epoch: Epoch) -> None:
            val = f", validation {epoch.val_accuracy:.1%}" if epoch.val_accuracy is not None else ""
            progress.update(
                bar,
                description=f"epoch {epoch.number}: loss {epoch.loss:.3f}, training {epoch.train_accuracy:.1%}{val}",
            )

        fitted = fit(
            frozen,
            pixels,
            config,
            recipe,
            validation=validation,
            on_step=lambda: progress.advance(bar),
            on_epoch=show,
        )
    metrics |= {
        "epoch": fitted.chosen.number,
        "train_accuracy": round(fitted.chosen.train_accuracy, 4),
        "recipe": recipe.model_dump(),
    }
    if fitted.chosen.val_accuracy is not None:
        metrics["val_accuracy"] = round(fitted.chosen.val_accuracy, 4)
    if held_out is not None:
        metrics["test_images"] = len(held_out)
        metrics["test_accuracy"] = round(accuracy(fitted.model, held_out), 4)
    adapter: Adapter = extract(fitted.model, images.labels, preprocess=preprocess, metrics=metrics)
    adapter.write(output)
    return {"file": str(output), "bytes": len(adapter.data), "digest": adapter.digest, "labels": len(images.labels)} | {
        name: value for name, value in metrics.items() if name != "recipe"
    }
