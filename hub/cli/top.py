"""`karst-hub top`: what the hub does at this moment, in a terminal, from `GET /v1/status`."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..errors import Unavailable
from ..schemas import Counted, HubStatus, WorkerStatus

MIB = 1024**2
WIDE = 160  # columns; the table of workers needs them for itself
PASSES = ("device", "up", "images/s", "images/pass", "tasks/pass", "waiting")
ADAPTERS = ("slots", "host MiB", "hits", "loads", "ms/load", "evicted", "failed")
RATES = ("requests/s", "images/s", "refused/s", "in flight")


@dataclass(frozen=True)
class Look:
    """A status, and when it came: seconds of a clock that only goes forward."""

    status: HubStatus
    at_s: float


def run(status: Callable[[], HubStatus], console: Console, *, interval_s: float, once: bool) -> None:
    """Show status after status until Ctrl-C, or one of them. A hub that is away for a while is said, and asked again.

    Off a terminal there is nobody to watch: one of them.

    Raises:
        HubError: the first look fails, or the key is refused.
    """
    before = Look(status(), time.monotonic())

    def drawn(now: Look, before: Look | None) -> RenderableType:
        return screen(now, before, narrow=console.width < WIDE)  # each time: a window may change

    if once or not console.is_terminal:
        console.print(drawn(before, None))
        return
    with suppress(KeyboardInterrupt), Live(drawn(before, None), console=console, screen=True) as live:
        while True:
            time.sleep(interval_s)
            try:
                now = Look(status(), time.monotonic())
            except Unavailable as error:
                live.update(Group(Text(f"the hub does not answer: {error}", style="bold red"), drawn(before, None)))
            else:
                live.update(drawn(now, before), refresh=True)
                before = now


def screen(now: Look, before: Look | None, *, narrow: bool = False) -> RenderableType:
    """The whole picture. Requests and refusals a second need a look before; they are `-` without.

    Args:
        narrow: for 80 columns: workers and tenants in two tables each.
    """
    status = now.status
    tables = [*_workers(status, narrow), _tasks(status), *_tenants(now, before, narrow)]
    return Group(Text(headline(status), style="bold"), *tables)


def headline(status: HubStatus) -> str:
    """The hub in one line."""
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
            _ago(w.uptime_s),
            f"{w.images_per_second:.1f}",
            f"{w.images_per_pass:.1f}",
            f"{w.adapters_per_pass:.1f}",
            str(w.waiting),
            f"{w.slots_used}/{w.slots}",
            f"{w.host_bytes / MIB:.0f}/{w.host_limit_bytes / MIB:.0f}",
            _percent(w),
            str(w.loads),
            f"{1000 * w.load_s / w.loads:.1f}" if w.loads else "-",
            str(w.evictions),
            str(w.failures),
        ]
        for w in status.workers
    ]
    return _tables("worker", {"workers": PASSES, "their adapters": ADAPTERS}, rows, narrow)


def _tasks(status: HubStatus) -> Table:
    table = Table("tenant", "task", title="busiest tasks", title_justify="left")
    table.add_column("images/s", justify="right")
    for task in status.tasks:
        table.add_row(task.tenant, task.task, f"{task.images_per_second:.1f}")
    return table


def _tenants(now: Look, before: Look | None, narrow: bool) -> list[Table]:
    were = {t.tenant: t.counted for t in before.status.tenants} if before else {}
    seconds = now.at_s - before.at_s if before else 0.0
    rows = []
    for tenant in now.status.tenants:
        counted = tenant.counted
        rates = rates_of(counted, were.get(tenant.tenant), seconds)
        shown = [f"{rates[name]:.1f}" if rates else "-" for name in Counted.model_fields]
        counts = [str(getattr(counted, name)) for name in Counted.model_fields]
        rows.append([tenant.tenant, *shown, str(tenant.images_in_flight), *counts])
    parts = {"tenants of the last minute": RATES, "their counts": tuple(Counted.model_fields)}
    return _tables("tenant", parts, rows, narrow)


def _tables(what: str, parts: Mapping[str, Sequence[str]], rows: Sequence[Sequence[str]], narrow: bool) -> list[Table]:
    """One table with all columns; where it is narrow, one without lines for each part.

    Args:
        what: the rows are, as their first column says.
        parts: title -> columns.
        rows: a text for each column.
    """
    if not narrow:
        parts = {next(iter(parts)): [column for columns in parts.values() for column in columns]}
    tables, first = [], 1
    for title, columns in parts.items():
        table = Table(title=title, title_justify="left")
        if narrow:
            table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(what, overflow="fold")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row[0], *row[first : first + len(columns)])
        tables.append(table)
        first += len(columns)
    return tables


def rates_of(now: Counted, before: Counted | None, seconds: float) -> Mapping[str, float]:
    """Requests, images and refusals a second between two counts; nothing where there is only one."""
    if before is None or seconds <= 0:
        return {}
    # A tenant that was deleted and made again counts from 0.
    return {name: max(0, getattr(now, name) - getattr(before, name)) / seconds for name in Counted.model_fields}


def _percent(worker: WorkerStatus) -> str:
    asked = worker.hits + worker.loads
    return f"{100 * worker.hits / asked:.1f} %" if asked else "-"


def _ago(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours // 24}d {hours % 24}h" if hours >= 24 else f"{hours}h {minutes % 60}m" if hours else f"{minutes}m"
