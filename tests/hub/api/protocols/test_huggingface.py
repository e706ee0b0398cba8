"""Hugging Face's own client over a real socket, and requests without it."""

import base64
from pathlib import Path

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from adapters import Adapter
from tests.support.hub_app import OCTETS, Hub, bearer
from tests.support.protocols import IMAGES, assert_problem, v1_probabilities


def hugging_face(hub: Hub, address: str, path: str = "flowers", token: str | None = None) -> InferenceClient:
    return InferenceClient(f"http://{address}/models/{path}", token=token or hub.key)


def test_the_client_gets_the_predictions_of_v1(
    flowers: Hub, adapters: list[Adapter], address: str, tmp_path: Path
) -> None:
    best = dict(zip(adapters[1].labels, v1_probabilities(flowers, adapters[1])[0], strict=True))
    ranked = sorted(best, key=best.__getitem__, reverse=True)
    path = tmp_path / "cat.png"
    path.write_bytes(IMAGES[0])
    by_base_url = InferenceClient(base_url=f"http://{address}/models/flowers", api_key=flowers.key)
    for client in (hugging_face(flowers, address), by_base_url, hugging_face(flowers, address, "default:flowers")):
        for image in (IMAGES[0], path, str(path)):
            for top_k in (None, 1, 3):
                got = client.image_classification(image, top_k=top_k, function_to_apply="softmax" if top_k else None)
                assert [p.label for p in got] == ranked[:top_k]
                assert [p.score for p in got] == pytest.approx([best[label] for label in ranked[:top_k]], abs=1e-4)


def test_the_client_gets_a_version_when_its_url_names_one(flowers: Hub, adapters: list[Adapter], address: str) -> None:
    for reference, adapter in (("1", adapters[0]), ("stable", adapters[0]), ("latest", adapters[1])):
        got = hugging_face(flowers, address, f"flowers?version={reference}").image_classification(IMAGES[0])
        assert {p.label for p in got} == set(adapter.labels)
        assert got[0].score == pytest.approx(v1_probabilities(flowers, adapter, reference)[0].max(), abs=1e-4)


def test_the_client_shows_the_detail_of_an_error(flowers: Hub, address: str) -> None:
    def error(path: str = "flowers", image: bytes = IMAGES[0], token: str | None = None, **options: object) -> str:
        client = hugging_face(flowers, address, path, token)
        with pytest.raises(HfHubHTTPError) as caught:
            client.image_classification(image, **options)  # type: ignore[arg-type]  # wrong on purpose
        return str(caught.value)

    assert "not an image; expected one of JPEG" in error(image=b"text")
    assert "not an image; expected one of JPEG" in error(image=b"text", top_k=2)
    assert flowers.http.get("/v1/tasks/trees").json()["detail"] in error("trees")
    assert flowers.http.get("/v1/tasks/flowers/versions/old").json()["detail"] in error("flowers?version=old")
    assert flowers.http.get("/v1/tasks", headers=bearer("kh_wrong")).json()["detail"] in error(token="kh_wrong")
    assert "the hub returns probabilities only" in error(function_to_apply="sigmoid")
    assert "the hub returns probabilities only" in error(function_to_apply="none")
    assert "must be at most 1000" in error(top_k=1001)


INVALID_BODIES: dict[str, tuple[dict[str, object], str]] = {
    "no inputs": ({}, "inputs"),
    "not base64": ({"inputs": "?"}, "inputs"),
    "inputs not text": ({"inputs": 3}, "inputs"),
    "top_k too small": ({"inputs": "", "parameters": {"top_k": 0}}, "parameters.top_k"),
    "top_k as text": ({"inputs": "", "parameters": {"top_k": "3"}}, "parameters.top_k"),
    "misspelt parameter": ({"inputs": "", "parameters": {"topk": 3}}, "parameters.topk"),
    "unknown function": ({"inputs": "", "parameters": {"function_to_apply": "relu"}}, "parameters.function_to_apply"),
}


def test_an_invalid_body_gets_422(flowers: Hub, subtests: pytest.Subtests) -> None:
    for case, (body, field) in INVALID_BODIES.items():
        with subtests.test(case):
            assert_problem(flowers.http.post("/models/flowers", json=body), field)


def test_every_kind_of_body_gets_the_same_predictions(flowers: Hub, adapters: list[Adapter]) -> None:
    text = base64.b64encode(IMAGES[0]).decode()
    kinds: tuple[dict[str, str], ...] = ({"content-type": "image/png"}, OCTETS, {})
    replies = [flowers.http.post("/models/flowers", content=IMAGES[0], headers=kind) for kind in kinds]
    bodies: tuple[dict[str, str | None], ...] = (
        {"inputs": text},
        {"inputs": text, "parameters": None},
        {"inputs": f"data:image/png;base64,{text}"},
    )
    replies += [flowers.http.post("/models/flowers", json=body) for body in bodies]
    assert all(reply.json() == replies[0].json() for reply in replies)
    assert replies[0].json()[0]["label"] == adapters[1].labels[v1_probabilities(flowers, adapters[1])[0].argmax()]
    assert replies[0].headers["x-batch-images"] == "1"


def test_json_with_too_many_values_gets_413(flowers: Hub) -> None:
    body = {"inputs": "", "parameters": {f"wrong {i}": i for i in range(1000)}}
    assert_problem(flowers.http.post("/models/flowers", json=body), "body", "more than 100 values", 413)


def test_calls_with_one_canary_key_get_one_version(flowers: Hub) -> None:
    flowers.http.put("/v1/tasks/flowers/aliases/canary", json={"weights": {"1": 1, "2": 1}})

    def scores(key: str) -> frozenset[float]:
        reply = flowers.http.post("/models/flowers?version=canary", content=IMAGES[0], headers={"x-canary-key": key})
        return frozenset(p["score"] for p in reply.json())

    by_key = [{scores(key) for _ in range(3)} for key in map(str, range(20))]
    assert {len(versions) for versions in by_key} == {1}
    assert len(set.union(*by_key)) == 2  # scores of version 1 and of version 2
