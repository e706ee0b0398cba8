"""Every route, every role, own and foreign and absent things: a table made from the OpenAPI document.

A route that is added without a row in `ROUTES` fails here.
"""

import base64

import pytest

from tests.hub.conftest import OCTETS, bearer
from tests.support.models import png

TASK = "flowers"
# What a route needs: `open` nothing, `tenant` any key of a tenant, `owner` an owner's, `manager` an owner of the tenant
# in the path or an admin, `admin` an admin's.
ROUTES = {
    "GET /healthz": "open",
    "GET /readyz": "open",
    "GET /v1/tasks": "tenant",
    "GET /v1/tasks/{task}": "tenant",
    "DELETE /v1/tasks/{task}": "owner",
    "PUT /v1/tasks/{task}/sharing": "owner",
    "POST /v1/tasks/{task}/versions": "owner",
    "GET /v1/tasks/{task}/versions/{version}": "tenant",
    "GET /v1/tasks/{task}/versions/{version}/file": "owner",
    "DELETE /v1/tasks/{task}/versions/{version}": "owner",
    "PUT /v1/tasks/{task}/aliases/{alias}": "owner",
    "DELETE /v1/tasks/{task}/aliases/{alias}": "owner",
    "POST /v1/tasks/{task}/aliases/{alias}/rollback": "owner",
    "POST /v1/tasks/{task}/classify": "tenant",
    "POST /v1/classify": "tenant",
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
ROLES = ("none", "wrong", "admin", "owner", "caller", "foreign owner", "foreign caller")
# role -> what each need answers: a status that refuses, or 0 for "let in".
REFUSED = {
    "none": {"open": 0, "tenant": 401, "owner": 401, "manager": 401, "admin": 401},
    "wrong": {"open": 0, "tenant": 401, "owner": 401, "manager": 401, "admin": 401},
    "admin": {"open": 0, "tenant": 403, "owner": 403, "manager": 0, "admin": 0},
    "owner": {"open": 0, "tenant": 0, "owner": 0, "manager": 0, "admin": 403},
    "caller": {"open": 0, "tenant": 0, "owner": 403, "manager": 403, "admin": 403},
    "foreign owner": {"open": 0, "tenant": 0, "owner": 0, "manager": 404, "admin": 403},
    "foreign caller": {"open": 0, "tenant": 0, "owner": 403, "manager": 404, "admin": 403},
}


def operations(hub) -> list[str]:
    paths = hub.http.get("/openapi.json").json()["paths"]
    return [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]


BODIES = {
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


def ask(hub, operation: str, headers, *, task: str = TASK, tenant: str = "default", query: str = ""):
    """A request that means well: what it asks for may be there or not."""
    method, path = operation.split(" ")
    version = "1" if method == "DELETE" or "/v2/" in path else "latest"
    parts = {"task": task, "version": version, "alias": "stable", "tenant": tenant, "id": "0" * 16}
    body = {} if method in ("GET", "DELETE") else {"content": png()}
    body = next((b for end, b in BODIES.items() if path.endswith(end) and body), body)
    return hub.http.request(method, path.format(**parts) + query, headers=headers, **body)


def test_the_table_has_every_route(hub) -> None:
    assert sorted(ROUTES) == sorted(operations(hub))


@pytest.fixture
def keys(hub, adapters) -> dict[str, dict[str, str]]:
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
def test_every_route_for_a_role(hub, keys, role) -> None:
    # Reading routes first, deleting ones last, so that what they name is there for the others.
    for operation in sorted(ROUTES, key=lambda o: (o.startswith("DELETE"), o.startswith(("PUT", "PATCH")), o)):
        expected = REFUSED[role][ROUTES[operation]]
        answer = ask(hub, operation, keys[role])
        if expected:
            assert answer.status_code == expected, (operation, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
        else:
            assert answer.status_code not in (401, 403, 500, 503), (operation, answer.text)


def test_a_misspelt_query_parameter_is_refused_by_every_route_of_ours(hub, keys) -> None:
    paths = hub.http.get("/openapi.json").json()["paths"]
    for operation, need in sorted(ROUTES.items(), key=lambda item: item[0].startswith("DELETE")):
        method, path = operation.split(" ")
        who = "admin" if need == "admin" else "owner"
        answer = ask(hub, operation, keys[who], query="?topk=3")
        if not path.startswith("/v1/"):
            assert answer.status_code != 422, (operation, answer.text)
            continue
        known = sorted(p["name"] for p in paths[path][method.lower()].get("parameters", ()) if p["in"] == "query")
        assert answer.status_code == 422, operation
        assert answer.json()["type"].endswith(":invalid-request")
        said = f"unknown query parameter; this route takes {', '.join(known) or 'none'}"
        assert answer.json()["errors"] == [{"field": "topk", "message": said}]
        assert ask(hub, operation, keys["wrong"], query="?topk=3").status_code == 401
    assert ask(hub, "POST /v1/tasks/{task}/classify", keys["owner"], query="?top_k=1&version=1").status_code == 200


@pytest.mark.parametrize("role", ["owner", "caller", "admin"])
def test_foreign_and_absent_tasks_and_tenants_are_answered_alike(hub, keys, adapters, role) -> None:
    foreign = keys["foreign owner"]
    hub.http.post("/v1/tasks/trees/versions", content=adapters[1].data, headers=OCTETS | foreign)
    for operation, need in ROUTES.items():
        if "{task}" in operation:
            answers = [ask(hub, operation, keys[role], task=f"foreign:{name}") for name in ("trees", "nothing")]
            expected = REFUSED[role][need] or (None if operation.endswith("/versions") else 404)
        elif "{tenant}" in operation and role != "admin":
            answers = [ask(hub, operation, keys[role], tenant=name) for name in ("foreign", "nothing")]
            expected = 403 if need == "admin" else 404
        else:
            continue
        texts = [a.text.replace("trees", "nothing").replace("foreign'", "nothing'") for a in answers]
        assert answers[0].status_code == answers[1].status_code, operation
        assert texts[0] == texts[1], operation
        if expected is not None:
            assert answers[0].status_code == expected, (operation, answers[0].text)
    assert hub.http.get("/v1/tasks/trees", headers=foreign).status_code == 200
