"""Commands that work without a hub: train, evaluate, inspect and convert adapter files.

Each command imports the library itself. An import at the top would make all other commands load torch.
"""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AsJson
from .output import checked, err, fail, out, settings, show, usage_error

app = typer.Typer()


class TrainingRecipe(StrEnum):
    """Values of `train --recipe`; see `adapters.fit`."""

    AUTO = "auto"
    INSTANT = "instant"
    KARST = "karst"
    PAPER = "paper"


@app.command()
def train(
    data: Annotated[
        Path,
        typer.Argument(
            help="labelled images: class folders, CSV, Parquet, VTAB-1K or few-shot lists, or a `datasets` set"
        ),
    ],
    output: Annotated[
        Path, typer.Option("--out", "-o", help="adapter file to write; the report goes into a folder beside it")
    ],
    backbone: Annotated[str | None, typer.Option(help="timm model name or `demo`; default: HUB_BACKBONE")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="file with local weights; default: HUB_CHECKPOINT")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="side of the backbone's images in pixels; default: HUB_IMAGE_SIZE")
    ] = None,
    recipe: Annotated[
        TrainingRecipe,
        typer.Option(help="auto: instant, then KARST if it is better; instant: seconds; paper: by epochs"),
    ] = TrainingRecipe.AUTO,
    budget: Annotated[float | None, typer.Option(min=1, help="auto and karst: seconds for KARST; default: 600")] = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            "--val", help="validation images, in any form that DATA accepts; they replace the validation images of DATA"
        ),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="test images, in any form that DATA accepts; the file records their accuracy")
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.9,
            help="paper: share of DATA held out without validation images; 0 keeps the last epoch; default: 0.2",
        ),
    ] = None,
    shots: Annotated[int | None, typer.Option(min=1, help="few-shot lists: images per class")] = None,
    split_seed: Annotated[int, typer.Option(min=0, help="few-shot lists: seed of the list")] = 0,
    final: Annotated[
        bool, typer.Option("--final", help="VTAB-1K: train on train800val200, without validation")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="leave out unreadable and duplicate images; otherwise they are an error")
    ] = False,
    probe: Annotated[bool, typer.Option("--probe", help="also measure a linear probe on the test images")] = False,
    preset: Annotated[
        str | None, typer.Option(help="sizes of the official scripts: karst-vtab, karst-fewshot or karst-swin")
    ] = None,
    kernels: Annotated[int | None, typer.Option(min=1, help="N, Kronecker products per layer; default: 2")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="r, rank of A B; default: 8")] = None,
    factor: Annotated[int | None, typer.Option(min=1, help="p = q, side of C; default: 8")] = None,
    gain: Annotated[float | None, typer.Option(help="factor of the products; default: 1 / N; paper: 1 / r")] = None,
    rescale: Annotated[str | None, typer.Option(help="channel, scalar or none; default: channel")] = None,
    sites: Annotated[
        list[str] | None, typer.Option(help="pattern of layer names to adapt, such as 'blocks.1[01].*'; repeatable")
    ] = None,
    norms: Annotated[bool | None, typer.Option("--norms/--no-norms", help="also train the norm layers")] = None,
    stage_ranks: Annotated[str | None, typer.Option(help="Swin: r of each stage, such as 2,2,4,8")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="paper: passes over the training images")] = None,
    warmup_epochs: Annotated[
        int | None, typer.Option(min=0, help="paper: epochs in which the learning rate rises")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="paper: images per step")] = None,
    lr: Annotated[float | None, typer.Option(help="paper: peak learning rate")] = None,
    weight_decay: Annotated[
        float | None, typer.Option(min=0, help="paper: weight decay of AdamW; default: lr / 10")
    ] = None,
    drop_path: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="paper: stochastic depth, share of skipped blocks")
    ] = None,
    lr_start: Annotated[
        float | None, typer.Option(help="paper: learning rate at the start of the warm-up, as a factor of --lr")
    ] = None,
    lr_end: Annotated[
        float | None, typer.Option(help="paper: learning rate at the end of the cosine, as a factor of --lr")
    ] = None,
    grad_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--grad-checkpointing", help="paper: recompute activations: less memory, more time, the same results"
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="paper: GPUs (or CPU processes) that share each batch")
    ] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help="paper: continue an interrupted training")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the adapter file and the report of an earlier training")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="seed of all random numbers")] = 0,
    url: Annotated[
        str | None, typer.Option(envvar="HUB_URL", help="URL of the hub to train for; its backbone is the default")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="HUB_KEY", help="API key; prefer HUB_KEY")] = None,
    task: Annotated[
        str | None, typer.Option(help="task of the hub whose accuracy the report shows, too; default: the name of -o")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter on labelled images. Write the adapter file, and a report beside it.

    If HUB_URL and HUB_KEY are set, the hub's backbone and image size are the defaults, and others are refused.
    """
    try:
        from . import hub_target
        from . import train as training
    except ModuleNotFoundError as error:
        fail(f"training needs the package {error.name}, which is not installed; run: pip install 'karst-hub[train]'")
    if final and validation is not None:
        usage_error("--final trains on the validation images; omit --val")
    paper = {
        "epochs": epochs,
        "warmup_epochs": warmup_epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "drop_path": drop_path,
        "lr_start": lr_start,
        "lr_end": lr_end,
        "grad_checkpointing": grad_checkpointing,
    }
    given = {name: value for name, value in paper.items() if value is not None}
    run_options = {"val_fraction": val_fraction, "devices": devices, "resume": resume}
    run_options = {name: value for name, value in run_options.items() if value is not None}
    is_paper = recipe is TrainingRecipe.PAPER
    if not is_paper and (given or run_options):
        first = next(iter({**given, **run_options})).replace("_", "-")
        usage_error(
            f"--{first} belongs to --recipe paper, but the recipe is {recipe.value}; omit it, or change --recipe"
        )
    sizes: dict[str, Any] = {
        "preset": preset,
        "kernels": kernels,
        "rank": rank,
        "factor": factor,
        "gain": gain,
        "rescale": rescale,
    }
    sizes |= {"sites": sites, "norms": norms, "stage_ranks": stage_ranks}
    if recipe is TrainingRecipe.INSTANT and (size := [name for name, value in sizes.items() if value is not None]):
        usage_error(f"--{size[0].replace('_', '-')} is of no use to --recipe instant, which trains no kernels; omit it")
    if budget is not None and recipe not in (TrainingRecipe.AUTO, TrainingRecipe.KARST):
        usage_error(f"--budget belongs to --recipe auto and karst, but the recipe is {recipe.value}; omit it")
    config = adapter_config(
        preset,
        stage_ranks,
        kernels=kernels,
        rank=rank,
        factor=factor,
        gain=gain,
        rescale=rescale,
        norms=norms,
        sites=tuple(sites) if sites else None,
    )
    chosen = settings()
    training.silence_further_processes(err, devices or 1)
    target = None
    if url is not None:
        target = hub_target.ask_hub(err, url, key, task or output.name.removesuffix(".safetensors"))
    name = backbone or (chosen.backbone if "backbone" in chosen.model_fields_set else None)
    side = image_size or chosen.image_size
    if target is not None:
        try:
            name, side = target.loading(name, side)
            if recipe is not TrainingRecipe.INSTANT:
                target.check_sizes(config)
        except hub_target.TargetError as error:
            usage_error(str(error))
    report = training.run(
        err,
        data,
        output,
        target=target,
        backbone=name or chosen.backbone,
        checkpoint=checkpoint or chosen.checkpoint,
        image_size=side,
        device=chosen.torch_device,
        config=config,
        recipe=checked(training.Recipe, **given, seed=seed) if is_paper else recipe.value,
        karst=training.KarstRecipe(seed=seed),
        budget_s=training.DEFAULT_BUDGET_S if budget is None else budget,
        validation=validation,
        test=test,
        shots=shots,
        split_seed=split_seed,
        final=final,
        skip_bad=skip_bad,
        max_pixels=chosen.max_image_pixels,
        probe=probe,
        overwrite=overwrite,
        **run_options,
    )
    if target is not None and target.in_use is not None:
        report["in_use"] = asdict(target.in_use) if as_json else target.in_use.sentence
    if not err.quiet:  # with several devices only the first process prints
        show(report, as_json)


@app.command()
def evaluate(
    adapters: Annotated[
        list[Path] | None, typer.Argument(help="adapter files to evaluate on the images of --data")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="labelled images, in any form that `train` accepts; the test split of a set with splits"),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="CSV with the columns adapter,data: each adapter on its own images; replaces --data"),
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="compare with the merged model; exit code 1 if they disagree")
    ] = False,
    backbone: Annotated[str | None, typer.Option(help="timm model name or `demo`; default: HUB_BACKBONE")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="file with local weights; default: HUB_CHECKPOINT")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="as HUB_DTYPE, its default; `int8` also compares with float32")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of the bootstrap interval")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy (top-1, top-5, per class), calibration and throughput of adapters."""
    from . import evaluate as evaluating

    if table is not None:
        if adapters or data is not None:
            usage_error("--table names the adapters and images; omit adapter files and --data")
        pairs = evaluating.read_table(table)
    else:
        if not adapters or data is None:
            usage_error("no images to evaluate; give adapter files and --data, or --table")
        pairs = [(adapter, data) for adapter in adapters]
    chosen = settings() if dtype is None else settings(dtype=dtype)
    report = evaluating.run(
        err,
        pairs,
        backbone=backbone or chosen.backbone,
        checkpoint=checkpoint or chosen.checkpoint,
        image_size=chosen.image_size,
        device=chosen.torch_device,
        dtype=chosen.dtype,
        merged=merged,
        seed=seed,
        max_pixels=chosen.max_image_pixels,
    )
    if as_json:
        show(report, True)
    else:
        for table_of_results in evaluating.tables(report):
            out.print(table_of_results)
    if disagreements := evaluating.disagreements(report):
        fail("; ".join(disagreements))


@app.command()
def inspect(adapter: Annotated[Path, typer.Argument(help="adapter file")], as_json: AsJson = False) -> None:
    """Validate an adapter file and print its contents."""
    from adapters import Adapter

    found = Adapter.read(adapter)
    show(
        {
            "digest": found.digest,
            "bytes": len(found.data),
            "backbone": found.backbone,
            "fingerprint": found.fingerprint,
            "config": found.config.model_dump(),
            "labels": list(found.labels),
            "layers": len(found.layers),
            "numbers": sum(t.numel() for t in found.tensors.values()),
            "preprocess": found.preprocess,
            "metrics": found.metrics,
            "created": found.created,
            "producer": found.producer,
        },
        as_json,
    )


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="adapter file, peft LoKr folder or checkpoint of the official code")],
    output: Annotated[Path, typer.Option("--out", "-o", help="file to write; for lokr and lora a new folder")],
    to: Annotated[str, typer.Option(help="format to write: karst, lokr, lora, timm or onnx")] = "karst",
    backbone: Annotated[str | None, typer.Option(help="timm model name or `demo`; default: HUB_BACKBONE")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="file with local weights; default: HUB_CHECKPOINT")] = None,
    labels: Annotated[Path | None, typer.Option(help="file with class names, one per line, or a JSON list")] = None,
    head: Annotated[
        Path | None, typer.Option(help="safetensors file with weight and bias; needed if the source has no head")
    ] = None,
    preprocess: Annotated[
        Path | None,
        typer.Option(help="JSON file with the preprocessing of the source's images; default: the backbone's"),
    ] = None,
    multiplier: Annotated[
        float | None, typer.Option(help="multiplier of the official checkpoint's run; default: 1")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="truncate a LoRA to this rank; default: the exact rank")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert adapters from peft or the official code, to peft, or merged into a timm checkpoint or ONNX."""
    from adapters import load_backbone
    from adapters.convert.convert import TARGETS
    from adapters.convert.convert import convert as run

    if to not in TARGETS:
        usage_error(f"--to {to}: expected one of {', '.join(TARGETS)}")
    chosen = settings()
    frozen = load_backbone(backbone or chosen.backbone, checkpoint or chosen.checkpoint, image_size=chosen.image_size)
    try:
        report = run(
            source,
            output,
            to,
            frozen,
            labels=labels,
            head=head,
            preprocess=preprocess,
            multiplier=multiplier,
            rank=rank,
        )
    except ModuleNotFoundError as error:
        fail(str(error))
    show(report, as_json)


def adapter_config(preset: str | None, stage_ranks: str | None, **given: Any) -> Any:
    """Return the adapter config: the values of the preset (or the defaults), overridden by the given ones."""
    from adapters.method.config import PRESETS, KarstConfig

    if preset is not None and preset not in PRESETS:
        usage_error(f"--preset {preset}: expected one of {', '.join(PRESETS)}")
    values = (PRESETS[preset] if preset is not None else KarstConfig()).model_dump()
    values |= {name: value for name, value in given.items() if value is not None}
    if stage_ranks is not None:
        try:
            ranks = tuple(int(rank) for rank in stage_ranks.split(","))
        except ValueError:
            usage_error(f"--stage-ranks {stage_ranks}: expected one rank per stage, such as 2,2,4,8")
        values |= {"stage_ranks": ranks, "rank": max(ranks) if given["rank"] is None else given["rank"]}
    if values["stage_ranks"] is not None and max(values["stage_ranks"]) != values["rank"]:
        stages = ",".join(map(str, values["stage_ranks"]))
        usage_error(
            f"--rank {values['rank']}: differs from the largest of the stage ranks {stages}; "
            "omit --rank, or change --stage-ranks"
        )
    return checked(KarstConfig, **values)
