"""Replies to classifications have at most 8 MiB: a small request cannot ask for a large reply."""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from adapters import Backbone
from hub.errors import InvalidRequest
from hub.schemas import MAX_IMAGES, MAX_REPLY_BYTES
from hub.services.label_sets import require_small_sets
from tests.support.hub_app import OCTETS, Hub, running
from tests.support.models import flat_png, random_adapter

CLASSES = 600
LABELS = [f"{i:04}".ljust(200, "x") for i in range(CLASSES)]
IMAGE = flat_png(128)
FILES = [("image", IMAGE)] * MAX_IMAGES
TEXT = base64.b64encode(IMAGE).decode()


@pytest.fixture(scope="module")
def large(redis_url: str, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Run a hub with a task of many long labels."""
    store: Path = tmp_path_factory.mktemp("store")
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    adapter = random_adapter(backbone, classes=CLASSES, labels=LABELS)
    with running(redis_url, backbone, store, max_adapter_bytes=2_000_000) as hub:
        assert hub.http.post("/v1/tasks/large/versions", content=adapter.data, headers=OCTETS).status_code == 201
        yield hub


def test_call_is_refused_when_its_labels_are_larger_than_the_limit(large: Hub) -> None:
    inputs = {"inputs": [{"task": "large", "image": TEXT}] * MAX_IMAGES}
    for reply in (
        large.http.post("/v1/tasks/large/classify?top_k=1000", files=FILES),
        large.http.post("/v1/tasks/large/classify", json={"images": [TEXT] * MAX_IMAGES, "top_k": 1000}),
        large.http.post("/v1/classify?top_k=1000", json=inputs),
    ):
        assert reply.status_code == 422
        (problem,) = reply.json()["errors"]
        assert problem["field"] == "top_k"
        assert f"(limit {MAX_REPLY_BYTES}); send at most 56 images in a call, or lower top_k" in problem["message"]
    assert large.http.get("/v1/usage").json()["counted"]["images"] == 0


def test_call_is_answered_when_its_labels_fit(large: Hub) -> None:
    for images, top_k in ((MAX_IMAGES, 500), (56, 1000), (1, 1000)):
        reply = large.http.post(f"/v1/tasks/large/classify?top_k={top_k}", files=FILES[:images])
        assert reply.status_code == 200, reply.text
        assert len(reply.content) < MAX_REPLY_BYTES
        assert [len(found) for found in reply.json()["predictions"]] == [min(top_k, CLASSES)] * images
    reply = large.http.post("/models/large?top_k=1000", content=IMAGE)
    assert (reply.status_code, len(reply.json())) == (200, CLASSES)


def test_oip_call_is_refused_when_its_outputs_are_larger_than_the_limit(large: Hub) -> None:
    image = {"name": "image", "shape": [MAX_IMAGES], "datatype": "BYTES", "data": [TEXT] * MAX_IMAGES}
    whole = large.http.post("/v2/models/large/infer", json={"inputs": [image]})
    assert whole.status_code == 422
    assert whole.json()["errors"][0]["field"] == "outputs"
    best = {"name": "probabilities", "parameters": {"classification": 3}}
    for outputs in ([best], [{"name": "probabilities"}]):
        reply = large.http.post("/v2/models/large/infer", json={"inputs": [image], "outputs": outputs})
        assert reply.status_code == 200, reply.text
        assert len(reply.content) < MAX_REPLY_BYTES


def test_sets_are_refused_when_they_are_larger_than_the_limit() -> None:
    require_small_sets([LABELS[:500]] * MAX_IMAGES)
    with pytest.raises(InvalidRequest, match="lower the coverage"):
        require_small_sets([LABELS] * MAX_IMAGES)
