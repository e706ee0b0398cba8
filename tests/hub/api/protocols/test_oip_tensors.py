"""Bodies of /v2: every kind of invalid request, and a reply compared byte by byte."""

import contextlib
import gzip
import json
import struct
import zlib
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from adapters import Adapter
from hub.api.dependencies import JSON_LENGTH_HEADER
from hub.api.protocols.oip_tensors import InputParameters, InputTensor, read_images
from hub.errors import InvalidRequest
from tests.support.hub_app import Hub
from tests.support.protocols import (
    IMAGES,
    INFER,
    MAX_BODY_BYTES,
    TEXT,
    Reply,
    assert_problem,
    image_tensor,
    preprocessed,
    v1_probabilities,
)


def pixel_tensor(**changes: object) -> dict[str, Any]:
    return {"name": "pixels", "shape": [1, 3, 2, 1], "datatype": "UINT8", "data": [0] * 6} | changes


def output(name: str, **parameters: object) -> dict[str, Any]:
    return {"inputs": [image_tensor()], "outputs": [{"name": name, "parameters": parameters}]}


Invalid = tuple[dict[str, Any], str, str]
INVALID_JSON: dict[str, Invalid] = {
    "no input": ({"inputs": []}, "inputs", "must have at least 1"),
    "two inputs": ({"inputs": [image_tensor(), image_tensor()]}, "inputs", "has 2 tensors; send one, image or pixels"),
    "input's name": ({"inputs": [image_tensor(name="x")]}, "inputs.0.name", "must be 'image' or 'pixels'"),
    "datatype": ({"inputs": [image_tensor(datatype="FP64")]}, "inputs.0.datatype", "'BYTES', 'UINT8' or 'FP32'"),
    "image of numbers": ({"inputs": [image_tensor(datatype="FP32")]}, "image", "datatype is FP32; expected BYTES"),
    "pixels of bytes": ({"inputs": [pixel_tensor(datatype="BYTES")]}, "pixels", "expected UINT8 or FP32"),
    "image's shape": ({"inputs": [image_tensor(shape=[1, 2])]}, "image", "shape is [1, 2]; expected [B] or"),
    "pixels' shape": ({"inputs": [pixel_tensor(shape=[2, 3])]}, "pixels", "expected [B, 3, H, W]"),
    "channels last": ({"inputs": [pixel_tensor(shape=[1, 2, 1, 3])]}, "pixels", "expected [B, 3, H, W]"),
    "no shape": ({"inputs": [image_tensor(shape=[])]}, "image", "shape is []"),
    "negative size": ({"inputs": [image_tensor(shape=[-1])]}, "inputs.0.shape.0", "must be at least 1"),
    "huge": ({"inputs": [image_tensor(shape=[10**40])]}, "inputs.0.shape.0", "must be at most"),
    "broken number": ({"inputs": [image_tensor(shape=[1.5])]}, "inputs.0.shape.0", "must be a whole number"),
    "too many": (
        {"inputs": [image_tensor(shape=[65], data=[TEXT] * 65)]},
        "image",
        "65 images; a call may have at most 64",
    ),
    "shape lies": ({"inputs": [image_tensor(shape=[2])]}, "image", "shape [2] has 2 elements, but data has 1"),
    "large lie": ({"inputs": [pixel_tensor(shape=[1, 3, 2**31, 2**31])]}, "pixels", "elements, but data has 6"),
    "ragged": ({"inputs": [pixel_tensor(data=[[[[0], [0]], [[0], [0]], [[0]]]])]}, "pixels", "does not match shape"),
    "half nested": ({"inputs": [pixel_tensor(data=[[0], 0, 0, 0, 0, 0])]}, "pixels", "does not match shape"),
    "empty": ({"inputs": [image_tensor(data=[])]}, "image", "data has 0"),
    "no data": ({"inputs": [image_tensor(data=None)]}, "image", "needs either data, or binary_data_size"),
    "no base64": ({"inputs": [image_tensor(data=["?"])]}, "image.0", "not base64"),
    "no text": ({"inputs": [image_tensor(data=[7])]}, "image", "base64 texts of image files"),
    "too nested": ({"inputs": [image_tensor(data=[[TEXT]])]}, "image", "base64 texts of image files"),
    "256": ({"inputs": [pixel_tensor(data=[0] * 5 + [256])]}, "pixels", "integers from 0 to 255"),
    "below 0": ({"inputs": [pixel_tensor(data=[0] * 5 + [-1])]}, "pixels", "integers from 0 to 255"),
    "fraction": ({"inputs": [pixel_tensor(data=[0] * 5 + [0.5])]}, "pixels", "integers from 0 to 255"),
    "truth": ({"inputs": [pixel_tensor(data=[0] * 5 + [True])]}, "pixels", "integers from 0 to 255"),
    "text among floats": (
        {"inputs": [pixel_tensor(datatype="FP32", data=[0] * 5 + ["0"])]},
        "pixels",
        "must be numbers",
    ),
    "normalised": (
        {"inputs": [pixel_tensor(datatype="FP32", data=[0] * 5 + [-2.1])]},
        "pixels",
        "values from -2.1 to 0",
    ),
    "infinite": ({"inputs": [pixel_tensor(datatype="FP32", data=[0] * 5 + [10**400])]}, "pixels", "non-finite"),
    "shared memory": (
        {"inputs": [image_tensor(parameters={"shared_memory_region": "a"})]},
        "image",
        "does not support shared memory",
    ),
    "undeclared": ({"inputs": [image_tensor(parameters={"binary_data_size": 0})]}, "image", "either data, or binary"),
    "no bytes": (
        {"inputs": [image_tensor(data=None, parameters={"binary_data_size": 9})]},
        "image",
        "but 0 bytes follow",
    ),
    "output's name": (output("logits"), "outputs.0.name", "'probabilities', 'labels', 'typicality' or 'unknown'"),
    "labels' classes": (output("labels", classification=2), "labels", "does not support classification"),
    "below 0 classes": (
        output("probabilities", classification=-1),
        "outputs.0.parameters.classification",
        "must be at least 0",
    ),
    "output in shared memory": (output("labels", shared_memory_region="a"), "labels", "does not support shared memory"),
    "five outputs": ({"inputs": [image_tensor()], "outputs": [0] * 5}, "outputs", "at most 4"),
    "twice": ({"inputs": [image_tensor()], "outputs": [{"name": "labels"}] * 2}, "labels", "requested twice"),
}


def test_an_invalid_request_gets_422(flowers: Hub, subtests: pytest.Subtests) -> None:
    for case, (body, field, message) in INVALID_JSON.items():
        with subtests.test(case):
            assert_problem(flowers.http.post(INFER, json=body), field, message)


def packed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def send(
    hub: Hub, tensor: dict[str, Any], data: bytes, length: int | str | None = None, claimed: int | None = None
) -> Reply:
    """Send an infer request with binary data. Its two lengths may be wrong."""
    size = len(data) if claimed is None else claimed
    tensor = {key: value for key, value in tensor.items() if key != "data"} | {"parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [tensor]}).encode()
    length = len(text) if length is None else length
    return hub.http.post(INFER, content=text + data, headers={JSON_LENGTH_HEADER: str(length)})


FLOATS = np.zeros(6, "<f4")
INVALID_BINARY: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "length 0": ((image_tensor(), packed(IMAGES[0]), 0), JSON_LENGTH_HEADER, "is 0; expected the length of the JSON"),
    "length beyond": ((image_tensor(), b"", 10**9), JSON_LENGTH_HEADER, "is 1000000000; expected"),
    "length short": ((image_tensor(), packed(IMAGES[0]), 20), "body", "is not JSON"),
    "no number": ((image_tensor(), b"", "ten"), JSON_LENGTH_HEADER, "must be a whole number"),
    "claims more": ((image_tensor(), b"ab", None, 3), "image", "binary_data_size is 3, but 2 bytes follow"),
    "claims less": ((image_tensor(), b"ab", None, 1), "image", "binary_data_size is 1, but 2 bytes follow"),
    "element beyond": (
        (image_tensor(), struct.pack("<I", 2**32 - 1)),
        "image",
        "element 0 of 1 ends beyond the 4 bytes",
    ),
    "element cut": ((image_tensor(), b"\0\0"), "image", "element 0 of 1 ends beyond"),
    "too few elements": ((image_tensor(shape=[2]), packed(IMAGES[0])), "image", "element 1 of 2 ends beyond"),
    "too many elements": ((image_tensor(), packed(IMAGES[0], b"a")), "image", "5 bytes remain after 1 elements"),
    "pixels cut": ((pixel_tensor(), b"12345"), "pixels", "of UINT8 has 6 bytes, but binary_data_size is 5"),
    "floats cut": ((pixel_tensor(datatype="FP32"), b"123456"), "pixels", "of FP32 has 24 bytes"),
    "not a number": ((pixel_tensor(datatype="FP32"), (FLOATS + np.nan).tobytes()), "pixels", "non-finite"),
    "0 to 255": ((pixel_tensor(datatype="FP32"), (FLOATS + 255).tobytes()), "pixels", "FP32 pixels must be 0 to 1"),
}


def test_invalid_binary_data_get_422(flowers: Hub, subtests: pytest.Subtests) -> None:
    for case, (arguments, field, message) in INVALID_BINARY.items():
        with subtests.test(case):
            assert_problem(send(flowers, *arguments), field, message)


def test_a_binary_reply_has_exact_bytes(flowers: Hub, adapters: list[Adapter]) -> None:
    tensor = image_tensor()
    request = {"id": "7", "inputs": [tensor], "parameters": {"binary_data_output": True}}
    answer = flowers.http.post(INFER, json=request)
    length = int(answer.headers[JSON_LENGTH_HEADER])
    assert answer.headers["content-type"] == "application/octet-stream"
    labels = packed(*(label.encode() for label in adapters[1].labels))
    count = len(adapters[1].labels)
    assert json.loads(answer.content[:length]) == {
        "model_name": "flowers",
        "model_version": "2",
        "id": "7",
        "outputs": [
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": [1, count],
                "parameters": {"binary_data_size": 4 * count},
            },
            {
                "name": "labels",
                "datatype": "BYTES",
                "shape": [1, count],
                "parameters": {"binary_data_size": len(labels)},
            },
        ],
    }
    assert np.frombuffer(answer.content[length : length + 4 * count], "<f4") == pytest.approx(
        v1_probabilities(flowers, adapters[1])[0], abs=1e-4
    )
    assert answer.content[length + 4 * count :] == labels
    assert answer.headers["x-batch-images"] == "1"
    text = flowers.http.post(INFER, json=request | {"parameters": None})
    assert text.headers["content-type"] == "application/json"
    assert JSON_LENGTH_HEADER not in text.headers
    assert len(text.json()["outputs"][0]["data"]) == count


def test_nested_and_flat_data_get_the_same_reply(flowers: Hub, adapters: list[Adapter]) -> None:
    array = preprocessed(adapters[1])
    flat, nested = (
        flowers.http.post(INFER, json={"inputs": [pixel_tensor(shape=[*array.shape], data=data)]}).json()["outputs"][0]
        for data in (array.ravel().tolist(), array.tolist())
    )
    assert flat == nested
    assert np.reshape(flat["data"], flat["shape"]) == pytest.approx(v1_probabilities(flowers, adapters[1]), abs=1e-4)


LEAVES = st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=4)
ELEMENTS = st.lists(st.recursive(LEAVES, lambda x: st.lists(x, max_size=4), max_leaves=12), max_size=6)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from([("image", "BYTES"), ("pixels", "UINT8"), ("pixels", "FP32"), ("image", "FP32")]),
    shape=st.lists(st.integers(1, 3), max_size=4) | st.just([1, 3, 1, 2]),
    data=st.none() | ELEMENTS | st.lists(st.floats(0, 1), min_size=6, max_size=6),
    size=st.none() | st.integers(0, 24),
    binary=st.just(b"") | st.binary(max_size=24),
)
def test_any_tensor_is_read_or_gets_invalid_request(
    kind: tuple[str, str], shape: list[int], data: list[Any] | None, size: int | None, binary: bytes
) -> None:
    name, datatype = kind
    parameters = InputParameters(binary_data_size=size)
    fields = {"name": name, "datatype": datatype, "shape": shape, "data": data, "parameters": parameters}
    tensor = InputTensor.model_validate(fields)
    with contextlib.suppress(InvalidRequest):
        images = [found for _, found in read_images(tensor, memoryview(binary))]
        assert len(images) == shape[0]
        for found in images:
            assert isinstance(found, bytes) if name == "image" else np.shape(found) == tuple(shape[1:])


def test_a_compressed_body_is_limited_by_its_decompressed_size(flowers: Hub) -> None:
    body = json.dumps({"inputs": [image_tensor()]}).encode()

    def post(data: bytes, coding: str, path: str = INFER) -> Reply:
        return flowers.http.post(path, content=data, headers={"content-encoding": coding})

    assert post(gzip.compress(body), "gzip").status_code == 200
    assert post(gzip.compress(IMAGES[0]), "gzip", "/models/flowers").status_code == 200
    bomb = zlib.compress(b" " * 100 * MAX_BODY_BYTES)
    assert len(bomb) < MAX_BODY_BYTES
    for coding in ("gzip", "deflate"):
        assert_problem(post(bomb, coding), "body", f"exceeds the limit of {MAX_BODY_BYTES} bytes", 413)
        assert_problem(post(body, coding), "body", f"is not {coding}")
        assert_problem(post(zlib.compress(body)[:-1], coding), "body", "is truncated")
        assert_problem(post(zlib.compress(body) * 2, coding), "body", "more than one")
    assert_problem(post(body, "br"), "Content-Encoding", "'br' is not supported")


def test_json_with_too_many_values_gets_413(flowers: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub.api.protocols.oip.MAX_JSON_VALUES", 100)
    tensor = {"name": "pixels", "shape": [1, 3, 32, 32], "datatype": "UINT8", "data": [0] * 3072}
    assert_problem(flowers.http.post(INFER, json={"inputs": [tensor]}), "body", "more than 100 values", 413)
