"""The command line: `karst-hub`. Exit codes: 0, 1 (the hub or a file said no), 2 (usage)."""

import re
import signal
import sys
import threading
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.table import Table

from ..client.client import Client
from ..errors import HubError
from ..schemas import LATEST
from . import adapters as cli_library
from . import tenants as cli_tenants
from .output import AsJson, err, fail, out, settings, show

app = typer.Typer(
    help="One frozen vision transformer, many KARST adapters: train, register and classify.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_library.app)
app.add_typer(cli_tenants.app, name="tenants")

Url = Annotated[str, typer.Option(envvar="HUB_URL", help="the hub's address")]
Key = Annotated[str, typer.Option(envvar="HUB_KEY", help="an API key; better in HUB_KEY than on the command line")]
# By name: importing these kinds here would load torch for every command.
_EXPECTED = (
    "AdapterError",
    "BackboneError",
    "ConfigError",
    "DataError",
    "EmbeddedRedisError",
    "StartError",
    "FloatingPointError",
)
DEFAULT_URL = "http://127.0.0.1:8000"


def main() -> None:
    """Run the command line; whatever is expected to go wrong ends in one line on stderr, never in a traceback."""
    try:
        app()
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        if not isinstance(error, HubError) and type(error).__name__ not in _EXPECTED:
            raise
        fail(str(error))


@app.command()
def serve() -> None:
    """Run a hub on this machine until Ctrl-C; its options are HUB_* environment variables (docs/settings.md)."""
    from ..local.hub import local_hub

    chosen = settings()
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while starting: unwind, as Ctrl-C does
    err.print(f"starting: backbone {chosen.backbone}, data in {chosen.home}")
    with local_hub(chosen) as hub:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        if hub.first_keys.admin is not None:
            err.print("The first admin key; it is shown only now, keep it:")
            out.print(f"HUB_ADMIN_KEY={hub.first_keys.admin}", soft_wrap=True)
        if hub.first_keys.owner is not None:
            err.print("The first key (owner of tenant `default`); it is shown only now, keep it:")
            out.print(f"HUB_KEY={hub.first_keys.owner}", soft_wrap=True)
        out.print(f"HUB_URL={hub.url}", soft_wrap=True)
        err.print("ready; Ctrl-C stops")
        sys.stdout.flush()
        stopping.wait()
        err.print("stopping")


@app.command()
def demo() -> None:
    """Start a hub on free ports, register three tasks, classify real images of all three, and stop it all."""
    from . import demo as demonstration

    demonstration.run(out, settings(**demonstration.SETTINGS))


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
    statuses: list[int] = []
    with Client(url, key, on_response=lambda response: statuses.append(response.status_code)) as client:
        done = client.register(task, adapter, alias=alias)
    if as_json:
        show(done, True)
    elif statuses[-1] == HTTPStatus.OK:  # not made: what is called by default may be an older version from now on
        moved = "latest" if alias in (None, LATEST) else f"latest and {alias}"
        verb = "is" if moved == LATEST else "are"
        out.print(f"{done.task}: was there already as version {done.version}; {moved} {verb} {done.version} now")
    else:
        out.print(f"{done.task} version {done.version}: {len(done.labels)} labels, digest {done.digest[:12]}")


@app.command()
def tasks(key: Key, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the tasks that the key's tenant owns, and those that are shared with it."""
    with Client(url, key) as client:
        found = client.tasks()
    if as_json:
        return show(found, True)
    table = Table("task", "latest", "classes", "aliases")
    for task in found.tasks:
        aliases = ", ".join(f"{alias} -> {'/'.join(map(str, to))}" for alias, to in task.aliases.items())
        table.add_row(task.task, str(task.latest or "-"), str(task.classes), aliases)
    out.print(table)


@app.command()
def top(
    key: cli_tenants.AdminKey,
    interval_s: Annotated[float, typer.Option(min=0.2, help="seconds between two looks")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="print once, and end")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Watch workers, tasks and tenants live, until Ctrl-C; for admins. `--json` prints one look."""
    from . import top as screen

    with Client(url, key) as client:
        if as_json:
            return show(client.status(), True)
        screen.run(client.status, out, interval_s=interval_s, once=once)


@app.command()
def gc(
    key: cli_tenants.AdminKey,
    older_than_s: Annotated[int, typer.Option(min=0, help="only files that nobody put for so many seconds")] = 3600,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Remove adapter files from the store that no version holds."""
    with Client(url, key) as client:
        done = client.gc(older_than_s)
    if as_json:
        show(done, True)
    else:
        out.print(f"removed {done.removed} files ({done.bytes} bytes), kept {done.kept}")


@app.command()
def admin_key() -> None:
    """Make an admin key on the hub's own machine, for whoever lost the last one; it is shown once.

    It needs no key but the registry itself: HUB_REDIS_URL, or the HUB_HOME of a hub that runs or not.
    """
    from ..local.hub import new_admin_key

    out.print(f"HUB_ADMIN_KEY={new_admin_key(settings())}", soft_wrap=True)


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
    try:
        with Client(url, key) as client:
            answer = client.classify(task, list(images), top_k=top_k, version=version)
    except HubError as error:
        fail(_named(str(error), images))
    if as_json:
        return show(answer, True)
    table = Table("image", "label", "score")
    for image, predictions in zip(images, answer.predictions, strict=True):
        for prediction in predictions:
            table.add_row(str(image), prediction.label, f"{prediction.score:.3f}")
    out.print(table)


def _named(text: str, images: list[Path]) -> str:
    """An error with the names of the files, which the client only counts: `images.1`."""
    names = {f"images.{i}": str(image) for i, image in enumerate(images)}
    return re.sub(r"\bimages\.\d+", lambda found: names.get(found[0], found[0]), text)
