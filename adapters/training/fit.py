"""`adapters.fit`: labelled images in, an adapter file and its report out.

The steps: read the dataset, check it and prepare tensors, train by a recipe, write.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..backbone import Backbone, BackboneError, load_backbone
from ..data.checks import CheckedDataset, check_dataset
from ..data.datasets import DatasetSplits, read_dataset, read_split
from ..data.errors import DataError
from ..data.images import MAX_IMAGE_PIXELS, preprocess_of
from ..evaluation.html_report import HtmlReport
from ..evaluation.linear_probe import linear_probe
from ..evaluation.outputs import AccuracyInUse, checkpoint_file, described, report_folder, versions
from ..evaluation.report import write_report
from ..format.file import Adapter
from ..method.config import ConfigError, KarstConfig
from ..paper.devices import is_first_process
from ..paper.fit import fit_paper
from ..paper.recipe import Recipe
from ..paper.selection import EpochResult
from .auto import InstantFit, InstantWatch, Refinement
from .auto_files import AutoFiles, fit_auto
from .steps import KarstRecipe

DEFAULT_BUDGET_S = 600.0
_DEFAULT_CONFIG = KarstConfig()
_DEFAULT_KARST = KarstRecipe()
VAL_FRACTION = 0.2  # of the recipe `paper`

RecipeName = Literal["auto", "instant", "karst", "paper"]


class Watch(InstantWatch):
    """Progress callbacks of `fit`. Override any of them; each does nothing by default."""

    def reading(self, images: int) -> None:
        """Called before the images are decoded, with their number."""

    def image(self) -> None:
        """Called after each decoded image."""

    def checked(self, images: CheckedDataset) -> None:
        """Called when the dataset has passed the checks. Show `images.warnings` to the user."""

    def step(self, epoch: int, loss: float, accuracy: float) -> None:
        """Called after each step of `paper`: epoch number from 1, the batch's mean loss and accuracy in [0, 1]."""

    def epoch(self, epoch: EpochResult) -> None:
        """Called after each epoch of the recipe `paper`."""


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
    image_size: int | None = None,
    device: str = "cpu",
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
    fingerprint: str | None = None,
    in_use: AccuracyInUse | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train an adapter on labelled images. Write it to `output`, and its report to a folder beside it.

    The recipes:

    - `instant`: a head on the frozen features, in closed form; seconds.
    - `karst`, `auto`: the instant adapter is written first; KARST replaces it if it is better on held-out images.
    - `paper`, or a `Recipe`: the epochs of the KARST paper. `<output>.checkpoint` holds the state after the last epoch
      and is deleted at the end.

    Args:
        data: a dataset in any layout that `data.datasets.read_dataset` reads. `shots`, `split_seed` and `final`
            select one of several lists.
        backbone: a timm name, `demo`, or a loaded backbone. `checkpoint`, `image_size` and `device` are those of
            `load_backbone`.
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
        fingerprint: that the backbone must have; None: any.
        in_use: accuracy of the classifier in use, for the report.

    Raises:
        DataError: the images or labels cannot be used, the output cannot be written, or the checkpoint does not exist
            (with `resume`), exists (without), or belongs to another training.
        NotBetterThanChance: a `DataError`: the adapter is kept under another name.
        ConfigError: an option belongs to another recipe, or `config` does not suit the backbone.
        BackboneError: the backbone cannot be loaded, or has another fingerprint.
        AdapterError, FloatingPointError: as `extract` and `train_model`.
    """
    output = Path(output)
    watch = watch or Watch()
    epochs = Recipe() if recipe == "paper" else recipe if isinstance(recipe, Recipe) else None
    if epochs is None:
        _refuse_paper_options(str(recipe), val_fraction=val_fraction, devices=devices, resume=resume)
    report = report_folder(output)
    state_file = checkpoint_file(output)
    if epochs is not None and state_file.exists() and not resume:
        raise DataError(
            f"{state_file}: checkpoint of an interrupted training; continue with --resume, or delete the file"
        )
    splits = _read_splits(Path(data), validation, test, shots=shots, split_seed=split_seed, final=final, probe=probe)
    if isinstance(backbone, Backbone):
        frozen, device = backbone, str(backbone.device)
    else:  # with several devices, each process copies the backbone to its own device later
        frozen = load_backbone(backbone, checkpoint, device=device if devices == 1 else "cpu", image_size=image_size)
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
    extra: dict[str, Any] = {}
    if probe and images.test is not None and is_first_process(devices):
        extra["linear_probe_test_accuracy"] = round(linear_probe(frozen, images.train, images.test), 4)
    metadata: dict[str, Any] = {"adapter": output.name, "data": str(data), "device": device}
    metadata |= {"warnings": list(images.warnings), "versions": versions()}
    metadata |= {"left_out": [asdict(files) for files in images.left_out]}
    if epochs is None:
        fitted = InstantFit.of(frozen, images, extra)
        refinement = None if recipe == "instant" else Refinement(images, config, karst, budget_s)
        files = AutoFiles(output, HtmlReport(report, metadata, in_use))
        classifier = fit_auto(fitted, refinement, files, watch)
        return Trained(classifier.adapter, output, report, classifier.metrics)
    if in_use is not None:
        metadata |= {"in_use": asdict(in_use)}
    adapter, trained, predictions, metrics = fit_paper(
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
    if is_first_process(devices):
        adapter.write(output)
        metadata |= {"seed": epochs.seed} | described(adapter) | metrics
        write_report(report, predictions, trained, images.train.images.targets, metadata)
        state_file.unlink(missing_ok=True)
    return Trained(adapter, output, report, metrics)


def _refuse_paper_options(recipe: str, *, val_fraction: float | None, devices: int, resume: bool) -> None:
    given = {"val_fraction": val_fraction is not None, "devices": devices != 1, "resume": resume}
    for name, is_given in given.items():
        if is_given:
            raise ConfigError(f"{name} belongs to the recipe `paper`, but the recipe is `{recipe}`; leave it out")


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
