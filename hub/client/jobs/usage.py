"""Methods of both clients for the use of a task, in the form of `client/endpoints`."""

from ...usage_schemas import TaskUsage
from ..replies import model
from ..request_parts import route
from ..transport import Call


def task_usage(name: str, *, days: int = 30) -> Call[TaskUsage]:
    """Return the counts of a task's answers by day, label and version, and whether the images drift.

    Args:
        days: number of days, today included (UTC), at most 400.
    """
    return Call("GET", route("tasks", name, "usage"), model(TaskUsage), params={"days": days})
