"""Commands of a tenant's tasks: list, versions, aliases, canaries, settings, sharing, usage, download and deletion."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..admin_schemas import Usage
from ..client.client import Client
from ..errors import InvalidRequest
from ..field_types import MeasuredAccuracy
from ..schemas import LATEST, Registered, TaskInfo
from ..usage_schemas import MAX_USAGE_DAYS
from .datasets.usage import show_task_usage
from .options import DEFAULT_URL, AsJson, Key, OwnerKey, UnknownBelow, Url, Yes
from .output import confirm, day, out, show, usage_error

app = typer.Typer()

Task = Annotated[str, typer.Argument(help="name of the task")]
AnyTask = Annotated[str, typer.Argument(help="name of the task; another tenant's shared task is `tenant:task`")]
Alias = Annotated[str, typer.Argument(help="name of the alias")]
DIGEST_CHARS = 12  # of a digest in a table; `--json` shows all


@app.command()
def tasks(key: Key, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the tasks of the key's tenant, and the tasks that other tenants share with it.

    `latest` is the version that clients call when they name none. Accuracy, training images and date are its own.
    """
    with Client(url, key) as client:
        found = client.tasks()
    if as_json:
        return show(found, True)
    table = Table("task", "latest", "labels", "accuracy", "images", "registered", "aliases")
    for task in found.tasks:
        others = ", ".join(f"{alias} -> {_targets(to)}" for alias, to in task.aliases.items() if alias != LATEST)
        table.add_row(
            task.task,
            _targets(task.aliases.get(LATEST, {})),
            str(task.classes),
            _accuracy(task.accuracy),
            _number(task.train_images),
            day(task.registered),
            others,
        )
    out.print(table)


@app.command()
def versions(task: AnyTask, key: Key, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the versions of a task, and the aliases that point at each."""
    with Client(url, key) as client:
        found = client.task(task)
    if as_json:
        return show(found, True)
    table = Table("version", "aliases", "labels", "accuracy", "images", "KiB", "registered", "digest")
    for version in found.versions:
        aliases = [
            alias if len(to) == 1 else f"{alias} ({100 * to[version.version] / sum(to.values()):.3g} %)"
            for alias, to in found.aliases.items()
            if version.version in to
        ]
        table.add_row(
            str(version.version),
            ", ".join(aliases),
            str(len(version.labels)),
            _accuracy(version.measured_accuracy()),
            _number(version.train_images()),
            f"{version.size_bytes / 1024:.0f}",
            day(version.registered),
            version.digest[:DIGEST_CHARS],
        )
    out.print(table)


@app.command()
def alias(
    task: Task,
    alias: Alias,
    key: OwnerKey,
    version: Annotated[int | None, typer.Argument(min=1, help="version that the alias points at")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="delete the alias; its versions stay")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Point an alias of a task at a version."""
    if (version is None) != delete:
        usage_error("give either a version or --delete")
    with Client(url, key) as client:
        if version is None:
            client.delete_alias(task, alias)
            return show({"task": task, "deleted": alias}, True) if as_json else out.print(f"{task}: no alias {alias}")
        _show_alias(client.set_alias(task, alias, version), alias, as_json)


@app.command()
def canary(
    task: Task,
    weights: Annotated[
        list[str], typer.Argument(help="versions with their shares, such as 3=90 4=10", metavar="VERSION=WEIGHT...")
    ],
    key: OwnerKey,
    alias: Annotated[str, typer.Option(help="alias whose calls are divided")] = LATEST,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Divide the calls of an alias between versions of a task."""
    targets: dict[int, int] = {}
    for text in weights:
        version, _, weight = text.partition("=")
        if not version.isdecimal() or not weight.isdecimal():
            usage_error(f"{text!r}: expected VERSION=WEIGHT, two whole numbers, such as 3=90")
        if int(version) in targets:
            usage_error(f"{text!r}: version {version} is named twice")
        targets[int(version)] = int(weight)
    with Client(url, key) as client:
        _show_alias(client.set_alias(task, alias, targets), alias, as_json)


@app.command()
def rollback(
    task: Task,
    key: OwnerKey,
    alias: Annotated[str, typer.Option(help="alias to move back")] = LATEST,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Point an alias of a task at its previous target."""
    with Client(url, key) as client:
        _show_alias(client.roll_back(task, alias), alias, as_json)


@app.command()
def share(
    task: Task,
    key: OwnerKey,
    tenant: Annotated[list[str] | None, typer.Option(help="tenant that may see the task; repeatable")] = None,
    public: Annotated[bool, typer.Option("--public", help="share with all tenants")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="end all sharing")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Replace the list of tenants that may classify with a task. Without options, show the list."""
    if stop and (tenant or public):
        usage_error("--stop ends all sharing; omit --tenant and --public")
    with Client(url, key) as client:
        changed = stop or public or bool(tenant)
        info = client.share(task, public=public, tenants=tenant or ()) if changed else client.task(task)
    if info.sharing is None:
        raise InvalidRequest(f"task {task!r} belongs to another tenant, whose key this command needs")
    if as_json:
        return show(info.sharing, True)
    names = "all tenants" if info.sharing.public else ", ".join(info.sharing.tenants) or "no other tenant"
    out.print(f"{task}: shared with {names}")


@app.command()
def settings(
    task: Task,
    key: OwnerKey,
    unknown_below: UnknownBelow = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Change settings of a task. Without options, show them."""
    with Client(url, key) as client:
        info = client.task(task)  # the hub would create a task with a misspelt name
        if unknown_below is not None:
            info = client.change_settings(task, unknown_below=unknown_below)
    if as_json:
        return show({"task": info.task, "unknown_below": info.unknown_below}, True)
    print_settings(info.task, info.unknown_below)


@app.command()
def token(
    task: AnyTask,
    key: Key,
    expires_s: Annotated[int, typer.Option(min=1, max=3600, help="seconds until the token expires")] = 3600,
    origin: Annotated[
        list[str] | None, typer.Option(help="web origin that the token works from, such as https://app.example.org")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Create a token for one task, which a web page or a phone may hold in place of the key."""
    with Client(url, key) as client:
        created = client.create_token(task, expires_s=expires_s, origins=origin or None)
    return show(created, True) if as_json else out.print(f"HUB_KEY={created.token}", soft_wrap=True)


@app.command()
def usage(
    key: Key,
    task: Annotated[str | None, typer.Argument(help="name of a task, to count its answers")] = None,
    days: Annotated[int | None, typer.Option(min=1, max=MAX_USAGE_DAYS, help="of TASK; 30 by default")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Show the limits and the usage of the key's tenant, or the answers of a task by day and whether its images drift.

    A task's answers need an owner's key.
    """
    if task is None and days is not None:
        usage_error("--days belongs to the answers of a task; name the task")
    with Client(url, key) as client:
        if task is None:
            show_usage(client.usage(), as_json)
        else:
            show_task_usage(client.task_usage(task, days=days or 30), as_json)


@app.command()
def download(
    task: Task,
    output: Annotated[Path, typer.Option("--out", "-o", help="adapter file to write")],
    key: OwnerKey,
    version: Annotated[str, typer.Option(help="version number or alias")] = LATEST,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Download the adapter file of a version."""
    with Client(url, key) as client:
        client.download(task, output, version=version)
    size = output.stat().st_size
    return show({"file": str(output), "bytes": size}, True) if as_json else out.print(f"{output}: {size} bytes")


@app.command()
def delete(
    task: Task,
    key: OwnerKey,
    version: Annotated[int | None, typer.Option(min=1, help="delete only this version")] = None,
    yes: Yes = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Delete a task with all its versions, or one version."""
    name = f"task {task} with all its versions" if version is None else f"version {version} of task {task}"
    if not yes:
        confirm(f"delete {name}?", f"{name} was not deleted")
    with Client(url, key) as client:
        client.delete_task(task) if version is None else client.delete_version(task, version)
    return show({"task": task, "version": version}, True) if as_json else out.print(f"{name}: deleted")


def print_settings(task: str, unknown_below: float) -> None:
    """Print the settings of a task."""
    out.print(f"{task}: images with a typicality below {unknown_below:g} are unknown", soft_wrap=True)


def print_registered(new: Registered) -> None:
    """Print a new version, its aliases, and its accuracy beside that of the version which was live before."""
    out.print(f"{new.task} version {new.version}: {len(new.labels)} labels, digest {new.digest[:DIGEST_CHARS]}")
    out.print(f"aliases: {', '.join(new.moved) or 'none; clients call it by its number'}", soft_wrap=True)
    if new.previous is not None:
        before = f"version {new.previous.version} {_accuracy(new.previous.accuracy)}"
        out.print(f"accuracy: version {new.version} {_accuracy(new.accuracy)}, {before}", soft_wrap=True)


def show_usage(found: Usage, as_json: bool) -> None:
    """Print limits, usage and counters of a tenant."""
    if as_json:
        return show(found, True)
    limits, used = found.limits.model_dump(), found.used.model_dump()
    table = Table("limit", "maximum", "used")
    for name, value in limits.items():
        table.add_row(name, f"{value:g}" if isinstance(value, float) else str(value), str(used.get(name, "")))
    out.print(table)
    out.print(", ".join(f"{name}: {n}" for name, n in found.counted.model_dump().items()))


def _show_alias(info: TaskInfo, alias: str, as_json: bool) -> None:
    if as_json:
        return show(info, True)
    out.print(f"{info.task}: {alias} -> {_targets(info.aliases[alias])}")


def _targets(targets: dict[int, int]) -> str:
    """Return an alias's versions, with shares in percent where it has several."""
    if len(targets) < 2:
        return "".join(map(str, targets)) or "-"
    total = sum(targets.values())
    return ", ".join(f"{number} ({100 * weight / total:.3g} %)" for number, weight in targets.items())


def _accuracy(found: MeasuredAccuracy | None) -> str:
    if found is None:
        return "-"
    text = f"{100 * found.accuracy:.1f} %"
    return text if found.interval is None else text + f" ({100 * found.interval[0]:.0f}-{100 * found.interval[1]:.0f})"


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
