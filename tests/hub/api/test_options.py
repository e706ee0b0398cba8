"""Options of a call: the query, a form, JSON or a header sets each one, or the hub refuses it by name."""

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from adapters import Adapter
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import png
from tests.support.protocols import Reply

CLASSIFY = "/v1/tasks/flowers/classify"
IMAGE = png()
TEXT = base64.b64encode(IMAGE).decode()
URLENCODED = {"content-type": "application/x-www-form-urlencoded"}
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(30)

Part = tuple[str, tuple[str | None, bytes | str]]


def form(hub: Hub, *parts: Part, path: str = CLASSIFY) -> Reply:
    """Send a form. A part without a file name is text."""
    reply: Reply = hub.http.post(path, files=[*parts])
    return reply


def image_part(name: str = "image", file: str = "a.png", data: bytes = IMAGE) -> Part:
    return name, (file, data)


def text_part(name: str, text: str) -> Part:
    return name, (None, text)


def version_and_labels(reply: Reply) -> tuple[int, int]:
    """Return the version and the number of labels of a reply to a classification."""
    assert reply.status_code == 200, reply.text
    return reply.json()["version"], len(reply.json()["predictions"][0])


def errors(reply: Reply, status: int = 422) -> dict[str, str]:
    """Return field -> message of a refusal."""
    assert reply.status_code == status, reply.text
    return {error["field"]: error["message"] for error in reply.json()["errors"]}


def test_the_options_of_a_form_count(flowers: Hub) -> None:
    assert version_and_labels(form(flowers, image_part())) == (2, 5)
    assert version_and_labels(form(flowers, image_part(), text_part("version", "1"))) == (1, 5)
    assert version_and_labels(form(flowers, text_part("version", "stable"), image_part())) == (1, 5)
    assert version_and_labels(form(flowers, image_part(), text_part("top_k", "1"))) == (2, 1)


@pytest.mark.parametrize(
    ("texts", "field", "message"),
    [
        ({"verison": ["1"]}, "verison", "the text fields of this form are top_k, version, coverage"),
        ({"b": [TEXT]}, "b", "send an image as a file: curl -F image=@FILE"),
        ({"version": ["1", "2"]}, "version", "is set 2 times"),
        ({"top_k": ["one"]}, "top_k", "must be a number"),
        ({"top_k": ["0"]}, "top_k", "must be at least 1"),
        ({"top_k": ["1" * 5000]}, "top_k", "must be a number"),
        ({"top_k": [""]}, "top_k", "must be a number"),
        ({"version": ["x" * 64]}, "version", "at most 63"),
    ],
)
def test_a_text_field_of_a_form_is_refused_when_it_is_not_a_valid_option(
    flowers: Hub, texts: Mapping[str, Sequence[str]], field: str, message: str
) -> None:
    parts = [text_part(name, text) for name, values in texts.items() for text in values]
    assert message in errors(form(flowers, image_part(), *parts))[field]


def test_an_option_is_refused_when_the_query_and_the_body_set_it(flowers: Hub) -> None:
    for name in ("version", "top_k"):
        message = {name: "is set in the query and in the body; set it in one of them"}
        path = f"{CLASSIFY}?{name}=1"
        assert errors(form(flowers, image_part(), text_part(name, "1"), path=path)) == message
        assert errors(flowers.http.post(path, json={"images": [TEXT], name: 1 if name == "top_k" else "1"})) == message
    inputs = {"inputs": [{"task": "flowers", "image": TEXT}], "top_k": 1}
    assert "top_k" in errors(flowers.http.post("/v1/classify?top_k=1", json=inputs))
    body = {"inputs": TEXT, "parameters": {"top_k": 1}}
    assert "top_k" in errors(flowers.http.post("/models/flowers?top_k=1", json=body))


def test_the_options_of_json_count(flowers: Hub) -> None:
    body: dict[str, Any] = {"images": [TEXT], "version": "1", "top_k": 2}
    assert version_and_labels(flowers.http.post(CLASSIFY, json=body)) == (1, 2)
    assert version_and_labels(flowers.http.post(CLASSIFY, json={"images": [TEXT], "top_k": None})) == (2, 5)
    inputs = {"inputs": [{"task": "flowers", "image": TEXT, "version": "1"}], "top_k": 2}
    [result] = flowers.http.post("/v1/classify", json=inputs).json()["results"]
    assert (result["version"], len(result["predictions"])) == (1, 2)


def test_the_options_of_a_call_by_hugging_faces_protocol_count(flowers: Hub) -> None:
    def labels(reply: Reply) -> int:
        assert reply.status_code == 200, reply.text
        return len(reply.json())

    assert labels(flowers.http.post("/models/flowers", content=IMAGE)) == 5
    first = flowers.http.post("/models/flowers?version=1", content=IMAGE).json()
    assert first == flowers.http.post(f"{CLASSIFY}?version=1", content=IMAGE).json()["predictions"][0]
    assert first != flowers.http.post("/models/flowers", content=IMAGE).json()
    assert labels(flowers.http.post("/models/flowers?top_k=1", content=IMAGE)) == 1
    assert labels(flowers.http.post("/models/flowers?top_k=1", json={"inputs": TEXT})) == 1
    assert labels(flowers.http.post("/models/flowers", json={"inputs": TEXT, "parameters": {"top_k": 2}})) == 2


MEMBERS: list[tuple[str, dict[str, Any], str]] = [
    (CLASSIFY, {"images": [TEXT], "verison": "1"}, "verison"),
    ("/v1/classify", {"inputs": [{"task": "flowers", "image": TEXT}], "version": "1"}, "version"),
    ("/v1/classify", {"inputs": [{"task": "flowers", "image": TEXT, "top_k": 1}]}, "inputs.0.top_k"),
    ("/models/flowers", {"inputs": TEXT, "version": "1"}, "version"),
    ("/models/flowers", {"inputs": TEXT, "options": {"wait_for_model": True}}, "options"),
    ("/models/flowers", {"inputs": TEXT, "parameters": {"version": "1"}}, "parameters.version"),
    ("/models/flowers", {"inputs": TEXT, "body": 1}, "body"),
]


@pytest.mark.parametrize(("path", "body", "field"), MEMBERS)
def test_an_unknown_json_member_is_refused_by_name(flowers: Hub, path: str, body: dict[str, Any], field: str) -> None:
    assert errors(flowers.http.post(path, json=body))[field].startswith("unknown member; ")


def test_an_unknown_member_of_an_infer_request_is_refused_by_name(flowers: Hub) -> None:
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [TEXT]}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"inputs": [tensor], "model_version": "1"}, "model_version"),
        ({"inputs": [tensor], "parameters": {"sequence_id": 7}}, "parameters.sequence_id"),
        ({"inputs": [tensor], "parameters": {"timeout": 10}}, "parameters.timeout"),
        ({"inputs": [tensor | {"parameters": {"content_type": "np"}}]}, "inputs.0.parameters.content_type"),
        ({"inputs": [tensor], "outputs": [{"name": "labels", "datatype": "BYTES"}]}, "outputs.0.datatype"),
    ]
    for body, field in cases:
        assert errors(flowers.http.post("/v2/models/flowers/infer", json=body))[field].startswith("unknown member; ")


def test_a_json_member_that_is_sent_twice_is_refused(flowers: Hub) -> None:
    path = "/v1/tasks/flowers/aliases/stable"
    for body, field in (('{"version": 1, "version": 2}', "version"), ('{"weights": {"1": 9, "1": 1}}', "1")):
        assert errors(flowers.http.put(path, content=body)) == {field: "is set 2 times; set it once"}
    for invalid in (b"[" * 9_000, b'{"version": 1', b"\xff"):
        assert "body" in errors(flowers.http.put(path, content=invalid))
    assert flowers.http.get("/v1/tasks/flowers").json()["aliases"]["stable"] == {"1": 1}


def test_weights_are_refused_with_an_example_when_they_are_shares_of_one(flowers: Hub) -> None:
    def refusal(weights: object) -> dict[str, str]:
        return errors(flowers.http.put("/v1/tasks/flowers/aliases/stable", json={"weights": weights}))

    assert refusal({"1": 0.9, "2": 0.1})["weights.1"] == "is 0.9; weights are whole numbers, such as 90 and 10"
    assert refusal(0.9)["weights"] == 'must map versions to weights, such as {"3": 90, "4": 10}'
    assert refusal({"01": 90, "1": 10})["weights"] == "'01' is not a version number, such as 3"
    assert refusal({"1": 1e9})["weights.1"] == "is 1000000000.0; must be at most 1000000"


def test_a_repeated_header_is_refused(flowers: Hub) -> None:
    headers = [("x-canary-key", "a"), ("x-canary-key", "b")]
    reply = flowers.http.post(CLASSIFY, content=IMAGE, headers=[*flowers.http.headers.multi_items(), *headers])
    assert reply.status_code == 400
    assert reply.json()["detail"] == "x-canary-key: is sent 2 times; send it once"


def test_a_description_of_an_alias_with_a_canary_follows_the_canary_key(flowers: Hub) -> None:
    flowers.http.put("/v1/tasks/flowers/aliases/canary", json={"weights": {"1": 1, "2": 1}})
    path, seen = "/v1/tasks/flowers/versions/canary", set()
    for key in map(str, range(12)):
        headers = {"x-canary-key": key}
        classified = flowers.http.post(f"{CLASSIFY}?version=canary", content=IMAGE, headers=headers).json()
        described = [flowers.http.get(path, headers=headers).json() for _ in range(3)]
        assert {version["version"] for version in described} == {classified["version"]}
        file = flowers.http.get(f"{path}/file", headers=headers)
        assert file.headers["etag"] == f'"{classified["digest"]}"'
        model = flowers.http.get("/v2/models/flowers/versions/canary", headers=headers).json()
        assert model["outputs"][0]["shape"] == [-1, len(described[0]["labels"])]
        seen.add(classified["version"])
    assert seen == {1, 2}


def tar(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("tenant.json"), io.BytesIO(content))
    return file.getvalue()


def test_every_route_with_a_body_accepts_a_compressed_one(hub: Hub, adapters: list[Adapter]) -> None:
    zipped = {"content-encoding": "gzip"}

    def send(method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        reply: Reply = hub.http.request(method, path, content=gzip.compress(body), headers={**headers, **zipped})
        return reply

    as_json = {"content-type": "application/json"}
    assert send("POST", "/v1/tasks/flowers/versions", adapters[0].data, OCTETS).status_code == 201
    assert send("PUT", "/v1/tasks/flowers/aliases/stable", b'{"version": 1}', as_json).status_code == 200
    assert send("PUT", "/v1/tasks/flowers/sharing", b'{"public": true}', as_json).status_code == 200
    assert send("POST", CLASSIFY, IMAGE, {}).status_code == 200
    assert send("POST", CLASSIFY, json.dumps({"images": [TEXT]}).encode(), as_json).status_code == 200
    inputs = {"inputs": [{"task": "flowers", "image": TEXT}]}
    assert send("POST", "/v1/classify", json.dumps(inputs).encode(), as_json).status_code == 200
    request = hub.http.build_request("POST", CLASSIFY, files=[("image", ("a.png", IMAGE))])
    assert send("POST", CLASSIFY, request.read(), {"content-type": request.headers["content-type"]}).status_code == 200
    assert send("POST", "/v1/gc", b"{}", hub.admin | as_json).status_code == 200
    exported = hub.http.get("/v1/tenants/default/export").content
    hub.http.post("/v1/tenants", json={"tenant": "copy"}, headers=hub.admin)
    assert send("POST", "/v1/tenants/copy/import", exported, hub.admin).status_code == 201
    assert send("POST", "/v1/tenants/copy/import", tar(b"{"), hub.admin).status_code == 422


def test_a_content_coding_is_refused_by_name_when_the_hub_does_not_support_it(
    hub: Hub, adapters: list[Adapter]
) -> None:
    for coding in ("br", "gzip, br", "zstd"):
        reply = hub.http.post("/v1/tasks/a/versions", content=adapters[0].data, headers={"content-encoding": coding})
        message = f"{coding!r} is not supported; send gzip, deflate or no compression"
        assert errors(reply) == {"Content-Encoding": message}
    bomb = gzip.compress(bytes(10**7))
    for path in ("/v1/tasks/a/versions", CLASSIFY):
        reply = hub.http.post(path, content=bomb, headers={"content-encoding": "gzip"})
        assert "exceeds the limit" in errors(reply, 413)["body"]


def test_a_form_gets_a_hint_on_a_route_that_accepts_none(flowers: Hub, adapters: list[Adapter]) -> None:
    for path, data in (
        ("/v1/tasks/new/versions", adapters[0].data),
        ("/models/flowers", IMAGE),
        ("/v2/models/flowers/infer", IMAGE),
        ("/v1/classify", IMAGE),
    ):
        assert "this route accepts no form" in errors(form(flowers, ("a", ("a", data)), path=path))["body"]


def test_a_file_that_curl_sent_as_text_gets_a_hint(flowers: Hub, adapters: list[Adapter]) -> None:
    """`curl -d @FILE` removes zero bytes and line ends; `--data-binary` sends the same content type."""
    for path, data in (
        (CLASSIFY, IMAGE),
        ("/models/flowers", IMAGE),
        ("/v1/tasks/curl/versions", adapters[0].data),
    ):
        lossy = data.replace(b"\0", b"").replace(b"\r", b"").replace(b"\n", b"")
        assert "curl --data-binary @FILE" in errors(flowers.http.post(path, content=lossy, headers=URLENCODED))["body"]
        assert flowers.http.post(path, content=data, headers=URLENCODED).is_success


def test_base64_text_gets_a_hint_where_image_files_are_expected(flowers: Hub) -> None:
    hint = "is base64 text of an image"
    assert hint in errors(flowers.http.post(CLASSIFY, content=TEXT))["body"]
    assert hint in errors(flowers.http.post("/models/flowers", content=TEXT))["body"]
    assert hint in errors(form(flowers, image_part(data=TEXT.encode())))["image"]


def test_apple_double_files_of_a_form_are_skipped_and_counted(flowers: Hub) -> None:
    parts = [
        image_part(file="a.png"),
        image_part(file="._a.png", data=APPLE_DOUBLE),
        image_part(file="__MACOSX/._b.png", data=APPLE_DOUBLE),
        image_part(file="._real.png"),
    ]
    reply = form(flowers, *parts)
    assert len(reply.json()["predictions"]) == 2
    assert reply.headers["x-skipped-files"] == "2"
    assert "x-skipped-files" not in form(flowers, image_part()).headers
    assert "2 AppleDouble files (._NAME) are not images" in errors(form(flowers, *parts[1:3]))["body"]
    assert "image" in errors(form(flowers, image_part(file="a.png", data=APPLE_DOUBLE)))


def test_a_form_with_more_images_than_a_call_may_have_is_refused(flowers: Hub) -> None:
    assert "65 images; send at most 64" in errors(form(flowers, *[image_part()] * 65))["body"]
    assert "Too many files" in errors(form(flowers, *[image_part()] * 129))["body"]
