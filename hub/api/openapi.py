"""The OpenAPI document finished, and its interactive page at `/docs`, which needs no network.

FastAPI tells of parameters, bodies and good answers; here every operation gets the problems that it may answer with,
and what belongs to the whole: version, key, groups.
"""

from collections.abc import Iterator
from functools import cache
from http import HTTPStatus
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from ..errors import HubError
from ..schemas import Problem

PROBLEM_JSON = "application/problem+json"
SCHEMA = "#/components/schemas/{model}"
DESCRIPTION = (
    "Many tenants' KARST adapters over one frozen backbone. Every error is a problem (RFC 9457). What belongs to "
    "another tenant is answered as if it were not there."
)
KEY = "An API key, `kh_...`. Owners manage their tenant's tasks, callers only classify, admins manage tenants."
# The longest prefix wins.
GROUPS = {
    "/": "hub",
    "/v1/tasks": "tasks",
    "/v1/tasks/{task}/classify": "classify",
    "/v1/classify": "classify",
    "/v1/tenants": "tenants",
    "/v1/usage": "tenants",
    "/v1/audit": "admin",
    "/v1/admin": "admin",
    "/v1/status": "admin",
    "/v1/gc": "admin",
    "/v2": "Open Inference Protocol v2",
    "/models": "Hugging Face",
}
# FastAPI's summaries are the names of functions; these would say too little.
SUMMARIES = {
    "Healthz": "Whether the gateway lives",
    "Readyz": "Whether a worker has its backbone",
    "Share": "Let all or some tenants use a task",
    "Register": "Register an adapter file as a version",
    "Roll Back": "Point an alias at what it pointed at before",
    "Classify": "Classify images with one task",
    "Classify Inputs": "Classify images of several tasks",
    "Collect": "Remove files that no version holds",
    "Hugging Face": "Classify an image",
    "Live": "Whether the gateway lives",
    "Ready": "Whether a worker has its backbone",
    "Server": "Name, version and extensions of the server",
    "Model": "Versions, inputs and outputs of a task",
    "Model Ready": "Whether a task can be called",
    "Infer": "Classify a batch of images",
}
PASS_HEADERS = {
    "x-worker": "the worker that computed it",
    "x-batch-images": "images in the largest forward pass that it shared",
    "x-batch-tasks": "tasks in that pass",
    "server-timing": "load, queue and compute in milliseconds",
}
PROTOCOLS = ("/v2", "/models")  # their problems have `error`, too: the text that their clients look for
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>karst-hub</title>
<link rel="icon" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</html>
"""
# A file of its own, since the page's Content-Security-Policy allows no script in the page. No key stays in the browser.
START = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null, persistAuthorization: false,
});
"""
ASSETS = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript", "favicon-32x32.png": "image/png"}
KEPT = {"cache-control": "public, max-age=86400"}


def finish(api: FastAPI) -> None:
    """Complete the document, and add `/docs`. The application is made with `docs_url=None, redoc_url=None`."""
    build = api.openapi

    def openapi() -> dict[str, Any]:
        if not api.openapi_schema:
            finished(build())
        return build()  # FastAPI keeps the document; it is finished in place

    api.openapi = openapi  # type: ignore[method-assign]
    _add_pages(api)


def finished(document: dict[str, Any]) -> None:
    """Finish FastAPI's document in place."""
    document["info"] |= {"version": version("karst-hub"), "description": DESCRIPTION}
    document["info"]["license"] = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
    components = document["components"]
    for scheme in components["securitySchemes"].values():
        scheme |= {"description": KEY}
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of errors, which nobody sees
        components["schemas"].pop(unused, None)
    components["schemas"] |= _problem_schemas()
    groups = set()
    for path, operations in document["paths"].items():
        group = GROUPS[max((prefix for prefix in GROUPS if path.startswith(prefix)), key=len)]
        groups.add(group)
        schema = "ProtocolProblem" if path.startswith(PROTOCOLS) else "Problem"
        for method, operation in operations.items():
            good = {status: answer for status, answer in operation["responses"].items() if int(status) < 400}
            bad = {str(status): _answer(status, schema) for status in _problems(path, method, operation)}
            operation["responses"] = good | bad
            operation["tags"] = [group]
            operation["summary"] = SUMMARIES.get(operation["summary"], operation["summary"])
            if _classifies(path, method):
                good["200"]["headers"] = {name: _header(text) for name, text in PASS_HEADERS.items()}
    document["tags"] = [{"name": group} for group in dict.fromkeys(GROUPS.values()) if group in groups]


def _problems(path: str, method: str, operation: dict[str, Any]) -> Iterator[int]:
    """The statuses of the problems that an operation may answer with."""
    body, parameters = "requestBody" in operation, operation.get("parameters")
    change = method != "get" and not _classifies(path, method)
    if operation.get("security"):
        yield from (401, 403, 404, 429)
    if body:
        yield 408
    if change:
        yield 409
    if body:
        yield 413
    yield 414
    if body or parameters or path.startswith("/v1"):  # there an unknown query parameter is refused, too
        yield 422
    yield from (431, 500)
    if operation.get("security") or path.endswith(("/ready", "/readyz")):
        yield 503


def _classifies(path: str, method: str) -> bool:
    return method == "post" and (path.endswith(("/classify", "/infer")) or path.startswith("/models"))


def _answer(status: int, schema: str) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": _description(status),
        "content": {PROBLEM_JSON: {"schema": {"$ref": SCHEMA.format(model=schema)}}},
    }
    if status == HTTPStatus.UNAUTHORIZED:
        answer["headers"] = {"www-authenticate": _header("Bearer")}
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        answer["headers"] = {"retry-after": _header("seconds to wait")}
    return answer


def _header(description: str) -> dict[str, Any]:
    return {"description": description, "required": True, "schema": {"type": "string"}}


@cache
def _description(status: int) -> str:
    """What it is called, and how the `type` of its problems ends."""
    codes = [kind.code for kind in _kinds(HubError) if kind.status == status]
    return HTTPStatus(status).phrase + (f"; its `type` ends in {' or '.join(codes)}" if codes else "")


def _kinds(kind: type[HubError]) -> Iterator[type[HubError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)


def _problem_schemas() -> dict[str, Any]:
    """`Problem` and its parts, and the same with `error`."""
    problem = Problem.model_json_schema(ref_template=SCHEMA)
    parts = problem.pop("$defs")
    text = {"type": "string", "description": "the same as `detail`"}
    protocol = problem | {
        "title": "ProtocolProblem",
        "properties": problem["properties"] | {"error": text},
        "required": [*problem["required"], "error"],
    }
    return {**parts, "Problem": problem, "ProtocolProblem": protocol}


def _add_pages(api: FastAPI) -> None:
    @api.get("/docs", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE)

    @api.get("/docs/start.js", include_in_schema=False)
    async def start() -> Response:
        return Response(START, media_type="text/javascript", headers=KEPT)

    @api.get("/docs/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in ASSETS:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return Response(_asset(name), media_type=ASSETS[name], headers=KEPT)


@cache
def _asset(name: str) -> bytes:
    """A file of Swagger UI, from the package that brings it along."""
    return (files("fastapi_swagger") / "resources" / name).read_bytes()
