"""`karst-hub top`: a live view of the hub in a terminal, from `GET /v1/status` and `GET /v1/admin/trainings`."""

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..admin_schemas import Counted, HubStatus, HubTrainingList, WorkerStatus
from ..dataset_schemas import ENDED
from ..errors import Unavailable

MIB = 1024**2
WIDE_COLUMNS = 160  # the table of workers needs this width
WORKER_COLUMNS = ("device", "up", "images/s", "images/pass", "tasks/pass", "waiting")
ADAPTER_COLUMNS = ("slots", "host MiB", "hits", "loads", "ms/load", "evicted", "failed")
MAX_TRAININGS = 20  # of those that run or wait
NO_TRAININGS = HubTrainingList(trainings=[], running=0, queued=0)
TENANT_COLUMNS = ("requests/s", "images/s", "refused/s", "in flight")


@dataclass(frozen=True)
class TimedStatus:
    """A status with the hub's trainings, and the time of its arrival, in seconds of a monotonic clock."""

    status: HubStatus
    at_s: float
    trainings: HubTrainingList = NO_TRAININGS


def run(
    status: Callable[[], HubStatus],
    console: Console,
    *,
    interval_s: float,
    once: bool,
    trainings: Callable[[], HubTrainingList] = lambda: NO_TRAININGS,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], bool] | None = None,
) -> None:
    """Show the hub's status, and update it until `q` or Ctrl-C. An unavailable hub shows an error until it is back.

    Without a terminal, the function prints one status and returns.

    Args:
        status: fetches a status.
        interval_s: seconds between two updates.
        once: print one status and return.
        trainings: fetches the trainings of all tenants.
        clock: monotonic clock in seconds.
        wait: waits for a number of seconds, and returns whether the user has ended the view; None: for `q`.

    Raises:
        HubError: The first request fails, or the hub refuses the key.
    """

    def fetch() -> TimedStatus:
        return TimedStatus(status(), clock(), trainings())

    before = fetch()

    def draw(now: TimedStatus, before: TimedStatus | None) -> RenderableType:
        return screen(now, before, narrow=console.width < WIDE_COLUMNS)  # a user may resize the window at any time

    if once or not console.is_terminal:
        console.print(draw(before, None))
        return
    with (
        suppress(KeyboardInterrupt),
        key_presses() as pressed,
        Live(draw(before, None), console=console, screen=True) as live,
    ):
        while not (wait or pressed)(interval_s):
            try:
                now = fetch()
            except Unavailable as error:
                warning = Text(f"the hub does not reply: {error}", style="bold red")
                live.update(Group(warning, draw(before, None)), refresh=True)
            else:
                live.update(draw(now, before), refresh=True)
                before = now


@contextmanager
def key_presses() -> Iterator[Callable[[float], bool]]:
    """Yield a function that waits for some seconds, and returns at once with True when the user presses `q`."""
    if not sys.stdin.isatty():

        def sleep(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield sleep
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed(seconds: float) -> bool:
        end_s = time.monotonic() + seconds
        while select.select([terminal], [], [], max(0.0, end_s - time.monotonic()))[0]:
            typed = os.read(terminal, 100)
            if b"q" in typed.lower() or not typed:
                return True
        return False

    try:
        tty.setcbreak(terminal)  # otherwise keys arrive only after Enter
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def screen(now: TimedStatus, before: TimedStatus | None, *, narrow: bool = False) -> RenderableType:
    """Return the whole view. Rates of tenants are `-` without an earlier sample.

    Args:
        narrow: fit into 80 columns: workers and tenants take two tables each.
    """
    status = now.status
    tables = [
        *_workers(status, narrow),
        _tasks(status),
        *_tenants(now, before, narrow),
        *_trainings(now),
        *_errors(status),
    ]
    head = [Text(headline(status), style="bold")]
    if status.changes_refused is not None:
        head.append(Text(f"changes are refused: {status.changes_refused}", style="bold red"))
    frozen = [
        Text(f"frozen layers of {w.worker}: {'; '.join(w.frozen_layers)}") for w in status.workers if w.frozen_layers
    ]
    return Group(*head, *tables, *frozen)


def headline(status: HubStatus) -> str:
    """Return a summary of the hub in one line."""
    workers = status.workers
    images = sum(worker.images_per_second for worker in workers)
    used, slots = sum(worker.slots_used for worker in workers), sum(worker.slots for worker in workers)
    waiting = sum(worker.waiting for worker in workers)
    return (
        f"{len(workers)} {'worker' if len(workers) == 1 else 'workers'}, {images:.1f} images/s, "
        f"{waiting} images waiting, {used} of {slots} slots in use"
    )


def _workers(status: HubStatus, narrow: bool) -> list[Table]:
    rows = [
        [
            w.worker,
            w.device,
            _duration(w.uptime_s),
            f"{w.images_per_second:.1f}",
            f"{w.images_per_pass:.1f}",
            f"{w.adapters_per_pass:.1f}",
            str(w.waiting),
            f"{w.slots_used}/{w.slots}",
            f"{w.host_bytes / MIB:.0f}/{w.host_limit_bytes / MIB:.0f}",
            _hit_rate(w),
            str(w.loads),
            f"{1000 * w.load_s / w.loads:.1f}" if w.loads else "-",
            str(w.evictions),
            str(w.failures),
        ]
        for w in status.workers
    ]
    return _tables("worker", {"workers": WORKER_COLUMNS, "adapters of the workers": ADAPTER_COLUMNS}, rows, narrow)


def _tasks(status: HubStatus) -> Table:
    table = Table("tenant", "task", title="busiest tasks", title_justify="left")
    table.add_column("images/s", justify="right")
    for task in status.tasks:
        table.add_row(task.tenant, task.task, f"{task.images_per_second:.1f}")
    return table


def _tenants(now: TimedStatus, before: TimedStatus | None, narrow: bool) -> list[Table]:
    earlier = {t.tenant: t.counted for t in before.status.tenants} if before else {}
    seconds = now.at_s - before.at_s if before else 0.0
    rows = []
    for tenant in now.status.tenants:
        counted = tenant.counted
        rates = rates_of(counted, earlier.get(tenant.tenant), seconds)
        shown = [f"{rates[name]:.1f}" if rates else "-" for name in Counted.model_fields]
        counts = [str(getattr(counted, name)) for name in Counted.model_fields]
        rows.append([tenant.tenant, *shown, str(tenant.images_in_flight), *counts])
    parts = {"tenants active in the last minute": TENANT_COLUMNS, "counts of the tenants": tuple(Counted.model_fields)}
    return _tables("tenant", parts, rows, narrow)


def _trainings(now: TimedStatus) -> Iterator[Table]:
    """Yield a table of the trainings that run or wait, if there are any."""
    active = [training for training in now.trainings.trainings if training.state not in ENDED]
    if not active:
        return
    title = f"trainings: {now.trainings.running} running, {now.trainings.queued} queued"
    table = Table("tenant", "task", "recipe", "state", title=title, title_justify="left")
    table.add_column("left", justify="right")
    for training in active[:MAX_TRAININGS]:
        progress = training.progress
        left = "-" if progress is None or progress.seconds_left is None else f"{progress.seconds_left:.0f} s"
        stage = progress.stage if progress is not None else training.state
        table.add_row(training.tenant, training.task, training.recipe, stage, left)
    yield table


def _errors(status: HubStatus) -> Iterator[Table]:
    """Yield a table of the errors of the last hour, if there are any."""
    if not status.errors:
        return
    table = Table("error", title="errors of the last hour", title_justify="left")
    for column in ("status", "requests"):
        table.add_column(column, justify="right")
    table.add_column("last")
    for error in status.errors:
        table.add_row(error.kind, str(error.status), str(error.count), error.last[11:16] + " UTC")
    yield table


def _tables(
    row_name: str, parts: Mapping[str, Sequence[str]], rows: Sequence[Sequence[str]], narrow: bool
) -> list[Table]:
    """Return one table with all columns, or with `narrow` one table without lines per part.

    Args:
        row_name: header of the first column.
        parts: title of each part -> its columns.
        rows: the cells of each row: first column, then the columns of all parts.
    """
    if not narrow:
        parts = {next(iter(parts)): [column for columns in parts.values() for column in columns]}
    tables, first = [], 1
    for title, columns in parts.items():
        table = Table(title=title, title_justify="left")
        if narrow:
            table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(row_name, overflow="fold")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row[0], *row[first : first + len(columns)])
        tables.append(table)
        first += len(columns)
    return tables


def rates_of(now: Counted, before: Counted | None, seconds: float) -> Mapping[str, float]:
    """Return requests, images and refusals per second between two counts; empty without an earlier count."""
    if before is None or seconds <= 0:
        return {}
    # The counts of a deleted and recreated tenant start at 0; otherwise its rates would be negative.
    return {name: max(0, getattr(now, name) - getattr(before, name)) / seconds for name in Counted.model_fields}


def _hit_rate(worker: WorkerStatus) -> str:
    lookups = worker.hits + worker.loads
    return f"{100 * worker.hits / lookups:.1f} %" if lookups else "-"


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours // 24}d {hours % 24}h" if hours >= 24 else f"{hours}h {minutes % 60}m" if hours else f"{minutes}m"
