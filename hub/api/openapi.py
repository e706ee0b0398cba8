"""OpenAPI document of the hub, and its interactive page at `/docs`, which needs no network.

FastAPI describes parameters and successful replies. This module adds request bodies, problems, reply headers, groups,
the version and the description of keys.
"""

from collections.abc import Iterator
from functools import cache
from http import HTTPStatus
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from ..errors import HubError
from ..schemas import ProblemDetails
from .problems import PROBLEM_JSON, is_protocol_path

OCTETS = "application/octet-stream"
BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
SCHEMA = "#/components/schemas/{model}"
DESCRIPTION = (
    "KARST adapters of many tenants on one frozen backbone. Every error is a problem (RFC 9457). A request for another "
    "tenant's task gets the same 404 as a request for an unknown task."
)
KEY_DESCRIPTION = (
    "An API key, `kh_...`. A key with role `owner` manages its tenant's tasks, a key with role `caller` only "
    "classifies, and an admin key manages tenants."
)
# Group of each path, by its longest prefix.
GROUPS = {
    "/": "hub",
    "/v1/tasks": "tasks",
    "/v1/tasks/{task}/classify": "classify",
    "/v1/classify": "classify",
    "/v1/tenants": "tenants",
    "/v1/usage": "tenants",
    "/v1/audit": "admin",
    "/v1/admin": "admin",
    "/v1/login": "hub",
    "/v1/status": "admin",
    "/v1/gc": "admin",
    "/v2": "Open Inference Protocol v2",
    "/models": "Hugging Face",
}
BATCH_HEADERS = {
    "x-worker": "worker that computed the reply",
    "x-batch-images": "images in the largest forward pass of the reply",
    "x-batch-tasks": "largest number of tasks in a forward pass of the reply",
    "server-timing": "decode, load, queue and compute in milliseconds",
}
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
# A separate file, because the page's Content-Security-Policy forbids inline scripts. The page stores no key in the
# browser.
START = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null, persistAuthorization: false,
});
"""
ASSETS = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript", "favicon-32x32.png": "image/png"}
CACHED = {"cache-control": "public, max-age=86400"}


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's JSON schema without references. A `$ref` of pydantic's would not resolve inside of OpenAPI."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = definitions[node["$ref"].rpartition("/")[2]]
        return {key: inlined(value) for key, value in node.items()}

    result: dict[str, Any] = inlined(schema)
    return result


def request_body(content: dict[str, dict[str, Any]], *, required: bool = True) -> dict[str, Any]:
    """Return OpenAPI's `requestBody` for a route that reads its body itself.

    Args:
        content: media type -> schema.
    """
    return {"requestBody": {"required": required, "content": {kind: {"schema": s} for kind, s in content.items()}}}


def complete(document: dict[str, Any]) -> None:
    """Complete FastAPI's document in place."""
    # Relative to the document: a proxy may serve the hub below a path that the hub does not know.
    document["servers"] = [{"url": "."}]
    document["info"] |= {"version": version("karst-hub"), "description": DESCRIPTION}
    document["info"]["license"] = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
    components = document["components"]
    for scheme in components["securitySchemes"].values():
        scheme |= {"description": KEY_DESCRIPTION}
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own errors, which the hub never sends
        components["schemas"].pop(unused, None)
    components["schemas"] |= _problem_schemas()
    _make_tuples_lists(document)
    groups = set()
    for path, operations in document["paths"].items():
        group = GROUPS[max((prefix for prefix in GROUPS if path.startswith(prefix)), key=len)]
        groups.add(group)
        for method, operation in operations.items():
            operation["tags"] = [group]
            _name_json_body(operation, components["schemas"])
            _complete_responses(path, method, operation)
    document["tags"] = [{"name": group} for group in dict.fromkeys(GROUPS.values()) if group in groups]


def _make_tuples_lists(node: Any) -> None:
    """Describe each tuple as a list of fixed length. Schemathesis and generators of clients fail on `prefixItems`."""
    if isinstance(node, dict):
        kinds = node.get("prefixItems")
        if isinstance(kinds, list) and all(kind == kinds[0] for kind in kinds):
            node["items"] = node.pop("prefixItems")[0]
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _make_tuples_lists(child)


def _name_json_body(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Move the schemas of a JSON body to the components: generators of clients name classes by components."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return
    forms = content["schema"].get("anyOf", [content["schema"]])
    named = []
    for schema in forms:
        name = schema["title"]
        if schemas.get(name, schema) != schema:  # the model of a reply, whose schema differs in defaults
            name = f"{name}Request"
        schemas[name] = schema
        named.append({"$ref": SCHEMA.format(model=name)})
    content["schema"] = named[0] if len(named) == 1 else {"anyOf": named}


def _complete_responses(path: str, method: str, operation: dict[str, Any]) -> None:
    schema = "ProtocolProblem" if is_protocol_path(path) else "Problem"
    replies = {status: reply for status, reply in operation["responses"].items() if int(status) < 400}
    problems = {str(status): _problem_reply(status, schema) for status in _problem_statuses(path, method, operation)}
    if _classifies(path, method):
        replies["200"]["headers"] = {name: _header(text) for name, text in BATCH_HEADERS.items()}
    operation["responses"] = replies | problems


def _problem_statuses(path: str, method: str, operation: dict[str, Any]) -> Iterator[int]:
    """Yield the statuses of an operation's problems."""
    body = "requestBody" in operation
    change = method != "get" and not _classifies(path, method)
    if operation.get("security"):
        yield from (401, 403, 404, 429)
    if body:
        yield 408
    if change or path.endswith(("/compare", "/backtest")):
        yield 409
    if body:
        yield 413
    yield from (400, 414, 422, 431, 500)  # 422 on every route: none accepts an unknown query parameter
    if operation.get("security") or path.endswith(("/ready", "/readyz")):
        yield 503
    if path.endswith(("/versions", "/import")):
        yield 507


def _classifies(path: str, method: str) -> bool:
    return method == "post" and (path.endswith(("/classify", "/infer")) or path.startswith("/models"))


def _problem_reply(status: int, schema: str) -> dict[str, Any]:
    reply: dict[str, Any] = {
        "description": _description(status),
        "content": {PROBLEM_JSON: {"schema": {"$ref": SCHEMA.format(model=schema)}}},
    }
    if status == HTTPStatus.UNAUTHORIZED:
        reply["headers"] = {"www-authenticate": _header("Bearer")}
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        reply["headers"] = {"retry-after": _header("seconds to wait before a retry")}
    return reply


def _header(description: str) -> dict[str, Any]:
    return {"description": description, "required": True, "schema": {"type": "string"}}


@cache
def _description(status: int) -> str:
    """Return a status's phrase, and the codes that end the `type` of its problems."""
    codes = [error.code for error in _error_classes(HubError) if error.status == status]
    return HTTPStatus(status).phrase + (f"; `type` ends in {' or '.join(codes)}" if codes else "")


def _error_classes(base: type[HubError]) -> Iterator[type[HubError]]:
    yield base
    for child in base.__subclasses__():
        yield from _error_classes(child)


def _problem_schemas() -> dict[str, Any]:
    """Return the schemas of `Problem`, of its parts, and of `ProtocolProblem` with the member `error`."""
    problem = ProblemDetails.model_json_schema(ref_template=SCHEMA)
    parts = problem.pop("$defs")
    text = {"type": "string", "description": "copy of `detail`"}
    protocol = problem | {
        "title": "ProtocolProblem",
        "properties": problem["properties"] | {"error": text},
        "required": [*problem["required"], "error"],
    }
    return {**parts, "Problem": problem, "ProtocolProblem": protocol}


def add_pages(api: FastAPI) -> None:
    """Add `/docs` and its files."""

    @api.get("/docs", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE)

    @api.get("/docs/start.js", include_in_schema=False)
    async def start() -> Response:
        return Response(START, media_type="text/javascript", headers=CACHED)

    @api.get("/docs/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in ASSETS:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return Response(_asset(name), media_type=ASSETS[name], headers=CACHED)


@cache
def _asset(name: str) -> bytes:
    """Return a file of Swagger UI from its package."""
    return (files("fastapi_swagger") / "resources" / name).read_bytes()
