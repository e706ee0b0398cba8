"""Hostile uploads to datasets, over HTTP: lying zips, strange labels, full disks, a full Redis, broken connections."""

import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi.routing import APIRoute
from PIL import Image
from starlette.testclient import TestClient

from adapters import load_backbone
from hub.admission.quotas import DATASET_LABELS
from hub.errors import Conflict
from hub.local.embedded_redis import embedded_redis
from hub.registry.audit import OPERATOR
from hub.registry.datasets.entries import ListedImage
from hub.registry.datasets.index import DatasetIndex
from hub.registry.redis.connection import RegistryConnection
from hub.services.datasets.snapshots import MAX_SCORES, Snapshot
from tests.support.asgi import listening
from tests.support.datasets import new_image, unpaced_reads
from tests.support.hub_app import OCTETS, Hub, bearer, in_registry, make_api, running
from tests.support.models import encoded, png, wait_until
from tests.support.protocols import Reply
from tests.support.redis_servers import RedisServer, redis_server
from tests.support.zips import zip_of

ZIP = {"content-type": "application/zip"}
TASK = "/v1/tasks/flowers"
IMAGES = f"{TASK}/images"
MAX_PROBLEM_BYTES = 16 * 1024


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Hub]:
    """A hub in this process with a task `flowers` without versions."""
    with embedded_redis(tmp_path) as url, running(url, load_backbone("demo"), tmp_path / "store") as hub:
        assert hub.http.put(TASK, json={}).status_code == 201
        yield hub


def add_zip(app: Hub, data: bytes) -> Reply:
    return app.http.post(IMAGES, content=data, headers=ZIP)


def refusals(reply: Reply) -> dict[str, str]:
    """Return the reason by name."""
    assert reply.status_code == 200, reply.text
    return {refused["name"]: refused["reason"] for refused in reply.json()["refused"]}


def images_of(app: Hub) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = app.http.get(IMAGES, params={"count": 1000}).json()["images"]
    return found


def image_files(app: Hub) -> list[str]:
    return [name for name in app.stored() if ".image" in name]


def collect(app: Hub) -> None:
    """Run the collection of garbage, for files of any age."""
    reply = app.http.post("/v1/gc", json={"older_than_s": 0}, headers=app.admin)
    assert reply.status_code == 200, reply.text


def zip64(offset: int = 0, size: int | None = None, packed: int | None = None) -> bytes:
    """Return a zip of one image whose directory has sizes and offset of 64 bits."""
    data, name = png(1), b"rose/1.png"
    crc = zlib.crc32(data)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, crc, len(data), len(data), len(name), 0) + name + data
    numbers = (len(data) if size is None else size, len(data) if packed is None else packed, offset)
    extra = struct.pack("<2H3Q", 1, 24, *numbers)
    full = 0xFFFFFFFF
    entry = struct.pack("<4s6H3I", b"PK\1\2", 45, 45, 0, 0, 0, 0, crc, full, full)
    entry += struct.pack("<5H2I", len(name), len(extra), 0, 0, 0, 0, full) + name + extra
    return local + entry + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(entry), len(local), 0)


def test_a_zip64_entry_is_read_when_it_is_honest(app: Hub) -> None:
    assert add_zip(app, zip64()).json()["counts"]["added"] == 1


@pytest.mark.parametrize("offset", [10**6, 2**32, 2**62, 2**63, 2**64 - 1])
def test_an_entry_is_refused_by_name_when_its_offset_is_no_place_in_the_zip(app: Hub, offset: int) -> None:
    assert "damaged at this entry" in refusals(add_zip(app, zip64(offset)))["rose/1.png"]


@pytest.mark.parametrize("size", [2**32, 2**64 - 1])
def test_an_entry_is_refused_by_name_when_it_declares_4_gb(app: Hub, size: int) -> None:
    assert "which no image does" in refusals(add_zip(app, zip64(size=size)))["rose/1.png"]


def test_a_zip_is_refused_as_a_whole_when_an_entry_claims_more_bytes_than_the_zip(app: Hub) -> None:
    reply = add_zip(app, zip64(packed=2**64 - 1))
    assert (reply.status_code, images_of(app)) == (422, [])


@pytest.mark.parametrize("files", [{}, {"rose/": b""}, {"rose/.DS_Store": b"x", "__MACOSX/rose/._1.png": b"x"}])
def test_a_zip_without_images_is_refused_with_what_to_do(app: Hub, files: dict[str, bytes]) -> None:
    reply = add_zip(app, zip_of(files))
    assert reply.status_code == 422
    assert "has no image; put images into folders" in reply.json()["detail"]


@pytest.mark.parametrize("media_type", ["application/octet-stream", "application/x-www-form-urlencoded", "image/png"])
def test_a_zip_under_another_media_type_is_refused_with_the_right_one(app: Hub, media_type: str) -> None:
    data = zip_of({"rose/1.png": png(1)})
    reply = app.http.post(IMAGES, content=data, headers={"content-type": media_type})
    assert reply.status_code == 422
    assert "Content-Type: application/zip" in reply.json()["detail"]


def test_a_name_that_is_not_utf8_is_refused_when_the_zip_says_it_is_and_read_as_old_text_otherwise(app: Hub) -> None:
    flagged = zip_of({"caf\u00e9/1.png": png(1)}).replace("\u00e9".encode(), b"\xff\xfe")
    (reason,) = refusals(add_zip(app, flagged)).values()
    assert "not valid UTF-8" in reason
    old = zip_of({"cafX/1.png": png(1)}).replace(b"cafX", b"caf\x82")  # code page 437
    assert add_zip(app, old).json()["added"][0]["label"] == "caf\u00e9"


def test_a_zip_inside_of_a_zip_is_refused_under_any_name(app: Hub) -> None:
    inner = zip_of({"rose/1.png": png(1)})
    found = refusals(add_zip(app, zip_of({"rose/a.zip": inner, "rose/b.png": inner, "rose/c.ZIP": inner})))
    assert len(found) == 3
    assert image_files(app) == []


def test_a_reply_names_1_000_refused_files_when_a_zip_has_3_000(app: Hub) -> None:
    names = {f"rose/{i}.png": b"" for i in range(3000)}
    reply = add_zip(app, zip_of(names))
    assert reply.json()["counts"]["refused"] == 3000
    assert len(reply.json()["refused"]) == 1000
    assert len(reply.content) < 150_000


def test_a_body_that_grows_by_its_coding_stops_at_the_limit_of_free_disk(app: Hub) -> None:
    zeros = zlib.compress(bytes(64 * 1024**2))
    api = make_api(app.redis_url, app.store_folder, app.engine, min_free_disk=10**18)
    with TestClient(api, headers=bearer(app.key)) as full:
        refused = full.post(IMAGES, content=zeros, headers=ZIP | {"content-encoding": "deflate"})
        assert refused.status_code == 507
        assert "disk is nearly full" in refused.json()["detail"]


def test_nothing_is_listed_or_stored_when_the_disk_is_nearly_full(app: Hub) -> None:
    api = make_api(app.redis_url, app.store_folder, app.engine, min_free_disk=10**18)
    with TestClient(api, headers=bearer(app.key)) as full:
        bodies: list[tuple[bytes, dict[str, str]]] = [(png(1), OCTETS), (zip_of({"rose/1.png": png(1)}), ZIP)]
        for content, headers in bodies:
            refused = full.post(IMAGES, content=content, headers=headers)
            assert refused.status_code == 507, refused.text
            assert "disk is nearly full" in refused.json()["detail"]
    assert (images_of(app), image_files(app)) == ([], [])
    assert app.http.post(IMAGES, content=png(1), headers=OCTETS).json()["counts"]["added"] == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to any folder")
def test_nothing_is_listed_when_the_store_cannot_be_written(app: Hub) -> None:
    folder = app.store_folder / "images"
    folder.mkdir(mode=0o500)
    try:
        assert app.http.post(IMAGES, content=png(1), headers=OCTETS).status_code == 503
        assert images_of(app) == []
    finally:
        folder.chmod(0o700)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path / "redis") as server:
        yield server


def test_nothing_is_half_added_when_redis_is_full_and_no_file_stays(
    own_redis: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(own_redis.url, load_backbone("demo"), tmp_path / "store") as app:
        app.http.put(TASK, json={})
        kept = app.http.post(f"{IMAGES}?label=rose", content=png(1), headers=OCTETS).json()["added"][0]["digest"]
        wait_until(lambda: len(app.stored()) == 2)  # the file and its features
        own_redis.client.config_set("maxmemory", 1)
        try:
            parts = [("tulip", (f"{i}.png", png(i))) for i in range(2, 6)]
            bodies: list[dict[str, Any]] = [
                {"files": parts},
                {"content": png(2), "headers": OCTETS},
                {"content": zip_of({f"tulip/{i}.png": png(i) for i in range(2, 6)}), "headers": ZIP},
            ]
            for body in bodies:
                refused = app.http.post(IMAGES, **body)
                assert refused.status_code == 503, refused.text
                assert "The registry (Redis) refused a command" in refused.json()["detail"]
                assert "Redis has no memory left" in caplog.text
                assert len(refused.content) < MAX_PROBLEM_BYTES
            assert [image["digest"] for image in images_of(app)] == [kept]
            assert app.http.get(f"{TASK}/dataset").json()["images"] == 1
        finally:
            own_redis.client.config_set("maxmemory", 0)
        collect(app)
        assert image_files(app) == [f"{kept}.image"]
        assert app.http.post(IMAGES, files=parts).json()["counts"]["added"] == 4


def test_a_training_is_refused_when_its_scores_would_take_the_memory_of_the_hub() -> None:
    def listed(images: int, labels: int) -> list[ListedImage]:
        return [ListedImage(f"{i:064x}", "n", f"label {i % labels}", "train", "train") for i in range(images)]

    assert len(Snapshot.of(listed(6000, 3000)).images) == 6000
    with pytest.raises(Conflict, match="6000 labelled images of 4000 labels are too many"):
        Snapshot.of(listed(6000, 4000))


def test_names_and_reasons_stay_short_when_names_are_long(app: Hub) -> None:
    name = "n" * 3000 + ".png"
    form = app.http.post(IMAGES, files=[("rose", (name, b"no image")), ("rose", (name, png(1)))])
    zipped = add_zip(app, zip_of({f"rose/{name}": b"no image", f"tulip/{name}": png(2)}))
    for reply in (form, zipped):
        assert reply.status_code == 200, reply.text
        body = reply.json()
        assert (body["counts"]["added"], body["counts"]["refused"]) == (1, 1)
        assert len(body["refused"][0]["name"]) <= 200
        assert len(body["added"][0]["name"]) <= 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", IMAGES, {"data": {f"{i}{'x' * 3000}": "v" for i in range(60)}, "files": {"image": png(1)}}),
        ("POST", IMAGES, {"data": {"label": "x" * 500_000}, "files": {"image": png(1)}}),
        ("POST", IMAGES, {"files": [("x" * 3000, ("a.png", png(1)))]}),
        ("POST", f"{TASK}/dataset/rename-label", {"json": {"label": "x" * 60_000, "to": "y"}}),
        ("POST", f"{TASK}/dataset/rename-label", {"json": {"label": "a", "to": "\u202e" * 60_000}}),
        ("POST", f"{TASK}/trainings", {"json": {"recipe": "\u202e" * 63}}),
        ("POST", f"{TASK}/trainings", {"json": {"budget_s": 10**300}}),
        ("PUT", TASK, {"json": {"labels": ["x" * 300] * 1000}}),
        ("PATCH", f"{IMAGES}/{'0' * 64}", {"json": {"label": "x" * 60_000}}),
        ("PATCH", IMAGES, {"json": {"images": ["0" * 64] * 201, "label": "x"}}),
        ("PATCH", IMAGES, {"json": {"images": [f"{i}{'x' * 3000}" for i in range(200)], "label": "x"}}),
        ("GET", f"{TASK}/compare", {"params": {"a": "x" * 5000, "b": "y" * 5000}}),
        ("GET", f"{IMAGES}/{'f' * 64}", {}),
    ],
)
def test_a_refusal_is_a_small_problem(app: Hub, method: str, path: str, body: dict[str, Any]) -> None:
    reply = app.http.request(method, path, **body)
    assert 400 <= reply.status_code < 500, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    assert len(reply.content) < MAX_PROBLEM_BYTES


@pytest.mark.parametrize("label", ["\u200b", "\ufeff", "\u00ad\u2060", " \u200d "], ids=ascii)
def test_a_label_without_a_visible_character_is_refused(app: Hub, label: str) -> None:
    assert app.http.post(IMAGES, params={"label": label}, content=png(1), headers=OCTETS).status_code == 422
    (reason,) = refusals(add_zip(app, zip_of({f"{label}/1.png": png(1)}))).values()
    assert "no visible character" in reason


def test_composed_and_decomposed_labels_are_one_and_case_twins_are_two_with_a_warning(app: Hub) -> None:
    reply = add_zip(app, zip_of({"u\u0308ber/1.png": png(1), "\u00fcber/2.png": png(2), "\u00dcber/3.png": png(3)}))
    assert len(reply.json()["warnings"]) == 1
    labels = {row["label"]: row["train"] + row["test"] for row in app.http.get(f"{TASK}/dataset").json()["labels"]}
    assert labels == {"\u00fcber": 2, "\u00dcber": 1}
    assert app.http.get(IMAGES, params={"label": "u\u0308ber"}).json()["images"][0]["label"] == "\u00fcber"


def test_a_tenant_s_images_are_404_on_each_route_of_another_tenant_and_403_for_a_caller(app: Hub) -> None:
    digest = app.http.post(f"{IMAGES}?label=rose", content=png(1), headers=OCTETS).json()["added"][0]["digest"]
    app.http.post(f"{IMAGES}?label=tulip", content=png(2), headers=OCTETS)
    app.http.post(f"{IMAGES}?label=tulip", content=png(3), headers=OCTETS)
    training = app.http.post(f"{TASK}/trainings").json()["id"]
    foreign, caller = app.key_of("foreign"), app.key_of("default", "caller")
    app.http.put(TASK, json={}, headers=foreign)
    before = images_of(app)
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", f"{IMAGES}/{digest}", {}),
        ("GET", f"{IMAGES}/{digest}/thumbnail", {}),
        ("PATCH", f"{IMAGES}/{digest}", {"json": {"label": "stolen"}}),
        ("PATCH", IMAGES, {"json": {"images": [digest], "label": "stolen"}}),
        ("DELETE", f"{IMAGES}/{digest}", {}),
        ("POST", f"{TASK}/dataset/rename-label", {"json": {"label": "rose", "to": "stolen"}}),
        ("GET", f"{TASK}/trainings/{training}", {}),
        ("GET", f"{TASK}/trainings/{training}/snapshot", {}),
        ("GET", f"{TASK}/trainings/{training}/events", {}),
        ("GET", f"{TASK}/trainings/{training}/report/report.html", {}),
        ("DELETE", f"{TASK}/trainings/{training}", {}),
        ("GET", f"{TASK}/compare", {"params": {"a": "1", "b": "1"}}),
    ]
    for method, path, body in calls:
        for target in (path, path.replace("/flowers", "/default:flowers")):
            reply = app.http.request(method, target, headers=foreign, **body)
            assert reply.status_code == 404, (method, target, reply.text)
            assert "rose" not in reply.text.replace("'rose'", "")
        assert app.http.request(method, path, headers=caller, **body).status_code == 403, (method, path)
    # The same file in both tenants: one file in the store, and each tenant deletes only its own image.
    assert app.http.post(IMAGES, content=png(1), headers=foreign | OCTETS).json()["counts"]["added"] == 1
    assert app.http.delete(f"{IMAGES}/{digest}", headers=foreign).status_code == 204
    assert images_of(app) == before
    assert app.http.get(f"{IMAGES}/{digest}").content == png(1)


def test_images_that_are_deleted_during_trainings_at_once_leave_whole_versions(app: Hub) -> None:
    parts = [("rose" if i % 2 else "tulip", (f"{i}.png", png(i))) for i in range(24)]
    digests = [image["digest"] for image in app.http.post(IMAGES, files=parts).json()["added"]]
    replies: list[Reply] = []

    def train() -> None:
        replies.append(app.http.post(f"{TASK}/trainings"))

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for digest in digests[:12]:
        assert app.http.delete(f"{IMAGES}/{digest}").status_code == 204
    for thread in threads:
        thread.join()
    assert [reply.status_code for reply in replies] == [200] * 4, [reply.text for reply in replies]
    assert sorted(reply.json()["version"] for reply in replies) == [1, 2, 3, 4]
    states = {training["state"] for training in app.http.get(f"{TASK}/trainings").json()["trainings"]}
    assert states == {"done"}
    collect(app)
    assert len(image_files(app)) == len(images_of(app)) == 12


def test_a_dataset_of_10_000_labels_is_listed_and_the_next_label_is_refused(app: Hub) -> None:
    async def fill(connection: RegistryConnection) -> None:
        index = DatasetIndex(connection, unpaced_reads())
        for start in range(0, DATASET_LABELS, 500):
            images = [new_image(i, f"{i:05}") for i in range(start, start + 500)]
            await index.add(OPERATOR, "default", "flowers", images, {"files": len(images)}, patience_s=600)

    in_registry(app.redis_url, fill)
    assert len(app.http.get(f"{TASK}/dataset").json()["labels"]) == DATASET_LABELS
    one_more = app.http.post(f"{IMAGES}?label=one-more", content=png(1), headers=OCTETS)
    assert "too many labels in this dataset (limit 10000)" in refusals(one_more)["body"]
    assert image_files(app) == []
    for recipe in ("instant", "auto"):
        refused = app.http.post(f"{TASK}/trainings", json={"recipe": recipe})
        assert refused.status_code == 409
        assert "10000 labelled images of 10000 labels are too many for one training" in refused.json()["detail"]
        assert f"limit {MAX_SCORES}" in refused.json()["detail"]
        assert len(refused.content) < MAX_PROBLEM_BYTES


def test_an_upload_that_ends_midway_adds_nothing_and_frees_its_place(app: Hub) -> None:
    with listening(app.another_gateway().app) as url:
        place = urlsplit(url)
        data = zip_of({f"rose/{i}.png": png(i) for i in range(8)})
        for kind, body in (("application/zip", data), ("application/octet-stream", png(1, (200, 200)))):
            for _ in range(12):  # more than a tenant's uploads at once
                with socket.create_connection((str(place.hostname), int(place.port or 80))) as connection:
                    head = f"POST {IMAGES}?label=rose HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {app.key}\r\n"
                    head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
                    connection.sendall(head.encode() + body[: len(body) // 2])
                    time.sleep(0.02)
        whole = app.http.post(IMAGES, content=png(99), headers=OCTETS)
        assert whole.json()["counts"]["added"] == 1
    assert len(images_of(app)) == 1
    assert len(image_files(app)) == 1


def test_a_picture_that_is_bytes_of_an_image_and_no_picture_is_refused_by_name(app: Hub) -> None:
    whole = png(1, (64, 64))
    bad = {
        "cut.png": whole[:-200],
        "flipped.png": whole[:100] + bytes([whole[100] ^ 255]) + whole[101:],
        "empty.gif": b"GIF89a" + bytes(7),
        "start.jpg": b"\xff\xd8\xff\xe0" + bytes(100),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "nothing.png": b"",
        "thin.png": encoded(Image.new("L", (20_000, 1)), "PNG"),
    }
    found = refusals(add_zip(app, zip_of({f"rose/{name}": data for name, data in bad.items()})))
    assert sorted(found) == sorted(f"rose/{name}" for name in bad)
    form = refusals(app.http.post(IMAGES, files=[("rose", item) for item in bad.items()]))
    assert sorted(form) == sorted(bad)
    assert (images_of(app), image_files(app)) == ([], [])


# Routes whose replies have a few kilobytes, or end at a page of 512 KiB that is read in the tenant's turns. The list of
# tenants is for admins; `events` and `export` have limits of their own.
SMALL = {
    "/v1/tasks",
    "/v1/tasks/{task}",
    "/v1/tasks/{task}/versions/{version}",
    "/v1/backbone",
    "/v1/usage",
    "/v1/status",
    "/v1/admin/trainings",
    "/v1/tenants",
    "/v1/tenants/{tenant}",
    "/v1/tenants/{tenant}/usage",
    "/v1/tenants/{tenant}/export",
    "/v1/tasks/{task}/trainings/{training}",
    "/v1/tasks/{task}/trainings/{training}/events",
}


def test_each_reply_that_may_be_large_takes_one_of_the_tenants_places_for_large_replies(app: Hub) -> None:
    """Otherwise a tenant's further requests would each hold a file of 10 MB, or a long list, in memory."""
    routes = [route for route in app.api.routes if isinstance(route, APIRoute) and "GET" in (route.methods or ())]
    small = {
        route.path
        for route in routes
        if all(getattr(each.call, "__name__", "") != "large_reply" for each in route.dependant.dependencies)
    }
    assert {path for path in small if path.startswith("/v1")} == SMALL
