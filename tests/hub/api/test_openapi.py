"""The OpenAPI document is complete, and its pages need no network."""

import json
import re
from importlib.metadata import version
from typing import Any

import pytest

from hub.api.problems import PROBLEM_JSON
from tests.support.hub_app import Hub

WITHOUT_KEY = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")


@pytest.fixture
def document(hub: Hub) -> dict[str, Any]:
    document: dict[str, Any] = hub.http.get("/openapi.json", headers={"authorization": ""}).json()
    return document


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (path, method, operation) of each operation."""
    return [(p, m, o) for p, methods in document["paths"].items() for m, o in methods.items()]


def test_the_document_has_version_groups_and_key(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"] == version("karst-hub")
    assert [group["name"] for group in document["tags"]][:3] == ["hub", "tasks", "classify"]
    [scheme] = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert "HTTPValidationError" not in json.dumps(document)


def test_every_reference_resolves(document: dict[str, Any]) -> None:
    for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document))):
        node = document
        for part in reference.split("/"):
            node = node[part]


def test_every_operation_has_its_key_body_and_problems(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        where = f"{method} {path}"
        responses = operation["responses"]
        secured = path not in WITHOUT_KEY
        assert bool(operation.get("security")) == secured, where
        wanted = {"414", "431", "500"} | ({"401", "403", "404", "503"} if secured else set())
        if path.startswith("/v1"):
            wanted |= {"422"}
        has_body = method in ("post", "put", "patch") and not path.endswith("/rollback")
        assert ("requestBody" in operation) == has_body, where
        if operation.get("parameters"):
            wanted |= {"422"}
        if has_body:
            wanted |= {"408", "413", "422", "429"}
        assert wanted <= set(responses), where
        assert [s for s in responses if int(s) < 300], where
        for status, response in responses.items():
            if int(status) >= 400:
                [(kind, content)] = response["content"].items()
                assert kind == PROBLEM_JSON, where
                name = "ProtocolProblem" if path.startswith(("/v2", "/models")) else "Problem"
                assert content["schema"] == {"$ref": f"#/components/schemas/{name}"}, where
            elif status != "204":
                assert response["content"], where
        assert len(operation["tags"]) == 1, where


def test_every_operation_has_a_summary_of_several_words(document: dict[str, Any]) -> None:
    summaries = {f"{m} {p}": o["summary"] for p, m, o in operations(document)}
    assert {where: text for where, text in summaries.items() if " " not in text} == {}


def test_both_classify_routes_are_in_one_group(document: dict[str, Any]) -> None:
    [[one], [many]] = (document["paths"][p]["post"]["tags"] for p in ("/v1/tasks/{task}/classify", "/v1/classify"))
    assert one == many == "classify"


def test_operation_ids_are_unique(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)


def test_the_document_is_created_once(hub: Hub) -> None:
    assert hub.api.openapi() is hub.api.openapi()


def test_the_pages_load_only_files_of_the_hub(hub: Hub) -> None:
    anonymous = {"authorization": ""}
    page = hub.http.get("/docs", headers=anonymous)
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(named) == 4
    assert not re.search(r"https?:|<script>|onload=|style=", page.text)  # the policy would block it
    for name in named:
        asset = hub.http.get(f"/{name}", headers=anonymous)
        assert asset.status_code == 200
        assert asset.content
        assert asset.headers["cache-control"].startswith("public")
    start = hub.http.get("/docs/start.js", headers=anonymous)
    assert start.headers["content-type"].startswith("text/javascript")
    assert 'url: "openapi.json"' in start.text
    assert "persistAuthorization: false" in start.text  # the browser stores no key
    assert hub.http.get("/docs/other.js").json()["status"] == 404


def test_a_wrong_method_gets_405_with_the_supported_methods(hub: Hub) -> None:
    for path, allowed in (
        ("/v1/tasks/x", "DELETE, GET, PUT"),
        ("/v1/admin/keys", "GET, POST"),
        ("/healthz", "GET, HEAD"),
    ):
        answer = hub.http.request("PATCH", path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == allowed
