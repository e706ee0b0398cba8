"""Routes of trainings in the hub."""

from typing import Annotated

from fastapi import Depends, FastAPI, Path, Response

from ...admission.authentication import Caller
from ...dataset_schemas import TrainingInfo, TrainingList, TrainingRequest
from ...services.datasets.trainings import TrainingService
from ..bodies import JSON, RequestBody
from ..dependencies import CallerDependencies, TaskName
from ..openapi import request_body, schema_of
from ..problems import KEY_ID_PATTERN

TrainingId = Annotated[str, Path(pattern=KEY_ID_PATTERN)]


def add_training_routes(api: FastAPI, service: TrainingService, dependencies: CallerDependencies) -> None:
    """Add the routes of trainings. All of them need an owner's key."""
    Owner = Annotated[Caller, Depends(dependencies.owner)]
    Body = Annotated[RequestBody, Depends(dependencies.body)]

    @api.post(
        "/v1/tasks/{task}/trainings",
        summary="Train a new version from the task's dataset",
        openapi_extra=request_body({JSON: schema_of(TrainingRequest)}, required=False),
    )
    async def train_task(caller: Owner, task: TaskName, body: Body) -> TrainingInfo:
        return await service.train(caller, task, await body.read_json(TrainingRequest, default=b"{}"))

    @api.get("/v1/tasks/{task}/trainings", summary="List the trainings of a task, newest first")
    async def list_trainings(caller: Owner, task: TaskName) -> TrainingList:
        return await service.list(caller, task)

    @api.get("/v1/tasks/{task}/trainings/{training}", summary="Get a training with its report")
    async def get_training(caller: Owner, task: TaskName, training: TrainingId) -> TrainingInfo:
        return await service.get(caller, task, training)

    @api.get(
        "/v1/tasks/{task}/trainings/{training}/snapshot",
        summary="Get the list of images that a training used",
        response_class=Response,
        responses={200: {"content": {JSON: {"schema": {"type": "object"}}}}},
    )
    async def get_snapshot(caller: Owner, task: TaskName, training: TrainingId) -> Response:
        return Response(await service.snapshot(caller, task, training), media_type=JSON)
