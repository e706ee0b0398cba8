"""`karst-hub top`: what the hub does at this moment, in a terminal, from `GET /v1/status`."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .errors import Unavailable
from .schemas import Counted, HubStatus, WorkerStatus

MIB = 1024**2


@dataclass(frozen=True)
class Look:
    """A status, and when it came: seconds of a clock that only goes forward."""

    status: HubStatus
    at_s: float


def run(status: Callable[[], HubStatus], console: Console, *, interval_s: float, once: bool) -> None:
    """Show status after status until Ctrl-C, or one of them. A hub that is away for a while is said, and asked again.

    Raises:
        HubError: the first look fails, or the key is refused.
    """
    before = Look(status(), time.monotonic())
    if once:
        console.print(screen(before, None))
        return
    with suppress(KeyboardInterrupt), Live(screen(before, None), console=console, screen=True) as live:
        while True:
            time.sleep(interval_s)
            try:
                now = Look(status(), time.monotonic())
            except Unavailable as error:
                live.update(Group(Text(f"the hub does not answer: {error}", style="bold red"), screen(before, None)))
            else:
                live.update(screen(now, before), refresh=True)
                before = now


def screen(now: Look, before: Look | None) -> RenderableType:
    """The whole picture. Requests and refusals a second need a look before; they are `-` without."""
    status = now.status
    return Group(Text(headline(status), style="bold"), _workers(status), _tasks(status), _tenants(now, before))


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


def _workers(status: HubStatus) -> Table:
    table = Table("worker", title="workers", title_justify="left")
    for column in ("device", "up", "images/s", "images/pass", "tasks/pass", "waiting", "slots", "host MiB"):
        table.add_column(column, justify="right")
    for column in ("hits", "loads", "ms/load", "evicted", "failed"):
        table.add_column(column, justify="right")
    for w in status.workers:
        table.add_row(
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
        )
    return table


def _tasks(status: HubStatus) -> Table:
    table = Table("tenant", "task", title="busiest tasks", title_justify="left")
    table.add_column("images/s", justify="right")
    for task in status.tasks:
        table.add_row(task.tenant, task.task, f"{task.images_per_second:.1f}")
    return table


def _tenants(now: Look, before: Look | None) -> Table:
    table = Table("tenant", title="tenants of the last minute", title_justify="left")
    for column in ("requests/s", "images/s", "refused/s", "in flight", "requests", "images", "refused"):
        table.add_column(column, justify="right")
    were = {t.tenant: t.counted for t in before.status.tenants} if before else {}
    seconds = now.at_s - before.at_s if before else 0.0
    for tenant in now.status.tenants:
        counted = tenant.counted
        rates = rates_of(counted, were.get(tenant.tenant), seconds)
        table.add_row(
            tenant.tenant,
            *(f"{rates[name]:.1f}" if rates else "-" for name in Counted.model_fields),
            str(tenant.images_in_flight),
            *(str(getattr(counted, name)) for name in Counted.model_fields),
        )
    return table


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
