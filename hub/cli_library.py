"""The commands that need no hub: train, evaluate, inspect and convert adapter files.

The library is imported inside each command: torch would slow down every other.
"""

from pathlib import Path
from typing import Annotated

import typer

from .console import AsJson, checked, err, fail, settings, show, usage

app = typer.Typer()


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="folder with a folder of images for each class")],
    output: Annotated[Path, typer.Option("--out", "-o", help="adapter file to write")],
    backbone: Annotated[str | None, typer.Option(help="timm name or `demo`; else HUB_BACKBONE")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="local weights; else HUB_CHECKPOINT")] = None,
    test: Annotated[Path | None, typer.Option(help="held-out folder; accuracy there goes into the file")] = None,
    probe: Annotated[bool, typer.Option(help="measure a linear probe on the same folders too (needs --test)")] = False,
    val_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="images held out to choose the best epoch; 0: the last epoch")
    ] = 0.2,
    kernels: Annotated[int, typer.Option(min=1, help="N, Kronecker products a layer")] = 2,
    rank: Annotated[int, typer.Option(min=1, help="r")] = 8,
    factor: Annotated[int, typer.Option(min=1, help="p = q, the side of C")] = 8,
    rescale: Annotated[str, typer.Option(help="channel, scalar or none")] = "channel",
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    warmup_epochs: Annotated[int, typer.Option(min=0)] = 10,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 1e-3,
    drop_path: Annotated[float, typer.Option(min=0, max=0.9, help="stochastic depth")] = 0.1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Train an adapter on a folder of class folders and write it to one file."""
    try:
        from . import training
    except ModuleNotFoundError as error:
        fail(f"training needs {error.name}: pip install 'karst-hub[train]'")
    if probe and test is None:
        usage("--probe needs --test: a probe's accuracy is measured on held-out images")
    chosen = settings()
    report = training.run(
        err,
        data=data,
        output=output,
        backbone=backbone or chosen.backbone,
        checkpoint=checkpoint or chosen.checkpoint,
        device=chosen.torch_device,
        test=test,
        probe=probe,
        val_fraction=val_fraction,
        config=checked(training.KarstConfig, kernels=kernels, rank=rank, factor=factor, rescale=rescale),
        recipe=checked(
            training.Recipe,
            epochs=epochs,
            warmup_epochs=warmup_epochs,
            batch_size=batch_size,
            lr=lr,
            drop_path=drop_path,
            seed=seed,
        ),
    )
    show(report, as_json)


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
            "layers": len(found.layers()),
            "numbers": sum(t.numel() for t in found.tensors.values()),
            "preprocess": found.preprocess,
            "metrics": found.metrics,
            "created": found.created,
            "producer": found.producer,
        },
        as_json,
    )
