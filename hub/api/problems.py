"""Errors as HTTP replies: the one renderer of `application/problem+json` (RFC 9457).

Three kinds of errors become problems: the hub's own (`HubError`), HTTP statuses without a class of the hub's
(`about:blank`, such as 405), and unexpected exceptions (500).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from ..errors import FieldProblem, HubError, InvalidRequest, Unauthenticated
from ..observability import request_context

logger = logging.getLogger(__name__)

PROBLEM_JSON = "application/problem+json"
PROTOCOL_PATHS = ("/v2", "/models/")  # clients of these protocols read the error's text from the member `error`
MAX_ERRORS = 50  # field errors in one problem
MAX_DETAIL_ERRORS = 5  # field errors that `detail` repeats


def error_response(error: HubError, path: str, *, close: bool = False) -> Response:
    """Return the problem of one of the hub's errors, and record its code for logs and metrics.

    Args:
        close: end the connection after the reply. Otherwise the server would read the rest of a refused body.
    """
    request_context.note_error(error.code, error.errors[0].field if error.errors else "")
    headers = {"connection": "close"} if close else {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return _response(error.problem(), path, headers)


def status_response(status: int, detail: str, path: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return the problem of an HTTP status that has no class in the hub's error tree."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": int(status), "detail": detail}
    return _response(body, path, headers)


def _response(body: dict[str, Any], path: str, headers: Mapping[str, str] | None) -> Response:
    if path.startswith(PROTOCOL_PATHS):
        body |= {"error": body["detail"]}
    # ASCII: the detail may repeat half a surrogate pair from the request, which UTF-8 cannot encode.
    return Response(json.dumps(body), body["status"], headers, PROBLEM_JSON)


def invalid_fields(problems: Sequence[FieldProblem]) -> InvalidRequest:
    """Return one error for several invalid fields."""
    detail = "; ".join(f"{problem.field}: {problem.message}" for problem in problems[:MAX_DETAIL_ERRORS])
    return InvalidRequest(detail, problems[:MAX_ERRORS])


def invalid_request(errors: Sequence[Any], default_field: str = "body") -> InvalidRequest:
    """Return pydantic's validation errors as one error of the hub's, each with the path of its field.

    Args:
        default_field: field of an error without a path.
    """
    problems = []
    for error in errors[:MAX_ERRORS]:
        location = [str(part) for part in error["loc"] if part not in ("path", "query", "header", "body")]
        message = error["msg"]
        if "pattern" in error.get("ctx", {}):
            message = f"{error['input']!r} does not match {error['ctx']['pattern']}"
        problems.append(FieldProblem(".".join(location) or default_field, message))
    return invalid_fields(problems)


def add_exception_handlers(api: FastAPI) -> None:
    """Render every exception of a route as a problem."""

    @api.exception_handler(HubError)
    async def hub_error(request: Request, error: HubError) -> Response:
        return error_response(error, request.url.path)

    @api.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        return error_response(invalid_request(error.errors()), request.url.path)

    @api.exception_handler(HTTPException)
    async def http_exception(request: Request, error: HTTPException) -> Response:
        headers = error.headers
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:  # Starlette lists the methods of one route only
            headers = {"allow": ", ".join(sorted(_methods(api, request)))}
        return status_response(error.status_code, error.detail, request.url.path, headers)

    @api.exception_handler(Exception)
    async def unexpected_error(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        detail = "An unexpected error occurred. The hub's log has the traceback under this request's X-Request-Id."
        return error_response(HubError(detail), request.url.path)


def _methods(api: FastAPI, request: Request) -> set[str]:
    """Return all methods that the request's path supports."""
    routes = [route for route in api.routes if route.matches(request.scope)[0] != Match.NONE]
    return {method for route in routes for method in getattr(route, "methods", None) or ()}
