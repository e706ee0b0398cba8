"""The HTTP contract: registration, classification, aliases, deletion, and every error as a problem."""

import base64

import pytest

from adapters import load_backbone
from tests.hub.conftest import MAX_ADAPTER_BYTES, MAX_IMAGE_BYTES, OCTETS
from tests.support.models import bomb_png, png, random_adapter, with_metadata, with_tensors

PROBLEM = "application/problem+json"


def register(hub, task, adapter, **params):
    return hub.http.post(f"/v1/tasks/{task}/versions", content=adapter.data, params=params, headers=OCTETS)


def problem_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    body = response.json()
    assert {"type", "title", "status", "detail"} <= set(body)
    assert body["status"] == status
    return body


def expected_label(backbone, adapter, image):
    import torch

    from adapters.data.images import decode_image, eval_transform, normalise

    pixels = eval_transform(adapter.preprocess)(decode_image(image))[None]
    mean, std = (torch.tensor(adapter.preprocess[name]) for name in ("mean", "std"))
    with torch.inference_mode():
        scores = adapter.merge(backbone)(normalise(pixels, mean, std)).softmax(1)[0]
    return adapter.labels[int(scores.argmax())], float(scores.max())


def test_register_then_classify_gives_the_merged_model_s_answer(hub, backbone, adapters) -> None:
    made = register(hub, "flowers", adapters[0])
    assert made.status_code == 201
    assert made.json() | {"task": "flowers", "version": 1, "digest": adapters[0].digest} == made.json()
    assert made.json()["labels"] == list(adapters[0].labels)
    assert hub.engine.prefetched == [adapters[0].digest]

    answer = hub.http.post("/v1/tasks/flowers/classify", content=png(), headers={"content-type": "image/png"})
    assert answer.status_code == 200
    body = answer.json()
    assert set(body) == {"task", "version", "digest", "predictions"}
    label, score = expected_label(backbone, adapters[0], png())
    assert body["predictions"][0][0]["label"] == label
    assert body["predictions"][0][0]["score"] == pytest.approx(score, abs=1e-4)
    scores = [p["score"] for p in body["predictions"][0]]
    assert scores == sorted(scores, reverse=True)
    assert answer.headers["x-batch-images"] == "1"
    assert answer.headers["server-timing"].startswith("load;dur=")


def test_three_kinds_of_body_give_the_same_answer(hub, adapters) -> None:
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


def test_one_call_for_several_tasks(hub, backbone, adapters) -> None:
    for i, adapter in enumerate(adapters[:3]):
        register(hub, f"task{i}", adapter)
    order = [2, 0, 1, 0, 2]
    inputs = [{"task": f"task{n}", "image": base64.b64encode(png(i)).decode()} for i, n in enumerate(order)]
    results = hub.http.post("/v1/classify", json={"inputs": inputs}).json()["results"]
    for i, (result, n) in enumerate(zip(results, order, strict=True)):
        assert (result["task"], result["digest"]) == (f"task{n}", adapters[n].digest)
        assert result["predictions"][0]["label"] == expected_label(backbone, adapters[n], png(i))[0]


def test_the_same_bytes_are_the_same_version_and_new_bytes_a_new_one(hub, adapters) -> None:
    assert register(hub, "flowers", adapters[0], alias="stable").status_code == 201
    assert register(hub, "flowers", adapters[1]).json()["version"] == 2
    again = register(hub, "flowers", adapters[0])
    assert (again.status_code, again.json()["version"]) == (200, 1)
    task = hub.http.get("/v1/tasks/flowers").json()
    assert task["aliases"] == {"latest": {"1": 1}, "stable": {"1": 1}}
    assert [v["version"] for v in task["versions"]] == [1, 2]
    assert hub.http.get("/v1/tasks").json() == {
        "tasks": [{"task": "flowers", "latest": 1, "classes": 3, "aliases": task["aliases"]}]
    }


def test_versions_aliases_and_canaries_choose_the_adapter(hub, adapters) -> None:
    for adapter in adapters[:3]:
        register(hub, "flowers", adapter)
    url = "/v1/tasks/flowers/classify"

    def version_of(reference: str) -> int:
        return hub.http.post(url, content=png(), params={"version": reference}).json()["version"]

    assert hub.http.put("/v1/tasks/flowers/aliases/stable", json={"version": 2}).status_code == 200
    assert [version_of(r) for r in ("1", "stable", "latest")] == [1, 2, 3]
    hub.http.put("/v1/tasks/flowers/aliases/canary", json={"weights": {"1": 1, "3": 1}})
    assert {version_of("canary") for _ in range(40)} == {1, 3}
    body = problem_of(hub.http.put("/v1/tasks/flowers/aliases/stable", json={"version": 9}), 422)
    assert body["detail"] == "task 'flowers' has no version 9"
    problem_of(hub.http.put("/v1/tasks/flowers/aliases/stable", json={}), 422)
    problem_of(hub.http.put("/v1/tasks/flowers/aliases/7", json={"version": 1}), 422)
    assert version_of("stable") == 2


def test_the_file_comes_back_byte_for_byte(hub, adapters) -> None:
    register(hub, "flowers", adapters[0])
    file = hub.http.get("/v1/tasks/flowers/versions/latest/file")
    assert file.content == adapters[0].data
    assert file.headers["etag"] == f'"{adapters[0].digest}"'
    assert hub.http.get("/v1/tasks/flowers/versions/1").json()["digest"] == adapters[0].digest


def test_deleting(hub, adapters) -> None:
    register(hub, "flowers", adapters[0])
    register(hub, "flowers", adapters[1])
    body = problem_of(hub.http.delete("/v1/tasks/flowers/versions/2"), 409)
    assert "alias 'latest' of task 'flowers' points at version 2" in body["detail"]
    assert hub.http.delete("/v1/tasks/flowers/versions/1").status_code == 204
    problem_of(hub.http.post("/v1/tasks/flowers/classify", content=png(), params={"version": "1"}), 404)
    assert hub.http.delete("/v1/tasks/flowers").status_code == 204
    problem_of(hub.http.delete("/v1/tasks/flowers"), 404)
    problem_of(hub.http.post("/v1/tasks/flowers/classify", content=png()), 404)
    assert hub.http.get("/v1/tasks").json() == {"tasks": []}
    assert register(hub, "flowers", adapters[0]).json()["version"] == 3  # numbers are never given twice


def test_keys(hub, adapters) -> None:
    register(hub, "flowers", adapters[0])
    for header in ({"authorization": ""}, {"authorization": "Bearer kh_wrong"}, {"authorization": f"Basic {hub.key}"}):
        answer = hub.http.get("/v1/tasks", headers=header)
        problem_of(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    assert hub.http.get("/healthz", headers={"authorization": ""}).json() == {"status": "ok"}
    assert hub.http.get("/readyz", headers={"authorization": ""}).json() == {"status": "ok"}


IMAGES = {
    "text": (b"hello", 422, "body: not an image; expected one of JPEG, PNG, WEBP, BMP, GIF, TIFF"),
    "empty": (b"", 422, "body: 0 bytes; expected an image file"),
    "truncated": (png()[:600], 422, "body: the image cannot be decoded:"),
    "bomb": (bomb_png(), 413, "pixels that are allowed; not decoded"),
    "pixels": (bomb_png(2000), 413, "body: 2000 x 2000 pixels, but at most 1000000 are allowed"),
    "bytes": (png(size=(300, 300)), 413, f"at most {MAX_IMAGE_BYTES} are allowed for an image"),
    "body": (b"x" * (5 * MAX_IMAGE_BYTES), 413, "the body has more than the 800000 bytes that are allowed"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_that_are_refused(hub, adapters, case) -> None:
    data, status, detail = IMAGES[case]
    register(hub, "flowers", adapters[0])
    body = problem_of(hub.http.post("/v1/tasks/flowers/classify", content=data), status)
    assert detail in body["detail"]
    assert body["errors"][0]["field"] == "body"


def test_a_chunked_body_is_refused_as_soon_as_it_is_too_large(hub, adapters) -> None:
    register(hub, "flowers", adapters[0])
    chunks = (b"x" * 100_000 for _ in range(50))
    problem_of(hub.http.post("/v1/tasks/flowers/classify", content=chunks), 413)


def test_bad_bodies_name_the_field(hub, adapters) -> None:
    register(hub, "flowers", adapters[0])
    url = "/v1/tasks/flowers/classify"
    good = base64.b64encode(png()).decode()
    for options, field in [
        ({"json": {"images": [good, "?"]}}, "images.1"),
        ({"json": {"images": []}}, "images"),
        ({"json": {"pictures": [good]}}, "images"),
        ({"content": "{", "headers": {"content-type": "application/json"}}, "body"),
        ({"files": {"a": ("a.png", b"text")}}, "a"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "body"),
        ({"content": png(), "params": {"top_k": 0}}, "top_k"),
    ]:
        body = problem_of(hub.http.post(url, **options), 422)
        assert body["errors"][0]["field"] == field, body
    inputs = [{"task": "flowers", "image": good}, {"task": "flowers", "image": base64.b64encode(b"no").decode()}]
    assert problem_of(hub.http.post("/v1/classify", json={"inputs": inputs}), 422)["errors"][0]["field"] == (
        "inputs.1.image"
    )
    inputs[1] = {"task": "absent", "image": good}
    assert problem_of(hub.http.post("/v1/classify", json={"inputs": inputs}), 404)["detail"] == (
        "there is no task 'absent'"
    )


def test_json_without_its_content_type_is_told_so(hub, adapters) -> None:
    hub.http.post("/v1/tasks/a/versions", content=adapters[0].data)
    for kind in ("application/x-www-form-urlencoded", "application/octet-stream", ""):
        answer = hub.http.post("/v1/tasks/a/classify", content=b'\n {"images": []}', headers={"content-type": kind})
        assert answer.status_code == 422
        assert answer.json()["type"].endswith(":invalid-image")
        assert answer.json()["errors"] == [
            {"field": "body", "message": "looks like JSON; send it with content-type: application/json"}
        ]


def test_unknown_things_are_404_and_bad_names_422(hub, adapters) -> None:
    register(hub, "flowers", adapters[0])
    assert problem_of(hub.http.get("/v1/tasks/trees"), 404)["detail"] == "there is no task 'trees'"
    body = problem_of(hub.http.post("/v1/tasks/flowers/classify", content=png(), params={"version": "old"}), 404)
    assert body["detail"] == "task 'flowers' has no version or alias 'old'; it has 1, latest"
    for name in ("Flowers", "-x", "a" * 64, "fl%20owers"):
        body = problem_of(register(hub, name, adapters[0]), 422)
        assert body["errors"][0]["field"] == "task"
        assert "does not match ^([a-z0-9][a-z0-9_-]{0,62}:)?[a-z0-9][a-z0-9_-]{0,62}$" in body["detail"]
    problem_of(hub.http.get("/v3"), 404)
    problem_of(hub.http.post("/v1/tasks"), 405)


def bad_adapters(backbone, adapter):
    import torch

    tensors = dict(adapter.tensors)
    layer = "blocks.0.mlp.fc1"
    torch.manual_seed(5)
    foreign = random_adapter(load_backbone("demo", pretrained=False), rank=4)
    yield "text", b"no", "file", "not a safetensors file"
    yield "empty", b"", "file", "not a safetensors file: 0 bytes"
    yield "truncated", adapter.data[:-100], "file", "truncated"
    yield (
        "shape",
        with_tensors(adapter, tensors | {f"{layer}.karst_b": torch.zeros(2, 8, 3)}),
        f"{layer}.karst_b",
        "takes",
    )
    yield "dtype", with_tensors(adapter, tensors | {"head.bias": torch.zeros(3).double()}), "head.bias", "dtype F64"
    yield "nan", with_tensors(adapter, tensors | {"head.bias": torch.full((3,), torch.nan)}), "head.bias", "not finite"
    absent = {n: t for n, t in tensors.items() if n != f"{layer}.karst_a"}
    yield "missing", with_tensors(adapter, absent), f"{layer}.karst_a", "is missing"
    yield "extra", with_tensors(adapter, tensors | {"extra": torch.zeros(1)}), "extra", "is no tensor of a karst/1 file"
    yield "labels", with_metadata(adapter, labels='["a", "a", "b"]'), "labels", "must be unique"
    yield "count", with_metadata(adapter, labels='["a", "b"]'), "head.weight", "expected (2, D) for 2 labels"
    yield "foreign", foreign.data, "fingerprint", "was trained on backbone 'demo' with fingerprint"
    yield "rank", random_adapter(backbone, rank=9).data, "blocks.0.attn.proj.karst_a", "rank 9, but at most 8"
    yield "large", adapter.data + b"\0" * MAX_ADAPTER_BYTES, "body", f"more than the {MAX_ADAPTER_BYTES} bytes"


def test_bad_adapters_change_nothing_and_say_what_is_wrong(hub, backbone, adapters) -> None:
    register(hub, "flowers", adapters[0])
    before = hub.stored(), hub.registered()
    for case, data, field, message in bad_adapters(backbone, adapters[0]):
        answer = hub.http.post("/v1/tasks/flowers/versions", content=data, headers=OCTETS)
        body = problem_of(answer, 413 if case == "large" else 422)
        assert field in [e["field"] for e in body["errors"]], (case, body)
        assert message in body["detail"], (case, body)
        assert (hub.stored(), hub.registered()) == before, case


def test_an_unforeseen_error_shows_no_traceback(hub, adapters) -> None:
    register(hub, "flowers", adapters[0])
    hub.engine.slots[adapters[0].digest] = None  # what no worker would do
    body = problem_of(hub.http.post("/v1/tasks/flowers/classify", content=png()), 500)
    assert body["detail"] == "an unforeseen error; the hub's log has it"


def test_no_body_is_read_before_the_key_is_checked(hub) -> None:
    for method, path in (
        ("PUT", "/v1/tasks/flowers/aliases/stable"),
        ("POST", "/v1/tasks/flowers/versions"),
        ("POST", "/v1/tasks/flowers/classify"),
        ("POST", "/v1/classify"),
    ):
        taken = []

        def chunks(taken=taken):
            for _ in range(100):
                taken.append(1)
                yield b"{" * 1000

        problem_of(hub.http.request(method, path, content=chunks(), headers={"authorization": "Bearer kh_wrong"}), 401)
    body = b"{" * 100_000
    assert (
        "more than the 65536 bytes"
        in problem_of(hub.http.put("/v1/tasks/flowers/aliases/stable", content=body), 413)["detail"]
    )


def test_odd_texts_are_answered_as_what_they_are(hub, adapters) -> None:
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


def test_an_adapter_that_overflows_is_named(hub, adapters) -> None:
    import torch

    huge = adapters[0].tensors | {"head.weight": torch.full_like(adapters[0].tensors["head.weight"], 3e38)}
    data = with_tensors(adapters[0], huge)
    assert hub.http.post("/v1/tasks/huge/versions", content=data, headers=OCTETS).status_code == 201
    body = problem_of(hub.http.post("/v1/tasks/huge/classify", content=png()), 422)
    assert body["detail"].startswith("the adapter's numbers overflow")


def test_openapi_tells_of_keys_bodies_and_problems(hub) -> None:
    spec = hub.http.get("/openapi.json").json()
    assert spec["openapi"].startswith("3.1")
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            opened = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
            assert bool(operation.get("security")) == (path not in opened), path
            takes_a_body = method in ("post", "put", "patch") and not path.endswith("/rollback")
            assert ("requestBody" in operation) == takes_a_body, path
            problems = {status for status in operation["responses"] if int(status) >= 400}
            assert {"401", "403", "404", "429", "503"} <= problems or path in opened, path
            assert "422" in problems or not (takes_a_body or operation.get("parameters")), path
            assert all("application/problem+json" in operation["responses"][s]["content"] for s in problems)
