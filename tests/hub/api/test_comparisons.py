"""Comparison of two versions on the same images, and promotion by a task's rule, over HTTP."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adapters import Adapter, Backbone
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import random_adapter
from tests.support.zips import zip_of

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}
TASK = "/v1/tasks/colours"


def add(hub: Hub, folder: Path, split: str, count: int, seed: int, spread: float = 10) -> None:
    """Add images of 8 x 8 pixels of each colour; a larger spread makes them harder to tell apart."""
    rng, files = np.random.default_rng(seed), {}
    folder.mkdir()
    for label, colour in COLOURS.items():
        for i in range(count):
            pixels = np.clip(np.array(colour) + rng.normal(0, spread, 3) + rng.normal(0, 20, (8, 8, 3)), 0, 255)
            path = folder / f"{label}{i}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            files[f"{label}/{label}{i}.png"] = path.read_bytes()
    reply = hub.http.post(
        f"{TASK}/images?split={split}", content=zip_of(files), headers={"content-type": "application/zip"}
    )
    assert reply.json()["counts"]["added"] == 3 * count, reply.text


def train(hub: Hub) -> dict[str, Any]:
    reply = hub.http.post(f"{TASK}/trainings")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


@pytest.fixture
def colours(hub: Hub, tmp_path: Path) -> Hub:
    """A hub with a task whose first version was trained on 4 images per colour, and 20 test images per colour."""
    hub.http.put(TASK, json={"promote": "if_better"})
    add(hub, tmp_path / "few", "train", 4, seed=0, spread=80)
    add(hub, tmp_path / "test", "test", 20, seed=1, spread=60)
    return hub


def test_two_versions_are_compared_on_the_same_test_images(colours: Hub, tmp_path: Path) -> None:
    first = train(colours)
    add(colours, tmp_path / "more", "train", 20, seed=2, spread=60)
    second = train(colours)
    found = colours.http.get(f"{TASK}/compare?a=1&b=2").json()
    assert (found["images"], found["left_out"], found["beyond_limit"]) == (60, 0, 0)
    for name, training in (("a", first), ("b", second)):
        assert found[name]["accuracy"] == training["report"]["test_accuracy"]
        assert found[name]["interval"] == training["report"]["test_interval"]
    assert [row["label"] for row in found["classes"]] == ["blue", "green", "red"]
    assert sum(row["images"] * row["b"] for row in found["classes"]) == pytest.approx(found["b"]["right"], abs=0.01)
    assert found["differing"] == len(found["differ"]) > 0
    assert all(image["a"] != image["b"] for image in found["differ"])
    assert found["gain"] == pytest.approx(found["b"]["accuracy"] - found["a"]["accuracy"], abs=1e-3)
    mirrored = colours.http.get(f"{TASK}/compare?a=2&b=1").json()
    assert (mirrored["gain"], mirrored["differing"]) == (-found["gain"], found["differing"])


def test_heads_on_features_and_a_worker_give_the_same_answers(colours: Hub, tmp_path: Path, backbone: Backbone) -> None:
    train(colours)
    heads = colours.http.get(f"{TASK}/compare?a=1&b=1").json()
    adapted = random_adapter(backbone, seed=0, classes=3)
    reply = colours.http.post(f"{TASK}/versions?labels=changed", content=adapted.data, headers=OCTETS)
    assert reply.status_code == 201, reply.text
    mixed = colours.http.get(f"{TASK}/compare?a=1&b=2").json()
    assert mixed["images"] == 60
    # Features are stored as float16, so an answer at the border of two labels may differ.
    assert abs(mixed["a"]["right"] - heads["a"]["right"]) <= 1


def test_images_that_trained_a_version_are_left_out(colours: Hub) -> None:
    train(colours)
    images = colours.http.get(f"{TASK}/images?split=train&count=100").json()["images"]
    for image in images[:2]:
        colours.http.patch(f"{TASK}/images/{image['digest']}", json={"split": "test"})
    found = colours.http.get(f"{TASK}/compare?a=1&b=latest").json()
    assert (found["images"], found["left_out"]) == (60, 2)


def test_a_comparison_without_test_images_or_with_an_unknown_version_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.http.put(TASK, json={})
    add(hub, tmp_path / "few", "train", 2, seed=0)
    train(hub)
    reply = hub.http.get(f"{TASK}/compare?a=1&b=1")
    assert reply.status_code == 409
    assert "no test image" in reply.json()["detail"]
    assert hub.http.get(f"{TASK}/compare?a=1&b=7").status_code == 404
    assert hub.http.get(f"{TASK}/compare").status_code == 404  # no version is stable
    foreign = hub.key_of("foreign")
    assert hub.http.get("/v1/tasks/default:colours/compare", headers=foreign).status_code == 404


def test_a_version_is_promoted_if_it_is_better_on_the_same_images(colours: Hub, tmp_path: Path) -> None:
    first = train(colours)
    assert first["promotion"] == {
        "promoted": True,
        "reason": "the task had no stable version",
        "images": None,
        "stable_accuracy": None,
        "new_accuracy": None,
        "standard_error": None,
    }
    again = train(colours)
    assert (again["version"], again["promotion"]["promoted"]) == (2, False)
    add(colours, tmp_path / "more", "train", 20, seed=2, spread=60)
    better = train(colours)
    promotion = better["promotion"]
    assert promotion["promoted"], promotion
    assert promotion["images"] == 60
    assert promotion["new_accuracy"] - promotion["stable_accuracy"] > promotion["standard_error"]
    assert colours.http.get(TASK).json()["aliases"]["stable"] == {"3": 1}
    add(colours, tmp_path / "one", "train", 1, seed=3, spread=60)
    same = train(colours)
    assert not same["promotion"]["promoted"]
    assert "not better by more than one standard error" in same["promotion"]["reason"]
    aliases = colours.http.get(TASK).json()["aliases"]
    assert (aliases["stable"], aliases["latest"]) == ({"3": 1}, {"4": 1})
    entries = colours.http.get("/v1/tenants/default/audit").json()["entries"]
    decisions = [entry["detail"]["promotion"] for entry in entries if entry["action"] == "training.run"]
    assert [decision["promoted"] for decision in decisions] == [True, False, True, False]
    assert decisions[2]["images"] == 60


def test_no_version_is_promoted_without_a_rule(hub: Hub, tmp_path: Path, adapters: list[Adapter]) -> None:
    hub.http.put(TASK, json={})
    add(hub, tmp_path / "few", "train", 3, seed=0)
    assert train(hub)["promotion"] is None
    assert "stable" not in hub.http.get(TASK).json()["aliases"]
