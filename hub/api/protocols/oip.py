"""Routes of the Open Inference Protocol v2, for clients of KServe and Triton. A task is a model of the protocol."""

from functools import partial
from importlib.metadata import version as installed_version
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, Header, Response
from pydantic import BaseModel, StringConstraints

from ...admission.authentication import Caller
from ...concurrency import TenantConcurrencyLimit, run_blocking
from ...errors import InvalidRequest
from ...schemas import LATEST
from ...services.classification import ClassificationService
from ..bodies import INLINE_BYTES, JSON, RequestBody, parse_json
from ..bodies import MAX_JSON_VALUES as OTHER_JSON_VALUES
from ..dependencies import JSON_LENGTH_HEADER, CallerDependencies, CanaryKey, TaskName, batch_headers, no_options
from ..openapi import BINARY, OCTETS, request_body, schema_of
from .json_numbers import split_numbers
from .oip_sizes import require_small_outputs
from .oip_tensors import (
    EXTENSIONS,
    InferReply,
    InferRequest,
    ModelInfo,
    OutputFormat,
    ReplyTensors,
    read_images,
    requested_outputs,
    tensors_of,
    write_reply,
)

MAX_JSON_VALUES = 2**20  # six images of 224 x 224 pixels; more images fit as binary data

# A version's number or an alias. FastAPI reads it from the path, or from the query where the path has none.
Version = Annotated[str, StringConstraints(max_length=63)]
JsonLength = Annotated[
    int | None,
    Header(alias=JSON_LENGTH_HEADER, ge=0, description="bytes of JSON at the start of a body with binary data"),
]


class Live(BaseModel):
    live: Literal[True] = True


class Ready(BaseModel):
    ready: Literal[True] = True


class ModelReady(Ready):
    name: str


class ServerInfo(BaseModel):
    name: str
    version: str
    extensions: list[str]


def add_oip_routes(
    api: FastAPI,
    service: ClassificationService,
    dependencies: CallerDependencies,
    concurrency_limit: TenantConcurrencyLimit,
    *,
    max_request_bytes: int,
) -> None:
    """Add `/v2` to an application.

    Args:
        concurrency_limit: classifications of one tenant at once. A queued request's body stays unread.
        max_request_bytes: limit of a body, before and after decompression.
    """
    _add_metadata_routes(api, service, dependencies)
    _add_infer_routes(api, service, dependencies, concurrency_limit, max_request_bytes)


def _add_metadata_routes(api: FastAPI, service: ClassificationService, dependencies: CallerDependencies) -> None:
    TenantCaller = Annotated[Caller, Depends(dependencies.tenant_caller)]
    server_info = ServerInfo(name="karst-hub", version=installed_version("karst-hub"), extensions=[*EXTENSIONS])

    alone = [Depends(no_options)]

    @api.head("/v2/health/live", include_in_schema=False, dependencies=alone)
    @api.get("/v2/health/live", summary="Check that the gateway runs", dependencies=alone)
    async def check_server_live() -> Live:
        return Live()

    @api.head("/v2/health/ready", include_in_schema=False, dependencies=alone)
    @api.get("/v2/health/ready", summary="Check that a worker has loaded its backbone", dependencies=alone)
    async def check_server_ready() -> Ready:
        await service.ready()
        return Ready()

    @api.get("/v2", summary="Get name, version and extensions of the server")
    async def get_server(_caller: TenantCaller) -> ServerInfo:
        return server_info

    described = "Get versions, inputs and outputs of a task"
    ready = "Check that a task can be called"

    @api.get("/v2/models/{task}", summary=described)
    @api.get("/v2/models/{task}/versions/{version}", summary=described, operation_id="get_model_version")
    async def get_model(
        caller: TenantCaller, task: TaskName, version: Version = LATEST, canary: CanaryKey = None
    ) -> ModelInfo:
        numbers, chosen = await service.served(caller, task, version, canary)
        inputs, outputs = tensors_of(chosen)
        return ModelInfo(name=task, versions=[*map(str, numbers)], inputs=inputs, outputs=outputs)

    @api.head("/v2/models/{task}/ready", include_in_schema=False)
    @api.head("/v2/models/{task}/versions/{version}/ready", include_in_schema=False)
    @api.get("/v2/models/{task}/ready", summary=ready)
    @api.get("/v2/models/{task}/versions/{version}/ready", summary=ready, operation_id="check_model_version_ready")
    async def check_model_ready(
        caller: TenantCaller, task: TaskName, version: Version = LATEST, canary: CanaryKey = None
    ) -> ModelReady:
        await service.find(caller, task, version, canary)
        await service.ready()
        return ModelReady(name=task)


def _add_infer_routes(
    api: FastAPI,
    service: ClassificationService,
    dependencies: CallerDependencies,
    concurrency_limit: TenantConcurrencyLimit,
    max_request_bytes: int,
) -> None:
    TenantCaller = Annotated[Caller, Depends(dependencies.tenant_caller)]
    Body = Annotated[RequestBody, Depends(dependencies.body)]
    options: dict[str, Any] = {
        "summary": "Classify a batch of images",
        "response_class": Response,
        "responses": {200: {"model": InferReply, "content": {OCTETS: {"schema": BINARY}}}},
        "openapi_extra": request_body({JSON: schema_of(InferRequest), OCTETS: BINARY}),
    }

    @api.post("/v2/models/{task}/infer", **options)
    @api.post("/v2/models/{task}/versions/{version}/infer", operation_id="infer_version", **options)
    async def infer(
        caller: TenantCaller,
        task: TaskName,
        body: Body,
        version: Version = LATEST,
        json_length: JsonLength = None,
        canary: CanaryKey = None,
    ) -> Response:
        async with concurrency_limit.acquire(caller.tenant):
            data = await body.read(max_request_bytes)
            members, images, outputs = await body.parse(lambda sent: _parse(sent, json_length), data)
            check = partial(require_small_outputs, outputs)
            predicted = await service.predict(caller, task, version, images, canary, check=check)
        members = {"model_name": task, "model_version": str(predicted.version.version), **members}
        tensors = ReplyTensors(
            predicted.version.labels,
            np.stack([answer.probabilities for answer in predicted.answers]),
            predicted.typicality,
            predicted.unknown,
        )
        content, length = await run_blocking(body.pool, write_reply, members, outputs, tensors)
        response = Response(content, media_type=JSON if length is None else OCTETS)
        if length is not None:
            response.headers[JSON_LENGTH_HEADER] = str(length)
        response.headers.update(batch_headers([answer.computed for answer in predicted.answers]))
        return response


def _parse(
    body: bytes, json_length: int | None
) -> tuple[dict[str, str], list[tuple[str, bytes | np.ndarray]], list[OutputFormat]]:
    """Return the members that the reply repeats, the images, and the outputs of the reply."""
    length = len(body) if json_length is None else json_length
    if json_length is not None and not 0 < length <= len(body):
        message = f"is {length}; expected the length of the JSON at the start of the body of {len(body)} bytes"
        raise InvalidRequest.at(JSON_LENGTH_HEADER, message)
    text, numbers = body[:length], None
    if length > INLINE_BYTES:
        text, numbers = split_numbers(text, MAX_JSON_VALUES)
    # A body up to `INLINE_BYTES` has few numbers; a larger one has few other values.
    request = parse_json(InferRequest, text, MAX_JSON_VALUES if length <= INLINE_BYTES else OTHER_JSON_VALUES)
    outputs = requested_outputs(request)
    images = read_images(request.inputs[0], memoryview(body)[length:], numbers)
    return {} if request.id is None else {"id": request.id}, images, outputs
