"""HTTP: the routes of tasks as a FastAPI application; each says who, what, do, reply."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.formparsers import MultiPartException, MultiPartParser

from ..admission.authentication import Caller
from ..concurrency import Turns
from ..errors import InvalidImage, InvalidRequest
from ..schemas import (
    LATEST,
    MAX_IMAGES,
    NAME_PATTERN,
    TASK_PATTERN,
    AliasChange,
    Classified,
    Health,
    ImagesBody,
    InputsBody,
    Registered,
    Results,
    Sharing,
    SourceBody,
    TaskInfo,
    TaskList,
    VersionInfo,
)
from ..services.administration import Administration
from ..services.classification import Service, decode_base64
from ..services.registration import Changes
from .admin import add_administration
from .dependencies import (
    BINARY,
    JSON,
    MAX_CHANGE_BYTES,
    Doors,
    content_type,
    documented,
    limited,
    parse_json,
    read_body,
    require_name,
    schema_of,
    tell,
    translate_errors,
)
from .oip import add_protocols

ADAPTER_FILE = "application/octet-stream"
IMAGES_BODY: dict[str, Any] = {
    "image/*": BINARY,
    "multipart/form-data": {"type": "object", "properties": {"image": {"type": "array", "items": BINARY}}},
    JSON: schema_of(ImagesBody),
}
TaskName = Annotated[str, Path(pattern=TASK_PATTERN, description="`task`, or `tenant:task` of another tenant")]
AliasName = Annotated[str, Path(pattern=NAME_PATTERN)]
Number = Annotated[int, Path(ge=1, le=2**53)]
Reference = Annotated[str, Path(max_length=63, description="a version's number or an alias")]
Version = Annotated[str, Query(max_length=63, description="a version's number or an alias")]
TopK = Annotated[int, Query(ge=1, le=1000, description="labels an image")]
Alias = Annotated[str | None, Query(pattern=NAME_PATTERN, description="an alias to move, beside `latest`")]
Canary = Annotated[
    str | None,
    Header(alias="x-canary-key", max_length=256, description="calls of one key get one version of an alias"),
]


def create_api(
    service: Service,
    changes: Changes,
    administration: Administration,
    doors: Doors,
    turns: Turns,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
    *,
    max_request_bytes: int,
    max_adapter_bytes: int,
) -> FastAPI:
    """The application over its collaborators.

    Args:
        turns: a tenant's classifications at once; their bodies are read when it is their turn.
        lifespan: what runs while the application does (following change events, closing connections).
    """
    api = FastAPI(title="karst-hub", lifespan=lifespan, docs_url=None, redoc_url=None)
    translate_errors(api)
    Who = Annotated[Caller, Depends(doors.tenant_key)]
    Owner = Annotated[Caller, Depends(doors.owner)]

    @api.get("/healthz")
    async def healthz() -> Health:
        return Health()

    @api.get("/readyz")
    async def readyz() -> Health:
        await service.ready()
        return Health()

    @api.get("/v1/tasks")
    async def list_tasks(who: Who) -> TaskList:
        return TaskList(tasks=await service.tasks(who))

    @api.get("/v1/tasks/{task}")
    async def get_task(who: Who, task: TaskName) -> TaskInfo:
        return await service.task(who, task)

    @api.delete("/v1/tasks/{task}", status_code=204)
    async def delete_task(who: Owner, task: TaskName) -> None:
        await changes.delete_task(who, task)

    @api.put("/v1/tasks/{task}/sharing", openapi_extra=documented({JSON: schema_of(Sharing)}))
    async def share(who: Owner, task: TaskName, request: Request) -> TaskInfo:
        return await changes.share(who, task, parse_json(Sharing, await read_body(request, MAX_CHANGE_BYTES, "body")))

    @api.post(
        "/v1/tasks/{task}/versions",
        status_code=201,
        responses={200: {"model": Registered}},
        openapi_extra=documented({ADAPTER_FILE: BINARY, JSON: schema_of(SourceBody)}),
    )
    async def register(
        who: Owner, task: TaskName, request: Request, response: Response, alias: Alias = None
    ) -> Registered:
        require_name(alias)
        if content_type(request) == JSON:
            source = parse_json(SourceBody, await read_body(request, MAX_CHANGE_BYTES, "body"))
            registered, created = await changes.register_source(who, task, source, alias)
        else:
            data = await read_body(request, max_adapter_bytes, "adapter file")
            registered, created = await changes.register(who, task, data, alias)
        response.status_code = 201 if created else 200
        return registered

    @api.get("/v1/tasks/{task}/versions/{version}")
    async def get_version(who: Who, task: TaskName, version: Reference) -> VersionInfo:
        return await service.version(who, task, version)

    @api.get(
        "/v1/tasks/{task}/versions/{version}/file",
        response_class=Response,
        responses={200: {"content": {ADAPTER_FILE: {"schema": BINARY}}}},
    )
    async def get_file(who: Owner, task: TaskName, version: Reference) -> Response:
        info, data = await changes.file(who, task, version)
        name = f"{task.rpartition(':')[2]}-{info.version}.safetensors"
        headers = {"content-disposition": f'attachment; filename="{name}"', "etag": f'"{info.digest}"'}
        return Response(data, media_type=ADAPTER_FILE, headers=headers)

    @api.delete("/v1/tasks/{task}/versions/{version}", status_code=204)
    async def delete_version(who: Owner, task: TaskName, version: Number) -> None:
        await changes.delete_version(who, task, version)

    @api.put("/v1/tasks/{task}/aliases/{alias}", openapi_extra=documented({JSON: schema_of(AliasChange)}))
    async def set_alias(who: Owner, task: TaskName, alias: AliasName, request: Request) -> TaskInfo:
        require_name(alias)
        change = parse_json(AliasChange, await read_body(request, MAX_CHANGE_BYTES, "body"))
        return await changes.set_alias(who, task, alias, change.targets())

    @api.delete("/v1/tasks/{task}/aliases/{alias}", status_code=204)
    async def delete_alias(who: Owner, task: TaskName, alias: AliasName) -> None:
        await changes.delete_alias(who, task, alias)

    @api.post("/v1/tasks/{task}/aliases/{alias}/rollback")
    async def roll_back(who: Owner, task: TaskName, alias: AliasName) -> TaskInfo:
        return await changes.roll_back(who, task, alias)

    @api.post("/v1/tasks/{task}/classify", openapi_extra=documented(IMAGES_BODY))
    async def classify(
        who: Who,
        task: TaskName,
        request: Request,
        response: Response,
        top_k: TopK = 5,
        version: Version = LATEST,
        canary: Canary = None,
    ) -> Classified:
        async with turns.turn(who.tenant):
            images = await _images(request, max_request_bytes)
            classified, passes = await service.classify(who, task, version, images, top_k, canary)
        tell(response, passes)
        return classified

    @api.post("/v1/classify", openapi_extra=documented({JSON: schema_of(InputsBody)}))
    async def classify_inputs(
        who: Who, request: Request, response: Response, top_k: TopK = 5, canary: Canary = None
    ) -> Results:
        async with turns.turn(who.tenant):
            body = await run_in_threadpool(parse_json, InputsBody, await read_body(request, max_request_bytes, "body"))
            results, passes = await service.classify_inputs(who, body.inputs, top_k, canary)
        tell(response, passes)
        return Results(results=results)

    add_administration(api, administration, doors)
    add_protocols(api, service, doors.tenant_key, turns, max_request_bytes=max_request_bytes)
    return api


async def _images(request: Request, limit_bytes: int) -> list[tuple[str, bytes]]:
    """The images of a classification request, each with its field's name: one raw, several as multipart or JSON."""
    kind = content_type(request)
    if kind == JSON:
        return await run_in_threadpool(_images_of_json, await read_body(request, limit_bytes, "body"))
    if kind == "multipart/form-data":
        return await _multipart(request, limit_bytes)
    body = await read_body(request, limit_bytes, "body")
    if body[:64].lstrip().startswith(b"{"):  # no kind of image begins so
        message = f"looks like JSON; send it with content-type: {JSON}"
        raise InvalidImage.at("body", message)
    return [("body", body)]


async def _multipart(request: Request, limit_bytes: int) -> list[tuple[str, bytes]]:
    stream = limited(request, limit_bytes, "body")
    try:
        form = await MultiPartParser(request.headers, stream, max_files=MAX_IMAGES, max_fields=MAX_IMAGES).parse()
    except MultiPartException as error:
        raise InvalidRequest.at("body", error.message) from error
    try:
        images = [(name, await part.read()) for name, part in form.multi_items() if not isinstance(part, str)]
    finally:
        await form.close()
    if not images:
        message = "no file part in the form; send each image as a file"
        raise InvalidRequest.at("body", message)
    return images


def _images_of_json(body: bytes) -> list[tuple[str, bytes]]:
    images = parse_json(ImagesBody, body).images
    return decode_base64([(f"images.{i}", text) for i, text in enumerate(images)])
