"""One image and many tasks over HTTP: `POST /v1/classify` with `image` and `tasks`."""

import base64
import json
from typing import Any

import pytest

from adapters import Adapter, Backbone
from hub.schemas import MAX_IMAGES, MAX_TASKS
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import calibrated_adapter, flat_png, png, random_adapter, wait_until, with_metadata
from tests.support.protocols import Reply

IMAGE = base64.b64encode(png(1)).decode()
HEADS = 5


@pytest.fixture(scope="module")
def heads(backbone: Backbone) -> list[Adapter]:
    plain = [random_adapter(backbone, seed=i, kernels=0, rescale="none", classes=3 + i) for i in range(HEADS - 1)]
    return [*plain, calibrated_adapter(backbone)]


@pytest.fixture
def many(hub: Hub, heads: list[Adapter], adapters: list[Adapter]) -> Hub:
    """A hub with tasks `head-0` .. `head-4`, the last with typicality, and `deep-0`, `deep-1`, which have kernels."""
    for i, adapter in enumerate(heads):
        register(hub, f"head-{i}", adapter.data)
    for i, adapter in enumerate(adapters[:2]):
        register(hub, f"deep-{i}", adapter.data)
    return hub


def register(hub: Hub, task: str, data: bytes, headers: dict[str, str] | None = None) -> None:
    reply = hub.http.post(f"/v1/tasks/{task}/versions", content=data, headers=OCTETS | (headers or {}))
    assert reply.status_code == 201, reply.text


def classify(hub: Hub, tasks: Any, headers: dict[str, str] | None = None, image: str = IMAGE, **params: Any) -> Reply:
    reply: Reply = hub.http.post("/v1/classify", json={"image": image, "tasks": tasks}, headers=headers, params=params)
    return reply


def refused(reply: Reply, status: int, field: str) -> str:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    assert field in [error["field"] for error in reply.json()["errors"]]
    return str(reply.json()["detail"])


def wait_for_count(hub: Hub, images: int) -> None:
    """Wait until the tenant's usage has this number of images; a gateway writes its counts twice a second."""
    wait_until(lambda: hub.http.get("/v1/usage").json()["counted"]["images"] == images)


def test_each_task_answers_as_in_a_call_of_its_own(many: Hub) -> None:
    names = ["deep-1", "head-4", "head-0", "deep-0"]
    reply = classify(many, names, top_k=2)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-worker"] == "engine"
    assert "decode" in reply.headers["server-timing"]
    results = reply.json()["results"]
    assert set(reply.json()) == {"results"}
    assert [result["task"] for result in results] == names
    for name, result in zip(names, results, strict=True):
        alone = many.http.post(f"/v1/tasks/{name}/classify?top_k=2", content=png(1)).json()
        assert (result["version"], result["digest"]) == (alone["version"], alone["digest"])
        assert [p["label"] for p in result["predictions"]] == [p["label"] for p in alone["predictions"][0]]
        scores = [p["score"] for p in alone["predictions"][0]]
        assert [p["score"] for p in result["predictions"]] == pytest.approx(scores, abs=1e-5)
        assert ("typicality" in result) == ("typicality" in alone) == (name == "head-4")
    assert results[1]["unknown"] is False


def test_all_heads_are_in_one_call_to_a_worker(many: Hub, heads: list[Adapter], adapters: list[Adapter]) -> None:
    assert classify(many, "*").status_code == 200
    ((key, digests),) = many.engine.calls
    assert key == "default/0"
    assert sorted(digests) == sorted(adapter.digest for adapter in (*heads, *adapters[:2]))


def test_a_star_is_every_task_that_can_answer_and_names_the_others(
    many: Hub, heads: list[Adapter], adapters: list[Adapter]
) -> None:
    many.http.put("/v1/tasks/empty")
    bad = with_metadata(heads[0], labels=json.dumps(["x", "y", "z"]))
    register(many, "bad", bad)
    digest = many.http.get("/v1/tasks/bad/versions/latest").json()["digest"]
    many.engine.invalid.add(digest)
    register(many, "theirs", adapters[2].data, many.key_of("other"))
    reply = classify(many, "*").json()
    assert [result["task"] for result in reply["results"]] == ["deep-0", "deep-1", *(f"head-{i}" for i in range(HEADS))]
    assert [skipped["task"] for skipped in reply["skipped"]] == ["bad", "empty"]
    assert "does not fit" in reply["skipped"][0]["reason"]
    assert "has no version yet" in reply["skipped"][1]["reason"]
    assert "task 'bad' cannot answer" in refused(classify(many, ["head-0", "bad"]), 422, "tasks")
    assert "has no version yet" in refused(classify(many, ["head-0", "empty"]), 404, "version")
    many.http.delete("/v1/tasks/deep-0")
    assert "deep-0" not in [result["task"] for result in classify(many, "*").json()["results"]]


def test_coverage_skips_tasks_without_thresholds_for_a_star_and_is_an_error_in_a_list(many: Hub) -> None:
    reply = classify(many, "*", coverage=0.9).json()
    assert [result["task"] for result in reply["results"]] == ["head-4"]
    assert reply["results"][0]["set"]
    assert len(reply["skipped"]) == HEADS + 1
    assert "task 'head-0'" in refused(classify(many, ["head-0"], coverage=0.9), 422, "coverage")


def test_a_star_without_an_answer_is_an_error(hub: Hub) -> None:
    assert "this key has no task" in refused(classify(hub, "*"), 404, "tasks")
    hub.http.put("/v1/tasks/empty")
    assert "none of the 1 tasks can answer; 'empty'" in refused(classify(hub, "*"), 422, "tasks")


def test_tasks_of_others_answer_where_they_are_shared_and_are_missing_elsewhere(
    many: Hub, adapters: list[Adapter]
) -> None:
    friend = many.key_of("friend", "caller")
    register(many, "own", adapters[2].data, many.key_of("friend"))
    names = ["own", "default:head-0"]
    hidden = classify(many, names, friend)
    assert "there is no task 'default:head-0'" in refused(hidden, 404, "task")
    many.http.put("/v1/tasks/head-0/sharing", json={"tenants": ["friend"]})
    assert [r["task"] for r in classify(many, names, friend).json()["results"]] == names
    assert [r["task"] for r in classify(many, "*", friend).json()["results"]] == ["own"]
    refused(classify(many, ["default:none"], friend), 404, "task")


def test_a_key_that_is_bound_to_tasks_gets_only_these(many: Hub) -> None:
    made = many.http.post(
        "/v1/tenants/default/keys", json={"name": "camera", "role": "caller", "tasks": ["head-1", "deep-0"]}
    )
    bound = {"authorization": f"Bearer {made.json()['key']}"}
    assert [r["task"] for r in classify(many, "*", bound).json()["results"]] == ["deep-0", "head-1"]
    assert classify(many, ["head-1", "head-2"], bound).status_code == 403
    token = many.http.post("/v1/tokens", json={"task": "head-3", "expires_s": 60}, headers={}).json()["token"]
    one = classify(many, "*", {"authorization": f"Bearer {token}"}).json()
    assert [r["task"] for r in one["results"]] == ["head-3"]
    assert classify(many, "*", many.admin).status_code == 403
    assert classify(many, "*", {"authorization": ""}).status_code == 401


@pytest.mark.parametrize(
    ("tasks", "field", "message"),
    [
        ([], "tasks", "has 0 items; must have at least 1"),
        (["head-0"] * 10_001, None, "more than 10000 values"),
        ([f"t{i}" for i in range(MAX_TASKS + 1)], "tasks", f"must have at most {MAX_TASKS}"),
        (["head-0", "head-1", "head-0"], "tasks.2", "task 'head-0' is named twice; name it once"),
        (["head-0", "default:head-0"], "tasks.1", "is named twice"),
        (["head-0", "none"], "task", "there is no task 'none'"),
        (["*"], "tasks.0", "is '*'; must be 1 to 63 characters"),
        (["head-0\x00"], "tasks.0", "must be 1 to 63 characters"),
        (["head-0\u202e"], "tasks.0", "must be 1 to 63 characters"),
        (["../head-0"], "tasks.0", "must be 1 to 63 characters"),
        ([None], "tasks.0", "must be text"),
        ([["head-0"]], "tasks.0", "must be text"),
        ("head-0", "tasks", "is 'head-0'; must be a list of names of tasks, or * for every task"),
        ("**", "tasks", "must be a list of names of tasks, or *"),
        ({"a": 1}, "tasks", "must be a list"),
        (None, "tasks", "must be a list"),
        (1e400, "tasks", "must be a list"),
    ],
)
def test_hostile_tasks_are_refused_by_name_and_cost_nothing(
    many: Hub, tasks: Any, field: str | None, message: str
) -> None:
    body = json.dumps({"image": IMAGE, "tasks": tasks})
    reply = many.http.post("/v1/classify", content=body, headers={"content-type": "application/json"})
    assert reply.status_code in (404, 413, 422), reply.text
    assert message in reply.json()["detail"]
    assert field is None or field in [error["field"] for error in reply.json()["errors"]]
    assert many.engine.calls == []


def test_a_wrong_image_is_refused_by_its_field(many: Hub) -> None:
    assert "not base64" in refused(classify(many, "*", image="#"), 422, "image")
    text = base64.b64encode(b"no image").decode()
    refused(classify(many, "*", image=text), 422, "image")
    for body in ({"tasks": ["head-0"]}, {"image": IMAGE}, {"image": IMAGE, "tasks": "*", "version": "stable"}):
        assert many.http.post("/v1/classify", json=body).status_code == 422
    both = {"image": IMAGE, "tasks": "*", "inputs": [{"task": "head-0", "image": IMAGE}]}
    assert many.http.post("/v1/classify", json=both).status_code == 422
    assert many.engine.calls == []


def test_names_of_members_are_also_names_of_tasks(hub: Hub, heads: list[Adapter]) -> None:
    for name in ("inputs", "tasks", "image"):
        register(hub, name, heads[0].data)
    assert [r["task"] for r in classify(hub, ["inputs", "tasks", "image"]).json()["results"]] == [
        "inputs",
        "tasks",
        "image",
    ]
    inputs = {"inputs": [{"task": "tasks", "image": IMAGE}, {"task": "image", "image": IMAGE}]}
    assert len(hub.http.post("/v1/classify", json=inputs).json()["results"]) == 2


def test_a_call_counts_one_image_for_all_heads_and_one_for_each_other_task(many: Hub) -> None:
    total = 0
    costs = {"head-0": 1, "head-0 head-1 head-2 head-4": 1, "deep-0": 1, "deep-0 deep-1": 2, "head-0 head-1 deep-0": 2}
    for tasks, images in costs.items():
        assert classify(many, tasks.split()).status_code == 200
        wait_for_count(many, total := total + images)
    assert classify(many, "*").status_code == 200
    wait_for_count(many, total + 3)


def test_answers_count_by_the_hundred(hub: Hub, heads: list[Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    from hub.services import many_tasks

    monkeypatch.setattr(many_tasks, "ANSWERS_PER_IMAGE", 2)
    for i, adapter in enumerate(heads):
        register(hub, f"head-{i}", adapter.data)
    assert classify(hub, "*").status_code == 200
    wait_for_count(hub, 1 + 2)  # five answers: two more pairs begun


def test_tasks_that_cost_more_passes_than_a_call_may_have_are_refused(
    hub: Hub, backbone: Backbone, heads: list[Adapter]
) -> None:
    """Heads of one preprocessing are one pass; heads with one of their own are one each."""
    for i in range(MAX_IMAGES):
        preprocess = json.dumps({**heads[0].preprocess, "crop_pct": 0.5 + i / 1000})
        register(hub, f"t{i}", with_metadata(heads[0], preprocess=preprocess))
    assert classify(hub, "*").status_code == 200
    register(hub, "one-more", heads[0].data)
    detail = refused(classify(hub, "*"), 422, "tasks")
    assert f"the 65 tasks cost 65 forward passes (limit {MAX_IMAGES})" in detail


def test_a_tenants_limits_hold(many: Hub) -> None:
    change = {"limits": {"images_in_flight": 2}}
    assert many.http.patch("/v1/tenants/default", json=change, headers=many.admin).status_code == 200
    reply = classify(many, "*")
    assert reply.status_code == 429
    assert reply.json()["errors"][0]["field"] == "images_in_flight"
    assert classify(many, ["head-0", "deep-0"]).status_code == 200


def test_an_image_is_kept_by_each_task_that_keeps_images(many: Hub) -> None:
    settings = {"keep": {"images": "all", "per_day": 5, "days": 1}}
    for task in ("head-0", "deep-0"):
        assert many.http.put(f"/v1/tasks/{task}", json=settings).status_code == 200
    kept = {r["task"]: r.get("image") for r in classify(many, ["head-0", "head-1", "deep-0"]).json()["results"]}
    assert kept["head-1"] is None
    assert kept["head-0"] == kept["deep-0"] is not None


def test_a_cached_star_needs_no_registry_and_sees_changes_of_another_gateway(many: Hub, heads: list[Adapter]) -> None:
    assert classify(many, "*").status_code == 200
    with many.another_gateway() as other:
        reply = other.post("/v1/tasks/new/versions", content=heads[2].data, headers=OCTETS)
        assert reply.status_code == 201
        wait_until(lambda: "new" in [r["task"] for r in classify(many, "*").json()["results"]])


def test_another_image_gets_other_answers(many: Hub) -> None:
    other = classify(many, ["head-4"], image=base64.b64encode(flat_png()).decode()).json()["results"][0]
    assert other["unknown"] is True
