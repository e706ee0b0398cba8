"""Tenants over HTTP: creation, limits, usage, deletion and the audit of each change."""

from collections.abc import Iterator
from typing import Any

import httpx
from httpx2 import Response

from adapters import Adapter
from tests.support.hub_app import OCTETS, Hub, bearer
from tests.support.models import png, wait_until


def create(hub: Hub, tenant: str, **limits: Any) -> Response:
    return hub.http.post("/v1/tenants", json={"tenant": tenant, "limits": limits}, headers=hub.admin)


def test_a_deleted_tenant_leaves_nothing_to_a_new_one_of_its_name(hub: Hub, adapters: list[Adapter]) -> None:
    created = create(hub, "acme", tasks=2)
    assert created.status_code == 201
    assert (created.json()["tenant"], created.json()["limits"]["tasks"], created.json()["limits"]["versions"]) == (
        "acme",
        2,
        100,
    )
    assert create(hub, "acme").status_code == 409
    assert [t["tenant"] for t in hub.http.get("/v1/tenants", headers=hub.admin).json()["tenants"]] == [
        "acme",
        "default",
    ]
    owner = hub.http.post("/v1/tenants/acme/keys", json={"name": "o", "role": "owner"}, headers=hub.admin).json()
    acme = bearer(owner["key"])
    assert hub.http.get("/v1/tenants/acme", headers=acme).json() == created.json()
    register = "/v1/tasks/flowers/versions"
    assert hub.http.post(register, content=adapters[0].data, headers=OCTETS | acme).status_code == 201
    assert hub.http.post("/v1/tasks/flowers/classify", content=png(), headers=acme).status_code == 200

    assert hub.http.delete("/v1/tenants/acme", headers=hub.admin).status_code == 204
    assert hub.http.get("/v1/tasks", headers=acme).status_code == 401
    assert hub.http.get("/v1/tenants/acme", headers=hub.admin).status_code == 404
    assert [name for name in hub.registered() if name.startswith("karst:t:acme:")] == []
    assert create(hub, "acme").status_code == 201
    again = hub.http.post("/v1/tenants/acme/keys", json={"name": "o", "role": "owner"}, headers=hub.admin).json()
    assert hub.http.get("/v1/tasks", headers=bearer(again["key"])).json() == {"tasks": []}
    assert hub.http.get("/v1/usage", headers=bearer(again["key"])).json()["counted"]["requests"] == 0
    actions = [e["action"] for e in hub.http.get("/v1/tenants/acme/audit", headers=hub.admin).json()["entries"]]
    assert actions == ["tenant.create", "key.create"]  # no entries of the deleted tenant


def test_a_registration_is_refused_at_each_limit(hub: Hub, adapters: list[Adapter]) -> None:
    create(hub, "acme", tasks=1, versions=2, stored_bytes=10**6)
    acme = hub.key_of("acme")

    def register(task: str, i: int) -> Response:
        return hub.http.post(f"/v1/tasks/{task}/versions", content=adapters[i].data, headers=OCTETS | acme)

    def assert_refused(reply: Response, field: str) -> None:
        assert reply.status_code == 429
        assert reply.json()["errors"][0]["field"] == field
        assert int(reply.headers["retry-after"]) > 0

    assert register("a", 0).status_code == 201
    assert_refused(register("b", 1), "tasks")
    assert register("a", 1).status_code == 201
    before = hub.registered(), hub.stored()
    assert_refused(register("a", 2), "versions")
    assert (hub.registered(), hub.stored()) == before
    assert register("a", 0).status_code == 200  # the same file needs no more bytes
    used = hub.http.get("/v1/usage", headers=acme).json()
    assert used["used"]["tasks"] == 1
    assert used["used"]["stored_bytes"] == len(adapters[0].data) + len(adapters[1].data)
    change = {"limits": {"versions": 9, "stored_bytes": used["used"]["stored_bytes"] + 1}}
    assert hub.http.patch("/v1/tenants/acme", json=change, headers=hub.admin).json()["limits"]["tasks"] == 1
    assert_refused(register("a", 2), "stored_bytes")
    assert hub.http.delete("/v1/tasks/a/versions/1", headers=acme).status_code == 204
    assert register("a", 0).status_code == 201
    hub.http.delete("/v1/tasks/a", headers=acme)
    assert hub.http.get("/v1/usage", headers=acme).json()["used"]["stored_bytes"] == 0


def test_a_limit_outside_its_range_is_refused(hub: Hub) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"requests_per_second": 0}, "limits.requests_per_second"),
        ({"weight": 1e9}, "limits.weight"),
        ({"tasks": -1}, "limits.tasks"),
        ({"taks": 1}, "limits.taks"),
    ]
    for limits, field in cases:
        reply = create(hub, "acme", **limits)
        assert (reply.status_code, reply.json()["errors"][0]["field"]) == (422, field)
    assert hub.http.post("/v1/tenants", json={"tenant": "A b"}, headers=hub.admin).status_code == 422


def test_an_owner_cannot_tell_another_tenant_from_an_absent_one(hub: Hub) -> None:
    create(hub, "acme")
    for path in ("", "/keys", "/usage", "/audit", "/export"):
        foreign, absent = (hub.http.get(f"/v1/tenants/{name}{path}") for name in ("acme", "nobody"))
        assert foreign.status_code == absent.status_code == 404
        assert foreign.text.replace("acme", "nobody") == absent.text


def test_every_change_is_audited(hub: Hub, adapters: list[Adapter]) -> None:
    key = hub.http.post("/v1/tenants/default/keys", json={"name": "ann", "role": "owner"}).json()
    ann = bearer(key["key"])
    url = "/v1/tasks/flowers"
    for i in range(2):
        hub.http.post(f"{url}/versions", content=adapters[i].data, headers=OCTETS | ann)
    hub.http.put(f"{url}/aliases/stable", json={"version": 1}, headers=ann)
    hub.http.post(f"{url}/aliases/latest/rollback", headers=ann)
    create(hub, "acme")
    hub.http.put(f"{url}/sharing", json={"tenants": ["acme"]}, headers=ann)
    hub.http.delete(f"{url}/versions/2", headers=ann)
    hub.http.delete(f"{url}/aliases/stable", headers=ann)
    hub.http.delete(url, headers=ann)
    hub.http.delete(f"/v1/tenants/default/keys/{key['id']}")
    page = hub.http.get("/v1/tenants/default/audit", params={"count": 5}).json()
    entries = page["entries"]
    while page["next"]:
        page = hub.http.get("/v1/tenants/default/audit", params={"count": 5, "after": page["next"]}).json()
        entries += page["entries"]
    by_ann = [e for e in entries if e["key"] == key["id"]]
    assert [e["action"] for e in by_ann] == [
        "version.register",
        "version.register",
        "alias.set",
        "alias.roll-back",
        "task.share",
        "version.delete",
        "alias.delete",
        "task.delete",
    ]
    assert all((e["name"], e["role"], e["tenant"]) == ("ann", "owner", "default") for e in by_ann)
    assert by_ann[1]["detail"] == {
        "task": "flowers",
        "version": 2,
        "digest": adapters[1].digest,
        "aliases": ["latest"],
    }
    assert by_ann[3]["detail"]["targets"] == {"1": 1}
    assert entries[-1]["action"] == "key.revoke"
    whole = hub.http.get("/v1/audit", params={"count": 1000}, headers=hub.admin).json()["entries"]
    assert [e["action"] for e in whole if e["tenant"] == "default"] == [e["action"] for e in entries]
    assert key["key"] not in str(whole)


def test_audit_has_the_newest_entry_first_when_a_client_asks_for_it(hub: Hub) -> None:
    for name in ("a", "b", "c"):
        hub.http.put(f"/v1/tasks/{name}", json={})
    path = "/v1/tenants/default/audit"
    newest: dict[str, str | int] = {"order": "desc", "count": 2}
    oldest = hub.http.get(path).json()["entries"]
    page = hub.http.get(path, params=newest).json()
    found = list(page["entries"])
    while page["next"]:
        page = hub.http.get(path, params=newest | {"after": page["next"]}).json()
        found += page["entries"]
    assert len(found) >= 3
    assert found == oldest[::-1]
    whole = [
        hub.http.get("/v1/audit", params={"order": order}, headers=hub.admin).json()["entries"]
        for order in ("asc", "desc")
    ]
    assert whole[0] == whole[1][::-1]


def test_only_owners_and_admins_read_the_audit(hub: Hub) -> None:
    assert hub.http.get("/v1/tenants/default/audit", headers=hub.key_of("default", "caller")).status_code == 403
    assert hub.http.get("/v1/tenants/default/audit", headers=hub.key_of("acme")).status_code == 404
    assert hub.http.get("/v1/audit").status_code == 403


def test_an_alias_is_refused_when_the_task_has_its_maximum(hub: Hub, adapters: list[Adapter]) -> None:
    hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
    statuses = [hub.http.put(f"/v1/tasks/flowers/aliases/a{i}", json={"version": 1}).status_code for i in range(210)]
    assert statuses.index(429) >= 100
    assert set(statuses[statuses.index(429) :]) == {429}
    assert hub.http.put("/v1/tasks/flowers/aliases/a0", json={"version": 1}).status_code == 200


def test_a_key_that_is_revoked_during_an_upload_changes_nothing(hub: Hub, url: str, adapters: list[Adapter]) -> None:
    key = hub.http.post("/v1/tenants/default/keys", json={"name": "slow", "role": "owner"}).json()

    def body() -> Iterator[bytes]:
        data = adapters[0].data
        yield data[:1000]
        hub.http.delete(f"/v1/tenants/default/keys/{key['id']}")
        wait_until(lambda: httpx.get(f"{url}/v1/tasks", headers=bearer(key["key"])).status_code == 401)
        yield data[1000:]

    before = hub.registered(), hub.stored()
    headers = OCTETS | bearer(key["key"])
    reply = httpx.post(f"{url}/v1/tasks/slow/versions", content=body(), headers=headers, timeout=30)
    assert reply.status_code == 401
    assert hub.http.get("/v1/tasks/slow").status_code == 404
    assert hub.stored() == before[1]


def test_changes_by_admins_have_an_audit_of_their_own(hub: Hub, adapters: list[Adapter]) -> None:
    create(hub, "acme")
    hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
    entries = hub.http.get("/v1/audit", params={"of": "admins", "count": 1000}, headers=hub.admin).json()["entries"]
    assert {e["role"] for e in entries} == {"admin"}
    assert "tenant.create" in [e["action"] for e in entries]
