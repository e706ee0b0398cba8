"""Methods of both clients for the use of a task, in the form of `client/endpoints`."""

from ...usage_schemas import Backtest, TaskUsage
from ..replies import model
from ..request_parts import route, without_none
from ..transport import Call


def task_usage(name: str, *, days: int = 30) -> Call[TaskUsage]:
    """Return the counts of a task's answers by day, label and version, and whether the images drift.

    Args:
        days: number of days, today included (UTC), at most 400.
    """
    return Call("GET", route("tasks", name, "usage"), model(TaskUsage), params={"days": days})


def backtest(name: str, *, a: str | int | None = None, b: str | int = "latest", last: int = 500) -> Call[Backtest]:
    """Find the kept images of a task that version `b` answers otherwise.

    Args:
        a: the version to compare with, a number or an alias; None: the answers that the callers got.
        b: a version number or an alias.
        last: number of kept images, the newest ones, at most 1,000.

    Raises:
        Conflict: The task has kept no image, or an alias points at several versions.
    """
    params = without_none(a=None if a is None else str(a), b=str(b), last=last)
    return Call("GET", route("tasks", name, "backtest"), model(Backtest), params=params)
