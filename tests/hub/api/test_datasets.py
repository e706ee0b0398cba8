"""Datasets over HTTP: uploads in every form, lists, labels, splits, thumbnails, removal, other tenants."""

import dataclasses
import hashlib
import io
import os
import threading
from typing import Any

import pytest
from PIL import Image

from hub.concurrency import LOW_PRIORITY
from hub.services.datasets.images import STEP_BYTES, STEP_IMAGES, steps_of
from hub.services.datasets.zip_folders import ZipEntry, ZipFolders
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import bomb_png, encoded, png, wait_until
from tests.support.protocols import Reply
from tests.support.zips import zip_of

ZIP = {"content-type": "application/zip"}
IMAGES = "/v1/tasks/flowers/images"


@pytest.fixture
def dataset(hub: Hub) -> Hub:
    """A hub with a task `flowers` without versions."""
    assert hub.http.put("/v1/tasks/flowers", json={}).status_code == 201
    return hub


def add(hub: Hub, data: bytes, query: str = "", **options: Any) -> Reply:
    return hub.http.post(IMAGES + query, content=data, headers=options.pop("headers", OCTETS), **options)


def listed(hub: Hub, query: str = "") -> list[dict[str, Any]]:
    reply = hub.http.get(IMAGES + query)
    assert reply.status_code == 200, reply.text
    images: list[dict[str, Any]] = reply.json()["images"]
    return images


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def image_files(hub: Hub) -> list[str]:
    return [name for name in hub.stored() if name.endswith(".image")]


def test_a_task_is_made_without_versions_and_settings_change(hub: Hub) -> None:
    made = hub.http.put("/v1/tasks/flowers", json={"labels": ["rose"], "promote": "always"})
    assert made.status_code == 201
    assert made.json()["labels"] == ["rose"]
    assert (made.json()["versions"], made.json()["aliases"], made.json()["promote"]) == ([], {}, "always")
    assert hub.http.put("/v1/tasks/flowers", json={"unknown_below": 0.1}).status_code == 200
    found = hub.http.get("/v1/tasks/flowers").json()
    assert (found["unknown_below"], found["promote"]) == (0.1, "always")
    assert hub.http.get("/v1/tasks").json()["tasks"][0]["latest"] is None
    refused = hub.http.post("/v1/tasks/flowers/classify", content=png(), headers=OCTETS)
    assert refused.status_code == 404
    assert "has no version yet" in refused.json()["detail"]


def test_one_image_is_added_listed_read_and_shown_small(dataset: Hub) -> None:
    data = png(1, (240, 200))
    reply = add(dataset, data, "?label=rose&split=train")
    assert reply.status_code == 200, reply.text
    assert reply.json()["counts"] == {"added": 1, "already_there": 0, "moved": 0, "refused": 0}
    (image,) = listed(dataset)
    assert (image["digest"], image["label"], image["use"]) == (digest_of(data), "rose", "train")
    file = dataset.http.get(f"{IMAGES}/{digest_of(data)}")
    assert (file.content, file.headers["content-type"]) == (data, "application/octet-stream")
    small = dataset.http.get(f"{IMAGES}/{digest_of(data)}/thumbnail")
    assert max(Image.open(io.BytesIO(small.content)).size) == 192


def test_a_thumbnail_has_no_exif(dataset: Hub) -> None:
    photo = Image.new("RGB", (500, 500), (200, 30, 30))
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    data = encoded(photo, "JPEG", exif=exif, icc_profile=b"profile" * 20)
    add(dataset, data)
    small = dataset.http.get(f"{IMAGES}/{digest_of(data)}/thumbnail").content
    assert b"secret" in data
    assert b"secret" not in small
    assert b"profile" not in small


def test_a_form_labels_by_its_field_its_parts_or_the_query(dataset: Hub) -> None:
    parts = [("rose", ("1.png", png(1))), ("tulip", ("2.png", png(2))), ("image", ("3.png", png(3)))]
    assert dataset.http.post(IMAGES, files=parts).json()["counts"]["added"] == 3
    labels = {image["name"]: image["label"] for image in listed(dataset)}
    assert labels == {"1.png": "rose", "2.png": "tulip", "3.png": None}
    field = dataset.http.post(IMAGES, files=[("image", ("4.png", png(4)))], data={"label": "lily", "split": "test"})
    assert field.json()["added"] == [{"name": "4.png", "digest": digest_of(png(4)), "label": "lily"}]
    assert listed(dataset, "?label=lily&split=test")[0]["name"] == "4.png"
    twice = dataset.http.post(f"{IMAGES}?label=a", files=[("image", png(5))], data={"label": "b"})
    assert twice.status_code == 422
    unknown = dataset.http.post(IMAGES, files=[("image", png(5))], data={"labels": "b"})
    assert unknown.json()["errors"][0]["field"] == "labels"


def test_bad_images_are_refused_by_name_and_the_others_kept(dataset: Hub) -> None:
    parts = [("rose", (f"{i}.png", png(i))) for i in range(3)]
    parts += [
        ("rose", ("text.png", b"no image")),
        ("rose", ("bomb.png", bomb_png())),
        ("rose", ("cut.png", png(9)[:50])),
    ]
    reply = dataset.http.post(IMAGES, files=parts)
    assert reply.status_code == 200
    body = reply.json()
    assert (body["counts"]["added"], body["counts"]["refused"]) == (3, 3)
    reasons = {refused["name"]: refused["reason"] for refused in body["refused"]}
    assert "not an image" in reasons["text.png"]
    assert "pixels" in reasons["bomb.png"]
    assert len(image_files(dataset)) == 3


def test_the_same_bytes_are_there_already_and_move_to_another_label(dataset: Hub) -> None:
    add(dataset, png(1), "?label=rose")
    again, moved = add(dataset, png(1), "?label=rose").json(), add(dataset, png(1), "?label=tulip").json()
    assert again["already_there"][0]["digest"] == digest_of(png(1))
    assert moved["moved"] == [{"name": "body", "digest": digest_of(png(1)), "label": "tulip", "before": "rose"}]
    twin = add(dataset, png(2), "?label=Tulip").json()
    assert "differs from label 'tulip' only in case" in twin["warnings"][0]


def test_a_zip_of_class_folders_keeps_its_images_and_skips_what_systems_add(dataset: Hub) -> None:
    files = {
        "flowers/train/rose/1.png": png(1),
        "flowers/test/rose/2.png": png(2),
        "flowers/tulip/3.png": png(3),
        "top.png": png(4),
        "flowers/": b"",
        "__MACOSX/flowers/._1.png": b"x",
        "flowers/tulip/._3.png": b"x",
        "flowers/.DS_Store": b"x",
        "flowers/tulip/Thumbs.db": b"x",
        "flowers/tulip/notes.txt": b"text",
    }
    reply = add(dataset, zip_of(files), headers=ZIP)
    assert reply.status_code == 200, reply.text
    assert reply.json()["counts"] == {"added": 4, "already_there": 0, "moved": 0, "refused": 1}
    assert reply.json()["refused"][0]["name"] == "flowers/tulip/notes.txt"
    found = {image["name"]: (image["label"], image["split"]) for image in listed(dataset)}
    assert found == {
        "flowers/train/rose/1.png": ("rose", "train"),
        "flowers/test/rose/2.png": ("rose", "test"),
        "flowers/tulip/3.png": ("tulip", "auto"),
        "top.png": (None, "auto"),
    }
    entries = dataset.http.get("/v1/tenants/default/audit").json()["entries"]
    assert [entry["action"] for entry in entries].count("image.add") == 1


@pytest.mark.parametrize("label", ["", "   ", "x" * 300, "a\x00b", "a\nb", "\u202eevil", "\u2028"], ids=ascii)
def test_a_bad_label_is_refused_by_every_route(dataset: Hub, label: str) -> None:
    assert add(dataset, png(1), "", params={"label": label}).status_code == 422
    assert dataset.http.post(IMAGES, files=[("image", png(1))], data={"label": label}).status_code == 422
    add(dataset, png(1))
    change = dataset.http.patch(f"{IMAGES}/{digest_of(png(1))}", json={"label": label})
    assert change.status_code == 422
    rename = {"label": "x", "to": label}
    assert dataset.http.post("/v1/tasks/flowers/dataset/rename-label", json=rename).status_code == 422
    assert dataset.http.put("/v1/tasks/flowers", json={"labels": [label]}).status_code == 422


@pytest.mark.parametrize("label", ["../x", "a/b", "שלום", "ملصق", "🌹", "👩‍🌾", "a:b", "=", "%2e", "l" * 200])
def test_an_unusual_label_is_a_label_like_any_other(dataset: Hub, label: str) -> None:
    reply = dataset.http.post(IMAGES, content=png(1), params={"label": label}, headers=OCTETS)
    assert reply.json()["added"][0]["label"] == label
    found = dataset.http.get(IMAGES, params={"label": label}).json()["images"]
    assert [image["label"] for image in found] == [label]
    counts = dataset.http.get("/v1/tasks/flowers/dataset").json()["labels"]
    assert counts[0]["label"] == label


def test_label_and_split_change_and_labels_are_renamed_and_merged(dataset: Hub) -> None:
    for i, label in enumerate(["rose", "rosa", "tulip"]):
        add(dataset, png(i), f"?label={label}&split=train")
    changed = dataset.http.patch(f"{IMAGES}/{digest_of(png(2))}", json={"label": None, "split": "test"})
    assert (changed.json()["label"], changed.json()["use"]) == (None, "test")
    merged = dataset.http.post("/v1/tasks/flowers/dataset/rename-label", json={"label": "rosa", "to": "rose"})
    assert merged.json() == {"label": "rose", "merged": True, "counts": {"label": "rose", "train": 2, "test": 0}}
    info = dataset.http.get("/v1/tasks/flowers/dataset").json()
    assert info["labels"] == [{"label": "rose", "train": 2, "test": 0}]
    assert info["unlabelled"] == {"label": None, "train": 0, "test": 1}
    missing = dataset.http.post("/v1/tasks/flowers/dataset/rename-label", json={"label": "rosa", "to": "x"})
    assert missing.status_code == 404


def test_pages_follow_the_cursor(dataset: Hub) -> None:
    dataset.http.post(IMAGES, files=[("rose", (f"{i}.png", png(i))) for i in range(5)])
    seen, cursor = [], "0"
    while True:
        page = dataset.http.get(IMAGES, params={"count": 2, "cursor": cursor, "label": "rose"}).json()
        seen += [image["name"] for image in page["images"]]
        if page["next"] is None:
            break
        cursor = page["next"]
    assert seen == [f"{i}.png" for i in reversed(range(5))]
    assert dataset.http.get(IMAGES, params={"cursor": "x"}).status_code == 422


def test_a_deleted_image_takes_its_file_and_features_unless_another_task_has_them(dataset: Hub) -> None:
    dataset.http.put("/v1/tasks/trees", json={})
    add(dataset, png(1))

    def inodes() -> set[int]:
        return {path.stat().st_ino for path in dataset.store_folder.rglob("*.f16")}

    wait_until(lambda: bool(inodes()))
    first = inodes()
    dataset.http.post("/v1/tasks/trees/images", content=png(1), headers=OCTETS)
    wait_until(lambda: inodes() != first)  # otherwise the features may be written again after the deletion
    assert dataset.http.delete(f"{IMAGES}/{digest_of(png(1))}").status_code == 204
    assert image_files(dataset)
    assert dataset.http.delete(f"/v1/tasks/trees/images/{digest_of(png(1))}").status_code == 204
    assert dataset.stored() == []
    assert dataset.http.get(f"{IMAGES}/{digest_of(png(1))}").status_code == 404
    assert add(dataset, png(1)).json()["counts"]["added"] == 1


def test_a_deleted_task_takes_its_images(dataset: Hub) -> None:
    dataset.http.post(IMAGES, files=[("rose", (f"{i}.png", png(i))) for i in range(5)])
    wait_until(lambda: len(dataset.stored()) == 10)
    assert dataset.http.delete("/v1/tasks/flowers").status_code == 204
    wait_until(lambda: dataset.stored() == [], timeout_s=20)


def test_garbage_collection_removes_images_that_no_dataset_holds_and_keeps_the_others(dataset: Hub) -> None:
    add(dataset, png(1))
    orphan = dataset.store_folder / "images" / "00" / f"{'0' * 64}.image"
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"left by a crash")
    collected = dataset.http.post("/v1/gc", json={"older_than_s": 0}, headers=dataset.admin)
    assert collected.json()["removed"] == 1, collected.text
    assert image_files(dataset) == [f"{digest_of(png(1))}.image"]


def test_features_are_computed_once_on_arrival(dataset: Hub) -> None:
    dataset.http.post(IMAGES, files=[("rose", (f"{i}.png", png(i))) for i in range(5)])
    wait_until(lambda: len([name for name in dataset.stored() if name.endswith(".f16")]) == 5)
    add(dataset, png(1), "?label=tulip")
    assert dataset.engine.feature_images == 5


def test_several_images_change_in_one_step_and_absent_ones_are_named(dataset: Hub) -> None:
    dataset.http.post(IMAGES, files=[("rose", (f"{i}.png", png(i))) for i in range(3)])
    digests, absent = [digest_of(png(i)) for i in range(3)], "0" * 64
    body = {"images": [digests[0], digests[1], digests[1], absent], "label": "tulip", "split": "test"}
    changed = dataset.http.patch(IMAGES, json=body)
    assert changed.status_code == 200, changed.text
    assert changed.json() == {"changed": 2, "absent": [absent]}
    assert {image["digest"] for image in listed(dataset, "?label=tulip&split=test")} == set(digests[:2])
    assert dataset.http.patch(IMAGES, json={"images": digests, "label": "tulip"}).json()["changed"] == 1
    assert dataset.http.patch(IMAGES, json={"images": digests, "label": None}).json()["changed"] == 3
    assert [row["label"] for row in dataset.http.get("/v1/tasks/flowers/dataset").json()["labels"]] == []
    assert dataset.http.patch(IMAGES, json={"images": [absent], "label": "lily"}).status_code == 404
    assert dataset.http.patch(IMAGES, json={"images": [], "label": "lily"}).status_code == 422
    actions = [entry["action"] for entry in dataset.http.get("/v1/tenants/default/audit").json()["entries"]]
    assert actions.count("image.change") == 3


def test_another_tenant_sees_neither_the_dataset_nor_an_image_by_its_digest(dataset: Hub) -> None:
    add(dataset, png(1))
    foreign = dataset.key_of("foreign")
    dataset.http.put("/v1/tasks/flowers", json={}, headers=foreign)
    for path in ("", "/thumbnail"):
        own = dataset.http.get(f"{IMAGES}/{digest_of(png(1))}{path}", headers=foreign)
        unknown = dataset.http.get(f"{IMAGES}/{digest_of(png(2))}{path}", headers=foreign)
        assert own.status_code == unknown.status_code == 404
        assert own.text.replace(digest_of(png(1)), digest_of(png(2))) == unknown.text
    assert dataset.http.get(IMAGES, headers=foreign).json()["images"] == []
    assert dataset.http.get("/v1/tasks/default:flowers/images", headers=foreign).status_code == 404
    assert dataset.http.delete(f"{IMAGES}/{digest_of(png(1))}", headers=foreign).status_code == 404
    assert listed(dataset)


def test_a_task_that_does_not_exist_gets_no_images(hub: Hub) -> None:
    assert hub.http.post("/v1/tasks/nothing/images", content=png(1), headers=OCTETS).status_code == 404
    assert hub.http.get("/v1/tasks/nothing/images").status_code == 404
    assert hub.stored() == []


def test_a_full_tenant_is_refused_and_leaves_no_file(dataset: Hub) -> None:
    limits = {"limits": {"images": 2}}
    dataset.http.patch("/v1/tenants/default", json=limits, headers=dataset.admin)
    reply = dataset.http.post(IMAGES, files=[("rose", (f"{i}.png", png(i))) for i in range(3)])
    assert (reply.json()["counts"]["added"], reply.json()["counts"]["refused"]) == (2, 1)
    assert "too many images in datasets (limit 2)" in reply.json()["refused"][0]["reason"]
    assert len(image_files(dataset)) == 2
    full = add(dataset, png(9))
    assert (full.status_code, full.json()["errors"][0]["field"]) == (429, "images")
    usage = dataset.http.get("/v1/usage").json()
    assert (usage["used"]["images"], usage["limits"]["images"]) == (2, 2)


def test_refused_entries_of_a_zip_count_against_the_rate_of_images(dataset: Hub) -> None:
    limits = {"limits": {"images_per_second": 0.01}}
    dataset.http.patch("/v1/tenants/default", json=limits, headers=dataset.admin)
    archive = add(dataset, zip_of({"rose/inner.zip": b"x"}), headers=ZIP)
    assert "an archive inside the zip" in archive.json()["refused"][0]["reason"]
    next_one = add(dataset, png(1))
    assert (next_one.status_code, next_one.json()["errors"][0]["field"]) == (429, "images_per_second")


def test_a_zip_is_unpacked_at_low_priority_in_steps_of_few_bytes(dataset: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 entries of 10 MiB each were in memory at once, and entries that inflate a thousand times took both cores."""
    read, found = ZipFolders.read, []

    def noted(self: ZipFolders, entry: ZipEntry) -> bytes:
        priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        found.append((threading.current_thread().name.split("_")[0], priority))
        return read(self, entry)

    monkeypatch.setattr(ZipFolders, "read", noted)
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert add(dataset, zip_of({"rose/1.png": png(1)}), headers=ZIP).json()["counts"]["added"] == 1
    assert found == [("unpack", max(own, LOW_PRIORITY))]
    large = ZipEntry("a", None, None, "", 0, 0, 10, STEP_BYTES // 2, 0)
    small = dataclasses.replace(large, size_bytes=10)
    entries = [large, large, small, *[small] * STEP_IMAGES, large, dataclasses.replace(large, size_bytes=2**40), small]
    assert [len(step) for step in steps_of(entries)] == [2, STEP_IMAGES, 2, 1, 1]
