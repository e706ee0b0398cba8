"""Bodies of `/v2` written by hand: every request that is refused, and replies to the byte."""

import contextlib
import gzip
import json
import struct
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from hub.api.oip import JSON_BYTES
from hub.api.oip_tensors import InputParameters, InputTensor, read_images
from hub.errors import InvalidRequest
from tests.hub.api.test_protocols import (
    IMAGES,
    INFER,
    MAX_BODY_BYTES,
    TEXT,
    flowers,
    image,
    near,
    preprocessed,
    refused,
    v1,
)

__all__ = ["flowers"]  # the fixture


def pixels(**changes) -> dict:
    return {"name": "pixels", "shape": [1, 3, 2, 1], "datatype": "UINT8", "data": [0] * 6} | changes


def ask(name: str, **parameters) -> dict:
    return {"inputs": [image()], "outputs": [{"name": name, "parameters": parameters}]}


REFUSED = {
    "no input": ({"inputs": []}, "inputs", "at least 1 item"),
    "two inputs": ({"inputs": [image(), image()]}, "inputs", "at most 1 item"),
    "input's name": ({"inputs": [image(name="x")]}, "inputs.0.name", "should be 'image' or 'pixels'"),
    "datatype": ({"inputs": [image(datatype="FP64")]}, "inputs.0.datatype", "'BYTES', 'UINT8' or 'FP32'"),
    "image of numbers": ({"inputs": [image(datatype="FP32")]}, "image", "datatype is FP32, but image takes BYTES"),
    "pixels of bytes": ({"inputs": [pixels(datatype="BYTES")]}, "pixels", "pixels takes UINT8 or FP32"),
    "image's shape": ({"inputs": [image(shape=[1, 1])]}, "image", "shape is [1, 1], but image takes [B]"),
    "pixels' shape": ({"inputs": [pixels(shape=[2, 3])]}, "pixels", "but pixels takes [B, 3, H, W]"),
    "channels last": ({"inputs": [pixels(shape=[1, 2, 1, 3])]}, "pixels", "but pixels takes [B, 3, H, W]"),
    "no shape": ({"inputs": [image(shape=[])]}, "image", "shape is []"),
    "negative size": ({"inputs": [image(shape=[-1])]}, "inputs.0.shape.0", "greater than or equal to 1"),
    "huge": ({"inputs": [image(shape=[10**40])]}, "inputs.0.shape.0", "less than or equal to"),
    "broken number": ({"inputs": [image(shape=[1.5])]}, "inputs.0.shape.0", "valid integer"),
    "too many": ({"inputs": [image(shape=[65], data=[TEXT] * 65)]}, "image", "65 images, but at most 64"),
    "shape lies": ({"inputs": [image(shape=[2])]}, "image", "shape [2] has 2 elements, but data has 1"),
    "large lie": ({"inputs": [pixels(shape=[1, 3, 2**31, 2**31])]}, "pixels", "elements, but data has 6"),
    "ragged": ({"inputs": [pixels(data=[[[[0], [0]], [[0], [0]], [[0]]]])]}, "pixels", "nested as shape"),
    "half nested": ({"inputs": [pixels(data=[[0], 0, 0, 0, 0, 0])]}, "pixels", "nested as shape"),
    "empty": ({"inputs": [image(data=[])]}, "image", "data has 0"),
    "no data": ({"inputs": [image(data=None)]}, "image", "takes either data, or binary_data_size"),
    "no base64": ({"inputs": [image(data=["?"])]}, "image.0", "not base64"),
    "no text": ({"inputs": [image(data=[7])]}, "image", "base64 text of an image file"),
    "too nested": ({"inputs": [image(data=[[TEXT]])]}, "image", "base64 text of an image file"),
    "256": ({"inputs": [pixels(data=[0] * 5 + [256])]}, "pixels", "whole numbers from 0 to 255"),
    "below 0": ({"inputs": [pixels(data=[0] * 5 + [-1])]}, "pixels", "whole numbers from 0 to 255"),
    "fraction": ({"inputs": [pixels(data=[0] * 5 + [0.5])]}, "pixels", "whole numbers from 0 to 255"),
    "truth": ({"inputs": [pixels(data=[0] * 5 + [True])]}, "pixels", "whole numbers from 0 to 255"),
    "text among floats": ({"inputs": [pixels(datatype="FP32", data=[0] * 5 + ["0"])]}, "pixels", "takes numbers"),
    "normalised": ({"inputs": [pixels(datatype="FP32", data=[0] * 5 + [-2.1])]}, "pixels", "values from -2.1 to 0"),
    "infinite": ({"inputs": [pixels(datatype="FP32", data=[0] * 5 + [10**400])]}, "pixels", "not finite"),
    "shared memory": (
        {"inputs": [image(parameters={"shared_memory_region": "a"})]},
        "image",
        "shares no memory with its clients",
    ),
    "undeclared": ({"inputs": [image(parameters={"binary_data_size": 0})]}, "image", "either data, or binary"),
    "no bytes": ({"inputs": [image(data=None, parameters={"binary_data_size": 9})]}, "image", "but 0 bytes follow"),
    "output's name": (ask("logits"), "outputs.0.name", "'probabilities' or 'labels'"),
    "labels' classes": (ask("labels", classification=2), "labels", "has no classification"),
    "below 0 classes": (ask("probabilities", classification=-1), "outputs.0.parameters.classification", "equal to 0"),
    "output in shared memory": (ask("labels", shared_memory_region="a"), "labels", "shares no memory"),
    "three outputs": ({"inputs": [image()], "outputs": [0, 0, 0]}, "outputs", "at most 2 items"),
    "twice": ({"inputs": [image()], "outputs": [{"name": "labels"}] * 2}, "labels", "asked for twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_infer_requests_that_are_refused(flowers, case) -> None:
    body, field, message = REFUSED[case]
    refused(flowers.http.post(INFER, json=body), field, message)


def packed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def send(hub, tensor: dict, data: bytes, length: int | str | None = None, claimed: int | None = None, **headers):
    """An infer request with binary data, whose lengths may lie."""
    size = len(data) if claimed is None else claimed
    tensor = {key: value for key, value in tensor.items() if key != "data"} | {"parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [tensor]}).encode()
    length = len(text) if length is None else length
    return hub.http.post(INFER, content=text + data, headers={"inference-header-content-length": str(length)} | headers)


FLOATS = np.zeros(6, "<f4")
BINARY_REFUSED = {
    "length 0": ((image(), packed(IMAGES[0]), 0), JSON_BYTES, "is 0, but must be the length of the JSON"),
    "length beyond": ((image(), b"", 10**9), JSON_BYTES, "is 1000000000, but must be"),
    "length short": ((image(), packed(IMAGES[0]), 20), "body", "Invalid JSON"),
    "no number": ((image(), b"", "ten"), JSON_BYTES, "valid integer"),
    "claims more": ((image(), b"ab", None, 3), "image", "binary_data_size is 3, but 2 bytes follow"),
    "claims less": ((image(), b"ab", None, 1), "image", "binary_data_size is 1, but 2 bytes follow"),
    "element beyond": ((image(), struct.pack("<I", 2**32 - 1)), "image", "element 0 of 1 goes beyond the 4 bytes"),
    "element cut": ((image(), b"\0\0"), "image", "element 0 of 1 goes beyond"),
    "too few elements": ((image(shape=[2]), packed(IMAGES[0])), "image", "element 1 of 2 goes beyond"),
    "too many elements": ((image(), packed(IMAGES[0], b"a")), "image", "5 bytes are left after 1 elements"),
    "pixels cut": ((pixels(), b"12345"), "pixels", "of UINT8 takes 6 bytes, but binary_data_size is 5"),
    "floats cut": ((pixels(datatype="FP32"), b"123456"), "pixels", "of FP32 takes 24 bytes"),
    "not a number": ((pixels(datatype="FP32"), (FLOATS + np.nan).tobytes()), "pixels", "not finite"),
    "0 to 255": ((pixels(datatype="FP32"), (FLOATS + 255).tobytes()), "pixels", "FP32 pixels take 0 to 1"),
}


@pytest.mark.parametrize("case", BINARY_REFUSED)
def test_binary_data_that_is_refused(flowers, case) -> None:
    arguments, field, message = BINARY_REFUSED[case]
    refused(send(flowers, *arguments), field, message)


def test_a_binary_reply_to_the_byte(flowers, adapters) -> None:
    tensor = image() | {"data": [TEXT]}
    asked = {"id": "7", "inputs": [tensor], "parameters": {"binary_data_output": True}}
    answer = flowers.http.post(INFER, json=asked)
    length = int(answer.headers[JSON_BYTES])
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
    assert np.frombuffer(answer.content[length : length + 4 * count], "<f4") == near(v1(flowers, adapters[1])[0])
    assert answer.content[length + 4 * count :] == labels
    assert answer.headers["x-batch-images"] == "1"
    text = flowers.http.post(INFER, json=asked | {"parameters": None})
    assert text.headers["content-type"] == "application/json"
    assert JSON_BYTES not in text.headers
    assert len(text.json()["outputs"][0]["data"]) == count


def test_nested_and_flat_data_are_the_same(flowers, adapters) -> None:
    array = preprocessed(adapters[1])
    flat, nested = (
        flowers.http.post(INFER, json={"inputs": [pixels(shape=[*array.shape], data=data)]}).json()["outputs"][0]
        for data in (array.ravel().tolist(), array.tolist())
    )
    assert flat == nested
    assert np.reshape(flat["data"], flat["shape"]) == near(v1(flowers, adapters[1]))


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
def test_whatever_a_tensor_says_it_is_read_or_refused(kind, shape, data, size, binary) -> None:
    name, datatype = kind
    parameters = InputParameters(binary_data_size=size)
    tensor = InputTensor(name=name, datatype=datatype, shape=shape, data=data, parameters=parameters)
    with contextlib.suppress(InvalidRequest):
        images = [found for _, found in read_images(tensor, memoryview(binary))]
        assert len(images) == shape[0]
        for found in images:
            assert isinstance(found, bytes) if name == "image" else found.shape == tuple(shape[1:])


def test_compressed_bodies_are_bounded(flowers) -> None:
    body = json.dumps({"inputs": [image()]}).encode()

    def post(data: bytes, coding: str, path: str = INFER):
        return flowers.http.post(path, content=data, headers={"content-encoding": coding})

    assert post(gzip.compress(body), "gzip").status_code == 200
    assert post(gzip.compress(IMAGES[0]), "gzip", "/models/flowers").status_code == 200
    bomb = zlib.compress(b" " * 100 * MAX_BODY_BYTES)
    assert len(bomb) < MAX_BODY_BYTES
    for coding in ("gzip", "deflate"):
        refused(post(bomb, coding), "body", f"more than the {MAX_BODY_BYTES} bytes that are allowed when", 413)
        refused(post(body, coding), "body", f"is not {coding}")
        refused(post(zlib.compress(body)[:-1], coding), "body", "is cut off")
        refused(post(zlib.compress(body) * 2, coding), "body", "more than one")
    refused(post(body, "br"), "Content-Encoding", "'br' is not offered")


def test_json_of_too_many_values_is_not_parsed(flowers, monkeypatch) -> None:
    monkeypatch.setattr("hub.api.oip.MAX_JSON_VALUES", 100)
    tensor = {"name": "pixels", "shape": [1, 3, 32, 32], "datatype": "UINT8", "data": [0] * 3072}
    refused(flowers.http.post(INFER, json={"inputs": [tensor]}), "body", "more than 100 values", 413)
    wrong = {"inputs": TEXT, "parameters": {f"wrong {i}": i for i in range(1000)}}
    refused(flowers.http.post("/models/flowers", json=wrong), "body", "more than 100 values", 413)
