"""Problems are small: a client's text may be any size, and no problem repeats more than its start."""

import base64
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from adapters import Adapter
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import png, with_metadata

LARGEST_PROBLEM_BYTES = 16 * 1024
# ASCII, a control character, text beyond the BMP: 1, 6 and 12 bytes a character in the JSON of a problem.
TEXTS = {"quote": '"' * 600_000, "control": "\x7f" * 600_000, "emoji": "\U0001f600" * 150_000}
SHORTER = 7_000  # characters of a text that bodies of at most 64 KiB have room for
JSON = {"content-type": "application/json"}
# Values of path parameters: the request must reach the check of its body.
PATHS = {"task": "flowers", "version": "1", "alias": "stable", "tenant": "default", "id": "0" * 16}
PATHS |= {"digest": "0" * 64, "training": "0" * 16, "file": "report.html"}


def resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow references of an OpenAPI document."""
    while "$ref" in schema:
        found: Any = document
        for part in str(schema["$ref"]).removeprefix("#/").split("/"):
            found = found[part]
        schema = found
    return schema


def example(document: Mapping[str, Any], name: str, schema: Mapping[str, Any]) -> Any:
    """Return a valid value of a member, so that a request reaches the use of its other members."""
    schema = resolved(document, schema)
    if name in ("image", "images", "inputs"):
        image = base64.b64encode(png()).decode()
        return image if name == "image" else [image]
    kinds = {"integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}
    return kinds.get(schema.get("type", ""), schema.get("enum", ["x"])[0])


def bodies(document: Mapping[str, Any], schema: Mapping[str, Any], text: str, depth: int = 0) -> Iterator[Any]:
    """Yield values of the schema that have the long text at one place each: each text, key and unknown member."""
    schema = resolved(document, schema)
    yield text
    if depth > 4:
        return
    for variant in schema.get("anyOf", []):
        yield from bodies(document, variant, text, depth + 1)
    if schema.get("type") == "array" or "items" in schema:
        yield from ([value] for value in bodies(document, schema.get("items", {}), text, depth + 1))
        yield [text[:1000]] * 1000
    if schema.get("type") == "object" or "properties" in schema:
        yield {text: 1}
        yield {f"{text[:1000]}{i}": text[:1000] for i in range(900)}
        properties = schema.get("properties", {})
        others = {name: example(document, name, properties[name]) for name in schema.get("required", [])}
        for name, member in properties.items():
            for value in bodies(document, member, text, depth + 1):
                yield {name: value}
                yield {**others, name: value}
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            yield from ({"x": value} for value in bodies(document, extra, text, depth + 1))


@pytest.mark.parametrize("kind", TEXTS)
def test_problem_is_small_when_a_text_of_a_json_body_is_long(flowers: Hub, kind: str) -> None:
    document = flowers.http.get("/openapi.json").json()
    tried = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if schema is None:
                continue
            texts = (TEXTS[kind], TEXTS[kind][:SHORTER])
            for body in itertools.chain.from_iterable(bodies(document, schema, text) for text in texts):
                url = path.format(**PATHS)
                admin = flowers.admin if "/tenants" in path or "/admin" in path else {}
                content = json.dumps(body, ensure_ascii=False).encode()
                reply = flowers.http.request(method, url, content=content, headers=JSON | admin)
                assert len(reply.content) < LARGEST_PROBLEM_BYTES, (method, path, str(body)[:200])
                assert reply.status_code < 500, (method, path, str(body)[:200])
                tried += 1
    assert tried > 200


@pytest.mark.parametrize("kind", TEXTS)
def test_problem_is_small_when_a_path_a_query_or_a_header_is_long(flowers: Hub, kind: str) -> None:
    document, text = flowers.http.get("/openapi.json").json(), TEXTS[kind][:2000].replace("\x7f", "\x80")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method in ("delete", "post") and "{" not in path:
                continue
            names = [p["name"] for p in operation.get("parameters", []) if p["in"] == "query"]
            requests: list[tuple[str, dict[str, str], dict[str, str]]] = [
                (path.format(**PATHS), {name: text}, {}) for name in [*names, "unknown", text]
            ]
            requests += [(path.format(**PATHS | {name: text}), {}, {}) for name in PATHS if f"{{{name}}}" in path]
            ascii_text = text.encode("ascii", "backslashreplace").decode()
            headers = ("content-type", "content-encoding", "canary-key", "x-canary-key", "x-request-id", "accept")
            requests += [(path.format(**PATHS), {}, {name: ascii_text}) for name in (*headers, "authorization")]
            for url, query, header in requests:
                if method == "delete" and url == path.format(**PATHS):
                    continue  # it would delete the task
                reply = flowers.http.request(method, url, params=query, headers=header, content=b"{}")
                if reply.status_code >= 400:
                    assert len(reply.content) < LARGEST_PROBLEM_BYTES, (method, path, list(query)[:1], list(header))
                assert reply.status_code < 500, (method, path)


@pytest.mark.parametrize("kind", TEXTS)
def test_problem_is_small_when_metadata_of_an_adapter_are_long(
    flowers: Hub, adapters: list[Adapter], kind: str
) -> None:
    text = TEXTS[kind][:40_000]
    names = ("format", "config", "backbone", "fingerprint", "labels", "preprocess", "metrics", "created", "producer")
    values = [text, json.dumps(text), json.dumps([text] * 3), json.dumps({text: text}), json.dumps([{text: text}])]
    tried = 0
    for name in (*names, "coverage", text):
        for value in values:
            data = with_metadata(adapters[2], **{name: value})
            reply = flowers.http.post("/v1/tasks/flowers/versions", content=data, headers=OCTETS)
            if reply.status_code >= 400:
                assert len(reply.content) < LARGEST_PROBLEM_BYTES, name
                tried += 1
    assert tried > 30


@pytest.mark.parametrize("kind", TEXTS)
def test_problem_is_small_when_a_form_has_long_names(flowers: Hub, kind: str) -> None:
    text = TEXTS[kind].encode()
    forms = [
        b'form-data; name="' + text.replace(b'"', b"%22") + b'"',
        b'form-data; name="' + text.replace(b'"', b"%22") + b'"; filename="x.png"',
        b'form-data; name="i"; filename="' + text.replace(b'"', b"%22") + b'"',
        b'form-data; name="i"; filename="x.png"\r\nX-A: ' + text,
        b'form-data; name="version"\r\nX-A: ' + text,
    ]
    for head in forms:
        body = b"--b\r\nContent-Disposition: " + head + b"\r\n\r\nnot an image\r\n--b--\r\n"
        content_type = {"content-type": "multipart/form-data; boundary=b"}
        reply = flowers.http.post("/v1/tasks/flowers/classify", content=body, headers=content_type)
        assert 400 <= reply.status_code < 500
        assert len(reply.content) < LARGEST_PROBLEM_BYTES
    assert flowers.http.post("/v1/tasks/flowers/classify", content=png()).status_code == 200
