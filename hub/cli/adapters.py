"""The commands that need no hub: train, evaluate, inspect and convert adapter files.

The library is imported inside each command: torch would slow down every other.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import AsJson, checked, err, fail, out, settings, show, usage

app = typer.Typer()


@app.command()
def train(
    data: Annotated[
        Path,
        typer.Argument(help="folder of class folders, CSV or Parquet, VTAB-1K or few-shot lists, or a datasets set"),
    ],
    output: Annotated[Path, typer.Option("--out", "-o", help="adapter file to write; a report goes beside it")],
    backbone: Annotated[str | None, typer.Option(help="timm name or `demo`; else HUB_BACKBONE")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="local weights; else HUB_CHECKPOINT")] = None,
    validation: Annotated[
        Path | None, typer.Option("--val", help="validation images, of any kind that DATA may be, instead of its own")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="test images, the same; accuracy there goes into the file")] = None,
    val_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="without validation images: share to hold out; 0: the last epoch")
    ] = 0.2,
    shots: Annotated[int | None, typer.Option(min=1, help="few-shot lists: which")] = None,
    split_seed: Annotated[int, typer.Option(min=0, help="few-shot lists: the seed of the list")] = 0,
    final: Annotated[
        bool, typer.Option("--final", help="VTAB-1K: train on train800val200, without validation")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="leave out unreadable images and copies instead of refusing the set")
    ] = False,
    probe: Annotated[bool, typer.Option("--probe", help="measure a linear probe on the test images, too")] = False,
    preset: Annotated[
        str | None, typer.Option(help="sizes of the official scripts: karst-vtab, karst-fewshot or karst-swin")
    ] = None,
    kernels: Annotated[int | None, typer.Option(min=1, help="N, Kronecker products a layer; else 2")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="r; else 8")] = None,
    factor: Annotated[int | None, typer.Option(min=1, help="p = q, the side of C; else 8")] = None,
    gain: Annotated[float | None, typer.Option(help="g, what the products are multiplied with; else 1 / r")] = None,
    rescale: Annotated[str | None, typer.Option(help="channel, scalar or none; else channel")] = None,
    sites: Annotated[
        list[str] | None, typer.Option(help="pattern of layers to adapt, such as 'blocks.1[01].*'; may be repeated")
    ] = None,
    norms: Annotated[bool | None, typer.Option("--norms/--no-norms", help="train the norm layers, too")] = None,
    stage_ranks: Annotated[str | None, typer.Option(help="Swin: r of each stage, such as 2,2,4,8")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    warmup_epochs: Annotated[int, typer.Option(min=0)] = 10,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 1e-3,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="AdamW's; else lr / 10")] = None,
    drop_path: Annotated[float, typer.Option(min=0, max=0.9, help="stochastic depth")] = 0.1,
    lr_start: Annotated[float, typer.Option(help="where the warm-up starts, in parts of --lr")] = 0.01,
    lr_end: Annotated[float, typer.Option(help="where the cosine ends, in parts of --lr")] = 0.1,
    grad_checkpointing: Annotated[
        bool, typer.Option("--grad-checkpointing", help="less memory, more time, same numbers")
    ] = False,
    devices: Annotated[int, typer.Option(min=1, help="GPUs, or processes on the CPU, that share each batch")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a training that was interrupted")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Train an adapter on labelled images; write it to one file, and a report beside it."""
    try:
        from . import train as training
    except ModuleNotFoundError as error:
        fail(f"training needs {error.name}: pip install 'karst-hub[train]'")
    if final and validation is not None:
        usage("--final trains on the validation images: give no --val beside it")
    chosen = settings()
    report = training.run(
        err,
        data,
        output,
        backbone=backbone or chosen.backbone,
        checkpoint=checkpoint or chosen.checkpoint,
        device=chosen.torch_device,
        config=_config(
            preset,
            stage_ranks,
            kernels=kernels,
            rank=rank,
            factor=factor,
            gain=gain,
            rescale=rescale,
            norms=norms,
            sites=tuple(sites) if sites else None,
        ),
        recipe=checked(
            training.Recipe,
            epochs=epochs,
            warmup_epochs=warmup_epochs,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            drop_path=drop_path,
            lr_start=lr_start,
            lr_end=lr_end,
            grad_checkpointing=grad_checkpointing,
            seed=seed,
        ),
        validation=validation,
        test=test,
        val_fraction=val_fraction,
        shots=shots,
        split_seed=split_seed,
        final=final,
        skip_bad=skip_bad,
        probe=probe,
        devices=devices,
        resume=resume,
    )
    if not err.quiet:  # on several devices one process speaks for all
        show(report, as_json)


@app.command()
def evaluate(
    adapters: Annotated[list[Path] | None, typer.Argument(help="adapter files, all on the images of --data")] = None,
    data: Annotated[
        Path | None, typer.Option(help="labelled images, as `train` takes them; of a set with splits, its test images")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="CSV with columns adapter,data instead: each adapter on images of its own")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="check that the merged form agrees; else exit code 1")
    ] = False,
    backbone: Annotated[str | None, typer.Option(help="timm name or `demo`; else HUB_BACKBONE")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="local weights; else HUB_CHECKPOINT")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the bootstrap interval")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure adapters: accuracy (top-1, top-5, each class), calibration and throughput."""
    from . import evaluate as evaluating

    if table is not None:
        if adapters or data is not None:
            usage("--table names adapters and images: give no others beside it")
        pairs = evaluating.read_table(table)
    else:
        if not adapters or data is None:
            usage("give adapter files and --data, or --table")
        pairs = [(adapter, data) for adapter in adapters]
    chosen = settings()
    report = evaluating.run(
        err,
        pairs,
        backbone=backbone or chosen.backbone,
        checkpoint=checkpoint or chosen.checkpoint,
        device=chosen.torch_device,
        dtype=chosen.dtype,
        merged=merged,
        seed=seed,
    )
    if as_json:
        show(report, True)
    else:
        for found in evaluating.tables(report):
            out.print(found)
    if apart := evaluating.disagreements(report):
        fail("; ".join(apart))


@app.command()
def inspect(adapter: Annotated[Path, typer.Argument(help="adapter file")], as_json: AsJson = False) -> None:
    """Validate an adapter file and show what is in it."""
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
    source: Annotated[Path, typer.Argument(help="adapter file, peft LoKr folder, or official-style checkpoint")],
    output: Annotated[Path, typer.Option("--out", "-o", help="file to write, or (lokr, lora) a new folder")],
    to: Annotated[str, typer.Option(help="karst, lokr, lora, timm or onnx")] = "karst",
    backbone: Annotated[str | None, typer.Option(help="timm name or `demo`; else HUB_BACKBONE")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="local weights; else HUB_CHECKPOINT")] = None,
    labels: Annotated[Path | None, typer.Option(help="class names: one a line, or a JSON list")] = None,
    head: Annotated[Path | None, typer.Option(help="safetensors with weight and bias, if the source has none")] = None,
    preprocess: Annotated[
        Path | None, typer.Option(help="JSON: what the source's images went through; else the backbone's own")
    ] = None,
    multiplier: Annotated[float | None, typer.Option(help="of an official checkpoint's run; else 1")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="cut a LoRA to this rank; else it is exact")] = None,
    as_json: AsJson = False,
) -> None:
    """Bring adapters in from peft or the official code; out to peft, or merged into a timm checkpoint or ONNX."""
    from adapters import load_backbone
    from adapters.convert.convert import TARGETS
    from adapters.convert.convert import convert as run

    if to not in TARGETS:
        usage(f"--to {to}: expected one of {', '.join(TARGETS)}")
    chosen = settings()
    frozen = load_backbone(backbone or chosen.backbone, checkpoint or chosen.checkpoint)
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


def _config(preset: str | None, stage_ranks: str | None, **given: Any) -> Any:
    """An adapter's config: a preset's values or the defaults, but for what is given."""
    from adapters.method.config import PRESETS, KarstConfig

    if preset is not None and preset not in PRESETS:
        usage(f"--preset {preset}: expected one of {', '.join(PRESETS)}")
    values = (PRESETS[preset] if preset is not None else KarstConfig()).model_dump()
    values |= {name: value for name, value in given.items() if value is not None}
    if stage_ranks is not None:
        try:
            ranks = tuple(int(rank) for rank in stage_ranks.split(","))
        except ValueError:
            usage(f"--stage-ranks {stage_ranks}: expected a rank for each stage, such as 2,2,4,8")
        values |= {"stage_ranks": ranks, "rank": max(ranks) if given["rank"] is None else given["rank"]}
    if values["stage_ranks"] is not None and max(values["stage_ranks"]) != values["rank"]:
        stages = ",".join(map(str, values["stage_ranks"]))
        usage(f"--rank {values['rank']}: the largest of the stages' ranks {stages} is expected; see --stage-ranks")
    return checked(KarstConfig, **values)
