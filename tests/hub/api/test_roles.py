"""Access of every role to every route, and to another tenant's tasks. A route without a row in `ROUTES` fails here."""

import base64
from typing import Any

import pytest

from adapters import Adapter
from tests.support.hub_app import OCTETS, Hub, bearer
from tests.support.models import png
from tests.support.protocols import Reply

Headers = dict[str, str]

TASK = "flowers"
# Key that a route needs: `open` none, `any` any key, `tenant` any key of a tenant, `owner` an owner's key, `manager` an
# admin's key or that of an owner of the tenant in the path, `admin` an admin's key.
ROUTES = {
    "GET /healthz": "open",
    "GET /readyz": "open",
    "GET /v1/backbone": "any",
    "GET /v1/tasks": "tenant",
    "GET /v1/tasks/{task}": "tenant",
    "PUT /v1/tasks/{task}": "owner",
    "DELETE /v1/tasks/{task}": "owner",
    "PUT /v1/tasks/{task}/sharing": "owner",
    "GET /v1/tasks/{task}/dataset": "owner",
    "POST /v1/tasks/{task}/dataset/rename-label": "owner",
    "POST /v1/tasks/{task}/images": "owner",
    "GET /v1/tasks/{task}/images": "owner",
    "GET /v1/tasks/{task}/images/{digest}": "owner",
    "GET /v1/tasks/{task}/images/{digest}/thumbnail": "owner",
    "PATCH /v1/tasks/{task}/images": "owner",
    "PATCH /v1/tasks/{task}/images/{digest}": "owner",
    "DELETE /v1/tasks/{task}/images/{digest}": "owner",
    "GET /v1/tasks/{task}/review": "owner",
    "GET /v1/tasks/{task}/near-duplicates": "owner",
    "POST /v1/tasks/{task}/feedback": "owner",
    "GET /v1/tasks/{task}/compare": "owner",
    "GET /v1/tasks/{task}/usage": "owner",
    "GET /v1/tasks/{task}/backtest": "owner",
    "POST /v1/tasks/{task}/trainings": "owner",
    "GET /v1/tasks/{task}/trainings": "owner",
    "GET /v1/tasks/{task}/trainings/{training}": "owner",
    "DELETE /v1/tasks/{task}/trainings/{training}": "owner",
    "GET /v1/tasks/{task}/trainings/{training}/events": "owner",
    "GET /v1/tasks/{task}/trainings/{training}/report/{file}": "owner",
    "GET /v1/tasks/{task}/trainings/{training}/snapshot": "owner",
    "POST /v1/tasks/{task}/versions": "owner",
    "GET /v1/tasks/{task}/versions/{version}": "tenant",
    "GET /v1/tasks/{task}/versions/{version}/file": "owner",
    "DELETE /v1/tasks/{task}/versions/{version}": "owner",
    "PUT /v1/tasks/{task}/aliases/{alias}": "owner",
    "DELETE /v1/tasks/{task}/aliases/{alias}": "owner",
    "POST /v1/tasks/{task}/aliases/{alias}/rollback": "owner",
    "POST /v1/tasks/{task}/classify": "tenant",
    "POST /v1/classify": "tenant",
    "POST /v1/tokens": "tenant",
    "POST /v1/login": "code",
    "GET /v1/usage": "tenant",
    "GET /v1/tenants": "admin",
    "POST /v1/tenants": "admin",
    "GET /v1/tenants/{tenant}": "manager",
    "PATCH /v1/tenants/{tenant}": "admin",
    "DELETE /v1/tenants/{tenant}": "admin",
    "GET /v1/tenants/{tenant}/usage": "manager",
    "GET /v1/tenants/{tenant}/keys": "manager",
    "POST /v1/tenants/{tenant}/keys": "manager",
    "DELETE /v1/tenants/{tenant}/keys/{id}": "manager",
    "GET /v1/tenants/{tenant}/audit": "manager",
    "GET /v1/tenants/{tenant}/export": "manager",
    "POST /v1/tenants/{tenant}/import": "admin",
    "GET /v1/admin/keys": "admin",
    "POST /v1/admin/keys": "admin",
    "DELETE /v1/admin/keys/{id}": "admin",
    "GET /v1/admin/trainings": "admin",
    "GET /v1/audit": "admin",
    "GET /v1/status": "admin",
    "POST /v1/gc": "admin",
    "POST /models/{task}": "tenant",
    "GET /v2/health/live": "open",
    "GET /v2/health/ready": "open",
    "GET /v2": "tenant",
    "GET /v2/models/{task}": "tenant",
    "GET /v2/models/{task}/ready": "tenant",
    "POST /v2/models/{task}/infer": "tenant",
    "GET /v2/models/{task}/versions/{version}": "tenant",
    "GET /v2/models/{task}/versions/{version}/ready": "tenant",
    "POST /v2/models/{task}/versions/{version}/infer": "tenant",
}
WITHOUT_KEY = ("open", "code")  # needs that no key fulfils; such routes look at a request's options first
WITHOUT_BODY = ("/rollback", "/login")  # routes that have POST and no body
ROLES = ("none", "wrong", "admin", "owner", "caller", "foreign owner", "foreign caller")
# role -> needed key -> status of the refusal; 0: no refusal.
REFUSALS = {
    "none": {"open": 0, "code": 401, "any": 401, "tenant": 401, "owner": 401, "manager": 401, "admin": 401},
    "wrong": {"open": 0, "code": 401, "any": 401, "tenant": 401, "owner": 401, "manager": 401, "admin": 401},
    "admin": {"open": 0, "code": 401, "any": 0, "tenant": 403, "owner": 403, "manager": 0, "admin": 0},
    "owner": {"open": 0, "code": 401, "any": 0, "tenant": 0, "owner": 0, "manager": 0, "admin": 403},
    "caller": {"open": 0, "code": 401, "any": 0, "tenant": 0, "owner": 403, "manager": 403, "admin": 403},
    "foreign owner": {"open": 0, "code": 401, "any": 0, "tenant": 0, "owner": 0, "manager": 404, "admin": 403},
    "foreign caller": {"open": 0, "code": 401, "any": 0, "tenant": 0, "owner": 403, "manager": 404, "admin": 403},
}


def operations(hub: Hub) -> list[str]:
    """Return "METHOD path" of each operation in the OpenAPI document."""
    paths = hub.http.get("/openapi.json").json()["paths"]
    return [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]


BODIES: dict[str, dict[str, Any]] = {
    "rename-label": {"json": {"label": "rose", "to": "rosa"}},
    "PATCH /v1/tasks/{task}/images": {"json": {"images": ["0" * 64], "label": "rose"}},
    "images/{digest}": {"json": {"label": "rose"}},
    "feedback": {"json": {"image": "0" * 64, "label": "rose"}},
    "trainings": {"json": {"recipe": "instant"}},
    "/tasks/{task}": {"json": {"unknown_below": 0.05}},
    "tokens": {"json": {"task": TASK}},
    "sharing": {"json": {"public": True}},
    "aliases/{alias}": {"json": {"version": 1}},
    "infer": {
        "json": {
            "inputs": [
                {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(png()).decode()]},
            ]
        }
    },
}


def send(
    hub: Hub,
    operation: str,
    headers: Headers,
    *,
    task: str = TASK,
    tenant: str = "default",
    query: str = "",
    content: bytes | None = None,
) -> Reply:
    """Send a valid request. Its task, version, alias, tenant or key need not exist.

    Args:
        content: body in place of a valid one.
    """
    method, path = operation.split(" ")
    version = "1" if method == "DELETE" or "/v2/" in path else "latest"
    parts = {"task": task, "version": version, "alias": "stable", "tenant": tenant, "id": "0" * 16}
    parts |= {"digest": "0" * 64, "training": "0" * 16, "file": "report.html"}
    body: dict[str, Any] = {} if method in ("GET", "DELETE") or path.endswith(WITHOUT_BODY) else {"content": png()}
    body = next((b for end, b in BODIES.items() if operation.endswith(end) and body), body)
    if content is not None:
        body = {"content": content}
    return hub.http.request(method, path.format(**parts) + query, headers=headers, **body)


def test_the_table_has_every_route(hub: Hub) -> None:
    assert sorted(ROUTES) == sorted(operations(hub))


@pytest.fixture
def keys(hub: Hub, adapters: list[Adapter]) -> dict[str, Headers]:
    """The header of a key of each role; the hub has the task `flowers`."""
    hub.http.post(f"/v1/tasks/{TASK}/versions", content=adapters[0].data, headers=OCTETS)
    return {
        "none": {"authorization": ""},
        "wrong": bearer("kh_" + "x" * 43),
        "admin": hub.admin,
        "owner": bearer(hub.key),
        "caller": hub.key_of("default", "caller"),
        "foreign owner": hub.key_of("foreign"),
        "foreign caller": hub.key_of("foreign", "caller"),
    }


@pytest.mark.parametrize("role", ROLES)
def test_a_role_reaches_only_its_routes(hub: Hub, keys: dict[str, Headers], role: str) -> None:
    # Reads first and deletes last: otherwise a delete would remove the task that other requests need.
    for operation in sorted(ROUTES, key=lambda o: (o.startswith("DELETE"), o.startswith(("PUT", "PATCH")), o)):
        expected = REFUSALS[role][ROUTES[operation]]
        reply = send(hub, operation, keys[role])
        if expected:
            assert reply.status_code == expected, (operation, reply.text)
            assert reply.headers["content-type"] == "application/problem+json"
        else:
            assert reply.status_code not in (401, 403, 500, 503), (operation, reply.text)


def described(hub: Hub) -> list[tuple[str, str, dict[str, Any]]]:
    """Return each operation, a role that may use it, and its description in the OpenAPI document; deletes last."""
    paths = hub.http.get("/openapi.json").json()["paths"]
    found = []
    for operation, need in sorted(ROUTES.items(), key=lambda item: item[0].startswith("DELETE")):
        method, path = operation.split(" ")
        found.append((operation, "admin" if need == "admin" else "owner", paths[path][method.lower()]))
    return found


def parameters(description: dict[str, Any], where: str) -> list[str]:
    return sorted(p["name"] for p in description.get("parameters", ()) if p["in"] == where)


def test_every_route_refuses_an_unknown_query_parameter(hub: Hub, keys: dict[str, Headers]) -> None:
    for operation, role, description in described(hub):
        reply = send(hub, operation, keys[role], query="?topk=3")
        assert reply.status_code == 422, operation
        assert reply.json()["type"].endswith(":invalid-request")
        known = ", ".join(parameters(description, "query")) or "none"
        message = f"unknown query parameter; this route accepts {known}"
        assert reply.json()["errors"] == [{"field": "topk", "message": message}]
        if ROUTES[operation] not in WITHOUT_KEY:
            assert send(hub, operation, keys["wrong"], query="?topk=3").status_code == 401
    assert send(hub, "POST /v1/tasks/{task}/classify", keys["owner"], query="?top_k=1&version=1").status_code == 200


def test_every_route_refuses_an_option_that_is_sent_twice(hub: Hub, keys: dict[str, Headers]) -> None:
    for operation, role, description in described(hub):
        for name in parameters(description, "query"):
            reply = send(hub, operation, keys[role], query=f"?{name}=1&{name}=2")
            assert reply.status_code == 422, operation
            assert reply.json()["errors"] == [{"field": name, "message": "is sent 2 times; send it once"}]


def test_every_route_refuses_an_option_header_that_it_does_not_have(hub: Hub, keys: dict[str, Headers]) -> None:
    for operation, role, description in described(hub):
        own = [name.lower() for name in parameters(description, "header")]
        for name in ("x-canary-key", "Inference-Header-Content-Length"):
            reply = send(hub, operation, {**keys[role], name: "1"})
            refused = "this route does not have this header; remove it" in reply.text
            assert refused == (name.lower() not in own), (operation, name)


def test_every_route_without_a_body_refuses_content(hub: Hub, keys: dict[str, Headers]) -> None:
    """A body such as `{"version": 2}` of a roll-back would be ignored."""
    for operation, role, description in described(hub):
        if "requestBody" in description:
            continue
        for content in (b'{"version": 2}', b"x" * 5000):
            reply = send(hub, operation, keys[role], content=content)
            assert reply.status_code == 422, (operation, reply.text)
            assert reply.json()["errors"] == [{"field": "body", "message": "this route has no body; remove it"}]
        if ROUTES[operation] not in WITHOUT_KEY and not operation.startswith("DELETE"):
            assert "no body" not in send(hub, operation, keys[role], content=b" {} ").text, operation


@pytest.mark.parametrize("role", ["owner", "caller", "admin"])
def test_tasks_and_tenants_of_others_get_the_same_replies_as_unknown_ones(
    hub: Hub, keys: dict[str, Headers], adapters: list[Adapter], role: str
) -> None:
    foreign = keys["foreign owner"]
    hub.http.post("/v1/tasks/trees/versions", content=adapters[1].data, headers=OCTETS | foreign)
    for operation, need in ROUTES.items():
        if "{task}" in operation:
            replies = [send(hub, operation, keys[role], task=f"foreign:{name}") for name in ("trees", "nothing")]
            expected = REFUSALS[role][need] or (None if operation.endswith("/versions") else 404)
        elif "{tenant}" in operation and role != "admin":
            replies = [send(hub, operation, keys[role], tenant=name) for name in ("foreign", "nothing")]
            expected = 403 if need == "admin" else 404
        else:
            continue
        texts = [reply.text.replace("trees", "nothing").replace("foreign'", "nothing'") for reply in replies]
        assert replies[0].status_code == replies[1].status_code, operation
        assert texts[0] == texts[1], operation
        if expected is not None:
            assert replies[0].status_code == expected, (operation, replies[0].text)
    assert hub.http.get("/v1/tasks/trees", headers=foreign).status_code == 200
