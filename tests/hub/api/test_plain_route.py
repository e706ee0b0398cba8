"""Classifications that pass FastAPI's dependencies by get the replies of those that do not."""

import pytest
from fastapi.routing import APIRoute, APIRouter
from starlette.types import Receive, Scope, Send

from hub.api.plain_route import PlainRequest, plain_request
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import png

ROUTE = APIRoute("/v1/tasks/{task}/classify", lambda: None, methods=["POST"])


def given(query: bytes = b"", task: str = "flowers", *headers: tuple[bytes, bytes]) -> PlainRequest | None:
    path = f"/v1/tasks/{task}/classify"
    scope = {"type": "http", "method": "POST", "path": path, "query_string": query, "headers": list(headers)}
    return plain_request(scope, ROUTE)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (b"", PlainRequest("flowers", None, None)),
        (b"top_k=1", PlainRequest("flowers", 1, None)),
        (b"version=stable&top_k=1000", PlainRequest("flowers", 1000, "stable")),
    ],
)
def test_request_is_plain_when_its_values_need_no_check(query: bytes, expected: PlainRequest) -> None:
    assert given(query) == expected
    assert given(query, "tenant:flowers", (b"x-request-id", b"1")) is not None


@pytest.mark.parametrize(
    "query",
    [
        *(b"top_k=0", b"top_k=1001", b"top_k=01", b"top_k=", b"top_k", b"top_k=%31", b"top_k=1&top_k=1", b"&top_k=1"),
        *(b"version=", b"version=%61", b"version=a+b", b"version=" + 64 * b"a", b"coverage=0.9", b"other=1"),
    ],
)
def test_fastapi_handles_every_other_query(query: bytes) -> None:
    assert given(query) is None


def test_fastapi_handles_option_headers_and_names_that_no_task_has() -> None:
    assert given(b"", "flowers", (b"x-canary-key", b"a")) is None
    assert given(b"", "flowers", (b"inference-header-content-length", b"1")) is None
    assert given(b"", "flowers\n") is None
    assert given(b"", "Flowers") is None


@pytest.mark.parametrize(("key", "task", "status"), [("own", "flowers", 200), ("own", "none", 404), ("no", "x", 401)])
def test_both_ways_give_the_same_reply(flowers: Hub, key: str, task: str, status: int) -> None:
    headers = OCTETS | ({} if key == "own" else {"authorization": "Bearer nothing"})
    # FastAPI decodes the second query.
    replies = [
        flowers.http.post(f"/v1/tasks/{task}/classify?{query}", content=png(), headers=headers)
        for query in ("top_k=2", "top_k=%32")
    ]
    assert [reply.status_code for reply in replies] == [status, status]
    first, second = (reply.json() for reply in replies)
    assert first == second
    assert [*replies[0].headers] == [*replies[1].headers]


def test_a_usual_request_bypasses_the_router(flowers: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    routed = []
    route = APIRouter.__call__

    async def noted(router: APIRouter, scope: Scope, receive: Receive, send: Send) -> None:
        routed.append(scope["query_string"])
        await route(router, scope, receive, send)

    monkeypatch.setattr(APIRouter, "__call__", noted)
    for query in ("top_k=2", "top_k=%32"):
        reply = flowers.http.post(f"/v1/tasks/flowers/classify?{query}", content=png(), headers=OCTETS)
        assert reply.status_code == 200
    assert routed == [b"top_k=%32"]


@pytest.mark.parametrize(
    "scope", [{"type": "websocket"}, {"method": "GET"}, {"path": "/v1/tasks"}, {"path": "/v1/tasks/a/b/classify"}]
)
def test_fastapi_handles_every_other_path_and_method(scope: dict[str, str]) -> None:
    plain = {"type": "http", "method": "POST", "path": "/v1/tasks/a/classify", "query_string": b"", "headers": []}
    assert plain_request(plain, ROUTE) is not None
    assert plain_request(plain | scope, ROUTE) is None


def test_the_path_is_below_the_prefix_of_the_application() -> None:
    scope = {"type": "http", "method": "POST", "path": "/hub/v1/tasks/a/classify", "query_string": b"", "headers": []}
    assert plain_request(scope | {"root_path": "/hub"}, ROUTE) == PlainRequest("a", None, None)
    assert plain_request(scope, ROUTE) is None
