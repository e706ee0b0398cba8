"""The use of a task over HTTP: counts of its answers by day, label and version; feedback; drift."""

import base64
from datetime import UTC, datetime
from typing import Any

import pytest

from adapters import Adapter
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import flat_png, png, wait_until, with_metadata
from tests.support.zips import zip_of

URL = "/v1/tasks/flowers"


def classify(hub: Hub, *images: bytes, task: str = "flowers", **options: Any) -> Any:
    files = [("image", (f"{i}.png", image)) for i, image in enumerate(images)]
    reply = hub.http.post(f"/v1/tasks/{task}/classify", files=files, **options)
    assert reply.status_code == 200, reply.text
    return reply.json()


def usage(hub: Hub, query: str = "", task: str = "flowers") -> Any:
    reply = hub.http.get(f"/v1/tasks/{task}/usage{query}")
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_answers_are_counted_by_day_label_and_version(served: Hub, adapter: Adapter) -> None:
    body = classify(served, png(1), png(2), flat_png())
    served.http.post(f"{URL}/versions", content=with_metadata(adapter, producer="again"), headers=OCTETS)
    inputs = [{"task": "flowers", "image": base64.b64encode(png(3)).decode()}] * 2
    results = served.http.post("/v1/classify", json={"inputs": inputs}).json()["results"]
    answers = [row[0]["label"] for row in body["predictions"]] + [r["predictions"][0]["label"] for r in results]
    typicality = [*body["typicality"], *(result["typicality"] for result in results)]
    unknown = sum(body["unknown"]) + sum(result["unknown"] for result in results)
    assert unknown > 0
    found = usage(served, "?days=3")
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


def test_kept_images_and_feedback_are_counted_once(served: Hub) -> None:
    served.http.put(URL, json={"keep": {"images": "all"}})
    body = classify(served, png(1), png(2))
    first, second = body["image"]
    best = [row[0]["label"] for row in body["predictions"]]
    for _ in range(2):
        served.http.post(f"{URL}/feedback", json={"image": first, "label": best[0]})
        served.http.post(f"{URL}/feedback", json={"image": second, "label": "tulip"})
    served.http.post(f"{URL}/images", content=png(9), headers=OCTETS)
    wait_until(lambda: usage(served)["total"]["kept"] == 2)
    total = usage(served)["total"]
    assert (total["images"], total["confirmed"], total["corrections"]) == (2, 1, 1)


def test_answers_to_other_tenants_are_not_counted(served: Hub) -> None:
    foreign = served.key_of("foreign")
    served.http.put(f"{URL}/sharing", json={"tenants": ["foreign"]})
    classify(served, png(1), task="default:flowers", headers=foreign)
    classify(served, png(1), task="default:flowers")
    assert usage(served)["total"]["images"] == 1
    assert usage(served, task="default:flowers")["total"]["images"] == 1
    assert served.http.get("/v1/tasks/default:flowers/usage", headers=foreign).status_code == 404


def test_refused_calls_and_comparisons_are_not_counted(served: Hub) -> None:
    files = [("image", ("a.png", png(1))), ("image", ("b.png", b"no image"))]
    assert served.http.post(f"{URL}/classify", files=files).status_code == 422
    assert served.http.post(f"{URL}/images?split=test&label=rose", content=png(1), headers=OCTETS).status_code == 200
    assert served.http.get(f"{URL}/compare?a=1&b=1").status_code == 200
    assert usage(served)["total"]["images"] == 0


def test_a_deleted_task_of_the_same_name_starts_at_zero(served: Hub, adapter: Adapter) -> None:
    classify(served, png(1))
    assert usage(served)["total"]["images"] == 1
    served.http.delete(URL)
    assert served.http.get(f"{URL}/usage").status_code == 404
    served.http.post(f"{URL}/versions", content=adapter.data, headers=OCTETS)
    assert usage(served)["total"]["images"] == 0


def test_a_task_without_answers_has_no_drift(served: Hub) -> None:
    found = usage(served)
    assert (len(found["days"]), found["total"]["by_label"], found["drift"]) == (30, {}, None)


@pytest.mark.parametrize("days", ["0", "401", "-1", "1.5", "ten", "1e9", "99999999999999999999", "%00"])
def test_a_wrong_number_of_days_is_refused(served: Hub, days: str) -> None:
    reply = served.http.get(f"{URL}/usage?days={days}")
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["field"] == "days"


def test_counts_of_two_gateways_are_added_and_those_of_a_stopped_one_are_kept(served: Hub) -> None:
    with served.another_gateway() as second:
        assert second.post(f"{URL}/classify", content=png(1), headers=OCTETS).status_code == 200
    classify(served, png(2))
    assert usage(served, "?days=400")["total"]["images"] == 2


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
