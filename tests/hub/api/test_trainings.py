"""Trainings over HTTP: from uploaded images to a version that answers, and refusals of datasets that cannot train."""

import asyncio
import hashlib
from typing import Any

import pytest
import redis

from hub.registry.datasets import trainings
from hub.services.trainings.instant import fit_instant
from hub.services.trainings.promotion import PromotionService
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import coloured_noise, wait_until
from tests.support.zips import zip_of

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}
TRAININGS = "/v1/tasks/colours/trainings"
IMAGES = "/v1/tasks/colours/images"


@pytest.fixture
def colours(hub: Hub, tmp_path: Any) -> Hub:
    """A hub with a task `colours` and twelve images of each of three colours."""
    hub.http.put("/v1/tasks/colours", json={"promote": "always"})
    folder = coloured_noise(tmp_path / "colours", COLOURS, count=12, seed=0)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}
    reply = hub.http.post(IMAGES, content=zip_of(files), headers={"content-type": "application/zip"})
    assert reply.json()["counts"]["added"] == 36, reply.text
    return hub


def test_a_training_makes_a_version_that_answers_at_once(colours: Hub, tmp_path: Any) -> None:
    reply = colours.http.post(TRAININGS, json={"recipe": "instant"})
    assert reply.status_code == 200, reply.text
    training = reply.json()
    assert (training["state"], training["version"], training["snapshot"]["images"]) == ("done", 1, 36)
    assert training["report"]["leave_one_out_accuracy"] > 0.8
    assert training["report"]["test_images"] == training["snapshot"]["test"] > 0
    new = coloured_noise(tmp_path / "new", COLOURS, count=1, seed=9)
    for label in COLOURS:
        data = (new / label / "0.png").read_bytes()
        answer = colours.http.post("/v1/tasks/colours/classify", content=data, headers=OCTETS).json()
        assert answer["predictions"][0][0]["label"] == label
    task = colours.http.get("/v1/tasks/colours").json()
    assert task["aliases"] == {"latest": {"1": 1}, "stable": {"1": 1}}
    version = colours.http.get("/v1/tasks/colours/versions/1").json()
    assert version["metrics"]["snapshot"] == training["snapshot"]["digest"]
    listed = colours.http.get(f"{TRAININGS}/{version['metrics']['training']}/snapshot").content
    assert hashlib.sha256(listed).hexdigest() == version["metrics"]["snapshot"]


def test_a_training_is_listed_with_its_snapshot(colours: Hub) -> None:
    made = colours.http.post(TRAININGS).json()
    assert colours.http.get(TRAININGS).json()["trainings"] == [made]
    assert colours.http.get(f"{TRAININGS}/{made['id']}").json() == made
    snapshot = colours.http.get(f"{TRAININGS}/{made['id']}/snapshot").json()
    listed = colours.http.get(f"{IMAGES}?count=100").json()["images"]
    assert [image[:2] for image in snapshot["images"]] == sorted([each["digest"], each["label"]] for each in listed)
    uses = {image["digest"]: image["use"] for image in listed}
    moved = [image for image in snapshot["images"] if image[2] != uses[image[0]]]
    untested = set(COLOURS) - {image["label"] for image in listed if image["use"] == "test"}
    assert sorted(image[1:] for image in moved) == [[label, "test"] for label in sorted(untested)]
    assert colours.http.get(f"{TRAININGS}/{'0' * 16}").status_code == 404
    entries = colours.http.get("/v1/tenants/default/audit").json()["entries"]
    assert [entry["action"] for entry in entries].count("training.run") == 1


def test_an_admin_sees_the_trainings_of_all_tenants(colours: Hub) -> None:
    made = colours.http.post(TRAININGS).json()
    listed = colours.http.get("/v1/admin/trainings", headers=colours.admin).json()
    assert (listed["running"], listed["queued"]) == (0, 0)
    [training] = listed["trainings"]
    assert (training["tenant"], training["task"], training["id"]) == ("default", "colours", made["id"])
    assert (training["state"], training["images"], training["version"]) == ("done", 36, 1)


def test_an_instant_training_has_a_report_that_goes_with_its_task(colours: Hub) -> None:
    red = colours.http.get(f"{IMAGES}?label=red&split=train").json()["images"]
    colours.http.patch(f"{IMAGES}/{red[0]['digest']}", json={"label": "blue"})
    made = colours.http.post(TRAININGS).json()
    assert made["report_files"] == ["report.json"]
    report = colours.http.get(f"{TRAININGS}/{made['id']}/report/report.json").json()
    assert report["labels"] == ["blue", "green", "red"]
    counts = [report["classes"][label]["images"] for label in report["labels"]]
    assert [sum(row) for row in report["confusion"]] == counts
    wrong = {(error["image"], error["label"], error["predicted"]) for error in report["errors"]}
    assert (red[0]["digest"], "blue", "red") in wrong
    assert report["learning_curve"][-1] == [made["snapshot"]["train"], report["accuracy"]]
    assert report["advice"]
    assert [name for name in colours.stored() if name.endswith(".zip")]
    colours.http.delete("/v1/tasks/colours")
    wait_until(lambda: not any(name.endswith(".zip") for name in colours.stored()), timeout_s=20)


def test_stored_features_are_used_and_missing_ones_are_computed(colours: Hub) -> None:
    with redis.Redis.from_url(colours.redis_url) as client:
        # Otherwise the gateway's first look at images without features could compute the same ones beside a training.
        wait_until(lambda: bool(client.exists("karst:feature-key")) and not client.zcard("karst:pending"))
    colours.http.post(TRAININGS)  # gives a batch that the look has leased the time to end
    assert colours.engine.feature_images == 36
    for path in colours.store_folder.rglob("*.f16"):
        path.unlink()
    assert colours.http.post(TRAININGS).status_code == 200
    assert colours.engine.feature_images == 72


def test_a_new_label_grows_the_classes_of_the_task(colours: Hub, tmp_path: Any) -> None:
    colours.http.post(TRAININGS)
    white = coloured_noise(tmp_path / "white", {"white": (230, 230, 230)}, count=4, seed=3)
    for path in white.rglob("*.png"):
        colours.http.post(f"{IMAGES}?label=white", content=path.read_bytes(), headers=OCTETS)
    assert colours.http.post(TRAININGS).json()["version"] == 2
    assert colours.http.get("/v1/tasks/colours").json()["labels"] == ["blue", "green", "red", "white"]


def test_a_dataset_that_cannot_train_is_refused_with_the_reason(hub: Hub, tmp_path: Any) -> None:
    hub.http.put("/v1/tasks/colours", json={})

    def refusal() -> str:
        reply = hub.http.post(TRAININGS)
        assert reply.status_code == 409, reply.text
        return str(reply.json()["detail"])

    def add(label: str, i: int, split: str) -> None:
        data = (images / label / f"{i}.png").read_bytes()
        hub.http.post(IMAGES, params={"label": label, "split": split}, content=data, headers=OCTETS)

    images = coloured_noise(tmp_path / "images", COLOURS, count=3, seed=0)
    assert "no labelled image" in refusal()
    add("red", 0, "train")
    assert "one label only" in refusal()
    add("blue", 0, "test")
    assert "'blue' have the split test" in refusal()
    add("blue", 1, "train")
    assert "No label has two images" in refusal()
    add("red", 1, "train")
    made = hub.http.post(TRAININGS)
    assert made.status_code == 200, made.text
    assert "one image only of 'blue'" in made.json()["warnings"][0]
    assert "no test image of 'red'" in made.json()["warnings"][1]
    assert hub.http.get("/v1/tasks/colours").json()["versions"][0]["version"] == 1


def test_an_image_whose_file_is_lost_is_left_out_with_a_warning(colours: Hub) -> None:
    for path in colours.store_folder.rglob("*.f16"):
        path.unlink()
    next(colours.store_folder.rglob("*.image")).unlink()
    colours.engine.feature_images = 0
    made = colours.http.post(TRAININGS).json()
    assert made["snapshot"]["images"] == 35
    assert "1 images cannot be read and were left out" in made["warnings"]


def test_a_training_of_another_tenants_task_or_without_a_task_is_not_found(colours: Hub) -> None:
    foreign = colours.key_of("foreign")
    assert colours.http.post("/v1/tasks/default:colours/trainings", headers=foreign).status_code == 404
    assert colours.http.post(TRAININGS, headers=foreign).status_code == 404
    assert colours.http.post("/v1/tasks/nothing/trainings").status_code == 404


def test_a_training_beyond_the_quota_of_snapshots_is_refused_and_leaves_no_file(
    colours: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainings, "TRAINING_BYTES", 100)
    for recipe in ("instant", "karst"):
        reply = colours.http.post(TRAININGS, json={"recipe": recipe})
        assert (reply.status_code, reply.json()["errors"][0]["field"]) == (429, "training_bytes"), reply.text
    assert colours.http.get(TRAININGS).json()["trainings"] == []
    assert not [name for name in colours.stored() if name.endswith(".json")]


def test_a_deleted_task_takes_its_snapshots(colours: Hub) -> None:
    colours.http.post(TRAININGS)
    assert any(name.endswith(".json") for name in colours.stored())
    colours.http.delete("/v1/tasks/colours")
    wait_until(lambda: not any(name.endswith((".json", ".image", ".f16")) for name in colours.stored()), timeout_s=20)


@pytest.mark.parametrize("at", ["fit", "registration"])
@pytest.mark.parametrize("remade", [False, True])
def test_a_training_writes_nothing_after_its_task_was_deleted_and_made_again(
    colours: Hub, monkeypatch: pytest.MonkeyPatch, at: str, *, remade: bool
) -> None:
    def delete() -> None:
        assert colours.http.delete("/v1/tasks/colours").status_code == 204
        assert not remade or colours.http.put("/v1/tasks/colours", json={}).status_code == 201

    register = PromotionService.register

    def fit_then_delete(*arguments: Any) -> Any:
        found = fit_instant(*arguments)
        delete()
        return found

    async def register_then_delete(*arguments: Any) -> Any:
        found = await register(*arguments)
        await asyncio.to_thread(delete)
        return found

    if at == "fit":
        monkeypatch.setattr("hub.services.trainings.service.fit_instant", fit_then_delete)
    else:
        monkeypatch.setattr(PromotionService, "register", register_then_delete)
    assert colours.http.post(TRAININGS).status_code == (409 if at == "fit" and remade else 404)
    used = colours.http.get("/v1/usage").json()["used"]
    assert (used["tasks"], used["training_bytes"], used["stored_bytes"]) == (int(remade), 0, 0)
    if remade:
        assert colours.http.get(TRAININGS).json()["trainings"] == []
        assert colours.http.get("/v1/tasks/colours").json()["aliases"] == {}
