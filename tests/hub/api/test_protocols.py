"""Clients that exist, unchanged, over a real socket: Hugging Face's and Triton's; and every request that is refused."""

import asyncio
import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from adapters.data.images import decode_image, eval_transform
from hub.api.oip import JSON_BYTES
from tests.hub.conftest import MAX_IMAGE_BYTES, OCTETS
from tests.support.asgi import listening
from tests.support.models import encoded, png

DOCS = Path(__file__).parents[3] / "docs" / "protocols.md"
INFER = "/v2/models/flowers/infer"
MAX_BODY_BYTES = 4 * MAX_IMAGE_BYTES
IMAGES = [png(1), png(2), png(3)]


@pytest.fixture
def flowers(hub, adapters):
    """A hub with a task `flowers`: version 1 is `stable`, version 2 is `latest`."""
    for adapter, params in ((adapters[0], {"alias": "stable"}), (adapters[1], {})):
        made = hub.http.post("/v1/tasks/flowers/versions", content=adapter.data, params=params, headers=OCTETS)
        assert made.status_code == 201, made.text
    return hub


@pytest.fixture
def address(flowers) -> Iterator[str]:
    with listening(flowers.another_gateway().app) as url:
        yield url.removeprefix("http://")


@pytest.fixture
def client(flowers, address) -> Iterator[triton.InferenceServerClient]:
    class Key(triton.InferenceServerClientPlugin):
        def __call__(self, request) -> None:
            request.headers["Authorization"] = f"Bearer {flowers.key}"

    with triton.InferenceServerClient(address) as client:
        client.register_plugin(Key())
        yield client


def hugging_face(flowers, address: str, path: str = "flowers", token: str | None = None) -> InferenceClient:
    return InferenceClient(f"http://{address}/models/{path}", token=token or flowers.key)


def v1(flowers, adapter, version: str = "latest", images=IMAGES) -> np.ndarray:
    """What `/v1` says: probabilities (B, K) in the order of the adapter's labels."""
    answer = flowers.http.post(
        "/v1/tasks/flowers/classify",
        files=[("image", (f"{i}.png", image)) for i, image in enumerate(images)],
        params={"top_k": 1000, "version": version},
    )
    rows = [{p["label"]: p["score"] for p in row} for row in answer.json()["predictions"]]
    return np.array([[row[label] for label in adapter.labels] for row in rows])


def image_input(images=IMAGES, **options) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    return tensor.set_data_from_numpy(np.array(images, dtype=np.object_), **options)


def pixel_input(pixels: np.ndarray, **options) -> triton.InferInput:
    datatype = {"uint8": "UINT8", "float32": "FP32"}[pixels.dtype.name]
    return triton.InferInput("pixels", [*pixels.shape], datatype).set_data_from_numpy(pixels, **options)


def preprocessed(adapter) -> np.ndarray:
    """The images as the hub itself would preprocess them: uint8 (B, 3, H, W)."""
    transform = eval_transform(adapter.preprocess)
    return np.stack([transform(decode_image(image)).numpy() for image in IMAGES])


def near(expected: np.ndarray):
    return pytest.approx(expected, abs=1e-4)


def test_hugging_face_s_client_gets_v1_s_answer(flowers, adapters, address, tmp_path) -> None:
    best = dict(zip(adapters[1].labels, v1(flowers, adapters[1])[0], strict=True))
    ranked = sorted(best, key=best.__getitem__, reverse=True)
    path = tmp_path / "cat.png"
    path.write_bytes(IMAGES[0])
    by_base_url = InferenceClient(base_url=f"http://{address}/models/flowers", api_key=flowers.key)
    for client in (hugging_face(flowers, address), by_base_url, hugging_face(flowers, address, "default:flowers")):
        for image in (IMAGES[0], path, str(path)):
            for top_k in (None, 1, 3):
                got = client.image_classification(image, top_k=top_k, function_to_apply="softmax" if top_k else None)
                assert [p.label for p in got] == ranked[:top_k]
                assert [p.score for p in got] == near([best[label] for label in ranked[:top_k]])


def test_hugging_face_s_client_takes_a_version_in_its_url(flowers, adapters, address) -> None:
    for reference, adapter in (("1", adapters[0]), ("stable", adapters[0]), ("latest", adapters[1])):
        got = hugging_face(flowers, address, f"flowers?version={reference}").image_classification(IMAGES[0])
        assert {p.label for p in got} == set(adapter.labels)
        assert got[0].score == near(v1(flowers, adapter, reference)[0].max())


def test_hugging_face_s_client_shows_what_is_wrong(flowers, address) -> None:
    def error(path="flowers", image=IMAGES[0], token=None, **options) -> str:
        with pytest.raises(HfHubHTTPError) as caught:
            hugging_face(flowers, address, path, token).image_classification(image, **options)
        return str(caught.value)

    assert "not an image; expected one of JPEG" in error(image=b"text")
    assert "not an image; expected one of JPEG" in error(image=b"text", top_k=2)
    assert "there is no task 'trees'" in error("trees")
    assert "has no version or alias 'old'" in error("flowers?version=old")
    assert "the hub does not know this key" in error(token="kh_wrong")
    assert "the hub gives probabilities only" in error(function_to_apply="sigmoid")
    assert "the hub gives probabilities only" in error(function_to_apply="none")
    assert "less than or equal to 1000" in error(top_k=1001)


HUGGING_FACE_REFUSED = {
    "no inputs": ({}, "inputs"),
    "not base64": ({"inputs": "?"}, "inputs"),
    "no text": ({"inputs": 3}, "inputs"),
    "top_k": ({"inputs": "", "parameters": {"top_k": 0}}, "parameters.top_k"),
    "top_k as text": ({"inputs": "", "parameters": {"top_k": "3"}}, "parameters.top_k"),
    "misspelt": ({"inputs": "", "parameters": {"topk": 3}}, "parameters.topk"),
    "nonsense": ({"inputs": "", "parameters": {"function_to_apply": "relu"}}, "parameters.function_to_apply"),
}


@pytest.mark.parametrize("case", HUGGING_FACE_REFUSED)
def test_hugging_face_bodies_that_are_refused(flowers, case) -> None:
    body, field = HUGGING_FACE_REFUSED[case]
    refused(flowers.http.post("/models/flowers", json=body), field)


def test_hugging_face_without_its_client(flowers, adapters) -> None:
    text = base64.b64encode(IMAGES[0]).decode()
    kinds = ({"content-type": "image/png"}, OCTETS, {})
    answers = [flowers.http.post("/models/flowers", content=IMAGES[0], headers=kind) for kind in kinds]
    bodies = ({"inputs": text}, {"inputs": text, "parameters": None}, {"inputs": f"data:image/png;base64,{text}"})
    answers += [flowers.http.post("/models/flowers", json=body) for body in bodies]
    assert all(answer.json() == answers[0].json() for answer in answers)
    assert answers[0].json()[0]["label"] == adapters[1].labels[v1(flowers, adapters[1])[0].argmax()]
    assert answers[0].headers["x-batch-images"] == "1"


def ways(adapter) -> dict[str, triton.InferInput]:
    pixels = preprocessed(adapter)
    scaled = pixels.astype(np.float32) / 255
    return {
        "image files": image_input(),
        "image files in JSON": image_input([base64.b64encode(image) for image in IMAGES], binary_data=False),
        "UINT8": pixel_input(pixels),
        "UINT8 in JSON": pixel_input(pixels, binary_data=False),
        "FP32": pixel_input(scaled),
        "FP32 in JSON": pixel_input(scaled, binary_data=False),
    }


def test_triton_s_client_gets_v1_s_answer_for_every_input(flowers, adapters, client) -> None:
    expected = v1(flowers, adapters[1])
    for way, tensor in ways(adapters[1]).items():
        answer = client.infer("flowers", [tensor])
        assert answer.as_numpy("probabilities") == near(expected), way
        assert answer.as_numpy("probabilities").dtype == np.float32
        assert answer.as_numpy("labels").tolist() == [[label.encode() for label in adapters[1].labels]] * len(IMAGES)


def test_triton_s_client_chooses_outputs_and_their_form(flowers, adapters, client) -> None:
    expected = v1(flowers, adapters[1])
    labels = [*adapters[1].labels]
    for binary in (True, False):
        wanted = [triton.InferRequestedOutput(n, binary_data=binary) for n in ("labels", "probabilities")]
        answer = client.infer("flowers", [image_input()], outputs=wanted, request_id="mine")
        assert [o["name"] for o in answer.get_response()["outputs"]] == ["labels", "probabilities"]
        assert answer.get_response()["id"] == "mine"
        assert answer.as_numpy("probabilities") == near(expected)
        assert answer.as_numpy("labels")[2].tolist() == ([label.encode() for label in labels] if binary else labels)
        one = client.infer("flowers", [image_input()], outputs=wanted[1:])
        assert one.as_numpy("labels") is None
        assert "id" not in one.get_response()
    mixed = [triton.InferRequestedOutput("probabilities"), triton.InferRequestedOutput("labels", binary_data=False)]
    answer = client.infer("flowers", [image_input()], outputs=mixed)
    assert answer.as_numpy("probabilities") == near(expected)
    assert answer.as_numpy("labels")[0].tolist() == labels


def test_triton_s_client_asks_for_classes(flowers, adapters, client) -> None:
    expected = v1(flowers, adapters[1])
    for count, binary in ((1, True), (2, False), (99, True)):
        output = triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=count)
        got = client.infer("flowers", [image_input()], outputs=[output]).as_numpy("probabilities")
        assert got.shape == (len(IMAGES), min(count, len(adapters[1].labels)))
        for row, texts in zip(expected, got, strict=True):
            found = [(t.decode() if binary else t).split(":", 2) for t in texts]
            assert [int(index) for _, index, _ in found] == np.argsort(-row)[:count].tolist()
            for score, index, label in found:
                assert float(score) == pytest.approx(row[int(index)], abs=1e-4)
                assert label == adapters[1].labels[int(index)]


def test_triton_s_client_reads_health_and_metadata(adapters, client, address) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("flowers")
    assert client.is_model_ready("flowers", "stable")
    assert not client.is_model_ready("flowers", "9")
    assert not client.is_model_ready("trees")
    server = client.get_server_metadata()
    assert (server["name"], server["extensions"]) == ("karst-hub", ["binary_tensor_data", "classification"])
    for version, adapter in (("", adapters[1]), ("1", adapters[0]), ("latest", adapters[1])):
        model = client.get_model_metadata("flowers", version)
        assert (model["name"], model["versions"]) == ("flowers", ["1", "2"])
        size, classes = adapter.preprocess["input_size"], len(adapter.labels)
        assert [(t["name"], t["datatype"], t["shape"]) for t in model["inputs"] + model["outputs"]] == [
            ("image", "BYTES", [-1]),
            ("pixels", "UINT8", [-1, *size]),
            ("probabilities", "FP32", [-1, classes]),
            ("labels", "BYTES", [-1, classes]),
        ]
    with triton.InferenceServerClient(address) as stranger:
        assert stranger.is_server_live()
        assert stranger.is_server_ready()
        assert not stranger.is_model_ready("flowers")
        with pytest.raises(triton.InferenceServerException, match=r"\[401\] send the header `Authorization"):
            stranger.get_server_metadata()


def test_triton_s_client_chooses_versions_and_compresses(flowers, adapters, client) -> None:
    for version, number, adapter in (("1", "1", adapters[0]), ("stable", "1", adapters[0]), ("", "2", adapters[1])):
        for compression in (None, "gzip", "deflate"):
            answer = client.infer(
                "default:flowers", [image_input()], version, request_compression_algorithm=compression
            )
            assert answer.as_numpy("probabilities") == near(v1(flowers, adapter, number))
            assert answer.get_response()["model_name"] == "default:flowers"
            assert answer.get_response()["model_version"] == number
    answer = client.infer("flowers", [image_input()], sequence_id=7, sequence_start=True, priority=1, timeout=10**6)
    assert answer.as_numpy("probabilities") == near(v1(flowers, adapters[1]))


def test_triton_s_client_shows_what_is_wrong(client) -> None:
    def error(tensor, model="flowers", version="", **options) -> str:
        with pytest.raises(triton.InferenceServerException) as caught:
            client.infer(model, [tensor], version, **options)
        return str(caught.value)

    assert error(image_input(), "trees") == "[404] there is no task 'trees'"
    assert "[404] task 'flowers' has no version or alias '9'" in error(image_input(), "flowers", "9")
    assert "[422] image.1: not an image; expected one of JPEG" in error(image_input([IMAGES[0], b"text"]))
    small = np.zeros((2, 3, 5, 5), np.uint8)
    assert "[422] pixels.0: pixels of shape [3, 5, 5], but the adapter takes [3, 32, 32]" in error(pixel_input(small))
    bright = np.full((2, 3, 5, 5), 255, np.float32)
    assert "[422] pixels: has values from 255 to 255, but FP32 pixels take 0 to 1" in error(pixel_input(bright))
    assert "[422] image: takes either data, or binary_data_size" in error(triton.InferInput("image", [1], "BYTES"))
    shared = triton.InferInput("image", [1], "BYTES")
    shared.set_shared_memory("region", 100)
    assert "[422] image: the hub shares no memory" in error(shared)


def test_triton_s_asynchronous_client(flowers, adapters, address) -> None:
    key = {"Authorization": f"Bearer {flowers.key}"}

    async def ask(model: str) -> np.ndarray:
        async with tritonclient.http.aio.InferenceServerClient(address) as client:
            return (await client.infer(model, [image_input()], headers=dict(key))).as_numpy("probabilities")

    assert asyncio.run(ask("flowers")) == near(v1(flowers, adapters[1]))
    with pytest.raises(triton.InferenceServerException, match=r"\[404\] there is no task 'trees'"):
        asyncio.run(ask("trees"))


TEXT = base64.b64encode(IMAGES[0]).decode()


def image(**changes) -> dict:
    return {"name": "image", "shape": [1], "datatype": "BYTES", "data": [TEXT]} | changes


def refused(response, field: str, message: str = "", status: int = 422) -> None:
    """The answer is a problem that names the field, and says the same where these protocols' clients look."""
    assert response.status_code == status, response.text
    body = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert {"type", "title", "status", "detail", "error"} <= set(body)
    assert body["error"] == body["detail"]
    assert message in body["detail"]
    assert field in [e["field"] for e in body.get("errors", [])], body


def test_a_canary_key_sticks_to_a_version(flowers) -> None:
    flowers.http.put("/v1/tasks/flowers/aliases/canary", json={"weights": {"1": 1, "2": 1}})

    def versions(keys) -> list[str]:
        url = "/v2/models/flowers/versions/canary/infer"
        headers = [{} if key is None else {"x-canary-key": key} for key in keys]
        return [flowers.http.post(url, json={"inputs": [image()]}, headers=h).json()["model_version"] for h in headers]

    def labels(key: str) -> set[str]:
        answer = flowers.http.post("/models/flowers?version=canary", content=IMAGES[0], headers={"x-canary-key": key})
        return {p["label"] for p in answer.json()}

    assert set(versions([None] * 40)) == {"1", "2"}
    each = {key: versions([key] * 3) for key in map(str, range(20))}
    assert all(len(set(got)) == 1 for got in each.values())
    assert {got[0] for got in each.values()} == {"1", "2"}
    assert all(len(labels(key)) == (3 if got[0] == "1" else 4) for key, got in each.items())


def test_no_body_is_read_before_the_key_is_checked(hub) -> None:
    for path in (INFER, "/models/flowers"):
        chunks = (b"{" * 1000 for _ in range(100))
        wrong = hub.http.post(path, content=chunks, headers={"authorization": "Bearer kh_wrong"})
        assert wrong.status_code == 401
        assert len(list(chunks)) > 50
        assert wrong.json()["error"] == "the hub does not know this key"
        too_large = hub.http.post(path, content=b"x" * (MAX_BODY_BYTES + 1))
        refused(too_large, "body", status=413)


def test_openapi_is_whole(hub) -> None:
    spec = hub.http.get("/openapi.json").json()

    def references(node) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key == "$ref":
                yield value
            elif isinstance(value, dict | list):
                yield from references(value)

    for reference in set(references(spec)):
        place = spec
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
    for path in ("/v2/models/{task}/infer", "/v2/models/{task}/versions/{version}/infer"):
        operation = spec["paths"][path]["post"]
        assert set(operation["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "application/octet-stream"}
        assert JSON_BYTES in [p["name"] for p in operation["parameters"]]
        assert operation["security"]
    assert "security" not in spec["paths"]["/v2/health/live"]["get"]


def test_the_docs_examples_run(flowers, adapters, address, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cat.jpg").write_bytes(encoded(Image.open(io.BytesIO(IMAGES[0])), "JPEG"))
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(examples) == 3
    names: dict = {}
    for example in examples:
        exec(example.replace("127.0.0.1:8000", address).replace("kh_...", flowers.key), names)
    names["client"].close()
    printed = capsys.readouterr().out.splitlines()
    scores = v1(flowers, adapters[1], images=[Path("cat.jpg").read_bytes()])[0]
    best = [adapters[1].labels[k] for k in np.argsort(-scores)]
    assert [line.rpartition(" ")[0] for line in printed] == [*best[:3], best[0], *best[:3]]
