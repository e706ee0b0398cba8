"""`karst-hub review ...`: images to label, labels that are probably wrong, and true labels."""

from typing import Annotated

import typer
from rich.table import Column, Table

from ...client.client import Client
from ..options import DEFAULT_URL, AsJson, OwnerKey, Url
from ..output import out, show
from .images import DIGEST_CHARACTERS

Task = Annotated[str, typer.Argument(help="name of the task")]
Image = Annotated[str, typer.Argument(help="digest of the image, from `review list` or the reply to a classification")]

app = typer.Typer(help="Label the images that help a task most.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_review(
    task: Task,
    key: OwnerKey,
    errors: Annotated[bool, typer.Option("--errors", help="labels that are probably wrong")] = False,
    count: Annotated[int, typer.Option(min=1, max=100, help="number of images")] = 20,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List images to review, most useful first."""
    with Client(url, key) as client:
        found = client.review(task, kind="errors" if errors else "unlabelled", count=count)
    if as_json:
        return show(found, True)
    table = Table(Column("image", no_wrap=True, min_width=DIGEST_CHARACTERS), "name", "label", "suggested")
    for row in found.images:
        suggested = ", ".join(f"{label.label} {label.score:.0%}" for label in row.suggestions)
        table.add_row(row.image.digest, row.image.name, row.image.label or "-", suggested or "-")
    out.print(table)


@app.command()
def confirm(
    task: Task,
    image: Image,
    label: Annotated[str, typer.Argument(help="true label")],
    key: OwnerKey,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Set the true label of an image."""
    with Client(url, key) as client:
        given = client.feedback(task, image, label)
    if as_json:
        return show(given, True)
    answered = given.image.answer.label if given.image.answer else None
    note = "" if answered is None else f"; the hub answered {answered}"
    out.print(f"{image[:12]}: {given.image.label}{note}", soft_wrap=True)
