"""Routes of trainings in the hub."""

from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, Path, Response
from fastapi.sse import EventSourceResponse

from ...admission.authentication import Caller
from ...dataset_schemas import Comparison, TrainingInfo, TrainingList, TrainingRequest
from ...services.trainings.comparison import ComparisonService
from ...services.trainings.service import TrainingService
from ..bodies import JSON, RequestBody
from ..dependencies import CallerDependencies, LargeReply, QueryVersion, Recheck, TaskName, json_reply
from ..openapi import request_body, schema_of
from ..problems import KEY_ID_PATTERN

TrainingId = Annotated[str, Path(pattern=KEY_ID_PATTERN)]
ReportFile = Literal["report.html", "report.json", "curves.png", "confusion.png", "errors.png"]
MEDIA_TYPES = {"html": "text/html; charset=utf-8", "json": JSON, "png": "image/png"}
# A report shows labels, which are any text: it may load nothing and run nothing.
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; frame-ancestors 'self'"


def add_training_routes(
    api: FastAPI, service: TrainingService, comparison: ComparisonService, dependencies: CallerDependencies
) -> None:
    """Add the routes of trainings and of comparisons of versions. All of them need an owner's key."""
    Owner = Annotated[Caller, Depends(dependencies.owner)]
    Body = Annotated[RequestBody, Depends(dependencies.body)]
    large = [Depends(dependencies.large_reply)]

    async def followed(caller: Owner, task: TaskName, training: TrainingId) -> AsyncIterator[TrainingInfo]:
        """Hold one of the tenant's streams until the reply ends. Its errors come before the reply begins."""
        async with service.stream(caller):
            yield await service.get(caller, task, training)

    @api.post(
        "/v1/tasks/{task}/trainings",
        summary="Train a new version from the task's dataset",
        openapi_extra=request_body({JSON: schema_of(TrainingRequest)}, required=False),
        responses={202: {"model": TrainingInfo, "description": "The training is queued"}},
    )
    async def train_task(caller: Owner, task: TaskName, body: Body, response: Response) -> TrainingInfo:
        training = await service.train(caller, task, await body.read_json(TrainingRequest, default=b"{}"))
        response.status_code = 202 if training.state == "queued" else 200
        return training

    @api.get(
        "/v1/tasks/{task}/trainings",
        summary="List the trainings of a task, newest first",
        response_model=TrainingList,
        dependencies=large,
    )
    async def list_trainings(caller: Owner, task: TaskName) -> Response:
        return json_reply(await service.list(caller, task))

    @api.get("/v1/tasks/{task}/trainings/{training}", summary="Get a training with its progress and its report")
    async def get_training(caller: Owner, task: TaskName, training: TrainingId) -> TrainingInfo:
        return await service.get(caller, task, training)

    @api.delete("/v1/tasks/{task}/trainings/{training}", summary="Cancel a training that has not ended")
    async def cancel_training(caller: Owner, task: TaskName, training: TrainingId) -> TrainingInfo:
        return await service.cancel(caller, task, training)

    @api.get(
        "/v1/tasks/{task}/trainings/{training}/events",
        summary="Follow a training: a server-sent event with the training after each change, until it has ended",
        response_class=EventSourceResponse,
    )
    async def follow_training(
        caller: Owner,
        task: TaskName,
        training: TrainingId,
        check: Annotated[Recheck, Depends(dependencies.recheck)],
        _found: Annotated[TrainingInfo, Depends(followed)],
    ) -> AsyncIterator[TrainingInfo]:
        async for state in service.follow(caller, task, training, check):
            yield state

    @api.get(
        "/v1/tasks/{task}/trainings/{training}/report/{file}",
        summary="Get a file of a training's report",
        response_class=Response,
        dependencies=large,
        responses={200: {"content": {name: {} for name in MEDIA_TYPES.values()}}},
    )
    async def get_report(caller: Owner, task: TaskName, training: TrainingId, file: ReportFile) -> Response:
        data = await service.report(caller, task, training, file)
        media_type = MEDIA_TYPES[file.rpartition(".")[2]]
        return LargeReply(data, media_type=media_type, headers={"content-security-policy": REPORT_POLICY})

    @api.get(
        "/v1/tasks/{task}/trainings/{training}/snapshot",
        summary="Get the list of images that a training used",
        response_class=Response,
        dependencies=large,
        responses={200: {"content": {JSON: {"schema": {"type": "object"}}}}},
    )
    async def get_snapshot(caller: Owner, task: TaskName, training: TrainingId) -> Response:
        return LargeReply(await service.snapshot(caller, task, training), media_type=JSON)

    @api.get(
        "/v1/tasks/{task}/compare",
        summary="Compare two versions on the same test images of the task's dataset",
        response_model=Comparison,
        dependencies=large,
    )
    async def compare_versions(
        caller: Owner, task: TaskName, a: QueryVersion = "stable", b: QueryVersion = "latest"
    ) -> Response:
        return json_reply(await comparison.compare(caller, task, a, b))
