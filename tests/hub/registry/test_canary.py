"""Aliases: weighted canaries with canary keys, roll-back, and versions and aliases that cannot be deleted."""

from collections import Counter

from httpx2 import Response

from adapters import Adapter
from hub.registry.models import Task, choose_version
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import png

URL = "/v1/tasks/flowers"


def register(hub: Hub, adapters: list[Adapter], count: int) -> None:
    for adapter in adapters[:count]:
        hub.http.post(f"{URL}/versions", content=adapter.data, headers=OCTETS)


def task(**weights: int) -> Task:
    digests = {n: f"{n:064x}" for n in (1, 2, 3)}
    return Task("flowers", digests, {"canary": {int(n[1:]): w for n, w in weights.items()}})


def test_a_canary_gets_its_share_and_a_canary_key_keeps_its_version() -> None:
    drawn = Counter(choose_version(task(v1=90, v3=10), "canary") for _ in range(5000))
    assert set(drawn) == {1, 3}
    assert 350 < drawn[3] < 650  # 500 expected; more than 6 standard deviations
    by_key = {f"user-{i}": choose_version(task(v1=90, v3=10), "canary", f"user-{i}") for i in range(2000)}
    assert 120 < sum(v == 3 for v in by_key.values()) < 280
    assert by_key == {key: choose_version(task(v1=90, v3=10), "canary", key) for key in by_key}
    wider = {key: choose_version(task(v1=60, v3=40), "canary", key) for key in by_key}
    assert all(wider[key] == 3 for key, v in by_key.items() if v == 3)  # a key with the canary keeps it


def test_a_canary_key_gets_the_same_version_at_each_call(hub: Hub, adapters: list[Adapter]) -> None:
    register(hub, adapters, 2)
    assert hub.http.put(f"{URL}/aliases/canary", json={"weights": {"1": 50, "2": 50}}).status_code == 200

    def classify(headers: dict[str, str]) -> int:
        reply = hub.http.post(f"{URL}/classify", content=png(), params={"version": "canary"}, headers=headers)
        return int(reply.json()["version"])

    assert {classify({}) for _ in range(30)} == {1, 2}
    for key in "abc":
        assert len({classify({"x-canary-key": key}) for _ in range(5)}) == 1


def test_each_roll_back_of_an_alias_goes_one_step_back(hub: Hub, adapters: list[Adapter]) -> None:
    register(hub, adapters, 3)
    for body in ({"version": 1}, {"weights": {"1": 90, "2": 10}}, {"version": 2}, {"version": 2}, {"version": 3}):
        hub.http.put(f"{URL}/aliases/stable", json=body)

    def roll_back() -> Response:
        return hub.http.post(f"{URL}/aliases/stable/rollback")

    assert roll_back().json()["aliases"]["stable"] == {"2": 1}
    assert roll_back().json()["aliases"]["stable"] == {"1": 90, "2": 10}
    assert hub.http.post(f"{URL}/classify", content=png(), params={"version": "stable"}).json()["version"] in (1, 2)
    assert roll_back().json()["aliases"]["stable"] == {"1": 1}
    refused = roll_back()
    assert refused.status_code == 409
    assert "has no former target that still exists" in refused.json()["detail"]
    assert hub.http.get(URL).json()["aliases"]["stable"] == {"1": 1}
    assert hub.http.post(f"{URL}/aliases/absent/rollback").status_code == 404


def test_a_roll_back_skips_deleted_versions(hub: Hub, adapters: list[Adapter]) -> None:
    register(hub, adapters, 3)
    for n in (1, 2, 3):
        hub.http.put(f"{URL}/aliases/stable", json={"version": n})
    assert hub.http.delete(f"{URL}/versions/2").status_code == 204
    assert hub.http.post(f"{URL}/aliases/stable/rollback").json()["aliases"]["stable"] == {"1": 1}


def test_versions_with_an_alias_and_latest_cannot_be_deleted(hub: Hub, adapters: list[Adapter]) -> None:
    register(hub, adapters, 3)
    hub.http.put(f"{URL}/aliases/canary", json={"weights": {"1": 90, "2": 10}})
    for n, alias in ((1, "canary"), (2, "canary"), (3, "latest")):
        reply = hub.http.delete(f"{URL}/versions/{n}")
        assert reply.status_code == 409
        assert f"alias '{alias}'" in reply.json()["detail"]
    assert hub.http.delete(f"{URL}/aliases/latest").status_code == 409
    assert hub.http.delete(f"{URL}/aliases/canary").status_code == 204
    assert hub.http.delete(f"{URL}/versions/1").status_code == 204
    assert hub.http.delete(f"{URL}/aliases/canary").status_code == 404
