"""The renderer of problems: members, headers and the additional member of other protocols."""

import json

import pytest
from starlette.types import Scope

from hub.api.problems import MAX_DETAIL_ERRORS, error_response, invalid_fields, status_response
from hub.errors import MAX_ERRORS, Conflict, FieldProblem, HubError, LimitReached, NotFound, Unauthenticated
from hub.observability import request_context
from hub.observability.request_context import RequestContext


def at(path: str, root: str = "") -> Scope:
    """Return the scope of a request for a path below the application's own."""
    return {"type": "http", "path": root.rstrip("/") + path, "root_path": root}


def test_an_error_of_the_hub_has_type_title_status_detail_and_fields() -> None:
    reply = error_response(NotFound.at("task", "there is no task 'x'"), at("/v1/tasks/x"))
    assert reply.status_code == 404
    assert reply.media_type == "application/problem+json"
    assert json.loads(bytes(reply.body)) == {
        "type": "urn:karst-hub:problem:not-found",
        "title": "Not found",
        "status": 404,
        "detail": "task: there is no task 'x'",
        "errors": [{"field": "task", "message": "there is no task 'x'"}],
    }


def test_a_status_without_a_class_has_type_about_blank() -> None:
    reply = status_response(405, "Method Not Allowed", at("/healthz"), {"allow": "GET"})
    assert json.loads(bytes(reply.body)) == {
        "type": "about:blank",
        "title": "Method Not Allowed",
        "status": 405,
        "detail": "Method Not Allowed",
    }
    assert reply.headers["allow"] == "GET"


@pytest.mark.parametrize("root", ["", "/hub", "/hub/", "/a/b"])
@pytest.mark.parametrize("path", ["/v2", "/v2/models/a/infer", "/models/a"])
def test_a_problem_of_another_protocol_repeats_its_detail_when_the_hub_is_below_a_path(path: str, root: str) -> None:
    scope = at(path, root)
    for reply in (error_response(Conflict("taken"), scope), status_response(414, "taken", scope)):
        assert json.loads(bytes(reply.body))["error"] == "taken"


@pytest.mark.parametrize(("path", "has"), [("/a/v2/models/b", True), ("/a/models/b", True), ("/v1/tasks/v2", False)])
def test_a_path_with_a_prefix_that_no_proxy_removed_is_still_one_of_its_protocol(path: str, has: bool) -> None:
    assert ("error" in json.loads(bytes(status_response(404, "Not Found", at(path)).body))) == has


@pytest.mark.parametrize(
    ("error", "name", "value"),
    [
        (Unauthenticated("no key"), "www-authenticate", "Bearer"),
        (LimitReached("too many", retry_after_s=7), "retry-after", "7"),
    ],
)
def test_a_problem_has_the_headers_of_its_error(error: HubError, name: str, value: str) -> None:
    headers = error_response(error, at("/v1")).headers
    assert headers[name] == value
    assert "connection" not in headers
    assert error_response(error, at("/v1"), close=True).headers["connection"] == "close"


def test_a_problem_is_recorded_in_the_context_of_its_request() -> None:
    context = RequestContext("r-1")
    with request_context.use(context):
        error_response(LimitReached.at("images_per_second", "too many"), at("/v1"))
    assert (context.error, context.limit) == ("limit-reached", "images_per_second")


def test_a_problem_is_ascii_when_its_detail_has_half_a_surrogate_pair() -> None:
    reply = error_response(Conflict("name \ud800"), at("/v1"))
    assert bytes(reply.body).isascii()


def test_an_error_about_many_fields_is_bounded() -> None:
    error = invalid_fields([FieldProblem(f"f{i}", "is wrong") for i in range(2 * MAX_ERRORS)])
    assert len(error.errors) == MAX_ERRORS
    assert error.detail.count("is wrong") == MAX_DETAIL_ERRORS
