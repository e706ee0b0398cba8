"""The OpenAPI document is complete, and its pages need no network."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from hub.api.problems import PROBLEM_JSON, RULES
from tests.support.hub_app import Hub

DOCS = Path(__file__).parents[3] / "docs" / "http.md"
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
        wanted = {"400", "414", "431", "500"} | ({"401", "403", "404", "503"} if secured else set())
        if path.startswith("/v1"):
            wanted |= {"422"}
        has_body = method in ("post", "put", "patch") and not path.endswith(("/rollback", "/login"))
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


def test_operation_ids_are_unique_names_of_functions(document: dict[str, Any]) -> None:
    """Generators of clients name functions by them."""
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)
    assert [name for name in names if not re.fullmatch("[a-z]+(_[a-z]+){0,4}", name)] == []
    assert {"classify", "list_tasks", "register_version", "import_tenant", "infer", "infer_version"} <= set(names)


def test_every_body_with_another_media_type_than_json_may_be_octets(document: dict[str, Any]) -> None:
    """Generators of clients do not know `image/*` and `application/x-tar`."""
    for path, method, operation in operations(document):
        kinds = set(operation.get("requestBody", {}).get("content", {}))
        assert "application/octet-stream" in kinds or kinds <= {"application/json"}, f"{method} {path}"


def patterns_in(node: Any) -> set[str]:
    """Return every regular expression of a document."""
    if isinstance(node, list):
        return set().union(*map(patterns_in, node))
    if not isinstance(node, dict):
        return set()
    own = {node["pattern"]} if isinstance(node.get("pattern"), str) else set()
    return own.union(*map(patterns_in, node.values()))


def test_every_pattern_has_a_rule_in_words(document: dict[str, Any]) -> None:
    assert patterns_in(document) - set(RULES) == set()


def test_the_docs_list_every_status_of_the_document_and_no_other(document: dict[str, Any]) -> None:
    documented = {status for _, _, operation in operations(document) for status in operation["responses"]}
    listed = set(re.findall(r"^\| ([1-5][0-9]{2}) \|", DOCS.read_text(), re.MULTILINE))
    # An operation has no unsupported method; no gateway sends 502 and 504.
    assert listed - documented == {"405", "502", "504"}
    assert documented - listed == set()


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


def test_tuples_are_lists_of_fixed_length(document: dict[str, Any]) -> None:
    """Schemathesis and generators of clients fail on the keyword `prefixItems`."""
    assert "prefixItems" not in json.dumps(document)
    size = document["components"]["schemas"]["ServedBackbone"]["properties"]["input_size"]
    assert (size["items"], size["minItems"], size["maxItems"]) == ({"type": "integer"}, 3, 3)
