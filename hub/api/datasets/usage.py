"""Routes of the use of a task: counts of its answers, and drift."""

from typing import Annotated

from fastapi import Depends, FastAPI, Query

from ...admission.authentication import Caller
from ...services.usage.service import UsageService
from ...usage_schemas import MAX_USAGE_DAYS, TaskUsage
from ..dependencies import CallerDependencies, TaskName

Days = Annotated[int, Query(ge=1, le=MAX_USAGE_DAYS, description="number of days, today included (UTC)")]


def add_usage_routes(api: FastAPI, usage: UsageService, dependencies: CallerDependencies) -> None:
    """Add the routes. All of them need an owner's key."""
    Owner = Annotated[Caller, Depends(dependencies.owner)]

    @api.get("/v1/tasks/{task}/usage", summary="Count the answers of a task by day, label and version; see drift")
    async def get_task_usage(caller: Owner, task: TaskName, days: Days = 30) -> TaskUsage:
        return await usage.usage(caller, task, days)
