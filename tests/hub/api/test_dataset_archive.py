"""Datasets in the export and import of a tenant, over HTTP: what survives, what is left out, hostile archives."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from starlette.testclient import TestClient

from hub.registry.audit import OPERATOR, Actor
from hub.registry.datasets.entries import ArchivedImage
from hub.registry.datasets.files import DatasetFiles
from hub.registry.datasets.staging import StagedDatasets
from hub.registry.datasets.trainings import Training
from hub.registry.redis.connection import RegistryConnection
from tests.support.hub_app import OCTETS, Hub, in_registry, make_api
from tests.support.models import png, wait_until
from tests.support.tenant_archives import Members, members, written

IMAGES = "/v1/tasks/flowers/images"
EXPORT, IMPORT = "/v1/tenants/default/export", "/v1/tenants/copy/import"
KEPT = {"keep": {"images": "all", "days": 30}}


@pytest.fixture
def tenant(hub: Hub) -> Hub:
    """A hub whose tenant has two tasks with datasets that share an image, and an empty tenant `copy`."""
    http = hub.http
    http.put("/v1/tasks/flowers", json={"promote": "always"})
    http.put("/v1/tasks/leaves", json={})
    http.put("/v1/tasks/bare", json={})
    for i in range(12):
        query = f"?label={'rose' if i % 2 else 'túlip 🌷'}" + ("&split=test" if i == 3 else "")
        assert http.post(IMAGES + query, files=[("image", (f"{i}.png", png(i)))]).json()["counts"]["added"] == 1
    http.post(IMAGES, files=[("image", ("loose.png", png(50)))])
    http.post(f"{IMAGES[:-7]}/dataset/rename-label", json={"label": "rose", "to": "Rosa"})
    http.post("/v1/tasks/leaves/images?label=oak", content=png(1), headers=OCTETS)
    hub.key_of("copy")
    return hub


@pytest.fixture
def other(tenant: Hub, tmp_path: Path) -> Iterator[TestClient]:
    """A gateway with the same registry and another, empty store, with the admin's key."""
    api = make_api(tenant.redis_url, tmp_path / "other", tenant.engine)
    with TestClient(api, headers=tenant.admin, raise_server_exceptions=False) as http:
        yield http


def exported(hub: Hub, query: str = "") -> bytes:
    reply = hub.http.get(EXPORT + query)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-length"] == str(len(reply.content))
    return reply.content


def listed(http: TestClient, task: str, headers: dict[str, str]) -> list[dict[str, Any]]:
    images: list[dict[str, Any]] = http.get(f"/v1/tasks/{task}/images", headers=headers).json()["images"]
    return images


def staged(hub: Hub) -> list[str]:
    """Return the names in Redis of datasets of unfinished imports."""
    with redis.Redis.from_url(hub.redis_url, decode_responses=True) as client:
        return [*client.zrange("karst:staged-datasets", 0, -1), *client.keys("karst:t:copy:data:*")]


def used(hub: Hub) -> tuple[int, int]:
    """Return the images and the bytes of images of the tenant `copy`."""
    usage = hub.http.get("/v1/tenants/copy/usage", headers=hub.admin).json()["used"]
    return usage["images"], usage["image_bytes"]


def test_an_import_has_the_datasets_of_the_export(tenant: Hub, other: TestClient, tmp_path: Path) -> None:
    tar = exported(tenant)
    assert tar == exported(tenant)
    reply = other.post(IMPORT, content=tar)
    assert reply.status_code == 201, reply.text
    key = tenant.key_of("copy")
    for task in ("flowers", "leaves", "bare"):
        assert listed(other, task, key) == listed(tenant.http, task, {})
        own, copied = (http.get(f"/v1/tasks/{task}", headers=h).json() for http, h in ((tenant.http, {}), (other, key)))
        assert copied["promote"] == own["promote"]
    assert other.get("/v1/tasks/flowers/dataset", headers=key).json()["labels"] == [
        {"label": "Rosa", **tenant.http.get("/v1/tasks/flowers/dataset").json()["labels"][0]},
        tenant.http.get("/v1/tasks/flowers/dataset").json()["labels"][1],
    ]
    digest = hashlib.sha256(png(3)).hexdigest()
    assert other.get(f"{IMAGES}/{digest}", headers=key).content == png(3)
    assert (len(list((tmp_path / "other").rglob("*.image"))), used(tenant)[0]) == (13, 14)
    assert [name for name in staged(tenant) if "~" in name] == []
    # The copy goes on like the original: labels, new images, trainings on features that are computed again.
    assert other.patch(f"{IMAGES}/{digest}", json={"label": "túlip 🌷"}, headers=key).status_code == 200
    assert other.post(f"{IMAGES}?label=Rosa", content=png(60), headers=key | OCTETS).json()["counts"]["added"] == 1
    assert other.get(f"{IMAGES}?label=Rosa", headers=key).json()["images"][0]["digest"] != digest
    trained = other.post("/v1/tasks/flowers/trainings", headers=key)
    assert (trained.status_code, trained.json()["snapshot"]["images"]) == (200, 13)
    wait_until(lambda: pending(tenant) == 0)
    other.delete("/v1/tasks/flowers", headers=key)
    assert used(tenant)[0] == 1


def pending(hub: Hub) -> int:
    with redis.Redis.from_url(hub.redis_url) as client:
        return int(client.zcard("karst:pending"))


def test_kept_answers_and_expiry_survive_a_move(tenant: Hub, other: TestClient) -> None:
    tenant.http.post("/v1/tasks/flowers/trainings")
    tenant.http.put("/v1/tasks/flowers", json=KEPT)
    (kept,) = tenant.http.post("/v1/tasks/flowers/classify", content=png(70), headers=OCTETS).json()["image"]
    wait_until(lambda: listed(tenant.http, "flowers", {})[0]["digest"] == kept)
    tar = exported(tenant)
    assert other.post(IMPORT, content=tar).status_code == 201
    (before, after) = (
        listed(tenant.http, "flowers", {})[0],
        listed(other, "flowers", tenant.key_of("copy"))[0],
    )
    assert after == before
    assert (after["answer"]["version"], "expires" in after) == (1, True)
    with redis.Redis.from_url(tenant.redis_url, decode_responses=True) as client:
        assert client.smembers("karst:kept") == {"default:flowers", "copy:flowers"}


TRAININGS = "/v1/tasks/flowers/trainings"


def test_a_version_says_on_the_new_hub_what_it_was_trained_on(tenant: Hub, other: TestClient) -> None:
    made = [tenant.http.post(TRAININGS).json() for _ in range(3)]
    tenant.http.delete("/v1/tasks/flowers/versions/2")
    assert other.post(IMPORT, content=exported(tenant)).status_code == 201
    key = tenant.key_of("copy")
    assert other.get(TRAININGS, headers=key).json()["trainings"] == [
        training | {"report_files": []} for training in (made[2], made[0])
    ]
    for training in (made[2], made[0]):
        path = f"{TRAININGS}/{training['id']}/snapshot"
        assert other.get(path, headers=key).content == tenant.http.get(path).content
        metrics = other.get(f"/v1/tasks/flowers/versions/{training['version']}", headers=key).json()["metrics"]
        assert (metrics["training"], metrics["snapshot"]) == (training["id"], training["snapshot"]["digest"])
    assert other.get(f"{TRAININGS}/{made[0]['id']}/report/report.json", headers=key).status_code == 404
    # The copy goes on like the original: a new training is the newest, comparisons leave out what trained, and
    # a deleted task takes its snapshots.
    assert other.post(TRAININGS, headers=key).json()["version"] == 4
    assert [found["version"] for found in other.get(TRAININGS, headers=key).json()["trainings"]] == [4, 3, 1]
    for image in listed(other, "flowers", key):
        other.patch(f"{IMAGES}/{image['digest']}", json={"split": "test"}, headers=key)
    compared = other.get("/v1/tasks/flowers/compare?a=1&b=3", headers=key).json()
    assert (compared["images"], compared["left_out"]) == (made[0]["snapshot"]["test"], made[0]["snapshot"]["train"])
    other.delete("/v1/tasks/flowers", headers=key)
    with redis.Redis.from_url(tenant.redis_url) as client:
        wait_until(lambda: client.hlen("karst:snapshots") == 1)  # the original's


def test_a_training_survives_a_dataset_without_images(tenant: Hub, other: TestClient) -> None:
    made = tenant.http.post(TRAININGS).json()
    for image in listed(tenant.http, "flowers", {}):
        assert tenant.http.delete(f"{IMAGES}/{image['digest']}").status_code == 204
    assert other.post(IMPORT, content=exported(tenant)).status_code == 201
    (found,) = other.get(TRAININGS, headers=tenant.key_of("copy")).json()["trainings"]
    assert found["snapshot"] == made["snapshot"]


def test_an_export_without_datasets_is_that_of_an_older_hub(tenant: Hub, other: TestClient) -> None:
    tar = exported(tenant, "?datasets=false")
    (entry,) = members(tar)
    assert b"dataset" not in entry[1]
    assert other.post(IMPORT, content=tar).status_code == 201
    assert listed(other, "flowers", tenant.key_of("copy")) == []


def test_an_import_can_leave_out_the_datasets(tenant: Hub, other: TestClient, tmp_path: Path) -> None:
    assert other.post(f"{IMPORT}?datasets=false", content=exported(tenant)).status_code == 201
    assert listed(other, "flowers", tenant.key_of("copy")) == []
    assert (used(tenant), list((tmp_path / "other").rglob("*.image"))) == ((0, 0), [])


def changed_lines(task: str, change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Members], Members]:
    """Return a maker of members with a changed list of one task."""

    def make(entries: Members) -> Members:
        name = f"datasets/{task}.jsonl"
        lines = [json.loads(line) for line in dict(entries)[name].splitlines()]
        change(lines)
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        return [(name, data) if found == name else (found, old) for found, old in entries]

    return make


def counted(task: str, images: int | None) -> Callable[[Members], Members]:
    """Return a maker of members whose manifest has another number of images of a task; None: no dataset."""

    def make(entries: Members) -> Members:
        manifest = json.loads(entries[0][1])
        (entry,) = (entry for entry in manifest["tasks"] if entry["name"] == task)
        del entry["dataset"]
        if images is not None:
            entry["dataset"] = {"images": images}
        return [("tenant.json", json.dumps(manifest).encode()), *entries[1:]]

    return make


def damaged(entries: Members) -> Members:
    name, data = entries[-1]
    return [*entries[:-1], (name, data[:-1] + bytes([data[-1] ^ 1]))]


def no_picture(entries: Members) -> Members:
    """Return members whose last image is text under its right digest."""
    name, data = entries[-1]
    text = b"x" * len(data)
    old, new = name.removeprefix("images/"), hashlib.sha256(text).hexdigest()
    return [*((n, d.replace(old.encode(), new.encode())) for n, d in entries[:-1]), (f"images/{new}", text)]


HOSTILE: dict[str, tuple[Callable[[Members], Members], str]] = {
    "other bytes": (damaged, "is damaged: its sha256 differs"),
    "no picture": (no_picture, "does not fit this hub"),
    "image missing": (lambda e: e[:-1], "is missing"),
    "image in no list": (lambda e: [*e, (f"images/{'0' * 64}", b"x")], "is in no dataset"),
    "image twice": (lambda e: [*e, e[-1]], "is a duplicate"),
    "list twice": (lambda e: [*e, next(m for m in e if m[0] == "datasets/leaves.jsonl")], "is a duplicate"),
    "listed twice": (changed_lines("flowers", lambda lines: lines.append(lines[0])), "is listed twice"),
    "list of no task": (lambda e: [*e, ("datasets/other.jsonl", b"")], "only in the manifest or only in the tar"),
    "list missing": (lambda e: [m for m in e if m[0] != "datasets/leaves.jsonl"], "only in the manifest or only in"),
    "list that the manifest lacks": (counted("leaves", None), "only in the manifest or only in the tar"),
    "fewer images than the manifest says": (counted("flowers", 99), "the manifest says 99"),
    "no images": (counted("leaves", 0), "tenant.json: tasks"),
    "path": (lambda e: [*e, ("datasets/../x.jsonl", b"")], "is neither"),
    "other size": (changed_lines("leaves", lambda lines: lines[0].update(size_bytes=1)), "the list says 1"),
    "unknown member": (changed_lines("leaves", lambda lines: lines[0].update(owner="x")), "line 1: owner"),
    "bad label": (changed_lines("leaves", lambda lines: lines[0].update(label="a\nb")), "line 1: label"),
    "endless score": (
        changed_lines("leaves", lambda lines: lines[0].update(answer={"version": 1, "label": "a", "score": 1e999})),
        "line 1: answer.score",
    ),
    "no JSON": (lambda e: [(n, b"{\n" if n == "datasets/leaves.jsonl" else d) for n, d in e], "line 1: the line"),
    "endless line": (lambda e: [(n, b" " * 9000 if n == "datasets/leaves.jsonl" else d) for n, d in e], "has no end"),
    "before the manifest": (lambda e: [e[-1], *e[:-1]], "is not first"),
}


def changed_training(change: Callable[[dict[str, Any]], object]) -> Callable[[Members], Members]:
    """Return a maker of members with a changed training of the task `flowers`."""

    def make(entries: Members) -> Members:
        name = "trainings/flowers.jsonl"
        line = json.loads(dict(entries)[name])
        change(line)
        return [(n, json.dumps(line).encode() + b"\n" if n == name else d) for n, d in entries]

    return make


def other_snapshot(text: bytes) -> Callable[[Members], Members]:
    """Return a maker of members with another snapshot under its right digest."""

    def make(entries: Members) -> Members:
        (old,) = (name[10:-5] for name, _ in entries if name.startswith("snapshots/"))
        new = hashlib.sha256(text).hexdigest()
        kept = [(n, d.replace(old.encode(), new.encode())) for n, d in entries if n == "trainings/flowers.jsonl"]
        rest = [entry for entry in entries if not entry[0].startswith(("snapshots/", "trainings/"))]
        return [*rest, *kept, (f"snapshots/{new}.json", text)]

    return make


def without(*starts: str) -> Callable[[Members], Members]:
    return lambda entries: [entry for entry in entries if not entry[0].startswith(starts)]


HOSTILE_TRAININGS: dict[str, tuple[Callable[[Members], Members], str]] = {
    "no list": (without("trainings/", "snapshots/"), "trainings of task 'flowers' are only in the manifest"),
    "no snapshot": (without("snapshots/"), "of task 'flowers' is missing"),
    "snapshot of no training": (lambda e: [*e, (f"snapshots/{'0' * 64}.json", b"{}")], "is of no training"),
    "snapshot twice": (lambda e: [*e, next(m for m in e if m[0].startswith("snapshots/"))], "is a duplicate"),
    "damaged snapshot": (
        lambda e: [(n, d[:-1] + b" " if n.startswith("snapshots/") else d) for n, d in e],
        "is damaged: its sha256 differs",
    ),
    "no snapshot's text": (other_snapshot(b'{"images": 3}'), "is no karst-snapshot/1"),
    "missing version": (changed_training(lambda line: line.update(version=9)), "made no version"),
    "other task": (changed_training(lambda line: line.update(task="leaves")), "made no version"),
    "running": (changed_training(lambda line: line.update(state="running")), "made no version"),
    "id that is none": (changed_training(lambda line: line.update(id="x:y")), "made no version"),
    "report": (changed_training(lambda line: line.update(report_files=["report.json"])), "has a report"),
    "unknown member": (changed_training(lambda line: line.update(author={})), "line 1: author"),
    "twice": (lambda e: [(n, d * 2 if n.startswith("trainings/") else d) for n, d in e], "or is listed twice"),
    "more than stated": (lambda e: [(n, d.replace(b'"trainings": 1', b'"trainings": 2')) for n, d in e], "says 2"),
}


def test_hostile_trainings_are_refused_and_leave_nothing(tenant: Hub, other: TestClient) -> None:
    tenant.http.post(TRAININGS)
    entries = members(exported(tenant))
    for name, (make, message) in HOSTILE_TRAININGS.items():
        status, text = refused(tenant, other, written(make(entries)))
        assert (status, message in text) == (422, True), (name, text)
    with redis.Redis.from_url(tenant.redis_url) as client:
        assert client.hvals("karst:snapshots") == [b"1"]
    assert other.post(IMPORT, content=written(entries)).status_code == 201


def refused(tenant: Hub, http: TestClient, tar: bytes) -> tuple[int, str]:
    """Return status and text of a refused import, of which nothing may remain."""
    reply = http.post(IMPORT, content=tar)
    assert http.get("/v1/tasks", headers=tenant.key_of("copy")).json()["tasks"] == []
    assert (staged(tenant), used(tenant)) == ([], (0, 0))
    return reply.status_code, reply.text


def test_hostile_datasets_are_refused_and_leave_nothing(tenant: Hub, other: TestClient) -> None:
    entries = members(exported(tenant))
    for name, (make, message) in HOSTILE.items():
        status, text = refused(tenant, other, written(make(entries)))
        assert (status, message in text) == (422, True), (name, text)
    assert other.post(IMPORT, content=written(entries)).status_code == 201


@pytest.mark.parametrize(
    ("limit", "status"), [({"images": 13}, 429), ({"image_bytes": 1000}, 429), ({"images": 5}, 422)]
)
def test_an_import_over_a_limit_of_images_leaves_nothing(
    tenant: Hub, other: TestClient, limit: dict[str, int], status: int
) -> None:
    other.patch("/v1/tenants/copy", json={"limits": limit})
    found, text = refused(tenant, other, exported(tenant))
    assert (found, "images" in text) == (status, True), text


def test_an_import_of_existing_tasks_leaves_their_datasets(tenant: Hub, other: TestClient) -> None:
    key, tar = tenant.key_of("copy"), exported(tenant)
    other.put("/v1/tasks/leaves", json={}, headers=key)
    other.post("/v1/tasks/leaves/images?label=elm", content=png(80), headers=key | OCTETS)
    assert other.post(IMPORT, content=tar).status_code == 409
    assert [image["label"] for image in listed(other, "leaves", key)] == ["elm"]
    assert used(tenant)[0] == 1


def test_datasets_of_an_import_that_stopped_are_removed(tenant: Hub) -> None:
    """A gateway that is killed leaves a staged dataset; a round of the removal drops it after an hour."""

    async def use(database: RegistryConnection) -> None:
        staging, files = StagedDatasets(database), DatasetFiles(database)
        image = ArchivedImage(digest="a" * 64, name="a", size_bytes=5, added=1, split="auto", label="x")
        await staging.add(OPERATOR, "copy", "~1", [image])
        await files.drain(10)
        assert used(tenant) == (1, 5)
        await database.redis.zadd("karst:staged-datasets", {"copy:~1": 1})
        await files.drain(10)

    in_registry(tenant.redis_url, use)
    assert (staged(tenant), used(tenant)) == ([], (0, 0))


def test_an_import_has_its_files_even_if_another_dataset_gives_them_up_meanwhile(
    tenant: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner deletes task and images between the import's write of the files and its listing of them."""
    tenant.http.post(TRAININGS)
    tar = exported(tenant)
    add, add_training = StagedDatasets.add, StagedDatasets.add_training
    gone: list[str] = []

    def remove(digest: str) -> None:
        for path in tenant.store_folder.rglob(f"{digest}.*"):
            if path.suffix != ".f16":
                path.unlink()
                gone.append(path.name)

    async def late_add(
        self: StagedDatasets, by: Actor, owner: str, name: str, images: list[ArchivedImage]
    ) -> list[str]:
        for image in images:
            remove(image.digest)
        return await add(self, by, owner, name, images)

    async def late_training(self: StagedDatasets, by: Actor, owner: str, name: str, training: Training) -> bool:
        remove(training.snapshot.digest)
        return await add_training(self, by, owner, name, training)

    monkeypatch.setattr(StagedDatasets, "add", late_add)
    monkeypatch.setattr(StagedDatasets, "add_training", late_training)
    reply = tenant.http.post(IMPORT, content=tar, headers=tenant.admin)
    assert reply.status_code == 201, reply.text
    assert len(gone) == 15  # 13 images and the snapshot of `flowers`, one image of `leaves`
    key = tenant.key_of("copy")
    for image in listed(tenant.http, "flowers", key):
        assert tenant.http.get(f"{IMAGES}/{image['digest']}", headers=key).status_code == 200
    (training,) = tenant.http.get(TRAININGS, headers=key).json()["trainings"]
    assert tenant.http.get(f"{TRAININGS}/{training['id']}/snapshot", headers=key).status_code == 200
