"""Routes of health, the backbone, tasks, versions, aliases and classification."""

import re
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.routing import APIRoute

from ..admin_schemas import NewToken, TokenRequest
from ..admission.authentication import Authenticator, Caller
from ..concurrency import TenantConcurrencyLimit
from ..errors import InvalidRequest
from ..field_types import NAME_PATTERN
from ..registry.task_reads import TaskOrder
from ..schemas import (
    LATEST,
    MAX_PAGE,
    AliasChange,
    Classified,
    ClassifyOptions,
    Health,
    ImagesBody,
    InputsBody,
    Registered,
    Results,
    ServedBackbone,
    Sharing,
    SourceBody,
    TaskInfo,
    TaskList,
    TasksBody,
    TaskSettings,
    TaskSort,
    VersionInfo,
)
from ..services.classification import ClassificationService
from ..services.many_tasks import ManyTasksService
from ..services.registration import RegistrationService
from .base64_images import NamedImage, decode_base64
from .bodies import FORM, JSON, RequestBody, parse_json
from .dependencies import (
    TOP_K,
    AliasName,
    CallerDependencies,
    CanaryKey,
    Coverage,
    LargeReply,
    Limit,
    QueryVersion,
    TaskName,
    TopK,
    VersionNumber,
    VersionReference,
    batch_headers,
    json_reply,
    no_options,
)
from .openapi import BINARY, OCTETS, request_body, schema_of
from .plain_route import PlainRequest, PlainRouteMiddleware
from .problems import NUMBER_PATTERN, TASKS_CURSOR_PATTERN

IMAGES_CONTENT: dict[str, Any] = {
    "image/*": BINARY,
    OCTETS: BINARY,
    FORM: {
        "type": "object",
        "properties": {"image": {"type": "array", "items": BINARY}, **schema_of(ClassifyOptions)["properties"]},
    },
    JSON: schema_of(ImagesBody),
}
INPUTS_MEMBER, TASKS_MEMBER = re.compile(rb'"inputs"\s*:'), re.compile(rb'"(tasks|image)"\s*:')
MovedAlias = Annotated[
    str | None, Query(pattern=NAME_PATTERN, description="a further alias that a new version gets, besides `latest`")
]
Stage = Annotated[bool, Query(description="true: `latest` stays where it is")]
Labels = Annotated[
    Literal["changed"] | None, Query(description="`changed`: the labels may differ from those behind `latest`")
]
TasksCursor = Annotated[str | None, Query(pattern=TASKS_CURSOR_PATTERN, description="`next` of the previous page")]
Search = Annotated[str, Query(max_length=127, description="part of a task's name")]
VersionsCursor = Annotated[str | None, Query(pattern=NUMBER_PATTERN, description="`next` of the previous page")]
UnknownBelow = Annotated[
    float | None, Query(ge=0, le=1, description="the task's setting: an image with a lower typicality is unknown")
]


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


def add_backbone_route(
    api: FastAPI,
    service: ClassificationService,
    dependencies: CallerDependencies,
    *,
    image_size: int | None,
    checkpoint: str | None,
) -> None:
    """Add the route that describes the backbone, so that a client can train for it.

    Args:
        image_size: side of the images in pixels; None: the model's own.
        checkpoint: name of the file of local weights; None: the backbone's own weights.
    """

    @api.get("/v1/backbone", summary="Get the backbone and the sizes of adapters that fit")
    async def get_backbone(_caller: Annotated[Caller, Depends(dependencies.any_caller)]) -> ServedBackbone:
        limits = await service.limits()
        return ServedBackbone(
            name=limits.backbone.name,
            fingerprint=limits.backbone.fingerprint,
            input_size=limits.backbone.input_size,
            image_size=image_size,
            checkpoint=checkpoint,
            max_rank=limits.max_rank,
            max_kernels=limits.max_kernels,
            factor=limits.factor,
        )


def add_task_routes(
    api: FastAPI,
    service: ClassificationService,
    changes: RegistrationService,
    dependencies: CallerDependencies,
    authenticator: Authenticator,
    *,
    max_adapter_bytes: int,
) -> None:
    """Add the routes that read and change tasks, and the route of tokens for a task."""
    TenantCaller = Annotated[Caller, Depends(dependencies.tenant_caller)]
    Owner = Annotated[Caller, Depends(dependencies.owner)]
    Body = Annotated[RequestBody, Depends(dependencies.body)]

    @api.get("/v1/tasks", response_model=TaskList)
    async def list_tasks(
        caller: TenantCaller,
        limit: Limit = MAX_PAGE,
        cursor: TasksCursor = None,
        search: Search = "",
        sort: Annotated[TaskSort, Query(description="value of the tenant's own tasks")] = "name",
        order: Annotated[Literal["asc", "desc"], Query()] = "asc",
    ) -> Response:
        chosen = TaskOrder(sort, order == "desc")
        return json_reply(await service.tasks(caller, limit, cursor or "", search, chosen))

    @api.get("/v1/tasks/{task}", response_model=TaskInfo)
    async def get_task(
        caller: TenantCaller, task: TaskName, limit: Limit = MAX_PAGE, cursor: VersionsCursor = None
    ) -> Response:
        return json_reply(await service.task(caller, task, limit, int(cursor or 0)))

    @api.put(
        "/v1/tasks/{task}",
        summary="Change settings of a task, or create it without a version",
        response_model=TaskInfo,
        responses={201: {"model": TaskInfo}},
        openapi_extra=request_body({JSON: schema_of(TaskSettings)}, required=False),
    )
    async def put_task(caller: Owner, task: TaskName, body: Body) -> Response:
        info, created = await changes.put(caller, task, await body.read_json(TaskSettings, default=b"{}"))
        return json_reply(info, 201 if created else 200)

    @api.delete("/v1/tasks/{task}", status_code=204)
    async def delete_task(caller: Owner, task: TaskName) -> None:
        await changes.delete_task(caller, task)

    @api.put(
        "/v1/tasks/{task}/sharing",
        summary="Share a task with all or some tenants",
        response_model=TaskInfo,
        openapi_extra=request_body({JSON: schema_of(Sharing)}),
    )
    async def share_task(caller: Owner, task: TaskName, body: Body) -> Response:
        return json_reply(await changes.share(caller, task, await body.read_json(Sharing)))

    @api.post(
        "/v1/tasks/{task}/versions",
        summary="Register an adapter file as a version",
        status_code=201,
        responses={200: {"model": Registered}},
        openapi_extra=request_body({OCTETS: BINARY, JSON: schema_of(SourceBody)}),
    )
    async def register_version(
        caller: Owner,
        task: TaskName,
        body: Body,
        response: Response,
        alias: MovedAlias = None,
        unknown_below: UnknownBelow = None,
        stage: Stage = False,
        labels: Labels = None,
    ) -> Registered:
        _refuse_version_number(alias)
        changed = labels is not None
        settings = TaskSettings() if unknown_below is None else TaskSettings(unknown_below=unknown_below)
        if body.content_type == JSON:
            source = await body.read_json(SourceBody)
            registered, created = await changes.register_source(
                caller, task, source, alias, settings, stage=stage, labels_may_change=changed
            )
        else:
            async with changes.upload(caller):
                data = await body.read_file(max_adapter_bytes, "adapter file")
                registered, created = await changes.register(
                    caller, task, data, alias, settings, stage=stage, labels_may_change=changed
                )
        response.status_code = 201 if created else 200
        return registered

    @api.post(
        "/v1/tokens",
        summary="Create a token, which acts for the key with one task for at most an hour",
        status_code=201,
        openapi_extra=request_body({JSON: schema_of(TokenRequest)}),
    )
    async def create_token(caller: TenantCaller, body: Body) -> NewToken:
        request = await body.read_json(TokenRequest)
        token = await authenticator.issue(caller, request)
        await service.find(caller, request.task, LATEST)  # a token for a task that does not exist would be of no use
        return token

    @api.get("/v1/tasks/{task}/versions/{version}", response_model=VersionInfo)
    async def get_version(
        caller: TenantCaller, task: TaskName, version: VersionReference, canary: CanaryKey = None
    ) -> Response:
        return json_reply((await service.version(caller, task, version, canary)).json)

    @api.get(
        "/v1/tasks/{task}/versions/{version}/file",
        response_class=Response,
        dependencies=[Depends(dependencies.large_reply)],
        responses={200: {"content": {OCTETS: {"schema": BINARY}}}},
    )
    async def download_version(
        caller: Owner, task: TaskName, version: VersionReference, canary: CanaryKey = None
    ) -> Response:
        number, digest, data = await changes.file(caller, task, version, canary)
        name = f"{task.rpartition(':')[2]}-{number}.safetensors"
        headers = {"content-disposition": f'attachment; filename="{name}"', "etag": f'"{digest}"'}
        return LargeReply(data, media_type=OCTETS, headers=headers)

    @api.delete("/v1/tasks/{task}/versions/{version}", status_code=204)
    async def delete_version(caller: Owner, task: TaskName, version: VersionNumber) -> None:
        await changes.delete_version(caller, task, version)

    @api.put(
        "/v1/tasks/{task}/aliases/{alias}",
        response_model=TaskInfo,
        openapi_extra=request_body({JSON: schema_of(AliasChange)}),
    )
    async def set_alias(caller: Owner, task: TaskName, alias: AliasName, body: Body) -> Response:
        _refuse_version_number(alias)
        change = await body.read_json(AliasChange)
        return json_reply(await changes.set_alias(caller, task, alias, change.targets()))

    @api.delete("/v1/tasks/{task}/aliases/{alias}", status_code=204)
    async def delete_alias(caller: Owner, task: TaskName, alias: AliasName) -> None:
        await changes.delete_alias(caller, task, alias)

    @api.post(
        "/v1/tasks/{task}/aliases/{alias}/rollback",
        summary="Point an alias at its previous target",
        response_model=TaskInfo,
    )
    async def roll_back_alias(caller: Owner, task: TaskName, alias: AliasName) -> Response:
        return json_reply(await changes.roll_back(caller, task, alias))


def add_classify_routes(
    api: FastAPI,
    service: ClassificationService,
    many: ManyTasksService,
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

    async def classified(
        caller: Caller,
        task: str,
        body: RequestBody,
        top_k: int,
        version: str,
        coverage: float | None = None,
        canary: str | None = None,
    ) -> Response:
        async with concurrency_limit.acquire(caller.tenant):
            sent = await body.read_images(max_request_bytes)
            top_k = body.option("top_k", top_k, sent.options.top_k)
            version = body.option("version", version, sent.options.version)
            coverage = body.option("coverage", coverage, sent.options.coverage)
            found, stats = await service.classify(caller, task, version, sent.images, top_k, canary, coverage)
        headers = batch_headers(stats)
        if sent.skipped:
            headers["x-skipped-files"] = str(sent.skipped)
        return Response(found.model_dump_json(), headers=headers, media_type=JSON)

    async def plain(request: Request, given: PlainRequest) -> Response:
        caller, body = await dependencies.plain(request)
        return await classified(caller, given.task, body, given.top_k or TOP_K, given.version or LATEST)

    async def classify(
        caller: TenantCaller,
        task: TaskName,
        body: Body,
        top_k: TopK = TOP_K,
        version: QueryVersion = LATEST,
        coverage: Coverage = None,
        canary: CanaryKey = None,
    ) -> Response:
        return await classified(caller, task, body, top_k, version, coverage, canary)

    api.router.add_api_route(
        "/v1/tasks/{task}/classify",
        classify,
        methods=["POST"],
        summary="Classify images with one task",
        response_model=Classified,
        openapi_extra=request_body(IMAGES_CONTENT),
    )
    route = next(route for route in api.routes if isinstance(route, APIRoute) and route.endpoint is classify)
    api.add_middleware(PlainRouteMiddleware, route=route, answer=plain)

    # FastAPI would check a thousand results once more.
    @api.post(
        "/v1/classify",
        summary="Classify images with several tasks, or one image with many tasks",
        response_model=Results,
        openapi_extra=request_body({JSON: {"anyOf": [schema_of(InputsBody), schema_of(TasksBody)]}}),
    )
    async def classify_inputs(
        caller: TenantCaller,
        body: Body,
        top_k: TopK = TOP_K,
        coverage: Coverage = None,
        canary: CanaryKey = None,
    ) -> Response:
        async with concurrency_limit.acquire(caller.tenant):
            sent, images = await body.parse(_parse_inputs, await body.read(max_request_bytes))
            top_k = body.option("top_k", top_k, sent.top_k)
            coverage = body.option("coverage", coverage, sent.coverage)
            if isinstance(sent, TasksBody):
                results, stats = await many.classify(caller, sent, images[0][1], top_k, canary, coverage)
            else:
                found, stats = await service.classify_inputs(caller, sent.inputs, images, top_k, canary, coverage)
                results = Results(results=found)
        return json_reply(results, headers=batch_headers(stats))


def _parse_inputs(body: bytes) -> tuple[InputsBody | TasksBody, list[NamedImage]]:
    """Return the body of a call for several tasks, and its decoded images.

    The names of the members tell both forms apart; a text with such a name is no member, since no colon follows it.
    """
    if not INPUTS_MEMBER.search(body) and TASKS_MEMBER.search(body):
        one = parse_json(TasksBody, body)
        return one, decode_base64([("image", one.image)])
    sent = parse_json(InputsBody, body)
    return sent, decode_base64([(f"inputs.{i}.image", x.image) for i, x in enumerate(sent.inputs)])


def _refuse_version_number(alias: str | None) -> None:
    """Refuse an alias of digits. A reference to it would be read as a version's number.

    Raises:
        InvalidRequest: the alias has only digits.
    """
    if alias is not None and alias.isdecimal():
        raise InvalidRequest.at("alias", f"{alias!r} is a version number; use a name with a letter")
