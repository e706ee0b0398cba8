"""Routes of the use of a task: counts of its answers, drift, and back-tests of versions on kept images."""

from typing import Annotated

from fastapi import Depends, FastAPI, Query, Response

from ...admission.authentication import Caller
from ...services.trainings.backtest import BacktestService
from ...services.usage.service import UsageService
from ...usage_schemas import MAX_BACKTEST_IMAGES, MAX_USAGE_DAYS, Backtest, TaskUsage
from ..dependencies import CallerDependencies, QueryVersion, TaskName, json_reply

Days = Annotated[int, Query(ge=1, le=MAX_USAGE_DAYS, description="number of days, today included (UTC)")]

Answered = Annotated[
    str | None,
    Query(max_length=63, description="a version's number or an alias; by default the answers that the callers got"),
]
Last = Annotated[int, Query(ge=1, le=MAX_BACKTEST_IMAGES, description="number of kept images, the newest ones")]


def add_usage_routes(
    api: FastAPI, usage: UsageService, backtests: BacktestService, dependencies: CallerDependencies
) -> None:
    """Add the routes. All of them need an owner's key."""
    Owner = Annotated[Caller, Depends(dependencies.owner)]
    large = [Depends(dependencies.large_reply)]

    @api.get(
        "/v1/tasks/{task}/usage",
        summary="Count the answers of a task by day, label and version; see drift",
        response_model=TaskUsage,
        dependencies=large,
    )
    async def get_task_usage(caller: Owner, task: TaskName, days: Days = 30) -> Response:
        return json_reply(await usage.usage(caller, task, days))

    @api.get(
        "/v1/tasks/{task}/backtest",
        summary="Find the kept images that a version would answer otherwise",
        response_model=Backtest,
        dependencies=large,
    )
    async def backtest_version(
        caller: Owner, task: TaskName, a: Answered = None, b: QueryVersion = "latest", last: Last = 500
    ) -> Response:
        return json_reply(await backtests.backtest(caller, task, a, b, last))
