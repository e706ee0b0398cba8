"""`karst-hub trainings ...`: versions trained in the hub, from the dataset of a task."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from ...client.client import Client
from ...dataset_schemas import TrainingInfo
from ...field_types import accuracy_of
from ...usage_schemas import MAX_BACKTEST_IMAGES
from ..options import DEFAULT_URL, AsJson, OwnerKey, Url
from ..output import err, out, show
from .images import DIGEST_CHARACTERS

Task = Annotated[str, typer.Argument(help="name of the task")]
Training = Annotated[str, typer.Argument(help="id, from `trainings list`")]

app = typer.Typer(
    help="Train versions in the hub from the images of a task.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def start(
    task: Task,
    key: OwnerKey,
    recipe: Annotated[
        str,
        typer.Option(
            help="`instant`: a head on the frozen features, in seconds; `karst`, `auto`: also KARST, in minutes"
        ),
    ] = "instant",
    budget: Annotated[int | None, typer.Option(min=1, help="seconds for KARST; 600 by default")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="wait for the end of `karst` and `auto`")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Train a new version, which becomes `latest`."""
    with Client(url, key) as client:
        training = client.train(task, recipe=recipe, budget_s=budget, wait=wait, progress=False if as_json else None)
    if as_json:
        return show(training, True)
    for warning in training.warnings:
        err.print(f"warning: {warning}", soft_wrap=True)
    if training.version is None:
        out.print(f"training {training.id} is {training.state}; karst-hub trainings show {task} {training.id}")
        return
    out.print(f"{task} version {training.version}: {training.snapshot.images} images, {training.seconds:.1f} s")
    out.print(f"accuracy: {_accuracy(training)}")


@app.command("list")
def list_trainings(task: Task, key: OwnerKey, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the trainings of a task, newest first."""
    with Client(url, key) as client:
        found = client.trainings(task)
    if as_json:
        return show(found, True)
    table = Table(
        Column("id", no_wrap=True, min_width=16), "recipe", "state", "version", "images", "accuracy", "created"
    )
    for training in found.trainings:
        version = "-" if training.version is None else str(training.version)
        images = str(training.snapshot.images)
        row = training.id, training.recipe, _state(training), version, images
        table.add_row(*row, _accuracy(training), training.created[:19])
    out.print(table)


@app.command("show")
def show_training(
    task: Task, training: Training, key: OwnerKey, url: Url = DEFAULT_URL, as_json: AsJson = False
) -> None:
    """Show a training with its progress and its figures."""
    with Client(url, key) as client:
        show(client.training(task, training), as_json)


@app.command()
def cancel(task: Task, training: Training, key: OwnerKey, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """End a queued or running training."""
    with Client(url, key) as client:
        found = client.cancel_training(task, training)
    if as_json:
        return show(found, True)
    out.print(f"training {found.id} is {found.state}")


@app.command()
def report(
    task: Task,
    training: Training,
    key: OwnerKey,
    output: Annotated[Path, typer.Option("-o", "--output", help="file to write")],
    file: Annotated[str, typer.Option(help="of `report_files`, which `trainings show` lists")] = "report.html",
    url: Url = DEFAULT_URL,
) -> None:
    """Download a file of a training's report."""
    with Client(url, key) as client:
        out.print(str(client.training_report(task, training, output, file=file)))


@app.command()
def compare(
    task: Task,
    key: OwnerKey,
    a: Annotated[str, typer.Argument(help="version or alias")] = "stable",
    b: Annotated[str, typer.Argument(help="version or alias")] = "latest",
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Compare two versions on the same test images of the dataset."""
    with Client(url, key) as client:
        found = client.compare(task, a=a, b=b)
    if as_json:
        return show(found, True)
    table = Table("label", "images", f"version {found.a.version}", f"version {found.b.version}")
    for row in found.classes:
        table.add_row(row.label, str(row.images), f"{row.a:.0%}", f"{row.b:.0%}")
    out.print(table)
    for version in (found.a, found.b):
        low, high = version.interval
        right = f"{version.right} of {found.images} test images"
        out.print(f"version {version.version}: {version.accuracy:.1%} ({right}; 95 % interval {low:.1%} to {high:.1%})")
    better = {"a": found.a, "b": found.b}.get(found.better or "")
    verdict = "neither is better" if better is None else f"version {better.version} is better"
    out.print(f"{verdict}, by more than one standard error; the answers differ for {found.differing} images")


@app.command()
def backtest(
    task: Task,
    key: OwnerKey,
    b: Annotated[str, typer.Argument(help="version or alias")] = "latest",
    a: Annotated[str | None, typer.Option(help="version or alias; by default the answers that the callers got")] = None,
    last: Annotated[int, typer.Option(min=1, max=MAX_BACKTEST_IMAGES, help="number of kept images, the newest")] = 500,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List the kept images that a version answers otherwise."""
    with Client(url, key) as client:
        found = client.backtest(task, a=a, b=b, last=last)
    if as_json:
        return show(found, True)
    before = "the callers' answer" if found.a is None else f"version {found.a}"
    if found.differ:
        table = Table(Column("image", no_wrap=True, min_width=DIGEST_CHARACTERS), "label", before, f"version {found.b}")
        for image in found.differ:
            table.add_row(image.digest, image.label or "-", image.a, image.b)
        out.print(table)
    low, high = found.interval
    share = f"{found.share:.1%}; 95 % interval {low:.1%} to {high:.1%}"
    out.print(
        f"version {found.b} answers {found.changed} of {found.images} kept images otherwise ({share})", soft_wrap=True
    )
    if found.labelled.images:
        right = f"{before} is right for {found.labelled.a}, version {found.b} for {found.labelled.b}"
        out.print(f"of {found.labelled.images} images with a label that trained neither: {right}", soft_wrap=True)


def _state(training: TrainingInfo) -> str:
    now = training.progress
    if now is None or training.state != "running":
        return training.state
    return f"{now.stage}, {now.step} of {now.steps}" if now.steps else now.stage


def _accuracy(training: TrainingInfo) -> str:
    found = accuracy_of(training.report or {})
    if found is None:
        return "-"
    return f"{100 * found.accuracy:.1f} % of {found.images} {found.measured_on}"
