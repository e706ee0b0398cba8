"""The use of a task over HTTP: counts of its answers by day, label and version; feedback; drift."""

import base64
from datetime import UTC, datetime
from typing import Any

import pytest

from adapters import Adapter, Backbone
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import calibrated_adapter, flat_png, png, wait_until, with_metadata
from tests.support.zips import zip_of

URL = "/v1/tasks/flowers"


@pytest.fixture(scope="module")
def adapter(backbone: Backbone) -> Adapter:
    return calibrated_adapter(backbone)


@pytest.fixture
def flowers(hub: Hub, adapter: Adapter) -> Hub:
    assert hub.http.post(f"{URL}/versions", content=adapter.data, headers=OCTETS).status_code == 201
    return hub


def classify(hub: Hub, *images: bytes, task: str = "flowers", **options: Any) -> Any:
    files = [("image", (f"{i}.png", image)) for i, image in enumerate(images)]
    reply = hub.http.post(f"/v1/tasks/{task}/classify", files=files, **options)
    assert reply.status_code == 200, reply.text
    return reply.json()


def usage(hub: Hub, query: str = "", task: str = "flowers") -> Any:
    reply = hub.http.get(f"/v1/tasks/{task}/usage{query}")
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_answers_are_counted_by_day_label_and_version(flowers: Hub, adapter: Adapter) -> None:
    body = classify(flowers, png(1), png(2), flat_png())
    flowers.http.post(f"{URL}/versions", content=with_metadata(adapter, producer="again"), headers=OCTETS)
    inputs = [{"task": "flowers", "image": base64.b64encode(png(3)).decode()}] * 2
    results = flowers.http.post("/v1/classify", json={"inputs": inputs}).json()["results"]
    answers = [row[0]["label"] for row in body["predictions"]] + [r["predictions"][0]["label"] for r in results]
    typicality = [*body["typicality"], *(result["typicality"] for result in results)]
    unknown = sum(body["unknown"]) + sum(result["unknown"] for result in results)
    assert unknown > 0
    found = usage(flowers, "?days=3")
    assert [day["images"] for day in found["days"]] == [0, 0, 5]
    assert found["days"][-1]["day"] == datetime.now(UTC).date().isoformat()
    assert found["days"][0]["typicality"] is None
    for counts in (found["days"][-1], found["total"]):
        assert counts["by_label"] == {label: answers.count(label) for label in answers}
        assert counts["by_version"] == {"1": 3, "2": 2}
        assert counts["typicality"] == pytest.approx(sum(typicality) / 5, abs=1e-4)
        assert (counts["unknown"], counts["typicality_images"]) == (unknown, 5)
        assert sum(counts["typicality_tenths"]) == 5
        assert (counts["kept"], counts["confirmed"], counts["corrections"]) == (0, 0, 0)
    assert "day" not in found["total"]
    assert found["drift"]["verdict"] == "few"


def test_kept_images_and_feedback_are_counted_once(flowers: Hub) -> None:
    flowers.http.put(URL, json={"keep": {"images": "all"}})
    body = classify(flowers, png(1), png(2))
    first, second = body["image"]
    best = [row[0]["label"] for row in body["predictions"]]
    for _ in range(2):
        flowers.http.post(f"{URL}/feedback", json={"image": first, "label": best[0]})
        flowers.http.post(f"{URL}/feedback", json={"image": second, "label": "tulip"})
    flowers.http.post(f"{URL}/images", content=png(9), headers=OCTETS)
    wait_until(lambda: usage(flowers)["total"]["kept"] == 2)
    total = usage(flowers)["total"]
    assert (total["images"], total["confirmed"], total["corrections"]) == (2, 1, 1)


def test_answers_to_other_tenants_are_not_counted(flowers: Hub) -> None:
    foreign = flowers.key_of("foreign")
    flowers.http.put(f"{URL}/sharing", json={"tenants": ["foreign"]})
    classify(flowers, png(1), task="default:flowers", headers=foreign)
    classify(flowers, png(1), task="default:flowers")
    assert usage(flowers)["total"]["images"] == 1
    assert usage(flowers, task="default:flowers")["total"]["images"] == 1
    assert flowers.http.get("/v1/tasks/default:flowers/usage", headers=foreign).status_code == 404


def test_refused_calls_and_comparisons_are_not_counted(flowers: Hub) -> None:
    files = [("image", ("a.png", png(1))), ("image", ("b.png", b"no image"))]
    assert flowers.http.post(f"{URL}/classify", files=files).status_code == 422
    assert flowers.http.post(f"{URL}/images?split=test&label=rose", content=png(1), headers=OCTETS).status_code == 200
    assert flowers.http.get(f"{URL}/compare?a=1&b=1").status_code == 200
    assert usage(flowers)["total"]["images"] == 0


def test_a_deleted_task_of_the_same_name_starts_at_zero(flowers: Hub, adapter: Adapter) -> None:
    classify(flowers, png(1))
    assert usage(flowers)["total"]["images"] == 1
    flowers.http.delete(URL)
    assert flowers.http.get(f"{URL}/usage").status_code == 404
    flowers.http.post(f"{URL}/versions", content=adapter.data, headers=OCTETS)
    assert usage(flowers)["total"]["images"] == 0


def test_a_task_without_answers_has_no_drift(flowers: Hub) -> None:
    found = usage(flowers)
    assert (len(found["days"]), found["total"]["by_label"], found["drift"]) == (30, {}, None)


@pytest.mark.parametrize("days", ["0", "401", "-1", "1.5", "ten", "1e9", "99999999999999999999", "%00"])
def test_a_wrong_number_of_days_is_refused(flowers: Hub, days: str) -> None:
    reply = flowers.http.get(f"{URL}/usage?days={days}")
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["field"] == "days"


def test_counts_of_two_gateways_are_added_and_those_of_a_stopped_one_are_kept(flowers: Hub) -> None:
    with flowers.another_gateway() as second:
        assert second.post(f"{URL}/classify", content=png(1), headers=OCTETS).status_code == 200
    classify(flowers, png(2))
    assert usage(flowers, "?days=400")["total"]["images"] == 2


def test_the_drift_of_a_trained_version_compares_labels_with_its_snapshot(hub: Hub) -> None:
    hub.http.put("/v1/tasks/shades", json={})
    files = {f"dark/{i}.png": flat_png(i) for i in range(20)} | {f"light/{i}.png": flat_png(255 - i) for i in range(20)}
    headers = {"content-type": "application/zip"}
    assert hub.http.post("/v1/tasks/shades/images", content=zip_of(files), headers=headers).status_code == 200
    assert hub.http.post("/v1/tasks/shades/trainings").status_code == 200
    classify(hub, *(flat_png(i % 20) for i in range(60)), task="shades")
    drift = usage(hub, task="shades")["drift"]
    assert (drift["verdict"], drift["version"], drift["images"]) == ("drift", 1, 60)
    assert drift["labels"]["trained_images"] == 40
    assert {share["label"]: share["trained"] for share in drift["labels"]["shares"]} == {"dark": 0.5, "light": 0.5}
    assert drift["typicality"]["images"] == 60
