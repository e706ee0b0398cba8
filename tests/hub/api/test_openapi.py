"""The OpenAPI document: complete, true to what is sent, and shown by pages that need no network."""

import json
import re
from importlib.metadata import version

import pytest

from hub.api.openapi import PROBLEM_JSON, SUMMARIES

OPEN = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")


@pytest.fixture
def document(hub) -> dict:
    return hub.http.get("/openapi.json", headers={"authorization": ""}).json()


def operations(document):
    return [(p, m, o) for p, methods in document["paths"].items() for m, o in methods.items()]


def test_the_whole(document) -> None:
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"] == version("karst-hub")
    assert [group["name"] for group in document["tags"]][:3] == ["hub", "tasks", "classify"]
    [scheme] = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert "HTTPValidationError" not in json.dumps(document)


def test_every_reference_leads_somewhere(document) -> None:
    for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document))):
        node = document
        for part in reference.split("/"):
            node = node[part]


def test_every_operation_tells_of_its_key_its_body_and_its_problems(document) -> None:
    for path, method, operation in operations(document):
        where = f"{method} {path}"
        answers = operation["responses"]
        secured = path not in OPEN
        assert bool(operation.get("security")) == secured, where
        wanted = {"414", "431", "500"} | ({"401", "403", "404", "503"} if secured else set())
        if path.startswith("/v1"):
            wanted |= {"422"}
        if "requestBody" in operation:
            wanted |= {"408", "413", "422", "429"}
        assert wanted <= set(answers), where
        assert [s for s in answers if int(s) < 300], where
        for status, answer in answers.items():
            if int(status) >= 400:
                [(kind, content)] = answer["content"].items()
                assert kind == PROBLEM_JSON, where
                name = "ProtocolProblem" if path.startswith(("/v2", "/models")) else "Problem"
                assert content["schema"] == {"$ref": f"#/components/schemas/{name}"}, where
            elif status != "204":
                assert answer["content"], where
        assert len(operation["tags"]) == 1, where


def test_every_operation_says_in_words_what_it_does(document) -> None:
    shown = {f"{m} {p}": o["summary"] for p, m, o in operations(document)}
    assert {where: text for where, text in shown.items() if " " not in text} == {}
    assert set(SUMMARIES.values()) <= set(shown.values())  # none is of a function that has another name now


def test_what_classifies_stands_together(document) -> None:
    [[one], [many]] = (document["paths"][p]["post"]["tags"] for p in ("/v1/tasks/{task}/classify", "/v1/classify"))
    assert one == many == "classify"


def test_names_of_operations_are_unique(document) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)


def test_it_is_made_once(hub) -> None:
    assert hub.api.openapi() is hub.api.openapi()


def test_the_documentation_needs_no_network(hub) -> None:
    anonymous = {"authorization": ""}
    page = hub.http.get("/docs", headers=anonymous)
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(named) == 4
    assert not re.search(r"https?:|<script>|onload=|style=", page.text)  # nothing that the policy would stop
    for name in named:
        asset = hub.http.get(f"/{name}", headers=anonymous)
        assert asset.status_code == 200
        assert asset.content
        assert asset.headers["cache-control"].startswith("public")
    start = hub.http.get("/docs/start.js", headers=anonymous)
    assert start.headers["content-type"].startswith("text/javascript")
    assert 'url: "openapi.json"' in start.text
    assert "persistAuthorization: false" in start.text  # a key is not left behind in the browser
    assert hub.http.get("/docs/other.js").json()["status"] == 404


def test_a_wrong_method_is_told_the_right_ones(hub) -> None:
    for path, allowed in (("/v1/tasks/x", "DELETE, GET"), ("/v1/admin/keys", "GET, POST"), ("/healthz", "GET")):
        answer = hub.http.request("PATCH", path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == allowed
