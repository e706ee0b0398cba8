"""What all routes share: who calls, bodies read within limits, and every error as a problem (RFC 9457)."""

import json
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response, Security
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from ..admission.authentication import Access, Caller
from ..errors import FieldProblem, HubError, InvalidRequest, TooLarge, Unauthenticated
from ..observability import logs
from ..worker_api import PassStats
from .edge import client_address
from .upload_guard import belongs_to

logger = logging.getLogger(__name__)

PROBLEM_JSON = "application/problem+json"
JSON = "application/json"
BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
MAX_CHANGE_BYTES = 64 * 1024
MAX_JSON_VALUES = 10_000  # of a body; parsed, each takes tens of bytes, and each that is wrong an error
MAX_ERRORS = 50  # that a problem names
PROTOCOLS = ("/v2", "/models/")  # whose clients look for an error's text in `error`
BEARER = HTTPBearer(auto_error=False)  # for the documentation; `Access` reads the header and answers as the hub does
Body = TypeVar("Body", bound=BaseModel)


class Doors:
    """FastAPI dependencies: each gives the caller, or refuses."""

    def __init__(self, access: Access) -> None:
        async def any_key(request: Request, _documented: Annotated[object, Security(BEARER)]) -> Caller:
            who = await access.caller(request.headers.get("authorization"), client_address(request))
            belongs_to(request.scope, who.tenant)
            request.state.still = partial(access.still, request.headers["authorization"])
            logs.note_tenant(who.tenant)
            _refuse_unknown(request)
            return who

        async def tenant_key(who: Annotated[Caller, Depends(any_key)]) -> Caller:
            who.must_have_tenant()
            return who

        async def owner(who: Annotated[Caller, Depends(any_key)]) -> Caller:
            who.must_own()
            return who

        async def admin(who: Annotated[Caller, Depends(any_key)]) -> Caller:
            who.must_be_admin()
            return who

        self.any_key, self.tenant_key, self.owner, self.admin = any_key, tenant_key, owner, admin


def _refuse_unknown(request: Request) -> None:
    """A query parameter that the route does not have: misspelt, it would be passed over, and the answer be another.

    Raises:
        InvalidRequest: under /v1 only; other people's clients send what their protocols may grow.
    """
    route = request.scope["route"]
    if not request.query_params or not route.path.startswith("/v1/"):
        return
    known = _query_names(route.dependant)
    unknown = sorted({*request.query_params} - known)
    if unknown:
        message = f"unknown query parameter; this route takes {', '.join(sorted(known)) or 'none'}"
        raise _refused([FieldProblem(name, message) for name in unknown])


def _query_names(dependant: Dependant) -> set[str]:
    """The names of all query parameters that a route and what it depends on declare."""
    own = {field.alias for field in dependant.query_params}
    return own.union(*(_query_names(other) for other in dependant.dependencies))


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema in one piece, since a `$ref` of pydantic's would point beside OpenAPI's own schemas."""
    whole = model.model_json_schema()
    parts = whole.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = parts[node["$ref"].rpartition("/")[2]]
        return {key: inlined(value) for key, value in node.items()}

    return inlined(whole)


def documented(content: dict[str, dict[str, Any]], *, required: bool = True) -> dict[str, Any]:
    """OpenAPI's `requestBody` of a route that reads its body itself, within limits and after the key was checked."""
    return {"requestBody": {"required": required, "content": {kind: {"schema": s} for kind, s in content.items()}}}


def content_type(request: Request) -> str:
    """The body's media type, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(request: Request, limit_bytes: int, what: str) -> bytes:
    """The whole body, refused as soon as it is known to be too large."""
    return b"".join([chunk async for chunk in limited(request, limit_bytes, what)])


async def limited(request: Request, limit_bytes: int, what: str) -> AsyncGenerator[bytes, None]:
    message = f"the {what} has more than the {limit_bytes} bytes that are allowed"
    error = TooLarge.at("body", message)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise error
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > limit_bytes:
            raise error
        yield chunk
    await request.state.still()


def parse_json(model: type[Body], body: bytes, most_values: int = MAX_JSON_VALUES) -> Body:
    """
    Raises:
        TooLarge: more values than allowed, so that parsing them would hold up others.
        InvalidRequest: not what the model says.
    """
    if body.count(b",") > most_values:
        message = f"the JSON has more than {most_values} values; send images as bytes, not as numbers"
        raise TooLarge.at("body", message)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error.errors(), "body") from error


def require_name(alias: str | None) -> None:
    """An alias of digits alone would be taken for a version's number."""
    if alias is not None and alias.isdecimal():
        message = f"{alias!r} is a version's number; an alias needs a letter in it"
        raise InvalidRequest.at("alias", message)


def tell(response: Response, passes: Sequence[PassStats]) -> None:
    """How the answer was computed, in headers; for several images the largest pass and the longest times."""
    response.headers["x-worker"] = passes[0].worker
    response.headers["x-batch-images"] = str(max(p.images for p in passes))
    response.headers["x-batch-tasks"] = str(max(p.tasks for p in passes))
    times_ms = {name: max(getattr(p, f"{name}_ms") for p in passes) for name in ("load", "queue", "compute")}
    response.headers["server-timing"] = ", ".join(f"{name};dur={ms:.2f}" for name, ms in times_ms.items())
    logs.note_times(**{name: ms / 1000 for name, ms in times_ms.items()})


def translate_errors(api: FastAPI) -> None:
    """Every error leaves as a problem: the hub's own, FastAPI's, and whatever nobody foresaw."""

    @api.exception_handler(HubError)
    async def hub_error(request: Request, error: HubError) -> Response:
        logs.note_error(error.code, error.errors[0].field if error.errors else "")
        headers = {}
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        if isinstance(error, Unauthenticated):
            headers["www-authenticate"] = "Bearer"
        return _problem(request, error.problem(), error.status, headers)

    @api.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        return await hub_error(request, invalid(error.errors()))

    @api.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        body = {"type": "about:blank", "title": error.detail, "status": error.status_code, "detail": error.detail}
        headers = error.headers
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:  # Starlette tells the methods of one route only
            headers = {"allow": ", ".join(sorted(_methods(api, request)))}
        return _problem(request, body, error.status_code, headers)

    @api.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return await hub_error(request, HubError("an unforeseen error; the hub's log has it"))


def _methods(api: FastAPI, request: Request) -> set[str]:
    """The methods that the path of a request has."""
    routes = [route for route in api.routes if route.matches(request.scope)[0] != Match.NONE]
    return {method for route in routes for method in getattr(route, "methods", None) or ()}


def _problem(request: Request, body: Mapping[str, Any], status: int, headers: Mapping[str, str] | None) -> Response:
    """ASCII only: what a client sent and is told of may hold half a surrogate, which UTF-8 cannot."""
    if request.url.path.startswith(PROTOCOLS):
        body = {**body, "error": body["detail"]}
    return Response(json.dumps(body), status, headers, PROBLEM_JSON)


def invalid(errors: Sequence[Any], where: str = "") -> InvalidRequest:
    """Pydantic's errors, each with its field's path; the first of them where there are many."""
    problems = []
    for error in errors[:MAX_ERRORS]:
        location = [str(part) for part in error["loc"] if part not in ("path", "query", "header", "body")]
        field = ".".join(location) or where or "body"
        message = error["msg"]
        if "pattern" in error.get("ctx", {}):
            message = f"{error['input']!r} does not match {error['ctx']['pattern']}"
        problems.append(FieldProblem(field, message))
    return _refused(problems)


def _refused(problems: Sequence[FieldProblem]) -> InvalidRequest:
    return InvalidRequest("; ".join(f"{p.field}: {p.message}" for p in problems[:5]), problems[:MAX_ERRORS])
