"""`karst-hub trainings ...`: versions trained in the hub, from the dataset of a task."""

from typing import Annotated

import typer
from rich.table import Table

from ...client.client import Client
from ...dataset_schemas import TrainingInfo
from ...field_types import accuracy_of
from ..options import DEFAULT_URL, AsJson, OwnerKey, Url
from ..output import err, out, show

Task = Annotated[str, typer.Argument(help="name of the task")]

app = typer.Typer(
    help="Train versions in the hub from the images of a task.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def start(
    task: Task,
    key: OwnerKey,
    recipe: Annotated[str, typer.Option(help="`instant`: a head on the frozen features, in seconds")] = "instant",
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Train a new version, which becomes `latest`."""
    with Client(url, key) as client:
        training = client.train(task, recipe=recipe)
    if as_json:
        return show(training, True)
    for warning in training.warnings:
        err.print(f"warning: {warning}", soft_wrap=True)
    out.print(f"{task} version {training.version}: {training.snapshot.images} images, {training.seconds:.1f} s")
    out.print(f"accuracy: {_accuracy(training)}")


@app.command("list")
def list_trainings(task: Task, key: OwnerKey, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the trainings of a task, newest first."""
    with Client(url, key) as client:
        found = client.trainings(task)
    if as_json:
        return show(found, True)
    table = Table("id", "recipe", "state", "version", "images", "accuracy", "created")
    for training in found.trainings:
        version = "-" if training.version is None else str(training.version)
        images = str(training.snapshot.images)
        row = training.id, training.recipe, training.state, version, images, _accuracy(training), training.created[:19]
        table.add_row(*row)
    out.print(table)


@app.command("show")
def show_training(
    task: Task,
    training: Annotated[str, typer.Argument(help="id, from `trainings list`")],
    key: OwnerKey,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Show a training with its report."""
    with Client(url, key) as client:
        show(client.training(task, training), as_json)


def _accuracy(training: TrainingInfo) -> str:
    found = accuracy_of(training.report or {})
    if found is None:
        return "-"
    return f"{100 * found.accuracy:.1f} % of {found.images} {found.measured_on}"
