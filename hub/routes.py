"""HTTP: every route of the hub as a FastAPI application; each says who, what, do, reply."""

import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Path, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from .access import Access, Caller
from .answers import Pass
from .errors import FieldProblem, HubError, InvalidRequest, TooLarge, Unauthenticated
from .schemas import (
    LATEST,
    MAX_IMAGES,
    NAME_PATTERN,
    AliasChange,
    Classified,
    Health,
    ImagesBody,
    Input,
    InputsBody,
    Problem,
    Registered,
    Results,
    TaskInfo,
    TaskList,
    VersionInfo,
)
from .service import Service, decode_base64
from .turns import Turns

logger = logging.getLogger(__name__)

MAX_CHANGE_BYTES = 64 * 1024
BEARER = HTTPBearer(auto_error=False)  # for the documentation; `Access` reads the header and answers as the hub does
PROBLEM_JSON = "application/problem+json"
ADAPTER_FILE = "application/octet-stream"
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {PROBLEM_JSON: {}}} for status in (401, 403, 404, 409, 413, 422, 429, 503)
}

JSON = "application/json"
BINARY = {"type": "string", "format": "binary"}
IMAGES_BODY: dict[str, Any] = {
    "image/*": BINARY,
    "multipart/form-data": {"type": "object", "properties": {"image": {"type": "array", "items": BINARY}}},
    JSON: ImagesBody.model_json_schema(),
}

# Written out, since a `$ref` of pydantic's would point beside OpenAPI's own schemas.
INPUTS_BODY = {
    "type": "object",
    "required": ["inputs"],
    "properties": {"inputs": {"type": "array", "maxItems": MAX_IMAGES, "items": Input.model_json_schema()}},
}

Body = TypeVar("Body", bound=BaseModel)
TaskName = Annotated[str, Path(pattern=NAME_PATTERN, description="a task of the caller's tenant")]
AliasName = Annotated[str, Path(pattern=NAME_PATTERN)]
Number = Annotated[int, Path(ge=1, le=2**53)]
Reference = Annotated[str, Path(max_length=63, description="a version's number or an alias")]
Version = Annotated[str, Query(max_length=63, description="a version's number or an alias")]
TopK = Annotated[int, Query(ge=1, le=1000, description="labels an image")]


def create_api(
    service: Service,
    access: Access,
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
    api = FastAPI(title="karst-hub", lifespan=lifespan, responses=PROBLEMS)
    _translate_errors(api)

    async def caller(request: Request, _documented: Annotated[object, Security(BEARER)]) -> Caller:
        return await access.caller(request.headers.get("authorization"))

    async def owner(who: Annotated[Caller, Depends(caller)]) -> Caller:
        who.must_own()
        return who

    Who = Annotated[Caller, Depends(caller)]
    Owner = Annotated[Caller, Depends(owner)]

    @api.get("/healthz")
    async def healthz() -> Health:
        return Health()

    @api.get("/readyz")
    async def readyz() -> Health:
        await service.ready()
        return Health()

    @api.get("/v1/tasks")
    async def list_tasks(who: Who) -> TaskList:
        return TaskList(tasks=await service.tasks(who.tenant))

    @api.get("/v1/tasks/{task}")
    async def get_task(who: Who, task: TaskName) -> TaskInfo:
        return await service.task(who.tenant, task)

    @api.delete("/v1/tasks/{task}", status_code=204)
    async def delete_task(who: Owner, task: TaskName) -> None:
        await service.delete_task(who.tenant, task)

    @api.post(
        "/v1/tasks/{task}/versions",
        status_code=201,
        responses={200: {"model": Registered}},
        openapi_extra=_documented({ADAPTER_FILE: BINARY}),
    )
    async def register(
        who: Owner,
        task: TaskName,
        request: Request,
        response: Response,
        alias: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
    ) -> Registered:
        _require_name(alias)
        data = await _body(request, max_adapter_bytes, "adapter file")
        registered, created = await service.register(who.tenant, task, data, alias)
        response.status_code = 201 if created else 200
        return registered

    @api.get("/v1/tasks/{task}/versions/{version}")
    async def get_version(who: Who, task: TaskName, version: Reference) -> VersionInfo:
        return await service.version(who.tenant, task, version)

    @api.get("/v1/tasks/{task}/versions/{version}/file", response_class=Response)
    async def get_file(who: Who, task: TaskName, version: Reference) -> Response:
        info, data = await service.file(who.tenant, task, version)
        name = f"{task}-{info.version}.safetensors"
        headers = {"content-disposition": f'attachment; filename="{name}"', "etag": f'"{info.digest}"'}
        return Response(data, media_type=ADAPTER_FILE, headers=headers)

    @api.delete("/v1/tasks/{task}/versions/{version}", status_code=204)
    async def delete_version(who: Owner, task: TaskName, version: Number) -> None:
        await service.delete_version(who.tenant, task, version)

    @api.put("/v1/tasks/{task}/aliases/{alias}", openapi_extra=_documented({JSON: AliasChange.model_json_schema()}))
    async def set_alias(who: Owner, task: TaskName, alias: AliasName, request: Request) -> TaskInfo:
        _require_name(alias)
        change = _parse(AliasChange, await _body(request, MAX_CHANGE_BYTES, "body"))
        return await service.set_alias(who.tenant, task, alias, change.targets())

    @api.post("/v1/tasks/{task}/classify", openapi_extra=_documented(IMAGES_BODY))
    async def classify(
        who: Who, task: TaskName, request: Request, response: Response, top_k: TopK = 5, version: Version = LATEST
    ) -> Classified:
        async with turns.turn(who.tenant):
            images = await _images(request, max_request_bytes)
            classified, passes = await service.classify(who.tenant, task, version, images, top_k)
        _tell(response, passes)
        return classified

    @api.post("/v1/classify", openapi_extra=_documented({JSON: INPUTS_BODY}))
    async def classify_inputs(who: Who, request: Request, response: Response, top_k: TopK = 5) -> Results:
        async with turns.turn(who.tenant):
            body = await run_in_threadpool(_parse, InputsBody, await _body(request, max_request_bytes, "body"))
            results, passes = await service.classify_inputs(who.tenant, body.inputs, top_k)
        _tell(response, passes)
        return Results(results=results)

    return api


def _documented(content: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """OpenAPI's `requestBody` of a route that reads its body itself, within limits and after the key was checked."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": s} for kind, s in content.items()}}}


async def _body(request: Request, limit_bytes: int, what: str) -> bytes:
    """The whole body, refused as soon as it is known to be too large."""
    return b"".join([chunk async for chunk in _limited(request, limit_bytes, what)])


async def _limited(request: Request, limit_bytes: int, what: str) -> AsyncGenerator[bytes, None]:
    message = f"the {what} has more than the {limit_bytes} bytes that are allowed"
    error = TooLarge(message, [FieldProblem("body", message)])
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise error
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > limit_bytes:
            raise error
        yield chunk


async def _images(request: Request, limit_bytes: int) -> list[tuple[str, bytes]]:
    """The images of a classification request, each with its field's name: one raw, several as multipart or JSON."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == JSON:
        return await run_in_threadpool(_images_of_json, await _body(request, limit_bytes, "body"))
    if content_type == "multipart/form-data":
        return await _multipart(request, limit_bytes)
    return [("body", await _body(request, limit_bytes, "body"))]


async def _multipart(request: Request, limit_bytes: int) -> list[tuple[str, bytes]]:
    stream = _limited(request, limit_bytes, "body")
    try:
        form = await MultiPartParser(request.headers, stream, max_files=MAX_IMAGES, max_fields=MAX_IMAGES).parse()
    except MultiPartException as error:
        raise InvalidRequest(error.message, [FieldProblem("body", error.message)]) from error
    try:
        images = [(name, await part.read()) for name, part in form.multi_items() if not isinstance(part, str)]
    finally:
        await form.close()
    if not images:
        message = "no file part in the form; send each image as a file"
        raise InvalidRequest(message, [FieldProblem("body", message)])
    return images


def _images_of_json(body: bytes) -> list[tuple[str, bytes]]:
    images = _parse(ImagesBody, body).images
    return decode_base64([(f"images.{i}", text) for i, text in enumerate(images)])


def _parse(model: type[Body], body: bytes) -> Body:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error.errors(), "body") from error


def _require_name(alias: str | None) -> None:
    """An alias of digits alone would be taken for a version's number."""
    if alias is not None and alias.isdecimal():
        message = f"{alias!r} is a version's number; an alias needs a letter in it"
        raise InvalidRequest(message, [FieldProblem("alias", message)])


def _tell(response: Response, passes: Sequence[Pass]) -> None:
    """How the answer was computed, in headers; for several images the largest pass and the longest times."""
    response.headers["x-worker"] = passes[0].worker
    response.headers["x-batch-images"] = str(max(p.images for p in passes))
    response.headers["x-batch-tasks"] = str(max(p.tasks for p in passes))
    response.headers["server-timing"] = ", ".join(
        f"{name};dur={max(getattr(p, f'{name}_ms') for p in passes):.2f}" for name in ("load", "queue", "compute")
    )


def _translate_errors(api: FastAPI) -> None:
    """Every error leaves as a problem: the hub's own, FastAPI's, and whatever nobody foresaw."""

    @api.exception_handler(HubError)
    async def hub_error(_request: Request, error: HubError) -> Response:
        headers = {}
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        if isinstance(error, Unauthenticated):
            headers["www-authenticate"] = "Bearer"
        return _problem(error.problem(), error.status, headers)

    @api.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        return await hub_error(request, _invalid(error.errors()))

    @api.exception_handler(HTTPException)
    async def no_route(_request: Request, error: HTTPException) -> Response:
        body = {"type": "about:blank", "title": error.detail, "status": error.status_code, "detail": error.detail}
        return _problem(body, error.status_code, error.headers)

    @api.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return await hub_error(request, HubError("an unforeseen error; the hub's log has it"))


def _problem(body: Mapping[str, Any], status: int, headers: Mapping[str, str] | None) -> Response:
    """ASCII only: what a client sent and is told of may hold half a surrogate, which UTF-8 cannot."""
    return Response(json.dumps(body), status, headers, PROBLEM_JSON)


def _invalid(errors: Sequence[Any], where: str = "") -> InvalidRequest:
    """Pydantic's errors, each with its field's path."""
    problems = []
    for error in errors:
        location = [str(part) for part in error["loc"] if part not in ("path", "query", "body")]
        field = ".".join(location) or where or "body"
        message = error["msg"]
        if "pattern" in error.get("ctx", {}):
            message = f"{error['input']!r} does not match {error['ctx']['pattern']}"
        problems.append(FieldProblem(field, message))
    return InvalidRequest("; ".join(f"{p.field}: {p.message}" for p in problems[:5]), problems)
