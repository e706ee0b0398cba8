"""Classified images that a task keeps, over HTTP: their choice, their limits, their expiry, and their true labels."""

import base64
import hashlib
import time
from typing import Any

import pytest
import redis

from tests.support.hub_app import OCTETS, Hub
from tests.support.models import flat_png, png, wait_until
from tests.support.protocols import Reply

URL = "/v1/tasks/flowers"
FOREIGN = flat_png()


def keep(hub: Hub, images: str, **options: int) -> None:
    reply = hub.http.put(URL, json={"keep": {"images": images, **options}})
    assert reply.status_code == 200, reply.text


def classify(hub: Hub, *images: bytes, **options: Any) -> Any:
    files = [("image", (f"{i}.png", image)) for i, image in enumerate(images)]
    reply = hub.http.post(f"{URL}/classify", files=files, **options)
    assert reply.status_code == 200, reply.text
    return reply.json()


def listed(hub: Hub, query: str = "") -> list[dict[str, Any]]:
    images: list[dict[str, Any]] = hub.http.get(f"{URL}/images{query}").json()["images"]
    return images


def wait_for_images(hub: Hub, count: int) -> list[dict[str, Any]]:
    wait_until(lambda: len(listed(hub)) == count)
    return listed(hub)


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def feedback(hub: Hub, digest: str, label: str, **options: Any) -> Reply:
    return hub.http.post(f"{URL}/feedback", json={"image": digest, "label": label}, **options)


def test_a_task_keeps_no_images_by_default(served: Hub) -> None:
    assert "image" not in classify(served, png(1), FOREIGN)
    assert listed(served) == []


def test_a_task_that_keeps_all_images_lists_them_without_labels_and_with_their_answers(served: Hub) -> None:
    keep(served, "all", days=7)
    body = classify(served, png(1), FOREIGN)
    assert body["image"] == [digest_of(png(1)), digest_of(FOREIGN)]
    images = {image["digest"]: image for image in wait_for_images(served, 2)}
    for i, digest in enumerate(body["image"]):
        image = images[digest]
        best = body["predictions"][i][0]
        assert (image["label"], image["answer"]["version"]) == (None, 1)
        assert image["answer"]["label"] == best["label"]
        assert image["answer"]["score"] == pytest.approx(best["score"], abs=1e-6)
        assert image["answer"]["typicality"] == pytest.approx(body["typicality"][i], abs=1e-6)
        assert image["expires"] > image["added"]
    assert served.http.get(f"{URL}/images/{digest_of(FOREIGN)}").content == FOREIGN
    assert len(listed(served, "?unlabelled=true")) == 2


def test_a_task_that_keeps_uncertain_images_keeps_an_unknown_one(served: Hub) -> None:
    keep(served, "uncertain")
    assert classify(served, FOREIGN)["image"] == [digest_of(FOREIGN)]
    (image,) = wait_for_images(served, 1)
    assert image["answer"]["typicality"] < 0.01


def test_inputs_of_several_tasks_name_their_kept_images(served: Hub) -> None:
    keep(served, "all")
    inputs = [{"task": "flowers", "image": base64.b64encode(png(i)).decode()} for i in (1, 2)]
    results = served.http.post("/v1/classify", json={"inputs": inputs}).json()["results"]
    assert [result["image"] for result in results] == [digest_of(png(1)), digest_of(png(2))]
    wait_for_images(served, 2)


def test_a_day_has_no_more_kept_images_than_the_task_allows(served: Hub) -> None:
    keep(served, "all", per_day=3)
    classify(served, *(png(i) for i in range(1, 6)))
    wait_for_images(served, 3)
    wait_until(lambda: classify(served, png(9))["image"] == [None])
    assert len(listed(served)) == 3
    wait_until(lambda: len([name for name in served.stored() if name.endswith(".image")]) == 3)


def test_images_of_a_tenant_that_the_task_is_shared_with_are_kept_for_the_owner(served: Hub) -> None:
    keep(served, "all")
    foreign = served.key_of("foreign")
    served.http.put(f"{URL}/sharing", json={"tenants": ["foreign"]})
    described = served.http.get("/v1/tasks/default:flowers", headers=foreign).json()
    assert described["keep"]["images"] == "all"
    reply = served.http.post("/v1/tasks/default:flowers/classify", content=png(4), headers=OCTETS | foreign)
    assert reply.json()["image"] == [digest_of(png(4))]
    (image,) = wait_for_images(served, 1)
    assert image["digest"] == digest_of(png(4))
    with redis.Redis.from_url(served.redis_url, decode_responses=True) as client:
        assert (client.get("karst:t:default:images"), client.get("karst:t:foreign:images")) == ("1", None)


def test_feedback_confirms_or_corrects_a_kept_image_at_once(served: Hub) -> None:
    keep(served, "all")
    body = classify(served, png(1), png(2))
    first, second = body["image"]
    best = [ranked[0]["label"] for ranked in body["predictions"]]
    confirmed = feedback(served, first, best[0])
    assert confirmed.status_code == 200, confirmed.text
    assert confirmed.json()["correct"] is True
    corrected = feedback(served, second, "tulip").json()
    assert (corrected["correct"], corrected["image"]["label"], corrected["image"]["answer"]["label"]) == (
        False,
        "tulip",
        best[1],
    )
    assert "expires" not in corrected["image"]
    assert listed(served, "?unlabelled=true") == []


def test_feedback_labels_an_uploaded_image_that_was_never_classified(served: Hub) -> None:
    served.http.post(f"{URL}/images", content=png(1), headers=OCTETS)
    reply = feedback(served, digest_of(png(1)), "rose").json()
    assert (reply["correct"], reply["image"]["label"]) == (None, "rose")


def test_feedback_of_another_tenants_image_is_not_found(served: Hub) -> None:
    keep(served, "all")
    (digest,) = classify(served, png(1))["image"]
    wait_for_images(served, 1)
    foreign = served.key_of("foreign")
    served.http.put(URL, json={}, headers=foreign)
    refused = feedback(served, digest, "rose", headers=foreign)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (404, "digest")
    assert feedback(served, digest_of(png(7)), "rose").status_code == 404
    assert served.http.post("/v1/tasks/default:flowers/feedback", json={}, headers=foreign).status_code in (404, 422)
    assert feedback(served, digest, "").status_code == 422
    assert feedback(served, "xyz", "rose").status_code == 422


def test_expired_images_are_removed_unless_they_have_a_label(served: Hub) -> None:
    keep(served, "all")
    unlabelled, labelled, sent = classify(served, png(1), png(2), png(3))["image"]
    feedback(served, labelled, "rose")
    wait_for_images(served, 3)
    again = served.http.post(f"{URL}/images", content=png(3), headers=OCTETS).json()
    assert again["counts"]["already_there"] == 1
    assert served.http.post("/v1/gc", headers=served.admin).status_code == 200
    assert len(listed(served)) == 3
    with redis.Redis.from_url(served.redis_url, decode_responses=True) as client:
        name = "karst:t:default:data:flowers:kept"
        assert [str(digest) for digest in client.zrange(name, 0, -1)] == [unlabelled]
        client.zadd(name, {unlabelled: time.time() * 1000 - 1})
    assert served.http.post("/v1/gc", headers=served.admin).status_code == 200
    assert {image["digest"] for image in listed(served)} == {labelled, sent}
    assert served.http.get(f"{URL}/images/{unlabelled}").status_code == 404
    with redis.Redis.from_url(served.redis_url, decode_responses=True) as client:
        assert client.smembers("karst:kept") == set()
    actions = [e["action"] for e in served.http.get("/v1/tenants/default/audit").json()["entries"]]
    assert actions.count("image.expire") == 1


def test_a_deleted_task_takes_its_kept_images(served: Hub) -> None:
    keep(served, "all")
    classify(served, png(1))
    wait_for_images(served, 1)
    assert served.http.delete(URL).status_code == 204
    wait_until(lambda: not any(name.endswith(".image") for name in served.stored()), timeout_s=20)
    with redis.Redis.from_url(served.redis_url, decode_responses=True) as client:
        assert not client.exists("karst:kept", "karst:t:default:data:flowers:kept")


def test_images_beyond_the_tenants_limit_are_answered_and_not_kept(served: Hub) -> None:
    changed = served.http.patch("/v1/tenants/default", json={"limits": {"images": 1}}, headers=served.admin)
    assert changed.status_code == 200, changed.text
    keep(served, "all")
    assert len(classify(served, png(1), png(2))["predictions"]) == 2
    wait_for_images(served, 1)
    wait_until(lambda: classify(served, png(3))["image"] == [None])
