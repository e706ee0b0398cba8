"""Triton's own clients over a real socket, the routes of the Open Inference Protocol, and docs/protocols.md."""

import asyncio
import base64
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio
from PIL import Image
from starlette.types import Message, Scope

from adapters import Adapter
from hub.api.dependencies import JSON_LENGTH_HEADER
from tests.support.hub_app import Hub
from tests.support.models import encoded
from tests.support.protocols import (
    IMAGES,
    INFER,
    MAX_BODY_BYTES,
    assert_problem,
    image_tensor,
    preprocessed,
    v1_probabilities,
)

DOCS = Path(__file__).parents[4] / "docs" / "protocols.md"


@pytest.fixture
def client(flowers: Hub, address: str) -> Iterator[triton.InferenceServerClient]:
    class Key(triton.InferenceServerClientPlugin):  # type: ignore[misc]  # tritonclient has no types
        def __call__(self, request: Any) -> None:
            request.headers["Authorization"] = f"Bearer {flowers.key}"

    with triton.InferenceServerClient(address) as client:
        client.register_plugin(Key())
        yield client


def image_input(images: Sequence[bytes] = IMAGES, **options: Any) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    return tensor.set_data_from_numpy(np.array(images, dtype=np.object_), **options)


def pixel_input(pixels: np.ndarray, **options: Any) -> triton.InferInput:
    datatype = {"uint8": "UINT8", "float32": "FP32"}[pixels.dtype.name]
    return triton.InferInput("pixels", [*pixels.shape], datatype).set_data_from_numpy(pixels, **options)


def near(expected: np.ndarray) -> Any:
    return pytest.approx(expected, abs=1e-4)


def inputs_of(adapter: Adapter) -> dict[str, triton.InferInput]:
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


def test_the_client_gets_the_probabilities_of_v1_for_every_input(
    flowers: Hub, adapters: list[Adapter], client: triton.InferenceServerClient
) -> None:
    expected = v1_probabilities(flowers, adapters[1])
    for name, tensor in inputs_of(adapters[1]).items():
        answer = client.infer("flowers", [tensor])
        assert answer.as_numpy("probabilities") == near(expected), name
        assert answer.as_numpy("probabilities").dtype == np.float32
        assert answer.as_numpy("labels").tolist() == [[label.encode() for label in adapters[1].labels]] * len(IMAGES)


def test_the_client_gets_the_requested_outputs_in_the_requested_format(
    flowers: Hub, adapters: list[Adapter], client: triton.InferenceServerClient
) -> None:
    expected = v1_probabilities(flowers, adapters[1])
    labels = [*adapters[1].labels]
    for binary in (True, False):
        wanted = [triton.InferRequestedOutput(n, binary_data=binary) for n in ("labels", "probabilities")]
        answer = client.infer("flowers", [image_input()], outputs=wanted, request_id="r-1")
        assert [o["name"] for o in answer.get_response()["outputs"]] == ["labels", "probabilities"]
        assert answer.get_response()["id"] == "r-1"
        assert answer.as_numpy("probabilities") == near(expected)
        assert answer.as_numpy("labels")[2].tolist() == ([label.encode() for label in labels] if binary else labels)
        one = client.infer("flowers", [image_input()], outputs=wanted[1:])
        assert one.as_numpy("labels") is None
        assert "id" not in one.get_response()
    mixed = [triton.InferRequestedOutput("probabilities"), triton.InferRequestedOutput("labels", binary_data=False)]
    answer = client.infer("flowers", [image_input()], outputs=mixed)
    assert answer.as_numpy("probabilities") == near(expected)
    assert answer.as_numpy("labels")[0].tolist() == labels


def test_the_client_gets_the_best_classes_when_it_sets_a_class_count(
    flowers: Hub, adapters: list[Adapter], client: triton.InferenceServerClient
) -> None:
    expected = v1_probabilities(flowers, adapters[1])
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


def test_the_client_reads_health_and_metadata(
    adapters: list[Adapter], client: triton.InferenceServerClient, address: str
) -> None:
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
    with triton.InferenceServerClient(address) as without_key:
        assert without_key.is_server_live()
        assert without_key.is_server_ready()
        assert not without_key.is_model_ready("flowers")
        with pytest.raises(triton.InferenceServerException, match=r"\[401\] "):
            without_key.get_server_metadata()


def test_the_client_gets_the_named_version_with_and_without_compression(
    flowers: Hub, adapters: list[Adapter], client: triton.InferenceServerClient
) -> None:
    for version, number, adapter in (("1", "1", adapters[0]), ("stable", "1", adapters[0]), ("", "2", adapters[1])):
        for compression in (None, "gzip", "deflate"):
            answer = client.infer(
                "default:flowers", [image_input()], version, request_compression_algorithm=compression
            )
            assert answer.as_numpy("probabilities") == near(v1_probabilities(flowers, adapter, number))
            assert answer.get_response()["model_name"] == "default:flowers"
            assert answer.get_response()["model_version"] == number


def test_the_client_gets_an_error_for_each_option_that_the_hub_does_not_support(
    client: triton.InferenceServerClient,
) -> None:
    """The hub would otherwise ignore a priority or a timeout."""
    for name, options in (
        ("priority", {"priority": 1}),
        ("timeout", {"timeout": 10**6}),
        ("sequence_id", {"sequence_id": 7}),
        ("top_k", {"parameters": {"top_k": 1}}),
    ):
        with pytest.raises(triton.InferenceServerException, match=rf"\[422\] .*parameters.{name}: unknown member"):
            client.infer("flowers", [image_input()], **options)


def test_the_client_can_send_image_files_in_a_column(
    flowers: Hub, adapters: list[Adapter], client: triton.InferenceServerClient
) -> None:
    """A model with `max_batch_size` has inputs of shape [B, 1]."""
    column = np.array([[image] for image in IMAGES], dtype=np.object_)
    texts = np.array([[base64.b64encode(image)] for image in IMAGES], dtype=np.object_)
    for data, binary in ((column, True), (texts, False)):
        tensor = triton.InferInput("image", [len(IMAGES), 1], "BYTES").set_data_from_numpy(data, binary_data=binary)
        answer = client.infer("flowers", [tensor])
        assert answer.as_numpy("probabilities") == near(v1_probabilities(flowers, adapters[1]))


def test_the_client_gets_a_hint_when_binary_data_are_base64_text(client: triton.InferenceServerClient) -> None:
    texts = [base64.b64encode(image) for image in IMAGES]
    with pytest.raises(triton.InferenceServerException, match=r"image\.0: is base64 text of an image; send the bytes"):
        client.infer("flowers", [image_input(texts)])


def test_metadata_and_error_say_that_a_call_has_one_input(
    adapters: list[Adapter], client: triton.InferenceServerClient
) -> None:
    model = client.get_model_metadata("flowers")
    assert model["parameters"]["inputs"] == "alternatives: a request has one input, image or pixels"
    both = [image_input(), pixel_input(preprocessed(adapters[1]))]
    with pytest.raises(triton.InferenceServerException, match="inputs: has 2 tensors; send one, image or pixels"):
        client.infer("flowers", both)


def test_the_client_shows_the_detail_of_an_error(flowers: Hub, client: triton.InferenceServerClient) -> None:
    def error(tensor: triton.InferInput, model: str = "flowers", version: str = "", **options: Any) -> str:
        with pytest.raises(triton.InferenceServerException) as caught:
            client.infer(model, [tensor], version, **options)
        return str(caught.value)

    def detail(path: str) -> str:
        return str(flowers.http.get(path).json()["detail"])

    assert error(image_input(), "trees") == f"[404] {detail('/v1/tasks/trees')}"
    assert error(image_input(), "flowers", "9") == f"[404] {detail('/v1/tasks/flowers/versions/9')}"
    assert "[422] image.1: not an image; expected one of JPEG" in error(image_input([IMAGES[0], b"text"]))
    small = np.zeros((2, 3, 5, 5), np.uint8)
    assert "[422] pixels.0: pixels have shape [3, 5, 5]; the adapter takes [3, 32, 32]" in error(pixel_input(small))
    bright = np.full((2, 3, 5, 5), 255, np.float32)
    assert "[422] pixels: has values from 255 to 255; FP32 pixels must be 0 to 1" in error(pixel_input(bright))
    assert "[422] image: needs either data, or binary_data_size" in error(triton.InferInput("image", [1], "BYTES"))
    shared = triton.InferInput("image", [1], "BYTES")
    shared.set_shared_memory("region", 100)
    assert "[422] image: the hub does not support shared memory" in error(shared)


def test_the_asynchronous_client_gets_the_probabilities_of_v1(
    flowers: Hub, adapters: list[Adapter], address: str
) -> None:
    key = {"Authorization": f"Bearer {flowers.key}"}

    async def ask(model: str) -> np.ndarray:
        async with tritonclient.http.aio.InferenceServerClient(address) as client:
            reply = await client.infer(model, [image_input()], headers=dict(key))
            probabilities: np.ndarray = reply.as_numpy("probabilities")
            return probabilities

    assert asyncio.run(ask("flowers")) == near(v1_probabilities(flowers, adapters[1]))
    with pytest.raises(triton.InferenceServerException, match=r"\[404\] .*'trees'"):
        asyncio.run(ask("trees"))


def test_calls_with_one_canary_key_get_one_version(flowers: Hub) -> None:
    flowers.http.put("/v1/tasks/flowers/aliases/canary", json={"weights": {"1": 1, "2": 1}})

    def version(headers: dict[str, str]) -> str:
        url = "/v2/models/flowers/versions/canary/infer"
        reply = flowers.http.post(url, json={"inputs": [image_tensor()]}, headers=headers).json()["model_version"]
        return str(reply)

    assert {version({}) for _ in range(40)} == {"1", "2"}
    by_key = [{version({"x-canary-key": key}) for _ in range(3)} for key in map(str, range(20))]
    assert {len(versions) for versions in by_key} == {1}
    assert set().union(*by_key) == {"1", "2"}


def events(hub: Hub, path: str, headers: list[tuple[bytes, bytes]], chunks: Iterator[bytes]) -> list[str]:
    """Send a request to the application; return its reads of the body and the parts of its reply, in order."""
    seen: list[str] = []

    async def receive() -> Message:
        seen.append("read")
        chunk = next(chunks, None)
        return (
            {"type": "http.disconnect"} if chunk is None else {"type": "http.request", "body": chunk, "more_body": True}
        )

    async def send(message: Message) -> None:
        seen.append(" ".join(str(message[name]) for name in ("type", "status") if name in message))

    scope: Scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"},
        **{"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers},
    }
    assert hub.http.portal is not None
    hub.http.portal.call(hub.api, scope, receive, send)
    return seen


def test_a_body_is_not_read_before_the_key_is_checked(hub: Hub) -> None:
    for path in (INFER, "/models/flowers"):
        chunks = (b"{" * 1000 for _ in range(100))
        seen = events(hub, path, [(b"authorization", b"Bearer kh_wrong"), (b"content-length", b"100000")], chunks)
        assert seen[:2] == ["http.response.start 401", "http.response.body"]  # it reads on only after the reply
        wrong = hub.http.post(path, content=b"{", headers={"authorization": "Bearer kh_wrong"})
        assert wrong.status_code == 401
        assert wrong.json()["error"] == wrong.json()["detail"]
        too_large = hub.http.post(path, content=b"x" * (MAX_BODY_BYTES + 1))
        assert_problem(too_large, "body", status=413)


def test_the_openapi_document_describes_infer(hub: Hub) -> None:
    document = hub.http.get("/openapi.json").json()
    for path in ("/v2/models/{task}/infer", "/v2/models/{task}/versions/{version}/infer"):
        operation = document["paths"][path]["post"]
        assert set(operation["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "application/octet-stream"}
        assert JSON_LENGTH_HEADER in [p["name"] for p in operation["parameters"]]
        assert operation["security"]
    assert "security" not in document["paths"]["/v2/health/live"]["get"]


def test_the_examples_of_the_docs_run(
    flowers: Hub,
    adapters: list[Adapter],
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cat.jpg").write_bytes(encoded(Image.open(io.BytesIO(IMAGES[0])), "JPEG"))
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(examples) == 3
    names: dict[str, Any] = {}
    for example in examples:
        exec(example.replace("127.0.0.1:8000", address).replace("kh_...", flowers.key), names)
    names["client"].close()
    printed = capsys.readouterr().out.splitlines()
    scores = v1_probabilities(flowers, adapters[1], images=[Path("cat.jpg").read_bytes()])[0]
    best = [adapters[1].labels[k] for k in np.argsort(-scores)]
    assert [line.rpartition(" ")[0] for line in printed] == [*best[:3], best[0], *best[:3]]
