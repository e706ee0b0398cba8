"""Back-tests over HTTP: which kept images a version would answer otherwise."""

from typing import Any

import numpy as np
import pytest

from adapters import Adapter, Backbone
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import flat_png, random_adapter, wait_until
from tests.support.zips import zip_of

URL = "/v1/tasks/shades"
ZIP = {"content-type": "application/zip"}


def train(hub: Hub, files: dict[str, bytes]) -> int:
    assert hub.http.post(f"{URL}/images", content=zip_of(files), headers=ZIP).status_code == 200
    reply = hub.http.post(f"{URL}/trainings")
    assert reply.status_code == 200, reply.text
    return int(reply.json()["version"])


def shades(seed: int, count: int) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    return {f"{'dark' if v < 128 else 'light'}/{i}.png": flat_png(int(v)) for i, v in enumerate(rng.choice(256, count))}


@pytest.fixture
def kept(hub: Hub) -> Hub:
    """A hub whose task has a version of few images, and keeps the 30 images that it has classified."""
    hub.http.put(URL, json={"keep": {"images": "all"}})
    train(hub, {f"dark/{v}.png": flat_png(v) for v in (100, 120)} | {f"light/{v}.png": flat_png(v) for v in (254, 255)})
    for start in range(0, 30, 10):
        files = [("image", (f"{i}.png", flat_png(3 + 8 * i))) for i in range(start, start + 10)]
        assert hub.http.post(f"{URL}/classify", files=files).status_code == 200
    wait_until(lambda: len(hub.http.get(f"{URL}/images?unlabelled=true&count=100").json()["images"]) == 30)
    return hub


def backtest(hub: Hub, query: str = "") -> Any:
    reply = hub.http.get(f"{URL}/backtest{query}")
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_the_same_version_answers_kept_images_as_it_did(kept: Hub) -> None:
    found = backtest(kept)
    assert (found["a"], found["b"], found["images"], found["beyond_limit"]) == (None, 1, 30, 0)
    # Features are stored as float16, so an answer at the border of two labels may differ.
    assert found["changed"] == len(found["differ"]) <= 1
    same = backtest(kept, "?a=1&b=1")
    assert (same["changed"], same["share"], same["differ"], same["changes"]) == (0, 0.0, [], [])
    assert same["interval"][0] == 0.0 < same["interval"][1] < 0.15


def test_images_that_another_version_answers_otherwise_are_listed_with_both_answers(kept: Hub) -> None:
    second = train(kept, {f"light/{v}.png": flat_png(v) for v in range(130, 180, 5)})
    found = backtest(kept, f"?b={second}&a=1")
    assert (found["a"], found["b"], found["images"]) == (1, second, 30)
    assert 0 < found["changed"] == len(found["differ"])
    assert found["share"] == pytest.approx(found["changed"] / 30, abs=1e-4)
    assert found["interval"][0] < found["share"] < found["interval"][1]
    assert all(image["a"] != image["b"] for image in found["differ"])
    assert sum(change["images"] for change in found["changes"]) == found["changed"]
    arrival = [image["added"] for image in found["differ"]]
    assert arrival == sorted(arrival, reverse=True)
    assert backtest(kept, "?last=7")["images"] == 7
    assert kept.engine.idle_images == 0


def test_labels_of_kept_images_say_which_version_is_right(kept: Hub) -> None:
    for image in kept.http.get(f"{URL}/images?unlabelled=true&count=5").json()["images"]:
        kept.http.post(f"{URL}/feedback", json={"image": image["digest"], "label": image["answer"]["label"]})
    labelled = backtest(kept)["labelled"]
    assert (labelled["images"], labelled["a"]) == (5, 5)
    assert labelled["b"] >= 4
    assert kept.http.post(f"{URL}/trainings").status_code == 200
    again = backtest(kept, "?b=2")["labelled"]
    assert again["images"] < 5  # those that train version 2 say nothing about it


def test_versions_with_kernels_answer_in_idle_turns_and_count_no_answer(kept: Hub, backbone: Backbone) -> None:
    adapted = random_adapter(backbone, seed=0, classes=2)
    reply = kept.http.post(f"{URL}/versions?labels=changed", content=adapted.data, headers=OCTETS)
    assert reply.status_code == 201, reply.text
    before = kept.http.get(f"{URL}/usage").json()["total"]["images"]
    found = backtest(kept, "?a=1&b=2")
    assert (found["images"], kept.engine.idle_images) == (30, 60)
    assert kept.http.get(f"{URL}/usage").json()["total"]["images"] == before == 30


def test_a_backtest_without_kept_images_or_of_an_unknown_version_is_refused(hub: Hub, adapters: list[Adapter]) -> None:
    hub.http.post(f"{URL}/versions", content=adapters[0].data, headers=OCTETS)
    hub.http.post(f"{URL}/images?label=dark", content=flat_png(1), headers=OCTETS)
    reply = hub.http.get(f"{URL}/backtest")
    assert (reply.status_code, "kept no classified image" in reply.json()["detail"]) == (409, True)
    assert hub.http.get(f"{URL}/backtest?b=7").status_code == 404
    assert hub.http.get(f"{URL}/backtest?a=stable").status_code == 404
    hub.http.put(f"{URL}/sharing", json={"tenants": ["foreign"]})
    foreign = hub.key_of("foreign")
    assert hub.http.get("/v1/tasks/default:shades/backtest", headers=foreign).status_code == 404


@pytest.mark.parametrize(
    "query", ["last=0", "last=1001", "last=-5", "last=x", f"a={'x' * 64}", f"b={'9' * 64}", "b=%00", "a=", "b=../1"]
)
def test_a_wrong_option_of_a_backtest_is_refused(kept: Hub, query: str) -> None:
    assert kept.http.get(f"{URL}/backtest?{query}").status_code in (404, 422)
