"""Middleware order of the gateway's application: which replies have ids, security headers, CORS and metrics."""

from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.testclient import TestClient

from hub.api.app import GatewayAPI
from hub.api.request_heads import MAX_TARGET_BYTES
from hub.concurrency import ActiveTenants
from hub.errors import NotFound
from hub.observability.request_context import RequestContext
from hub.settings import Settings

SITE = "https://a.example"


class Statuses:
    """`RequestMetrics` that keeps status and error code of each request."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []

    def record(self, context: RequestContext, status: int, seconds: float) -> None:
        self.seen.append((status, context.error))

    def record_kept(self, end: str, images: int) -> None:
        raise AssertionError(f"no test keeps images, and {images} were {end}")

    def record_lost_usage(self, images: int) -> None:
        raise AssertionError(f"no test fills the counts, and {images} were lost")

    def record_registry(self, refuses_changes: bool) -> None:
        assert not refuses_changes


@pytest.fixture
def api() -> GatewayAPI:
    api = GatewayAPI(Settings(backbone="demo", cors_origins=(SITE,)), ActiveTenants())

    @api.get("/missing")
    async def missing() -> Response:
        raise NotFound.at("task", "there is no task 'x'")

    @api.get("/fails")
    async def fails() -> Response:
        raise RuntimeError("secret detail")

    return api


CASES: list[tuple[int, str, dict[str, Any]]] = [
    (404, "/missing", {}),
    (404, "/nowhere", {}),
    (500, "/fails", {}),
    (414, "/missing", {"params": {"a": "x" * MAX_TARGET_BYTES}}),
]


@pytest.mark.parametrize(("status", "path", "options"), CASES)
def test_every_error_has_id_and_security_headers(
    api: GatewayAPI, status: int, path: str, options: dict[str, Any]
) -> None:
    http = TestClient(api, raise_server_exceptions=False)
    reply = http.get(path, headers={"x-request-id": "r-1", "origin": SITE}, **options)
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["x-request-id"] == "r-1"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "secret detail" not in reply.text
    # The limits of headers come before CORS, which would otherwise parse unlimited headers.
    assert ("access-control-allow-origin" in reply.headers) == (status != 414)


def test_metrics_count_every_request() -> None:
    metrics = Statuses()
    api = GatewayAPI(Settings(backbone="demo"), ActiveTenants(), metrics)

    @api.get("/missing")
    async def missing() -> Response:
        raise NotFound.at("task", "there is no task 'x'")

    http = TestClient(api)
    http.get("/missing")
    http.get("/nowhere")
    http.get("/missing", params={"a": "x" * MAX_TARGET_BYTES})
    assert metrics.seen == [(404, "not-found"), (404, ""), (414, "")]


def test_an_exception_handler_added_before_the_first_request_is_used(api: GatewayAPI) -> None:
    async def handle(_request: Request, _error: Exception) -> Response:
        return JSONResponse("handled", 418)

    api.add_exception_handler(KeyError, handle)  # Ray Serve adds handlers to a finished application

    @api.get("/key-error")
    async def key_error() -> Response:
        raise KeyError

    assert TestClient(api).get("/key-error").status_code == 418
