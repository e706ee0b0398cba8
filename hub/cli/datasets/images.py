"""`karst-hub images ...`: the dataset of a task."""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from ...client.client import Client
from ...dataset_schemas import MAX_PAGE_GROUPS, MAX_PAGE_IMAGES, PAGE_GROUPS, ImagesAdded, Split, Use
from ...errors import NotFound
from ..classify import find_images
from ..options import DEFAULT_URL, AsJson, OwnerKey, Url, Yes
from ..output import confirm, day, err, fail, out, show

Task = Annotated[str, typer.Argument(help="name of the task")]
Digest = Annotated[str, typer.Argument(help="digest of the image, from `images list`")]
SplitOption = Annotated[Split | None, typer.Option(help="train, test, or auto: the digest decides")]
DIGEST_CHARACTERS = 64
LIST_WIDTH = 140  # at least; on a narrow terminal lines wrap, otherwise a digest could not be copied
CALL_IMAGES = 200  # sent before the progress bar moves

app = typer.Typer(
    help="Add, list, label and delete the images of a task's dataset.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def add(
    task: Task,
    images: Annotated[list[Path], typer.Argument(help="image files, and folders of them")],
    key: OwnerKey,
    label: Annotated[
        str | None, typer.Option(help="label of all images; without it, the name of the folder of each image")
    ] = None,
    split: SplitOption = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Add images to a task, which is created if it does not exist. Images that are there already are not sent again.

    A second run of an interrupted command therefore continues where the first one stopped. The command lists images
    that the hub refuses, and adds the rest; the exit code is then 1.
    """
    files = [(file, label or _folder_label(path, file)) for path in images for file in find_images([path])]
    if not files:
        fail(f"{', '.join(map(str, images))}: no files; name image files, or a folder that has some")
    with Client(url, key) as client:
        try:
            client.task(task)
        except NotFound:
            client.create_task(task)
            err.print(f"{task}: created, without a version")
        known = _known_images(client, task)
        with _progress(len(files)) as advance:
            groups: dict[str | None, list[Path]] = defaultdict(list)
            for file, own in files:
                there = known.get(hashlib.sha256(file.read_bytes()).hexdigest(), "")
                if there != "" and split is None and own in (None, there):
                    advance(1)
                else:
                    groups[own].append(file)
            skipped = len(files) - sum(map(len, groups.values()))
            parts = list(_send(client, task, groups, split, advance))
    _report(parts, skipped, as_json)


@app.command("list")
def list_images(
    task: Task,
    key: OwnerKey,
    label: Annotated[str | None, typer.Option(help="only images with this label")] = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="only images without a label")] = False,
    split: Annotated[Use | None, typer.Option(help="only images that train, or only images that test")] = None,
    cursor: Annotated[str | None, typer.Option(help="`next` of the previous page")] = None,
    count: Annotated[int, typer.Option(min=1, max=MAX_PAGE_IMAGES, help="images of a page")] = 100,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List images, newest first."""
    with Client(url, key) as client:
        page = client.images.list(task, label=label, unlabelled=unlabelled, split=split, cursor=cursor, count=count)
    if as_json:
        return show(page, True)
    table = Table(Column("digest", no_wrap=True, min_width=DIGEST_CHARACTERS), "label", "split", "use", "name", "added")
    for image in page.images:
        table.add_row(image.digest, image.label or "-", image.split, image.use, image.name, day(image.added))
    out.print(table, width=max(out.width, LIST_WIDTH), crop=False)
    if page.next is not None:
        out.print(f"more: --cursor {page.next}")


@app.command("info")
def show_info(task: Task, key: OwnerKey, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show the labels of a dataset with their numbers of images."""
    with Client(url, key) as client:
        found = client.images.info(task)
    if as_json:
        return show(found, True)
    table = Table("label", "train", "test")
    for count in [*found.labels, found.unlabelled]:
        table.add_row(count.label or "(no label)", str(count.train), str(count.test))
    out.print(table)
    out.print(f"{found.images} images, {found.image_bytes} bytes")
    for group in found.similar_labels:
        message = f"labels that differ only in case, spaces or Unicode form: {', '.join(group)}"
        err.print(f"warning: {message}; merge them if they are one", soft_wrap=True)


@app.command()
def duplicates(
    task: Task,
    key: OwnerKey,
    cursor: Annotated[str | None, typer.Option(help="`next` of the previous page")] = None,
    count: Annotated[int, typer.Option(min=1, max=MAX_PAGE_GROUPS, help="groups of a page")] = PAGE_GROUPS,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List groups of near-duplicates: those across splits first, then the most similar."""
    with Client(url, key) as client:
        page = client.images.duplicates(task, cursor=cursor, count=count)
    if as_json:
        return show(page, True)
    table = Table("similarity", Column("digest", no_wrap=True, min_width=DIGEST_CHARACTERS), "label", "use", "name")
    for group in page.groups:
        similarity = f"{group.similarity:.4f}"
        for image in group.images:
            table.add_row(similarity, image.digest, image.label or "-", image.use, image.name)
            similarity = ""
        if group.size > len(group.images):
            table.add_row("", f"and {group.size - len(group.images)} more", "", "", "")
        table.add_section()
    out.print(table, width=max(out.width, LIST_WIDTH), crop=False)
    out.print(f"groups of near-duplicates among {page.considered} images: {page.total}")
    if page.total_across_splits:
        err.print(
            f"warning: groups that both train and test: {page.total_across_splits}; delete the copies, or give each "
            "group one split with `images label --split`",
            soft_wrap=True,
        )
    if page.next is not None:
        out.print(f"more: --cursor {page.next}")


@app.command("label")
def label_image(
    task: Task,
    digest: Digest,
    key: OwnerKey,
    label: Annotated[str | None, typer.Argument(help="new label; without it the image loses its label")] = None,
    split: SplitOption = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Set or remove the label of an image."""
    with Client(url, key) as client:
        image = client.images.label(task, digest, label, split=split)
    if as_json:
        return show(image, True)
    out.print(f"{digest}: {image.label or 'no label'}, {image.split}", soft_wrap=True)


@app.command()
def rename_label(
    task: Task,
    label: Annotated[str, typer.Argument(help="label")],
    to: Annotated[str, typer.Argument(help="new name; an existing label gets the images")],
    key: OwnerKey,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Rename a label, or merge it into another one."""
    with Client(url, key) as client:
        renamed = client.images.rename_label(task, label, to)
    if as_json:
        return show(renamed, True)
    done = "merged" if renamed.merged else "renamed"
    images = renamed.counts.train + renamed.counts.test
    out.print(f"{label}: {done} to {renamed.label}, {images} images", soft_wrap=True)


@app.command()
def delete(task: Task, digest: Digest, key: OwnerKey, yes: Yes = False, url: Url = DEFAULT_URL) -> None:
    """Delete an image."""
    if not yes:
        confirm(f"delete image {digest} of task {task}?", "the image was not deleted")
    with Client(url, key) as client:
        client.images.delete(task, digest)
    out.print(f"{digest}: deleted", soft_wrap=True)


def _folder_label(given: Path, file: Path) -> str | None:
    """Return the name of the folder of a file below a folder that the user gave; None for the folder itself."""
    return file.parent.name if given.is_dir() and file.parent != given else None


def _known_images(client: Client, task: str) -> dict[str, str | None]:
    """Return the label of every image of the dataset, by digest."""
    known: dict[str, str | None] = {}
    cursor: str | None = None
    while True:
        page = client.images.list(task, cursor=cursor, count=MAX_PAGE_IMAGES)
        known |= {image.digest: image.label for image in page.images}
        if page.next is None:
            return known
        cursor = page.next


def _send(
    client: Client,
    task: str,
    groups: Mapping[str | None, Sequence[Path]],
    split: Split | None,
    advance: Callable[[int], None],
) -> Iterator[ImagesAdded]:
    for label, files in groups.items():
        for start in range(0, len(files), CALL_IMAGES):
            part = files[start : start + CALL_IMAGES]
            yield client.images.add(task, list(part), label=label, split=split)
            advance(len(part))


def _report(parts: Sequence[ImagesAdded], skipped: int, as_json: bool) -> None:
    """Print the result of all calls; exit with code 1 if the hub has refused an image."""
    counts = {
        name: sum(getattr(part.counts, name) for part in parts)
        for name in ("added", "moved", "already_there", "refused")
    }
    counts["already_there"] += skipped
    refused = [image for part in parts for image in part.refused]
    if as_json:
        show({"counts": counts, "refused": [image.model_dump() for image in refused]}, True)
    else:
        out.print(", ".join(f"{name.replace('_', ' ')}: {n}" for name, n in counts.items()))
    for warning in dict.fromkeys(text for part in parts for text in part.warnings):
        err.print(f"warning: {warning}", soft_wrap=True)
    for image in refused:
        err.print(f"error: {image.name}: {image.reason}", soft_wrap=True)
    if counts["refused"]:
        raise SystemExit(1)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal. Yield a function that adds a number of finished images."""
    if not sys.stderr.isatty():
        yield lambda _images: None
        return
    columns = TextColumn("adding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda images: progress.advance(task, images)
