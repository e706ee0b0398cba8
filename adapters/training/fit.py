"""`adapters.fit`: labelled images in, an adapter file and its report out.

The steps: read the dataset, check it and prepare tensors, train by a recipe, write.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from ..backbone import Backbone, BackboneError, load_backbone
from ..data.checks import check_dataset
from ..data.datasets import DatasetSplits, read_dataset, read_split
from ..data.errors import DataError
from ..data.images import MAX_IMAGE_PIXELS, preprocess_of
from ..environment import chosen_backbone, chosen_device
from ..evaluation.figures import Png
from ..evaluation.html_report import HtmlReport
from ..evaluation.linear_probe import linear_probe
from ..evaluation.outputs import AccuracyInUse, check_free, checkpoint_file, described, report_folder, versions
from ..evaluation.report import write_report
from ..method.config import ConfigError, KarstConfig
from ..paper.devices import is_first_process
from ..paper.fit import fit_paper
from ..paper.recipe import Recipe
from .auto import NO_FIGURES, InstantFit, Refinement
from .auto_files import AutoFiles, fit_auto
from .progress import Watch, watching
from .steps import KarstRecipe
from .trained import Trained

DEFAULT_BUDGET_S = 600.0
_DEFAULT_CONFIG = KarstConfig()
_DEFAULT_KARST = KarstRecipe()
VAL_FRACTION = 0.2  # of the recipe `paper`

RecipeName = Literal["auto", "instant", "karst", "paper"]


def fit(
    data: str | Path | DatasetSplits,
    output: str | Path,
    *,
    backbone: str | Backbone | None = None,
    checkpoint: str | Path | None = None,
    image_size: int | None = None,
    device: str | None = None,
    config: KarstConfig = _DEFAULT_CONFIG,
    recipe: RecipeName | Recipe = "auto",
    karst: KarstRecipe = _DEFAULT_KARST,
    budget_s: float = DEFAULT_BUDGET_S,
    validation: Path | None = None,
    test: Path | None = None,
    val_fraction: float | None = None,
    shots: int | None = None,
    split_seed: int = 0,
    final: bool = False,
    skip_bad: bool = False,
    max_pixels: int = MAX_IMAGE_PIXELS,
    probe: bool = False,
    devices: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    fingerprint: str | None = None,
    in_use: AccuracyInUse | None = None,
    metrics: Mapping[str, Any] = NO_FIGURES,
    watch: Watch | None = None,
) -> Trained:
    """Train an adapter on labelled images. Write it to `output`, and its report to a folder beside it.

    The recipes:

    - `instant`: a head on the frozen features, in closed form; seconds.
    - `karst`, `auto`: the instant adapter is written first; KARST replaces it if it is better on held-out images.
    - `paper`, or a `Recipe`: the epochs of the KARST paper. `<output>.checkpoint` holds the state after the last epoch
      and is deleted at the end.

    Args:
        data: a dataset in any layout that `data.datasets.read_dataset` reads, or its splits. `shots`, `split_seed` and
            `final` select one of several lists of a layout.
        backbone: a timm name, `demo`, or a loaded backbone. None: the one of HUB_BACKBONE, HUB_CHECKPOINT and
            HUB_IMAGE_SIZE, as for the hub; `demo` without HUB_BACKBONE.
        checkpoint, image_size: as in `load_backbone`.
        device: torch device of a backbone that is not loaded; None: HUB_DEVICE, or the CPU without it.
        karst: hyperparameters of `karst` and `auto`.
        budget_s: seconds for KARST in `karst` and `auto`.
        validation, test: datasets that replace the validation and test splits of `data`.
        val_fraction: for `paper`: share of the training images to hold out if there is no validation split, in [0, 1);
            0.2 by default. With 0 the last epoch is selected. The other recipes hold out nothing.
        skip_bad: drop bad images instead of raising (`data.checks.check_dataset`).
        max_pixels: limit on an image's width times height.
        probe: also measure a linear probe on the test images.
        devices: for `paper`: GPUs or CPU processes that share each batch (`train.train_model`).
        resume: for `paper`: continue an interrupted training from its checkpoint.
        overwrite: replace the adapter file and the report of an earlier training; otherwise they are an error.
        fingerprint: that the backbone must have; None: any.
        in_use: accuracy of the classifier in use, for the report.
        metrics: further figures for the adapter's metadata.
        watch: callbacks. None: progress bars in a notebook and on a terminal; `Watch()` shows nothing.

    Raises:
        DataError: the images or labels cannot be used, the output cannot be written or exists (without `overwrite`), or
            the checkpoint does not exist (with `resume`), exists (without), or belongs to another training.
        NotBetterThanChance: a `DataError`: the adapter is kept under another name.
        ConfigError: an option belongs to another recipe, or `config` does not suit the backbone.
        BackboneError: the backbone cannot be loaded, or has another fingerprint.
        AdapterError, FloatingPointError: as `extract` and `train_model`.
    """
    output = Path(output)
    epochs = Recipe() if recipe == "paper" else recipe if isinstance(recipe, Recipe) else None
    if epochs is None:
        _refuse_paper_options(str(recipe), val_fraction=val_fraction, devices=devices, resume=resume)
    report = report_folder(output)
    if not overwrite:
        check_free(output, report)
    state_file = checkpoint_file(output)
    if epochs is not None and state_file.exists() and not resume:
        raise DataError(
            f"{state_file}: checkpoint of an interrupted training; continue with --resume, or delete the file"
        )
    splits = _read_splits(data, validation, test, shots=shots, split_seed=split_seed, final=final, probe=probe)
    with watching(watch, epochs, devices) as watch:
        if isinstance(backbone, Backbone):
            frozen, device = backbone, str(backbone.device)
        else:
            device = device or chosen_device()
            if backbone is None:
                chosen = chosen_backbone()
                watch.using(chosen.name, chosen.origin)
                backbone = chosen.name
                checkpoint, image_size = checkpoint or chosen.checkpoint, image_size or chosen.image_size
            # With several devices, each process copies the backbone to its own device later.
            first_device = device if devices == 1 else "cpu"
            frozen = load_backbone(backbone, checkpoint, device=first_device, image_size=image_size)
        if fingerprint is not None and frozen.fingerprint != fingerprint:
            raise BackboneError(
                f"the weights of backbone {frozen.name!r} have the fingerprint {frozen.fingerprint[:12]}..., "
                f"but {fingerprint[:12]}... is required"
            )
        watch.reading(sum(map(len, splits.by_name().values())))
        held_out = VAL_FRACTION if val_fraction is None else val_fraction
        images = check_dataset(
            splits,
            preprocess_of(frozen),
            val_fraction=0 if final or epochs is None else held_out,
            seed=karst.seed if epochs is None else epochs.seed,
            skip_bad=skip_bad,
            max_pixels=max_pixels,
            on_image=watch.image,
        )
        watch.checked(images)
        extra = dict(metrics)
        if probe and images.test is not None and is_first_process(devices):
            extra["linear_probe_test_accuracy"] = round(linear_probe(frozen, images.train, images.test), 4)
        metadata: dict[str, Any] = {"adapter": output.name, "data": _name_of(data), "device": device}
        metadata |= {"warnings": list(images.warnings), "versions": versions()}
        metadata |= {"left_out": [asdict(files) for files in images.left_out]}
        if epochs is None:
            fitted = InstantFit.of(frozen, images, extra)
            refinement = None if recipe == "instant" else Refinement(images, config, karst, budget_s)
            page = HtmlReport(report, metadata, in_use)
            classifier = fit_auto(fitted, refinement, AutoFiles(output, page), watch)
            return Trained(classifier.adapter, output, report, classifier.metrics, page.figures)
        if in_use is not None:
            metadata |= {"in_use": asdict(in_use)}
        adapter, trained, predictions, figures_of_paper = fit_paper(
            frozen,
            images,
            config,
            epochs,
            metrics={"train_images": len(images.train)} | extra,
            device=device,
            devices=devices,
            checkpoint=state_file,
            resume=resume,
            on_step=watch.step,
            on_epoch=watch.epoch,
        )
        figures: dict[str, Png] = {}
        if is_first_process(devices):
            adapter.write(output)
            metadata |= {"seed": epochs.seed} | described(adapter) | figures_of_paper
            figures = write_report(report, predictions, trained, images.train.images.targets, metadata)
            state_file.unlink(missing_ok=True)
        return Trained(adapter, output, report, figures_of_paper, figures)


def _refuse_paper_options(recipe: str, *, val_fraction: float | None, devices: int, resume: bool) -> None:
    given = {"val_fraction": val_fraction is not None, "devices": devices != 1, "resume": resume}
    for name, is_given in given.items():
        if is_given:
            raise ConfigError(f"{name} belongs to the recipe `paper`, but the recipe is `{recipe}`; leave it out")


def _name_of(data: str | Path | DatasetSplits) -> str:
    return "images of the caller" if isinstance(data, DatasetSplits) else str(data)


def _read_splits(
    data: str | Path | DatasetSplits,
    validation: Path | None,
    test: Path | None,
    *,
    shots: int | None,
    split_seed: int,
    final: bool,
    probe: bool,
) -> DatasetSplits:
    splits = data
    if not isinstance(splits, DatasetSplits):
        splits = read_dataset(Path(splits), shots=shots, seed=split_seed, final=final)
    labels = splits.train.labels
    if validation is not None:
        splits = splits.with_split("validation", read_split(validation, "validation", labels))
    if test is not None:
        splits = splits.with_split("test", read_split(test, "test", labels))
    if probe and splits.test is None:
        raise DataError(
            f"{_name_of(data)}: no test split, which --probe needs; give test images with --test, or omit --probe"
        )
    return splits
