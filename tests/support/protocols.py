"""Helpers of tests that call a hub by the Open Inference Protocol or by Hugging Face's protocol."""

import base64
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from adapters import Adapter
from adapters.data.images import decode_image, eval_transform
from tests.support.hub_app import MAX_IMAGE_BYTES, Hub
from tests.support.models import png

INFER = "/v2/models/flowers/infer"
MAX_BODY_BYTES = 4 * MAX_IMAGE_BYTES
IMAGES = [png(1), png(2), png(3)]
TEXT = base64.b64encode(IMAGES[0]).decode()


class Reply(Protocol):
    """Reply of any HTTP client that has the interface of httpx."""

    @property
    def status_code(self) -> int: ...
    @property
    def headers(self) -> Any: ...
    @property
    def content(self) -> bytes: ...
    @property
    def text(self) -> str: ...
    def json(self) -> Any: ...


def image_tensor(**changes: object) -> dict[str, Any]:
    """Return the input `image` with one image in JSON."""
    return {"name": "image", "shape": [1], "datatype": "BYTES", "data": [TEXT]} | changes


def v1_probabilities(
    hub: Hub, adapter: Adapter, version: str = "latest", images: Sequence[bytes] = IMAGES
) -> np.ndarray:
    """Return the probabilities (B, K) that /v1 gives, in the order of the adapter's labels."""
    reply = hub.http.post(
        "/v1/tasks/flowers/classify",
        files=[("image", (f"{i}.png", image)) for i, image in enumerate(images)],
        params={"top_k": 1000, "version": version},
    )
    rows = [{p["label"]: p["score"] for p in row} for row in reply.json()["predictions"]]
    return np.array([[row[label] for label in adapter.labels] for row in rows])


def preprocessed(adapter: Adapter) -> np.ndarray:
    """Return the images as the hub preprocesses them: uint8 (B, 3, H, W)."""
    transform = eval_transform(adapter.preprocess)
    return np.stack([transform(decode_image(image)).numpy() for image in IMAGES])


def assert_problem(reply: Reply, field: str, message: str = "", status: int = 422) -> None:
    """Assert that a reply is a problem about a field, with its detail repeated in `error`."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert reply.headers["content-type"] == "application/problem+json"
    assert {"type", "title", "status", "detail", "error"} <= set(body)
    assert body["error"] == body["detail"]
    assert message in body["detail"]
    assert field in [e["field"] for e in body.get("errors", [])], body
