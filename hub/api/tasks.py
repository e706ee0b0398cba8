"""Routes of health, tasks, versions, aliases and classification."""

from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Response
from starlette.concurrency import run_in_threadpool

from ..admission.authentication import Caller
from ..concurrency import TenantConcurrencyLimit
from ..errors import InvalidRequest
from ..field_types import NAME_PATTERN
from ..schemas import (
    LATEST,
    AliasChange,
    Classified,
    ClassifyOptions,
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
from ..services.classification import ClassificationService
from ..services.registration import RegistrationService
from .bodies import FORM, JSON, NamedImage, RequestBody, decode_base64, parse_json
from .dependencies import (
    AliasName,
    CallerDependencies,
    CanaryKey,
    QueryVersion,
    TaskName,
    TopK,
    VersionNumber,
    VersionReference,
    add_batch_headers,
    no_options,
)
from .openapi import BINARY, OCTETS, request_body, schema_of

IMAGES_CONTENT: dict[str, Any] = {
    "image/*": BINARY,
    OCTETS: BINARY,
    FORM: {
        "type": "object",
        "properties": {"image": {"type": "array", "items": BINARY}, **schema_of(ClassifyOptions)["properties"]},
    },
    JSON: schema_of(ImagesBody),
}
MovedAlias = Annotated[str | None, Query(pattern=NAME_PATTERN, description="an alias to move besides `latest`")]


def add_health_routes(api: FastAPI, service: ClassificationService) -> None:
    """Add the routes that an orchestrator probes."""

    alone = [Depends(no_options)]

    @api.head("/healthz", include_in_schema=False, dependencies=alone)
    @api.get("/healthz", summary="Check that the gateway runs", dependencies=alone)
    async def check_gateway() -> Health:
        return Health()

    @api.head("/readyz", include_in_schema=False, dependencies=alone)
    @api.get("/readyz", summary="Check that a worker has loaded its backbone", dependencies=alone)
    async def check_workers() -> Health:
        await service.ready()
        return Health()


def add_task_routes(
    api: FastAPI,
    service: ClassificationService,
    changes: RegistrationService,
    dependencies: CallerDependencies,
    *,
    max_adapter_bytes: int,
) -> None:
    """Add the routes that read and change tasks."""
    TenantCaller = Annotated[Caller, Depends(dependencies.tenant_caller)]
    Owner = Annotated[Caller, Depends(dependencies.owner)]
    Body = Annotated[RequestBody, Depends(dependencies.body)]

    @api.get("/v1/tasks")
    async def list_tasks(caller: TenantCaller) -> TaskList:
        return TaskList(tasks=await service.tasks(caller))

    @api.get("/v1/tasks/{task}")
    async def get_task(caller: TenantCaller, task: TaskName) -> TaskInfo:
        return await service.task(caller, task)

    @api.delete("/v1/tasks/{task}", status_code=204)
    async def delete_task(caller: Owner, task: TaskName) -> None:
        await changes.delete_task(caller, task)

    @api.put(
        "/v1/tasks/{task}/sharing",
        summary="Share a task with all or some tenants",
        openapi_extra=request_body({JSON: schema_of(Sharing)}),
    )
    async def share_task(caller: Owner, task: TaskName, body: Body) -> TaskInfo:
        return await changes.share(caller, task, await body.read_json(Sharing))

    @api.post(
        "/v1/tasks/{task}/versions",
        summary="Register an adapter file as a version",
        status_code=201,
        responses={200: {"model": Registered}},
        openapi_extra=request_body({OCTETS: BINARY, JSON: schema_of(SourceBody)}),
    )
    async def register_version(
        caller: Owner, task: TaskName, body: Body, response: Response, alias: MovedAlias = None
    ) -> Registered:
        _refuse_version_number(alias)
        if body.content_type == JSON:
            registered, created = await changes.register_source(caller, task, await body.read_json(SourceBody), alias)
        else:
            data = await body.read_file(max_adapter_bytes, "adapter file")
            registered, created = await changes.register(caller, task, data, alias)
        response.status_code = 201 if created else 200
        return registered

    @api.get("/v1/tasks/{task}/versions/{version}")
    async def get_version(
        caller: TenantCaller, task: TaskName, version: VersionReference, canary: CanaryKey = None
    ) -> VersionInfo:
        return await service.version(caller, task, version, canary)

    @api.get(
        "/v1/tasks/{task}/versions/{version}/file",
        response_class=Response,
        responses={200: {"content": {OCTETS: {"schema": BINARY}}}},
    )
    async def download_version(
        caller: Owner, task: TaskName, version: VersionReference, canary: CanaryKey = None
    ) -> Response:
        info, data = await changes.file(caller, task, version, canary)
        name = f"{task.rpartition(':')[2]}-{info.version}.safetensors"
        headers = {"content-disposition": f'attachment; filename="{name}"', "etag": f'"{info.digest}"'}
        return Response(data, media_type=OCTETS, headers=headers)

    @api.delete("/v1/tasks/{task}/versions/{version}", status_code=204)
    async def delete_version(caller: Owner, task: TaskName, version: VersionNumber) -> None:
        await changes.delete_version(caller, task, version)

    @api.put("/v1/tasks/{task}/aliases/{alias}", openapi_extra=request_body({JSON: schema_of(AliasChange)}))
    async def set_alias(caller: Owner, task: TaskName, alias: AliasName, body: Body) -> TaskInfo:
        _refuse_version_number(alias)
        change = await body.read_json(AliasChange)
        return await changes.set_alias(caller, task, alias, change.targets())

    @api.delete("/v1/tasks/{task}/aliases/{alias}", status_code=204)
    async def delete_alias(caller: Owner, task: TaskName, alias: AliasName) -> None:
        await changes.delete_alias(caller, task, alias)

    @api.post("/v1/tasks/{task}/aliases/{alias}/rollback", summary="Point an alias at its previous target")
    async def roll_back_alias(caller: Owner, task: TaskName, alias: AliasName) -> TaskInfo:
        return await changes.roll_back(caller, task, alias)


def add_classify_routes(
    api: FastAPI,
    service: ClassificationService,
    dependencies: CallerDependencies,
    concurrency_limit: TenantConcurrencyLimit,
    *,
    max_request_bytes: int,
) -> None:
    """Add the routes that classify images.

    Args:
        concurrency_limit: classifications of one tenant at once. A queued request's body stays unread.
    """
    TenantCaller = Annotated[Caller, Depends(dependencies.tenant_caller)]
    Body = Annotated[RequestBody, Depends(dependencies.body)]

    @api.post(
        "/v1/tasks/{task}/classify",
        summary="Classify images with one task",
        openapi_extra=request_body(IMAGES_CONTENT),
    )
    async def classify(
        caller: TenantCaller,
        task: TaskName,
        body: Body,
        response: Response,
        top_k: TopK = 5,
        version: QueryVersion = LATEST,
        canary: CanaryKey = None,
    ) -> Classified:
        async with concurrency_limit.acquire(caller.tenant):
            sent = await body.read_images(max_request_bytes)
            top_k = body.option("top_k", top_k, sent.options.top_k)
            version = body.option("version", version, sent.options.version)
            classified, stats = await service.classify(caller, task, version, sent.images, top_k, canary)
        add_batch_headers(response, stats)
        if sent.skipped:
            response.headers["x-skipped-files"] = str(sent.skipped)
        return classified

    @api.post(
        "/v1/classify",
        summary="Classify images with several tasks",
        openapi_extra=request_body({JSON: schema_of(InputsBody)}),
    )
    async def classify_inputs(
        caller: TenantCaller, body: Body, response: Response, top_k: TopK = 5, canary: CanaryKey = None
    ) -> Results:
        async with concurrency_limit.acquire(caller.tenant):
            sent, images = await run_in_threadpool(_parse_inputs, await body.read(max_request_bytes))
            top_k = body.option("top_k", top_k, sent.top_k)
            results, stats = await service.classify_inputs(caller, sent.inputs, images, top_k, canary)
        add_batch_headers(response, stats)
        return Results(results=results)


def _parse_inputs(body: bytes) -> tuple[InputsBody, list[NamedImage]]:
    """Return the body of a call for several tasks, and its decoded images."""
    sent = parse_json(InputsBody, body)
    return sent, decode_base64([(f"inputs.{i}.image", x.image) for i, x in enumerate(sent.inputs)])


def _refuse_version_number(alias: str | None) -> None:
    """Refuse an alias of digits. A reference to it would be read as a version's number.

    Raises:
        InvalidRequest: the alias has only digits.
    """
    if alias is not None and alias.isdecimal():
        raise InvalidRequest.at("alias", f"{alias!r} is a version number; use a name with a letter")
