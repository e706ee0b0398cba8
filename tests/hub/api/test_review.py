"""Review over HTTP and through the client: images to label, wrong labels, suggestions, other tenants."""

from pathlib import Path

import pytest
from PIL import Image

from tests.support.hub_app import OCTETS, Hub
from tests.support.models import coloured_noise
from tests.support.zips import zip_of

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}
URL = "/v1/tasks/colours"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return coloured_noise(tmp_path / "colours", COLOURS, count=14, seed=0)


@pytest.fixture
def colours(hub: Hub) -> Hub:
    """A hub with a task `colours` without images."""
    hub.http.put(URL, json={})
    return hub


def add(hub: Hub, folder: Path, numbers: range, label: bool) -> None:
    files = {
        f"{c}/{i}.png" if label else f"{c}-{i}.png": (folder / c / f"{i}.png").read_bytes()
        for c in COLOURS
        for i in numbers
    }
    reply = hub.http.post(f"{URL}/images", content=zip_of(files), headers={"content-type": "application/zip"})
    assert reply.json()["counts"]["added"] == len(files), reply.text


def test_images_to_review_have_no_suggestions_before_any_label(colours: Hub, folder: Path) -> None:
    assert colours.http.get(f"{URL}/review").json()["images"] == []
    add(colours, folder, range(4), label=False)
    reply = colours.http.get(f"{URL}/review", params={"count": 3})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert (body["kind"], body["considered"], len(body["images"])) == ("unlabelled", 12, 3)
    assert len({row["image"]["digest"] for row in body["images"]}) == 3
    assert all((row["suggestions"], row["margin"]) == ([], None) for row in body["images"])


def test_images_to_review_have_suggestions_once_others_have_labels(colours: Hub, folder: Path) -> None:
    add(colours, folder, range(12), label=True)
    add(colours, folder, range(12, 14), label=False)
    images = colours.http.get(f"{URL}/review").json()["images"]
    assert len(images) == 6
    right = [row["suggestions"][0]["label"] == row["image"]["name"].split("-")[0] for row in images]
    assert sum(right) > len(right) / 2
    for row in images:
        assert 0 <= row["margin"] <= 1
        given = colours.http.post(
            f"{URL}/feedback", json={"image": row["image"]["digest"], "label": row["suggestions"][0]["label"]}
        )
        assert given.status_code == 200
    assert colours.http.get(f"{URL}/review").json()["images"] == []


def test_a_wrong_label_is_the_first_suspect(colours: Hub, folder: Path) -> None:
    add(colours, folder, range(14), label=True)
    wrong = colours.http.get(f"{URL}/images", params={"label": "red", "count": 1}).json()["images"][0]["digest"]
    colours.http.patch(f"{URL}/images/{wrong}", json={"label": "blue"})
    images = colours.http.get(f"{URL}/review", params={"kind": "errors"}).json()["images"]
    assert images[0]["image"]["digest"] == wrong
    assert images[0]["suggestions"][0]["label"] == "red"
    assert images[0]["margin"] < 0


def test_a_review_of_another_tenants_task_is_not_found(colours: Hub) -> None:
    foreign = colours.key_of("foreign")
    assert colours.http.get(f"{URL}/review", headers=foreign).status_code == 404
    assert colours.http.get("/v1/tasks/default:colours/review", headers=foreign).status_code == 404
    assert colours.http.get(f"{URL}/review?kind=wrong").status_code == 422
    assert colours.http.get(f"{URL}/review?count=101").status_code == 422


def test_a_dataset_of_one_label_has_no_suspects(colours: Hub, folder: Path) -> None:
    data = (folder / "red" / "0.png").read_bytes()
    colours.http.post(f"{URL}/images?label=red", content=data, headers=OCTETS)
    assert colours.http.get(f"{URL}/review?kind=errors").json()["images"] == []


def test_near_duplicates_are_listed_in_pages_and_trainings_warn_of_them(colours: Hub, folder: Path) -> None:
    add(colours, folder, range(6), label=True)
    assert colours.http.get(f"{URL}/near-duplicates").json()["groups"] == []
    assert not any("near-duplicate" in text for text in colours.http.post(f"{URL}/trainings").json()["warnings"])
    for number, (label, splits) in enumerate({"red": ("train", "test"), "blue": ("train", "train")}.items()):
        path = folder / label / "13.png"
        again = path.with_suffix(".bmp")  # the same pixels in another file
        Image.open(path).save(again)
        for file, split in zip((path, again), splits, strict=True):
            reply = colours.http.post(
                f"{URL}/images", params={"label": label, "split": split}, content=file.read_bytes(), headers=OCTETS
            )
            assert reply.json()["counts"]["added"] == 1, (number, reply.text)
    first = colours.http.get(f"{URL}/near-duplicates", params={"count": 1}).json()
    assert (first["considered"], first["total"], first["total_across_splits"]) == (22, 2, 1)
    (group,) = first["groups"]
    assert (group["size"], group["across_splits"], {image["label"] for image in group["images"]}) == (2, True, {"red"})
    assert group["similarity"] > 0.99
    second = colours.http.get(f"{URL}/near-duplicates", params={"count": 1, "cursor": first["next"]}).json()
    assert (second["next"], second["groups"][0]["across_splits"]) == (None, False)
    for recipe in ("instant", "auto"):
        warnings = colours.http.post(f"{URL}/trainings", json={"recipe": recipe}).json()["warnings"]
        (warning,) = [text for text in warnings if "near-duplicate" in text]
        assert warning.startswith("1 of ")
        assert "GET .../near-duplicates" in warning
    foreign = colours.key_of("foreign")
    assert colours.http.get("/v1/tasks/default:colours/near-duplicates", headers=foreign).status_code == 404
    assert colours.http.get(f"{URL}/near-duplicates?count=101").status_code == 422
