"""The command line: `karst-hub`. Exit codes: 0, 1 (the hub or a file said no), 2 (usage)."""

import json
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from .client import Client
from .errors import HubError
from .settings import Settings

app = typer.Typer(
    help="One frozen vision transformer, many KARST adapters: train, register and classify.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# No markup: labels, paths and messages may hold brackets.
out = Console(highlight=False, markup=False)
err = Console(stderr=True, highlight=False, markup=False)

Url = Annotated[str, typer.Option(envvar="HUB_URL", help="the hub's address")]
Key = Annotated[str, typer.Option(envvar="HUB_KEY", help="an API key; better in HUB_KEY than on the command line")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for scripts")]
# By name: importing these kinds here would load torch for every command.
_EXPECTED = ("AdapterError", "BackboneError", "DataError", "EmbeddedRedisError", "StartError", "FloatingPointError")
DEFAULT_URL = "http://127.0.0.1:8000"


def main() -> None:
    """Run the command line; whatever is expected to go wrong ends in one line on stderr, never in a traceback."""
    try:
        app()
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        if not isinstance(error, HubError) and type(error).__name__ not in _EXPECTED:
            raise
        _fail(str(error))


@app.command()
def serve() -> None:
    """Run a hub on this machine until Ctrl-C; its options are HUB_* environment variables (docs/settings.md)."""
    from .local import local_hub

    settings = _settings()
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while starting: unwind, as Ctrl-C does
    err.print(f"starting: backbone {settings.backbone}, data in {settings.home}")
    with local_hub(settings) as hub:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        if hub.first_key is not None:
            err.print("The first key (owner of tenant `default`); it is shown only now, keep it:")
            out.print(f"HUB_KEY={hub.first_key}", soft_wrap=True)
        out.print(f"HUB_URL={hub.url}", soft_wrap=True)
        err.print("ready; Ctrl-C stops")
        sys.stdout.flush()
        stopping.wait()
        err.print("stopping")


@app.command()
def demo() -> None:
    """Start a hub on free ports, register three tasks, classify real images of all three, and stop it all."""
    from . import demo as demonstration

    demonstration.run(out, _settings(**demonstration.SETTINGS))


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
        _fail(f"training needs {error.name}: pip install 'karst-hub[train]'")
    if probe and test is None:
        _usage("--probe needs --test: a probe's accuracy is measured on held-out images")
    settings = _settings()
    report = training.run(
        err,
        data=data,
        output=output,
        backbone=backbone or settings.backbone,
        checkpoint=checkpoint or settings.checkpoint,
        device=settings.torch_device,
        test=test,
        probe=probe,
        val_fraction=val_fraction,
        config=_checked(lambda c: c.KarstConfig, kernels=kernels, rank=rank, factor=factor, rescale=rescale),
        recipe=_checked(
            lambda c: c.Recipe,
            epochs=epochs,
            warmup_epochs=warmup_epochs,
            batch_size=batch_size,
            lr=lr,
            drop_path=drop_path,
            seed=seed,
        ),
    )
    _show(report, as_json)


@app.command()
def inspect(adapter: Annotated[Path, typer.Argument(help="adapter file")], as_json: AsJson = False) -> None:
    """Validate an adapter file and show what is in it."""
    from adapters import Adapter

    found = Adapter.read(adapter)
    _show(
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


@app.command()
def register(
    task: Annotated[str, typer.Argument(help="name of the task")],
    adapter: Annotated[Path, typer.Argument(help="adapter file")],
    key: Key,
    alias: Annotated[str | None, typer.Option(help="alias to move to this version, beside `latest`")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Register an adapter file as a version of a task; it can be called at once."""
    with Client(url, key) as client:
        done = client.register(task, adapter, alias=alias)
    if as_json:
        _show(done, True)
    else:
        out.print(f"{done.task} version {done.version}: {len(done.labels)} labels, digest {done.digest[:12]}")


@app.command()
def tasks(key: Key, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the tasks that the key's tenant owns."""
    with Client(url, key) as client:
        found = client.tasks()
    if as_json:
        return _show(found, True)
    table = Table("task", "latest", "classes", "aliases")
    for task in found.tasks:
        aliases = ", ".join(f"{alias} -> {'/'.join(map(str, to))}" for alias, to in task.aliases.items())
        table.add_row(task.task, str(task.latest or "-"), str(task.classes), aliases)
    out.print(table)


@app.command()
def classify(
    task: Annotated[str, typer.Argument(help="name of the task")],
    images: Annotated[list[Path], typer.Argument(help="image files")],
    key: Key,
    top_k: Annotated[int, typer.Option(min=1, help="labels an image")] = 1,
    version: Annotated[str, typer.Option(help="a version's number or an alias")] = "latest",
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Classify image files with a task."""
    with Client(url, key) as client:
        answer = client.classify(task, list(images), top_k=top_k, version=version)
    if as_json:
        return _show(answer, True)
    table = Table("image", "label", "score")
    for image, predictions in zip(images, answer.predictions, strict=True):
        for prediction in predictions:
            table.add_row(str(image), prediction.label, f"{prediction.score:.3f}")
    out.print(table)


def _settings(**fixed: Any) -> Settings:
    """The environment's settings, but for what is fixed."""
    try:
        return Settings(**fixed)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"]:
            _usage(f"HUB_{str(first['loc'][0]).upper()}={first['input']!r}: {first['msg']}")
        _usage(f"settings: {first['msg']}")


def _checked(kind: Any, **values: Any) -> Any:
    """A config of the library from options; a value that it refuses is a usage error."""
    from . import training

    try:
        return kind(training)(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        _usage(f"--{option} {first['input']}: {first['msg']}")


def _show(value: BaseModel | dict[str, Any], as_json: bool) -> None:
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        return
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")  # a digest is of use only whole
    for name, item in data.items():
        table.add_row(name, item if isinstance(item, str) else json.dumps(item, ensure_ascii=False))
    out.print(table)


def _fail(message: str) -> NoReturn:
    err.print(f"error: {message}", soft_wrap=True)
    raise SystemExit(1)


def _usage(message: str) -> NoReturn:
    err.print(f"error: {message}", soft_wrap=True)
    raise SystemExit(2)
