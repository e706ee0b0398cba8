"""Tasks over HTTP: registration, versions, aliases, classification, deletion, and the problem of every error."""

import base64
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adapters import Adapter, Backbone, load_backbone
from adapters.data.images import decode_image, eval_transform, normalise
from adapters.method.karst import extract
from hub.api.problems import PROBLEM_JSON
from tests.support.hub_app import MAX_ADAPTER_BYTES, MAX_IMAGE_BYTES, OCTETS, Hub, bearer
from tests.support.models import bomb_png, png, random_adapter, random_model, with_metadata, with_tensors
from tests.support.protocols import Reply


def register(hub: Hub, task: str, adapter: Adapter, **params: str) -> Reply:
    return hub.http.post(f"/v1/tasks/{task}/versions", content=adapter.data, params=params, headers=OCTETS)


def random_adapter_with(labels: list[str], seed: int = 9, metrics: dict[str, Any] | None = None) -> Adapter:
    model = random_model(load_backbone("demo"), seed=seed, classes=len(labels))
    return extract(model, labels, metrics=metrics)


def problem_of(reply: Reply, status: int) -> dict[str, Any]:
    """Return the body of a reply that must be a problem with this status."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == PROBLEM_JSON
    body: dict[str, Any] = reply.json()
    assert {"type", "title", "status", "detail"} <= set(body)
    assert body["status"] == status
    return body


def fields_of(problem: dict[str, Any]) -> list[str]:
    return [error["field"] for error in problem["errors"]]


def best_label(backbone: Backbone, adapter: Adapter, image: bytes) -> tuple[str, float]:
    """Return label and score of an image by the model with merged weights."""
    pixels = eval_transform(adapter.preprocess)(decode_image(image))[None]
    mean, std = (torch.tensor(adapter.preprocess[name]) for name in ("mean", "std"))
    with torch.inference_mode():
        scores = adapter.merge(backbone)(normalise(pixels, mean, std)).softmax(1)[0]
    return adapter.labels[int(scores.argmax())], float(scores.max())


def test_a_registered_adapter_classifies_as_the_merged_model(
    hub: Hub, backbone: Backbone, adapters: list[Adapter]
) -> None:
    made = register(hub, "flowers", adapters[0])
    assert made.status_code == 201
    assert made.json() | {"task": "flowers", "version": 1, "digest": adapters[0].digest} == made.json()
    assert made.json()["labels"] == list(adapters[0].labels)
    assert hub.engine.prefetched == [adapters[0].digest]

    reply = hub.http.post("/v1/tasks/flowers/classify", content=png(), headers={"content-type": "image/png"})
    assert reply.status_code == 200
    body = reply.json()
    assert set(body) == {"task", "version", "digest", "predictions"}
    label, score = best_label(backbone, adapters[0], png())
    assert body["predictions"][0][0]["label"] == label
    assert body["predictions"][0][0]["score"] == pytest.approx(score, abs=1e-4)
    scores = [p["score"] for p in body["predictions"][0]]
    assert scores == sorted(scores, reverse=True)
    assert reply.headers["x-batch-images"] == "1"
    timing = reply.headers["server-timing"].split(", ")
    assert [part.partition(";dur=")[0] for part in timing] == ["decode", "load", "queue", "compute"]
    assert float(timing[0].partition("=")[2]) > 0


def test_the_backbone_route_has_the_identity_and_the_limits_of_the_workers(hub: Hub, backbone: Backbone) -> None:
    reply = hub.http.get("/v1/backbone")
    assert reply.json() == {
        "name": "demo",
        "fingerprint": backbone.fingerprint,
        "input_size": [3, 32, 32],
        "image_size": None,
        "checkpoint": None,
        "max_rank": 8,
        "max_kernels": 4,
        "factor": 8,
    }


def test_raw_multipart_and_json_bodies_get_the_same_predictions(hub: Hub, adapters: list[Adapter]) -> None:
    register(hub, "flowers", adapters[0])
    images = [png(1), png(2)]
    url = "/v1/tasks/flowers/classify"
    raw = [hub.http.post(url, content=image).json()["predictions"][0] for image in images]
    form = hub.http.post(url, files=[("image", ("a.png", images[0])), ("image", ("b.png", images[1]))])
    text = hub.http.post(url, json={"images": [base64.b64encode(image).decode() for image in images]})
    for answer in (form.json()["predictions"], text.json()["predictions"]):
        for got, want in zip(answer, raw, strict=True):
            assert [p["label"] for p in got] == [p["label"] for p in want]
            assert [p["score"] for p in got] == pytest.approx([p["score"] for p in want], abs=1e-5)


def test_one_call_classifies_with_several_tasks(hub: Hub, backbone: Backbone, adapters: list[Adapter]) -> None:
    for i, adapter in enumerate(adapters[:3]):
        register(hub, f"task{i}", adapter)
    order = [2, 0, 1, 0, 2]
    inputs = [{"task": f"task{n}", "image": base64.b64encode(png(i)).decode()} for i, n in enumerate(order)]
    results = hub.http.post("/v1/classify", json={"inputs": inputs}).json()["results"]
    for i, (result, n) in enumerate(zip(results, order, strict=True)):
        assert (result["task"], result["digest"]) == (f"task{n}", adapters[n].digest)
        assert result["predictions"][0]["label"] == best_label(backbone, adapters[n], png(i))[0]


def test_only_new_bytes_become_a_new_version(hub: Hub, adapters: list[Adapter]) -> None:
    assert register(hub, "flowers", adapters[0], alias="stable").status_code == 201
    assert register(hub, "flowers", adapters[1]).json()["version"] == 2
    again = register(hub, "flowers", adapters[0])
    assert (again.status_code, again.json()["version"], again.json()["moved"]) == (200, 1, [])
    task = hub.http.get("/v1/tasks/flowers").json()
    assert task["aliases"] == {"latest": {"2": 1}, "stable": {"1": 1}}
    assert [v["version"] for v in task["versions"]] == [1, 2]
    (summary,) = hub.http.get("/v1/tasks").json()["tasks"]
    assert summary == {
        "task": "flowers",
        "latest": 2,
        "classes": 5,
        "aliases": task["aliases"],
        "accuracy": None,
        "train_images": None,
        "registered": task["versions"][1]["registered"],
    }


def test_staged_version_does_not_become_latest(hub: Hub, adapters: list[Adapter]) -> None:
    first = register(hub, "flowers", adapters[0], stage="true").json()
    assert first["moved"] == ["latest"]  # a task always has one
    assert register(hub, "flowers", adapters[1], stage="true").json()["moved"] == []
    assert register(hub, "flowers", adapters[2], stage="true", alias="next").json()["moved"] == ["next"]
    assert hub.http.get("/v1/tasks/flowers").json()["aliases"] == {"latest": {"1": 1}, "next": {"3": 1}}
    problem_of(register(hub, "flowers", adapters[3], stage="true", alias="latest"), 422)
    problem_of(register(hub, "flowers", adapters[3], stage="perhaps"), 422)


def test_version_with_other_labels_is_refused_unless_it_is_meant(hub: Hub, adapters: list[Adapter]) -> None:
    labels = list(adapters[0].labels)
    other = random_adapter_with([*labels[:-1], "weed"])
    register(hub, "flowers", adapters[0])
    for params in ({}, {"stage": "true"}, {"alias": "next"}):
        problem = problem_of(register(hub, "flowers", other, **params), 409)
        assert problem["errors"][0]["field"] == "labels"
        assert "version 1" in problem["detail"]
        assert f"(new: 'weed'; missing: {labels[-1]!r})" in problem["detail"]
        assert "labels=changed" in problem["detail"]
    swapped = random_adapter_with([labels[1], labels[0], *labels[2:]])
    assert "the same labels in another order" in problem_of(register(hub, "flowers", swapped), 409)["detail"]
    problem_of(register(hub, "flowers", other, labels="same"), 422)
    assert hub.stored() == [f"{adapters[0].digest}.safetensors"]  # a refused file is not kept
    assert register(hub, "flowers", other, labels="changed").json()["moved"] == ["latest"]
    assert register(hub, "flowers", adapters[0]).status_code == 200  # known bytes move nothing
    canary = {"weights": {"1": 90, "2": 10}}
    problem = problem_of(hub.http.put("/v1/tasks/flowers/aliases/stable", json=canary), 409)
    assert "different labels" in problem["detail"]
    assert hub.http.put("/v1/tasks/flowers/aliases/stable", json={"version": 2}).status_code == 200


def test_reply_shows_the_accuracy_beside_that_of_the_version_before(hub: Hub, backbone: Backbone) -> None:
    for seed, accuracy in enumerate((0.75, 0.875)):
        metrics = {"test_accuracy": accuracy, "test_images": 80}
        made = register(hub, "flowers", random_adapter_with(["a", "b"], seed=seed, metrics=metrics)).json()
    measured = {"interval": None, "images": 80, "measured_on": "test images"}
    assert made["accuracy"] == {"accuracy": 0.875, **measured}
    assert made["previous"] == {"version": 1, "accuracy": {"accuracy": 0.75, **measured}}


def test_versions_and_aliases_select_the_adapter(hub: Hub, adapters: list[Adapter]) -> None:
    for adapter in adapters[:3]:
        register(hub, "flowers", adapter)
    url = "/v1/tasks/flowers/classify"

    def version_of(reference: str) -> int:
        return int(hub.http.post(url, content=png(), params={"version": reference}).json()["version"])

    assert hub.http.put("/v1/tasks/flowers/aliases/stable", json={"version": 2}).status_code == 200
    assert [version_of(r) for r in ("1", "stable", "latest")] == [1, 2, 3]
    hub.http.put("/v1/tasks/flowers/aliases/canary", json={"weights": {"1": 1, "3": 1}})
    assert {version_of("canary") for _ in range(40)} == {1, 3}
    problem = problem_of(hub.http.put("/v1/tasks/flowers/aliases/stable", json={"version": 9}), 422)
    assert "version 9" in problem["detail"]
    problem_of(hub.http.put("/v1/tasks/flowers/aliases/stable", json={}), 422)
    problem_of(hub.http.put("/v1/tasks/flowers/aliases/7", json={"version": 1}), 422)
    assert version_of("stable") == 2


def test_a_download_has_the_bytes_of_the_upload(hub: Hub, adapters: list[Adapter]) -> None:
    register(hub, "flowers", adapters[0])
    file = hub.http.get("/v1/tasks/flowers/versions/latest/file")
    assert file.content == adapters[0].data
    assert file.headers["etag"] == f'"{adapters[0].digest}"'
    assert hub.http.get("/v1/tasks/flowers/versions/1").json()["digest"] == adapters[0].digest


def test_a_version_can_be_deleted_when_no_alias_points_at_it(hub: Hub, adapters: list[Adapter]) -> None:
    register(hub, "flowers", adapters[0])
    register(hub, "flowers", adapters[1])
    problem = problem_of(hub.http.delete("/v1/tasks/flowers/versions/2"), 409)
    assert "'latest'" in problem["detail"]
    assert hub.http.delete("/v1/tasks/flowers/versions/1").status_code == 204
    problem_of(hub.http.post("/v1/tasks/flowers/classify", content=png(), params={"version": "1"}), 404)
    assert hub.http.delete("/v1/tasks/flowers").status_code == 204
    problem_of(hub.http.delete("/v1/tasks/flowers"), 404)
    problem_of(hub.http.post("/v1/tasks/flowers/classify", content=png()), 404)
    assert hub.http.get("/v1/tasks").json() == {"tasks": []}
    assert register(hub, "flowers", adapters[0]).json()["version"] == 3  # numbers are not reused


def test_a_request_gets_401_without_a_valid_key(hub: Hub) -> None:
    for header in ({"authorization": ""}, bearer("kh_wrong"), {"authorization": f"Basic {hub.key}"}):
        reply = hub.http.get("/v1/tasks", headers=header)
        problem_of(reply, 401)
        assert reply.headers["www-authenticate"] == "Bearer"
    assert hub.http.get("/healthz", headers={"authorization": ""}).json() == {"status": "ok"}
    assert hub.http.get("/readyz", headers={"authorization": ""}).json() == {"status": "ok"}


INVALID_IMAGES = {
    "text": (b"hello", 422, "not an image"),
    "empty": (b"", 422, "0 bytes"),
    "truncated": (png()[:600], 422, "cannot be decoded"),
    "decompression bomb": (bomb_png(), 413, "pixels"),
    "too many pixels": (bomb_png(2000), 413, "2000 x 2000 pixels"),
    "too many bytes": (png(size=(300, 300)), 413, f"{MAX_IMAGE_BYTES}"),
    "too large a body": (b"x" * (5 * MAX_IMAGE_BYTES), 413, "the body exceeds the limit of 800000 bytes"),
}


def test_an_invalid_image_gets_a_problem_about_the_body(
    hub: Hub, adapters: list[Adapter], subtests: pytest.Subtests
) -> None:
    register(hub, "flowers", adapters[0])
    for case, (data, status, detail) in INVALID_IMAGES.items():
        with subtests.test(case):
            problem = problem_of(hub.http.post("/v1/tasks/flowers/classify", content=data), status)
            assert detail in problem["detail"]
            assert fields_of(problem) == ["body"]


def test_a_chunked_body_gets_413_when_it_exceeds_the_limit(hub: Hub, adapters: list[Adapter]) -> None:
    register(hub, "flowers", adapters[0])
    chunks = (b"x" * 100_000 for _ in range(50))
    problem_of(hub.http.post("/v1/tasks/flowers/classify", content=chunks), 413)


def test_an_invalid_body_gets_a_problem_about_its_field(hub: Hub, adapters: list[Adapter]) -> None:
    register(hub, "flowers", adapters[0])
    url = "/v1/tasks/flowers/classify"
    good = base64.b64encode(png()).decode()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"json": {"images": [good, "?"]}}, "images.1"),
        ({"json": {"images": []}}, "images"),
        ({"json": {"pictures": [good]}}, "images"),
        ({"content": "{", "headers": {"content-type": "application/json"}}, "body"),
        ({"files": {"a": ("a.png", b"text")}}, "a"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "body"),
        ({"data": {"a": "text"}, "files": {}}, "body"),
        ({"content": png(), "params": {"top_k": 0}}, "top_k"),
    ]
    for options, field in cases:
        problem = problem_of(hub.http.post(url, **options), 422)
        assert fields_of(problem)[0] == field, problem


def test_an_invalid_input_of_several_gets_a_problem_about_its_field(hub: Hub, adapters: list[Adapter]) -> None:
    register(hub, "flowers", adapters[0])
    good, text = (base64.b64encode(data).decode() for data in (png(), b"no image"))
    for task, image, status, field in (
        ("flowers", text, 422, "inputs.1.image"),
        ("flowers", "?", 422, "inputs.1.image"),
        ("absent", good, 404, "task"),
    ):
        inputs = [{"task": "flowers", "image": good}, {"task": task, "image": image}]
        problem = problem_of(hub.http.post("/v1/classify", json={"inputs": inputs}), status)
        assert fields_of(problem) == [field]


def test_json_gets_a_hint_when_its_content_type_is_missing(hub: Hub, adapters: list[Adapter]) -> None:
    hub.http.post("/v1/tasks/a/versions", content=adapters[0].data)
    for kind in ("application/x-www-form-urlencoded", "application/octet-stream", ""):
        reply = hub.http.post("/v1/tasks/a/classify", content=b'\n {"images": []}', headers={"content-type": kind})
        problem = problem_of(reply, 422)
        assert problem["type"].endswith(":invalid-image")
        message = "the body looks like JSON; send it with Content-Type: application/json"
        assert problem["errors"] == [{"field": "body", "message": message}]
        assert problem["detail"] == f"body: {message}"


def test_unknown_tasks_get_404_and_invalid_names_get_422(hub: Hub, adapters: list[Adapter]) -> None:
    register(hub, "flowers", adapters[0])
    problem = problem_of(hub.http.get("/v1/tasks/trees"), 404)
    assert "'trees'" in problem["detail"]
    problem = problem_of(hub.http.post("/v1/tasks/flowers/classify", content=png(), params={"version": "old"}), 404)
    assert "'old'" in problem["detail"]
    for name in ("Flowers", "-x", "a" * 64, "fl%20owers"):
        problem = problem_of(register(hub, name, adapters[0]), 422)
        assert fields_of(problem) == ["task"]
        assert "must be 1 to 63 characters, each a lower-case letter, a digit, _ or -" in problem["detail"]
        assert "^" not in problem["detail"]
    problem_of(hub.http.get("/v3"), 404)
    problem_of(hub.http.post("/v1/tasks"), 405)


def invalid_adapters(backbone: Backbone, adapter: Adapter) -> Iterator[tuple[str, bytes, str]]:
    """Yield name, bytes and the field of the expected problem."""
    tensors = dict(adapter.tensors)
    layer = "blocks.0.mlp.fc1"
    torch.manual_seed(5)
    foreign = random_adapter(load_backbone("demo", pretrained=False), rank=4)
    absent = {n: t for n, t in tensors.items() if n != f"{layer}.karst_a"}
    yield "text", b"no", "file"
    yield "empty", b"", "file"
    yield "truncated", adapter.data[:-100], "file"
    yield "shape", with_tensors(adapter, tensors | {f"{layer}.karst_b": torch.zeros(2, 8, 3)}), f"{layer}.karst_b"
    yield "dtype", with_tensors(adapter, tensors | {"head.bias": torch.zeros(3).double()}), "head.bias"
    yield "nan", with_tensors(adapter, tensors | {"head.bias": torch.full((3,), torch.nan)}), "head.bias"
    yield "missing tensor", with_tensors(adapter, absent), f"{layer}.karst_a"
    yield "unknown tensor", with_tensors(adapter, tensors | {"extra": torch.zeros(1)}), "extra"
    yield "repeated label", with_metadata(adapter, labels='["a", "a", "b"]'), "labels"
    yield "too few labels", with_metadata(adapter, labels='["a", "b"]'), "head.weight"
    yield "other backbone", foreign.data, "fingerprint"
    yield "rank", random_adapter(backbone, rank=9).data, "blocks.0.attn.proj.karst_a"
    yield "too large", adapter.data + b"\0" * MAX_ADAPTER_BYTES, "body"


def test_an_invalid_adapter_gets_a_problem_and_changes_nothing(
    hub: Hub, backbone: Backbone, adapters: list[Adapter]
) -> None:
    register(hub, "flowers", adapters[0])
    before = hub.stored(), hub.registered()
    for case, data, field in invalid_adapters(backbone, adapters[0]):
        reply = hub.http.post("/v1/tasks/flowers/versions", content=data, headers=OCTETS)
        problem = problem_of(reply, 413 if case == "too large" else 422)
        assert field in fields_of(problem), (case, problem)
        assert field in problem["detail"], (case, problem)
        assert (hub.stored(), hub.registered()) == before, case


def test_an_unexpected_error_shows_no_traceback(hub: Hub, adapters: list[Adapter]) -> None:
    register(hub, "flowers", adapters[0])
    hub.engine.slots[adapters[0].digest] = None  # type: ignore[assignment]  # breaks the engine
    problem = problem_of(hub.http.post("/v1/tasks/flowers/classify", content=png()), 500)
    assert problem["type"].endswith(":internal")
    assert problem["detail"].startswith("An unexpected error occurred.")


def test_a_body_is_not_read_before_the_key_is_checked(hub: Hub) -> None:
    for method, path in (
        ("PUT", "/v1/tasks/flowers/aliases/stable"),
        ("POST", "/v1/tasks/flowers/versions"),
        ("POST", "/v1/tasks/flowers/classify"),
        ("POST", "/v1/classify"),
    ):
        chunks = (b"{" * 1000 for _ in range(100))
        problem_of(hub.http.request(method, path, content=chunks, headers=bearer("kh_wrong")), 401)
    reply = hub.http.put("/v1/tasks/flowers/aliases/stable", content=b"{" * 100_000)
    assert problem_of(reply, 413)["detail"] == "body: the body exceeds the limit of 65536 bytes"


def test_unusual_texts_get_a_problem_instead_of_an_internal_error(hub: Hub, adapters: list[Adapter]) -> None:
    register(hub, "flowers", adapters[0])
    url = "/v1/tasks/flowers/classify"
    problem_of(hub.http.post(url, json={"images": ["ä"]}), 422)
    for reference in ("9" * 5000, "x" * 64):
        problem_of(hub.http.post(url, content=png(), params={"version": reference}), 422)
    for reference in ("9" * 63, "٣", "01"):
        problem_of(hub.http.post(url, content=png(), params={"version": reference}), 404)
    problem_of(hub.http.put("/v1/tasks/flowers/aliases/stable", json={"version": 10**30}), 422)
    surrogate = b'--x\r\nContent-Disposition: form-data; name="\\ud800"; filename="a"\r\n\r\nno image\r\n--x--\r\n'
    kind = {"content-type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    problem_of(hub.http.post(url, content=surrogate, headers=kind), 422)


def test_an_adapter_that_overflows_gets_422(hub: Hub, adapters: list[Adapter]) -> None:
    huge = dict(adapters[0].tensors) | {"head.weight": torch.full_like(adapters[0].tensors["head.weight"], 3e38)}
    data = with_tensors(adapters[0], huge)
    assert hub.http.post("/v1/tasks/huge/versions", content=data, headers=OCTETS).status_code == 201
    problem = problem_of(hub.http.post("/v1/tasks/huge/classify", content=png()), 422)
    assert problem["type"].endswith(":invalid-adapter")
