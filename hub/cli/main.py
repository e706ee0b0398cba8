"""Command line `karst-hub`. Exit codes: 0 (success), 1 (error of the hub or of a file), 2 (usage error)."""

import codecs
import io
import logging
import shlex
import signal
import sys
import threading
from collections.abc import Mapping
from http import HTTPStatus
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from ..client.client import Client
from ..errors import HubError
from . import adapters as cli_library
from . import tasks as cli_tasks
from . import tenants as cli_tenants
from .datasets import images as cli_images
from .datasets import review as cli_review
from .datasets import trainings as cli_trainings
from .options import DEFAULT_URL, AdminKey, AsJson, Key, UnknownBelow, Url
from .output import err, fail, out, settings, show, show_text, usage_error

if TYPE_CHECKING:
    from .classify import ManyAnswers

logger = logging.getLogger(__name__)

app = typer.Typer(
    help="One frozen vision transformer, many KARST adapters: train, register and classify.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_library.app)
app.add_typer(cli_tasks.app)
app.add_typer(cli_images.app, name="images")
app.add_typer(cli_review.app, name="review")
app.add_typer(cli_trainings.app, name="trainings")
app.add_typer(cli_tenants.app, name="tenants")

# Names instead of classes: an import of the classes would load torch for every command.
_EXPECTED = (
    "AdapterError",
    "BackboneError",
    "ConfigError",
    "DataError",
    "EmbeddedRedisError",
    "StartError",
    "FloatingPointError",
)


def main() -> None:
    """Run the command line. Expected errors end in one line on stderr, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        # Python's own default for the locale C, which PYTHONUTF8=0 turns off: labels and paths have other characters.
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name == "ascii":
            stream.reconfigure(encoding="utf-8")
    try:
        app()
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        expected = any(kind.__name__ in _EXPECTED for kind in type(error).__mro__)
        if not isinstance(error, HubError) and not expected:
            raise
        fail(str(error))


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit", is_eager=True)] = False,
) -> None:
    if version:
        out.print(f"karst-hub {metadata.version('karst-hub')}")
        raise typer.Exit


@app.command()
def serve() -> None:
    """Run a hub on this machine until Ctrl-C. HUB_* environment variables configure it (docs/settings.md)."""
    from ..local.bootstrap import write_first_keys
    from ..local.hub import local_hub
    from ..observability import log_format

    chosen = settings()
    log_format.start(chosen.log_format, chosen.log_level)
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # during the start: unwind as Ctrl-C does
    _say(f"starting: backbone {chosen.backbone}, data in {chosen.home}")
    with local_hub(chosen) as hub:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        first = hub.first_keys.variables()
        if first and out.is_terminal:
            _say("The first keys, of the admin and of the owner of the tenant `default`. They are shown only here:")
            for line in first:
                out.print(line, soft_wrap=True)
        elif first:  # otherwise a container's log would keep the keys
            _say(f"The first keys are in {write_first_keys(hub.first_keys, chosen.home)} (mode 600).")
        out.print(f"HUB_URL={hub.url}", soft_wrap=True)
        if hub.login_link is not None and out.is_terminal:  # a log must not keep it
            _say("The console, for your browser. The link works once, within an hour:")
            out.print(hub.login_link, soft_wrap=True)
        else:
            command = f"HUB_HOME={shlex.quote(str(chosen.home))} {shlex.quote(sys.argv[0])}"
            _say(f"The console: `{command} login-link --url {hub.url}` prints a link for your browser.")
        sys.stdout.flush()
        _say("ready; press Ctrl-C to stop")
        stopping.wait()
        _say("stopping")


def _say(text: str) -> None:
    """Report the hub's state on stderr: as text on a terminal, otherwise as a log line."""
    if err.is_terminal:
        err.print(text, soft_wrap=True)
    else:
        logger.info(text)


@app.command()
def demo() -> None:
    """Start a hub on free ports, register three tasks, classify real images of all three, and stop the hub."""
    from . import demo as demonstration

    demonstration.run(out, settings(**demonstration.SETTINGS))


@app.command()
def register(
    task: Annotated[str, typer.Argument(help="name of the task")],
    adapter: Annotated[Path, typer.Argument(help="adapter file")],
    key: Key,
    alias: Annotated[str | None, typer.Option(help="further alias that a new version gets")] = None,
    stage: Annotated[bool, typer.Option("--stage", help="leave `latest` where it is")] = False,
    labels_changed: Annotated[
        bool, typer.Option("--labels-changed", help="accept labels that differ from those behind `latest`")
    ] = False,
    unknown_below: UnknownBelow = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Register an adapter file as a version of a task, which becomes `latest`. Known bytes move no alias."""
    statuses: list[int] = []
    with Client(url, key, on_response=lambda response: statuses.append(response.status_code)) as client:
        registered = client.register(
            task, adapter, alias=alias, unknown_below=unknown_below, stage=stage, labels_may_change=labels_changed
        )
    if as_json:
        return show(registered, True)
    if statuses[-1] == HTTPStatus.OK:
        message = f"{registered.task}: already registered as version {registered.version}; no alias moved"
        out.print(f"{message} (`karst-hub alias` moves one)", soft_wrap=True)
    else:
        cli_tasks.print_registered(registered)
    if registered.unknown_below is not None:
        cli_tasks.print_settings(registered.task, registered.unknown_below)


@app.command()
def top(
    key: AdminKey,
    interval_s: Annotated[float, typer.Option(min=0.2, help="seconds between two updates")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="print one status and exit")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Show live workers, tasks, tenants, trainings and errors until `q` or Ctrl-C. `--json` prints one status."""
    from . import top as screen

    with Client(url, key) as client:
        if as_json:
            return show(client.status(), True)
        screen.run(client.status, out, interval_s=interval_s, once=once, trainings=client.all_trainings)


@app.command()
def status(
    key: Annotated[
        str | None, typer.Option("--key", envvar="HUB_ADMIN_KEY", help="admin key, to see workers, tasks and tenants")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Check that the hub is ready to classify. With an admin key, also show its workers, tasks and tenants."""
    from . import top as screen

    with Client(url, key or "none") as client:
        ready = client.ready()
        found = client.status() if key is not None else None
    if as_json:
        return show(ready if found is None else found, True)
    out.print(f"{url}: ready", soft_wrap=True)
    if found is not None:
        screen.run(lambda: found, out, interval_s=0, once=True)


@app.command()
def gc(
    key: AdminKey,
    older_than_s: Annotated[
        int, typer.Option(min=0, help="only files that no client has uploaded for this many seconds")
    ] = 3600,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Remove the adapter files that no version uses from the store."""
    with Client(url, key) as client:
        collected = client.gc(older_than_s)
    if as_json:
        show(collected, True)
    else:
        out.print(f"removed {collected.removed} files ({collected.bytes} bytes), kept {collected.kept}")


@app.command()
def admin_key() -> None:
    """Create an admin key on the hub's own machine, after the loss of all others. The command shows it only once.

    The command needs access to the registry instead of a key: HUB_REDIS_URL, or HUB_HOME of a running or stopped hub.
    """
    from ..local.hub import new_admin_key

    out.print(f"HUB_ADMIN_KEY={new_admin_key(settings())}", soft_wrap=True)


@app.command()
def login_link(
    tenant: Annotated[str, typer.Argument(help="the tenant to manage")] = "default",
    admin: Annotated[bool, typer.Option(help="also give the rights of an admin key")] = False,
    url: Annotated[str | None, typer.Option(envvar="HUB_URL", help="address of the hub")] = None,
) -> None:
    """Print a link that opens the console in a browser, once, within an hour, on the hub's own machine.

    The link gives an owner's key of the tenant that expires after 12 hours. The command needs access to the registry
    instead of a key: HUB_REDIS_URL, or HUB_HOME of a running or stopped hub.
    """
    from ..local.hub import new_login_link

    out.print(new_login_link(settings(), tenant, admin=admin, url=url and url.rstrip("/")), soft_wrap=True)


@app.command()
def classify(
    task: Annotated[str, typer.Argument(help="name of the task; with --tasks an image too", metavar="TASK")],
    key: Key,
    images: Annotated[
        list[Path] | None, typer.Argument(help="image files, and folders of them", show_default=False)
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="names of tasks with commas between, or * for every task of the tenant; replaces TASK"),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="number of labels per image and task")] = 1,
    version: Annotated[str, typer.Option(help="version number or alias")] = "latest",
    coverage: Annotated[
        float | None,
        typer.Option(help="show the smallest set of labels that covers this share of images, such as 0.95"),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="print CSV, one row per label")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Classify image files with a task, or with many (`classify --tasks '*' IMAGE...`).

    Images that are unlike the task's own are marked as unknown. The command classifies all files below a folder. It
    lists images that the hub refuses, and answers the rest; the exit code is then 1.
    """
    from . import classify as classification

    if as_json and as_csv:
        usage_error("--json and --csv exclude each other; omit one")
    if tasks is not None and version != "latest":
        usage_error("--tasks classifies with the version `latest` of each task; omit --version")
    paths = [Path(task), *(images or ())] if tasks is not None else images
    if not paths:
        usage_error("name at least one image file, or a folder of them")
    files = classification.find_images(paths)
    if not files:
        fail(f"{', '.join(map(str, paths))}: no files; name image files, or a folder that has some")
    try:
        with Client(url, key) as client:
            if tasks is not None:
                names = classification.task_names(tasks)
                many = classification.run_many(client, names, files, top_k=top_k, coverage=coverage)
                return _show_many(many, as_json=as_json, as_csv=as_csv)
            answers = classification.run(
                client,
                task,
                files,
                top_k=top_k,
                version=version,
                coverage=coverage,
                progress=classification.shows_progress(files),
            )
    except HubError as error:
        fail(str(error))
    if as_json:
        show(classification.as_dict(answers), True)
    elif as_csv:
        show_text(classification.as_csv(answers))
    elif answers.reply is not None:
        out.print(classification.table(answers))
    _exit_if_refused(answers.refused)


def _show_many(answers: "ManyAnswers", *, as_json: bool, as_csv: bool) -> None:
    from . import classify as classification

    if as_json:
        show(classification.many_dict(answers), True)
    elif as_csv:
        show_text(classification.many_csv(answers))
    elif answers.replies:
        out.print(classification.many_table(answers))
    for task, reason in answers.skipped.items():
        err.print(f"task {task} cannot answer: {reason}", soft_wrap=True)
    _exit_if_refused(answers.refused)


def _exit_if_refused(refused: Mapping[Path, str]) -> None:
    for file, reason in refused.items():
        err.print(f"error: {file}: {reason}", soft_wrap=True)
    if refused:
        raise SystemExit(1)
