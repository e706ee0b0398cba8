"""Errors as HTTP replies: the one renderer of `application/problem+json` (RFC 9457).

Three kinds of errors become problems: the hub's own (`HubError`), HTTP statuses without a class of the hub's
(`about:blank`, such as 405), and unexpected exceptions (500).
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from ..errors import (
    MAX_DETAIL_BYTES,
    MAX_ERRORS,
    MAX_FIELD_BYTES,
    FieldProblem,
    HubError,
    InvalidRequest,
    Unauthenticated,
    cut,
    shown,
)
from ..field_types import DIGEST_PATTERN, NAME_PATTERN, ORIGIN_PATTERN, TASK_PATTERN
from ..observability import request_context

logger = logging.getLogger(__name__)

PROBLEM_JSON = "application/problem+json"
# Clients of these protocols read the error's text from the member `error`. The path may begin with a prefix that a
# proxy should have removed.
PROTOCOL_PATH = re.compile(r"(?!/v1/).*/(v2(/|$)|models/)")
MAX_DETAIL_ERRORS = 5  # field errors that `detail` repeats


NAME_RULE = "1 to 63 characters, each a lower-case letter, a digit, _ or -, the first a letter or a digit"
KEY_ID_PATTERN = r"^[0-9a-f]{16}$"
POSITION_PATTERN = r"^[0-9]{1,15}$"
CURSOR_PATTERN = r"^[0-9]{1,15}(-[0-9]{1,10})?$"
TASKS_CURSOR_PATTERN = r"^(own|named|public):([a-z0-9][a-z0-9_-]{0,62}(:[a-z0-9][a-z0-9_-]{0,62})?)?$"
NUMBER_PATTERN = r"^[1-9][0-9]{0,15}$"
NEXT_RULE = "the value `next` of the previous page"
# Regular expression -> the rule in words.
RULES = {
    NAME_PATTERN: NAME_RULE,
    TASK_PATTERN: f"{NAME_RULE}; for a task of another tenant TENANT:TASK",
    DIGEST_PATTERN: "a sha256 of 64 hexadecimal digits in lower case",
    KEY_ID_PATTERN: "a public id of 16 hexadecimal digits in lower case",
    ORIGIN_PATTERN: "a web origin in lower case, such as https://app.example.org or http://localhost:3000",
    POSITION_PATTERN: NEXT_RULE,
    CURSOR_PATTERN: NEXT_RULE,
    TASKS_CURSOR_PATTERN: NEXT_RULE,
    NUMBER_PATTERN: NEXT_RULE,
}
# Type of pydantic's error -> message. `{value}` is the refused value, other fields are the error's own.
MESSAGES = {
    "missing": "is missing",
    "json_invalid": "is not JSON: {error}",
    "int_from_float": "is {value}; must be a whole number",
    "int_parsing": "is {value}; must be a whole number",
    "int_parsing_size": "is too large",
    "int_type": "is {value}; must be a whole number",
    "float_parsing": "is {value}; must be a number",
    "float_type": "is {value}; must be a number",
    "finite_number": "is {value}; must be a finite number",
    "greater_than_equal": "is {value}; must be at least {ge}",
    "less_than_equal": "is {value}; must be at most {le}",
    "string_type": "is {value}; must be text",
    "string_too_short": "has too few characters; must have at least {min_length}",
    "string_too_long": "has too many characters; must have at most {max_length}",
    "bool_type": "is {value}; must be true or false",
    "literal_error": "is {value}; must be {expected}",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "too_short": "has {actual_length} items; must have at least {min_length}",
    "too_long": "has too many items; must have at most {max_length}",
    "timezone_aware": "must be a time with a time zone, such as 2027-01-01T00:00:00Z",
    "datetime_from_date_parsing": "must be a time with a time zone, such as 2027-01-01T00:00:00Z",
    "value_error": "{error}",
}


def route_path(scope: Scope) -> str:
    """Return the path below the application's own, which Serve's `route_prefix` sets."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def is_protocol_path(path: str) -> bool:
    """Return whether a path belongs to another protocol, whose clients read the member `error`."""
    return PROTOCOL_PATH.match(path) is not None


def error_response(error: HubError, scope: Scope, *, close: bool = False) -> Response:
    """Return the problem of one of the hub's errors, and record its code for logs and metrics.

    Args:
        scope: the request.
        close: end the connection after the reply. Otherwise the server would read the rest of a refused body.
    """
    request_context.note_error(error.code, error.errors[0].field if error.errors else "")
    headers = {"connection": "close"} if close else {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return _response(error.problem(), scope, headers)


def status_response(status: int, detail: str, scope: Scope, headers: Mapping[str, str] | None = None) -> Response:
    """Return the problem of an HTTP status that has no class in the hub's error tree."""
    body: dict[str, Any] = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": int(status)}
    body["detail"] = cut(detail, MAX_DETAIL_BYTES)
    return _response(body, scope, headers)


def _response(body: dict[str, Any], scope: Scope, headers: Mapping[str, str] | None) -> Response:
    if is_protocol_path(route_path(scope)):  # the hub may be below a path, Serve's `route_prefix`
        body |= {"error": body["detail"]}
    # ASCII: the detail may repeat half a surrogate pair from the request, which UTF-8 cannot encode.
    return Response(json.dumps(body), body["status"], headers, PROBLEM_JSON)


def invalid_fields(problems: Sequence[FieldProblem], count: int | None = None) -> InvalidRequest:
    """Return one error for several invalid fields.

    Args:
        count: number of all invalid fields, if `problems` has only the first ones.
    """
    named = "; ".join(f"{problem.field}: {problem.message}" for problem in problems[:MAX_DETAIL_ERRORS])
    more = (count or len(problems)) - MAX_DETAIL_ERRORS
    ending = f"; and {more} more" if more > 0 else ""
    return InvalidRequest(cut(named, MAX_DETAIL_BYTES - len(ending)) + ending, problems)


def invalid_request(errors: Sequence[Any], members: Sequence[str] = ()) -> InvalidRequest:
    """Return pydantic's validation errors as one error of the hub's, each with the path of its field.

    Args:
        members: names of the members of the whole JSON object, for the error about an unknown one.
    """
    problems = []
    for error in errors[:MAX_ERRORS]:
        location = [str(part)[:MAX_FIELD_BYTES] for part in error["loc"] if part != "[key]"]
        problems.append(FieldProblem(".".join(location) or "body", _message(error, members)))
    return invalid_fields(problems, len(errors))


def _message(error: Any, members: Sequence[str]) -> str:
    """Return a message for the client. Pydantic's own texts show regular expressions and its names of types."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        accepts = f"the JSON accepts {', '.join(members)}" if members and len(error["loc"]) == 1 else "remove it"
        return f"unknown member; {accepts}"
    if kind == "string_pattern_mismatch":
        return f"is {shown(error['input'])}; must be {RULES.get(context['pattern'], context['pattern'])}"
    if kind == "json_invalid" and error["input"] in ("", b""):
        return "is empty; send JSON"
    template = MESSAGES.get(kind)
    return template.format(**{**context, "value": shown(error["input"])}) if template else str(error["msg"])


def add_exception_handlers(api: FastAPI) -> None:
    """Render every exception of a route as a problem."""

    @api.exception_handler(HubError)
    async def hub_error(request: Request, error: HubError) -> Response:
        return error_response(error, request.scope)

    @api.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        # FastAPI's locations begin with `path`, `query` or `header`.
        errors = [{**found, "loc": found["loc"][1:]} for found in error.errors()]
        return error_response(invalid_request(errors), request.scope)

    @api.exception_handler(HTTPException)
    async def http_exception(request: Request, error: HTTPException) -> Response:
        headers, detail = error.headers, error.detail
        if error.status_code == HTTPStatus.NOT_FOUND:
            detail += _hint(api, request.scope)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:  # Starlette lists the methods of one route only
            headers = {"allow": ", ".join(sorted(_methods(api, request)))}
        return status_response(error.status_code, detail, request.scope, headers)

    @api.exception_handler(Exception)
    async def unexpected_error(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        detail = "An unexpected error occurred. The hub's log has the traceback under this request's X-Request-Id."
        return error_response(HubError(detail), request.scope)


def _hint(api: FastAPI, scope: Scope) -> str:
    """Return a hint if the path has a slash too many. A redirect could lead from https to http, or out of a prefix."""
    path = route_path(scope)
    clean = re.sub("/{2,}", "/", path).rstrip("/")
    corrected = {**scope, "path": scope.get("root_path", "").rstrip("/") + clean}
    if clean in ("", path) or all(route.matches(corrected)[0] == Match.NONE for route in api.routes):
        return ""
    return f": the path has a slash too many; use {clean}"


def _methods(api: FastAPI, request: Request) -> set[str]:
    """Return all methods that the request's path supports."""
    routes = [route for route in api.routes if route.matches(request.scope)[0] != Match.NONE]
    return {method for route in routes for method in getattr(route, "methods", None) or ()}
