"""Typicality, unknown images and label sets in replies over HTTP, and the settings of a task."""

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

from adapters import Adapter
from adapters.evaluation.intervals import coverage_threshold
from tests.support.asgi import listening
from tests.support.hub_app import OCTETS, Hub, bearer
from tests.support.models import flat_png, png, wait_until, with_metadata
from tests.support.protocols import INFER, Reply, assert_problem, image_tensor

URL = "/v1/tasks/flowers"
CLASSIFY = f"{URL}/classify"
FOREIGN = flat_png()


def register(hub: Hub, data: bytes, **params: float | str) -> Reply:
    return hub.http.post(f"{URL}/versions", content=data, headers=OCTETS, params=params)


def classify(hub: Hub, *images: bytes, headers: Mapping[str, str] | None = None, **params: float | str) -> Any:
    files = [("image", (f"{i}.png", image)) for i, image in enumerate(images)]
    reply = hub.http.post(CLASSIFY, files=files, params=params, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_an_image_of_the_task_is_typical_and_a_foreign_image_is_unknown(served: Hub) -> None:
    body = classify(served, png(1), FOREIGN, png(2))
    assert set(body) == {"task", "version", "digest", "predictions", "typicality", "unknown"}
    assert [len(row) for row in body["predictions"]] == [5, 5, 5]
    assert body["unknown"] == [False, True, False]
    own, foreign, other = body["typicality"]
    assert min(own, other) > 0.01 > foreign >= 0
    assert max(own, other) <= 1


def test_an_input_of_several_tasks_has_its_own_typicality_and_set(
    served: Hub, adapter: Adapter, adapters: list[Adapter]
) -> None:
    served.http.post("/v1/tasks/old/versions", content=adapters[0].data, headers=OCTETS)
    images = [png(1), FOREIGN, png(2)]
    inputs = [
        {"task": task, "image": base64.b64encode(image).decode()}
        for task, image in zip(("flowers", "flowers", "old"), images, strict=True)
    ]
    one, foreign, old = served.http.post("/v1/classify", json={"inputs": inputs}).json()["results"]
    assert [one["unknown"], foreign["unknown"]] == [False, True]
    alone = classify(served, *images[:2])
    assert [one["typicality"], foreign["typicality"]] == pytest.approx(alone["typicality"], rel=1e-3, abs=1e-6)
    assert set(old) == {"task", "version", "digest", "predictions"}

    params = {"coverage": 0.9}
    results = served.http.post("/v1/classify", json={"inputs": inputs[:2]}, params=params).json()["results"]
    assert [result["set"] for result in results] == classify(served, *images[:2], coverage=0.9)["sets"]
    refused = served.http.post("/v1/classify", json={"inputs": inputs}, params=params)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"] == "coverage"
    assert "version 1 of task 'old' has no data for label sets; train the adapter again" in refused.json()["detail"]


def test_a_reply_is_as_before_when_the_adapter_has_no_typicality(hub: Hub, adapters: list[Adapter]) -> None:
    made = register(hub, adapters[0].data).json()
    assert not {"coverage", "typicality", "unknown_below"} & set(made)
    body = classify(hub, png())
    assert set(body) == {"task", "version", "digest", "predictions"}
    assert set(hub.http.get(f"{URL}/versions/1").json()) == set(made) - {
        *("task", "moved", "accuracy", "previous"),
    }
    reply = hub.http.post(INFER, json={"inputs": [image_tensor()]}).json()
    assert [output["name"] for output in reply["outputs"]] == ["probabilities", "labels"]


def test_a_set_has_the_labels_at_or_above_the_threshold(served: Hub, adapter: Adapter) -> None:
    images = [png(i) for i in range(6)]
    probabilities = classify(served, *images, top_k=5)["predictions"]
    for coverage in (0.5, 0.8, 0.95, 0.995):
        assert adapter.coverage is not None
        threshold = coverage_threshold(adapter.coverage, coverage)
        body = classify(served, *images, top_k=1, coverage=coverage)
        assert [len(row) for row in body["predictions"]] == [1] * len(images)
        for ranked, found in zip(probabilities, body["sets"], strict=True):
            inside = [p["label"] for p in ranked if p["score"] >= threshold]
            assert found == (inside or [ranked[0]["label"]])
    everything = classify(served, png(), coverage=0.995)["sets"][0]
    assert sorted(everything) == sorted(adapter.labels)  # 60 images are too few for 99.5 %


def test_a_set_has_the_best_label_when_no_label_reaches_the_threshold(served: Hub, adapter: Adapter) -> None:
    high = with_metadata(adapter, coverage="[[0.5, 1.0]]")
    assert register(served, high).status_code == 201
    body = classify(served, png(1), png(2), coverage=0.5)
    assert body["sets"] == [[row[0]["label"]] for row in body["predictions"]]


def test_sets_are_refused_by_name_when_the_version_cannot_make_them(
    served: Hub, adapter: Adapter, adapters: list[Adapter]
) -> None:
    def refused(coverage: object, version: str = "latest") -> str:
        params = {"coverage": str(coverage), "version": version}
        reply = served.http.post(CLASSIFY, content=png(), params=params)
        assert reply.status_code == 422, reply.text
        assert [error["field"] for error in reply.json()["errors"]] == ["coverage"]
        return str(reply.json()["detail"])

    assert refused(0.3) == "coverage: is 0.3; version 1 of task 'flowers' takes 0.5 to 0.995"
    assert "takes 0.5 to 0.995" in refused(0.999)
    for value in (0, 1, -1, 95, "nan", "inf", "most", ""):
        refused(value)
    register(served, adapters[0].data)
    assert refused(0.95, "2").startswith(
        "coverage: version 2 of task 'flowers' has no data for label sets; train the adapter again"
    )
    assert classify(served, png(), version="1", coverage=0.95)["sets"]


def test_another_tenant_sees_typicality_by_the_owners_setting(served: Hub) -> None:
    served.http.put(f"{URL}/sharing", json={"public": True})
    served.http.put(URL, json={"unknown_below": 1})
    friend = served.key_of("friend")
    reply = served.http.post("/v1/tasks/default:flowers/classify", content=png(), headers=friend)
    assert reply.json()["unknown"] == [reply.json()["typicality"][0] < 1]
    assert served.http.get("/v1/tasks/default:flowers", headers=friend).json()["unknown_below"] == 1
    assert served.http.put("/v1/tasks/default:flowers", json={"unknown_below": 0}, headers=friend).status_code == 404


def test_a_task_keeps_its_threshold_until_its_owner_changes_it(served: Hub, adapters: list[Adapter]) -> None:
    assert served.http.get(URL).json()["unknown_below"] == 0.01
    own, foreign = classify(served, png(1), FOREIGN)["typicality"]
    assert foreign < own < 1
    changed = served.http.put(URL, json={"unknown_below": math.nextafter(own, 1)})
    assert changed.status_code == 200
    assert changed.json() == served.http.get(URL).json()
    assert classify(served, png(1), FOREIGN)["unknown"] == [True, True]
    served.http.put(URL, json={"unknown_below": own})  # an image at the threshold is known
    assert classify(served, png(1), FOREIGN)["unknown"] == [False, True]
    assert served.http.get(URL).json()["unknown_below"] == own  # no digit is lost in the registry
    served.http.put(URL, json={"unknown_below": 0})
    assert classify(served, FOREIGN)["unknown"] == [False]
    register(served, adapters[0].data)
    assert served.http.put(URL, json={}).json()["unknown_below"] == 0
    entries = served.http.get("/v1/tenants/default/audit").json()["entries"]
    details = [entry["detail"] for entry in entries if entry["action"] == "task.settings"]
    assert [detail.get("unknown_below") for detail in details[-2:]] == [0, None]
    assert {detail["task"] for detail in details} == {"flowers"}


def test_every_gateway_uses_a_changed_threshold(served: Hub) -> None:
    with served.another_gateway() as elsewhere:

        def unknown() -> object:
            return elsewhere.post(CLASSIFY, content=png(1)).json()["unknown"]

        assert unknown() == [False]
        served.http.put(URL, json={"unknown_below": 1})
        wait_until(lambda: unknown() == [True], 5)


def test_invalid_settings_are_refused_by_name(served: Hub) -> None:
    for body, field in (
        ('{"unknown_below": 2}', "unknown_below"),
        ('{"unknown_below": -0.1}', "unknown_below"),
        ('{"unknown_below": "0.1"}', "unknown_below"),
        ('{"unknown_below": true}', "unknown_below"),
        ('{"unknown_below": null}', "unknown_below"),
        ('{"unknown_below": NaN}', "unknown_below"),
        ('{"unknown": 0.1}', "unknown"),
        ('{"unknown_below": 0.1, "keep": {"images": "some"}}', "keep.images"),
    ):
        reply = served.http.put(URL, content=body)
        assert reply.status_code == 422, (body, reply.text)
        assert [error["field"] for error in reply.json()["errors"]] == [field]
    assert served.http.get(URL).json()["unknown_below"] == 0.01
    assert served.http.put("/v1/tasks/foreign:trees", json={"unknown_below": 0.1}).status_code == 404
    assert served.http.get("/v1/tasks/trees").status_code == 404
    caller = served.key_of("default", "caller")
    assert served.http.put(URL, json={"unknown_below": 0.1}, headers=caller).status_code == 403


def test_a_registration_sets_the_threshold_also_of_known_bytes(hub: Hub, adapter: Adapter) -> None:
    made = register(hub, adapter.data, unknown_below=0.2)
    assert (made.status_code, made.json()["unknown_below"]) == (201, 0.2)
    assert made.json()["coverage"] == [list(pair) for pair in adapter.coverage or ()]
    assert made.json()["typicality"] is True
    assert hub.http.get(URL).json()["unknown_below"] == 0.2
    again = register(hub, adapter.data)
    version = {k: v for k, v in made.json().items() if k not in ("unknown_below", "moved", "previous")}
    known = {"moved": [], "previous": {"version": 1, "accuracy": None}}
    assert (again.status_code, again.json()) == (200, version | known)
    assert hub.http.get(URL).json()["unknown_below"] == 0.2
    other = register(hub, adapter.data, unknown_below=0.3)
    assert (other.status_code, other.json()) == (200, version | known | {"unknown_below": 0.3})
    assert hub.http.get(URL).json()["unknown_below"] == 0.3
    for value in ("2", "-1", "nan", "x"):
        refused = register(hub, adapter.data, unknown_below=value)
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "unknown_below")
    audit = hub.http.get("/v1/tenants/default/audit").json()["entries"]
    registered = [e["detail"].get("unknown_below") for e in audit if e["action"] == "version.register"]
    assert registered == [0.2, None, 0.3]
    hub.http.delete(URL)
    register(hub, adapter.data)
    assert hub.http.get(URL).json()["unknown_below"] == 0.01  # the new task of the same name


def test_triton_reads_typicality_and_unknown(served: Hub, adapter: Adapter, adapters: list[Adapter]) -> None:
    images = [png(1), FOREIGN]
    expected = classify(served, *images)
    register(served, adapters[0].data)
    files = triton.InferInput("image", [2], "BYTES").set_data_from_numpy(np.array(images, dtype=np.object_))
    key = bearer(served.key)
    with (
        listening(served.another_gateway().app) as url,
        triton.InferenceServerClient(url.removeprefix("http://")) as client,
    ):

        def outputs(version: str) -> list[tuple[str, str, list[int]]]:
            model = client.get_model_metadata("flowers", version, headers=dict(key))
            return [(o["name"], o["datatype"], o["shape"]) for o in model["outputs"]]

        assert outputs("1")[2:] == [("typicality", "FP32", [-1]), ("unknown", "BOOL", [-1])]
        assert [name for name, _, _ in outputs("2")] == ["probabilities", "labels"]
        every = client.infer("flowers", [files], "1", headers=dict(key))
        names = [output["name"] for output in every.get_response()["outputs"]]
        assert names == ["probabilities", "labels", "typicality", "unknown"]
        for binary in (True, False):
            wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("unknown", "typicality")]
            reply = client.infer("flowers", [files], "1", outputs=wanted, headers=dict(key))
            assert [output["name"] for output in reply.get_response()["outputs"]] == ["unknown", "typicality"]
            assert reply.as_numpy("unknown").dtype == np.bool_
            assert reply.as_numpy("unknown").tolist() == expected["unknown"]
            assert reply.as_numpy("typicality").dtype == np.float32
            assert reply.as_numpy("typicality") == pytest.approx(expected["typicality"], rel=1e-3, abs=1e-6)
            with pytest.raises(triton.InferenceServerException, match=r"\[422\] unknown: this version's adapter"):
                client.infer("flowers", [files], "2", outputs=wanted, headers=dict(key))


def test_infer_refuses_classes_of_an_output_without_classes(served: Hub) -> None:
    for name in ("typicality", "unknown"):
        body = {"inputs": [image_tensor()], "outputs": [{"name": name, "parameters": {"classification": 1}}]}
        assert_problem(served.http.post(INFER, json=body), name, "does not support classification")


def test_hugging_face_replies_have_labels_and_scores_only(served: Hub) -> None:
    reply = served.http.post("/models/flowers", content=png())
    assert [set(entry) for entry in reply.json()] == [{"label", "score"}] * 5


def test_the_openapi_document_describes_answers_and_settings(hub: Hub) -> None:
    document = hub.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for model, members in (("Classified", ("typicality", "unknown", "sets")), ("Result", ("typicality", "set"))):
        assert set(members) <= set(schemas[model]["properties"])
        assert not set(members) & set(schemas[model]["required"])
    for path in ("/v1/tasks/{task}/classify", "/v1/classify"):
        (coverage,) = [p for p in document["paths"][path]["post"]["parameters"] if p["name"] == "coverage"]
        assert (coverage["in"], coverage["required"]) == ("query", False)
    body = document["paths"]["/v1/tasks/{task}"]["put"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/TaskSettings"}
    assert set(schemas["TaskSettings"]["properties"]) == {"unknown_below", "labels", "promote", "keep"}
    assert schemas["TaskSettings"]["additionalProperties"] is False
