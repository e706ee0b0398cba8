"""Keys: kept hashed, shown once, ended everywhere; roles; and tenants that cannot see each other."""

import json
import time
from datetime import UTC, datetime, timedelta

import pytest
import redis

from hub.admission.authentication import first_keys
from hub.errors import Conflict
from hub.registry.audit import OPERATOR
from hub.registry.tenants import Tenants, hash_key, key_id
from tests.support.hub_app import OCTETS, bearer, first_keys_of, in_registry
from tests.support.models import png, wait_until


def test_a_caller_s_key_classifies_and_changes_nothing(hub, adapters) -> None:
    url = "/v1/tasks/flowers"
    hub.http.post(f"{url}/versions", content=adapters[0].data, headers=OCTETS)
    caller = hub.key_of("default", "caller")
    before = hub.registered()
    assert hub.http.post(f"{url}/classify", content=png(), headers=caller).status_code == 200
    assert hub.http.get(url, headers=caller).status_code == 200
    for answer in (
        hub.http.post(f"{url}/versions", content=adapters[1].data, headers=OCTETS | caller),
        hub.http.put(f"{url}/aliases/stable", json={"version": 1}, headers=caller),
        hub.http.get(f"{url}/versions/1/file", headers=caller),
        hub.http.delete(f"{url}/versions/1", headers=caller),
        hub.http.delete(url, headers=caller),
    ):
        assert answer.status_code == 403
        assert answer.json()["detail"] == "a key with role 'caller' may only classify; use a key with role 'owner'"
    assert hub.registered() == before


def test_another_tenant_s_task_is_the_same_404_as_none(hub, adapters) -> None:
    hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
    other = hub.key_of("other")
    for name in ("flowers", "default:flowers"):
        absent = name.replace("flowers", "nothing")
        for method, path, options in (
            ("POST", "/v1/tasks/{}/classify", {"content": png()}),
            ("GET", "/v1/tasks/{}", {}),
            ("GET", "/v1/tasks/{}/versions/latest", {}),
            ("GET", "/v1/tasks/{}/versions/latest/file", {}),
            ("DELETE", "/v1/tasks/{}", {}),
            ("DELETE", "/v1/tasks/{}/versions/1", {}),
            ("PUT", "/v1/tasks/{}/aliases/stable", {"json": {"version": 1}}),
            ("POST", "/v1/tasks/{}/aliases/latest/rollback", {}),
            ("PUT", "/v1/tasks/{}/sharing", {"json": {"public": True}}),
        ):
            foreign, none = (hub.http.request(method, path.format(n), headers=other, **options) for n in (name, absent))
            assert foreign.status_code == none.status_code == 404, (method, path)
            assert foreign.text.replace("flowers", "nothing") == none.text
    assert hub.http.get("/v1/tasks", headers=other).json() == {"tasks": []}
    assert hub.http.get("/v1/tasks/flowers").status_code == 200


def test_the_same_bytes_in_two_tenants_are_stored_once_and_never_meet(hub, adapters) -> None:
    other = hub.key_of("other")
    for who in ({}, other):
        answer = hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS | who)
        assert (answer.status_code, answer.json()["version"]) == (201, 1)
    assert len(hub.stored()) == 1
    hub.http.delete("/v1/tasks/flowers", headers=other)
    assert hub.http.post("/v1/tasks/flowers/classify", content=png()).status_code == 200
    assert hub.http.post("/v1/gc", json={"older_than_s": 0}, headers=hub.admin).json()["removed"] == 0
    hub.http.delete("/v1/tasks/flowers")
    assert hub.http.post("/v1/gc", json={"older_than_s": 0}, headers=hub.admin).json()["removed"] == 1
    assert hub.stored() == []


def test_the_first_keys_are_made_once_and_kept_hashed(empty_redis) -> None:
    keys = first_keys_of(empty_redis)
    again = first_keys_of(empty_redis)
    assert (again.owner, again.admin) == (None, None)
    with redis.Redis.from_url(empty_redis, decode_responses=True) as client:
        kept = client.hgetall("karst:keys")
        for key in (keys.owner, keys.admin):
            assert (key[:3], len(key)) == ("kh_", 46)
            assert json.loads(kept[key_id(key)])["hash"] == hash_key(key)
            assert key not in str(kept)


def test_a_lost_admin_key_is_made_again_beside_the_old_tenants(empty_redis) -> None:
    keys = first_keys_of(empty_redis)
    with redis.Redis.from_url(empty_redis) as client:
        client.delete("karst:admins")
    again = in_registry(empty_redis, lambda database: first_keys(Tenants(database)))
    assert again.owner is None
    assert again.admin not in (None, keys.admin)


def test_a_revoked_key_is_refused_at_once_here_and_soon_at_other_gateways(hub) -> None:
    made = hub.http.post("/v1/tenants/default/keys", json={"name": "camera", "role": "caller"}).json()
    camera = bearer(made["key"])
    with hub.another_gateway() as elsewhere:
        for _ in range(3):
            assert elsewhere.get("/v1/tasks", headers=camera).status_code == 200
            assert hub.http.get("/v1/tasks", headers=camera).status_code == 200
        assert hub.http.delete(f"/v1/tenants/default/keys/{made['id']}").status_code == 204
        assert hub.http.get("/v1/tasks", headers=camera).status_code == 401
        wait_until(lambda: elsewhere.get("/v1/tasks", headers=camera).status_code == 401, timeout_s=2)
        time.sleep(0.2)
        assert elsewhere.get("/v1/tasks", headers=camera).status_code == 401
    assert hub.http.delete(f"/v1/tenants/default/keys/{made['id']}").status_code == 404


def test_an_expired_key_is_refused(hub) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=2)
    made = hub.http.post("/v1/tenants/default/keys", json={"name": "k", "expires": soon.isoformat()}).json()
    assert made["role"] == "caller"
    wait_until(lambda: hub.http.get("/v1/tasks", headers=bearer(made["key"])).status_code == 401)
    assert "time was over" in hub.http.get("/v1/tasks", headers=bearer(made["key"])).json()["detail"]
    naive = {"name": "k", "expires": "2030-01-01T00:00:00"}
    assert hub.http.post("/v1/tenants/default/keys", json=naive).json()["errors"][0]["field"] == "expires"


def test_keys_are_listed_without_themselves_and_with_their_last_use(hub) -> None:
    made = hub.http.post("/v1/tenants/default/keys", json={"name": "camera"}).json()

    def listed():
        return {k["id"]: k for k in hub.http.get("/v1/tenants/default/keys").json()["keys"]}

    assert listed()[made["id"]]["last_used"] is None
    assert "key" not in listed()[made["id"]]
    assert made["key"] not in hub.http.get("/v1/tenants/default/keys").text
    hub.http.get("/v1/tasks", headers=bearer(made["key"]))
    wait_until(lambda: listed()[made["id"]]["last_used"] is not None)


def test_the_last_admin_key_stays(hub) -> None:
    (only,) = hub.http.get("/v1/admin/keys", headers=hub.admin).json()["keys"]
    assert hub.http.delete(f"/v1/admin/keys/{only['id']}", headers=hub.admin).status_code == 409
    other = hub.http.post("/v1/admin/keys", json={"name": "second"}, headers=hub.admin).json()
    assert hub.http.delete(f"/v1/admin/keys/{only['id']}", headers=bearer(other["key"])).status_code == 204
    assert hub.http.get("/v1/tenants", headers=hub.admin).status_code == 401
    assert hub.http.get("/v1/tenants", headers=bearer(other["key"])).status_code == 200


def test_an_admin_key_that_ends_does_not_count_as_another_one(hub) -> None:
    (only,) = hub.http.get("/v1/admin/keys", headers=hub.admin).json()["keys"]
    ids = {}
    for name, seconds in (("over soon", 2), ("ends", 3600)):
        expires = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
        made = hub.http.post("/v1/admin/keys", json={"name": name, "expires": expires}, headers=hub.admin)
        assert made.status_code == 201
        ids[name] = made.json()["id"]
    refused = hub.http.delete(f"/v1/admin/keys/{only['id']}", headers=hub.admin)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (409, "id")
    assert refused.json()["detail"] == (
        "no other admin key never ends, so this one stays; make one without `expires` first"
    )
    time.sleep(2)
    assert hub.http.delete(f"/v1/admin/keys/{only['id']}", headers=hub.admin).status_code == 409
    for id in ids.values():
        assert hub.http.delete(f"/v1/admin/keys/{id}", headers=hub.admin).status_code == 204
    assert hub.http.get("/v1/tenants", headers=hub.admin).status_code == 200


def test_a_registry_whose_admin_keys_all_end_gets_one_that_does_not(empty_redis) -> None:
    """As a hub of before could leave it."""
    first_keys_of(empty_redis)
    soon, past = (datetime.now(UTC) + timedelta(hours=hours) for hours in (1, -1))

    async def use(database):
        tenants = Tenants(database)
        ending, over = [await tenants.add_key(OPERATOR, "", "admin", "k", expires) for expires in (soon, past)]
        lasting = [key.id for key in await tenants.keys("") if key.expires is None]
        await database.redis.srem("karst:admins", *lasting)
        with pytest.raises(Conflict, match="expires: there is no admin key that never ends; make one without"):
            await tenants.add_key(OPERATOR, "", "admin", "k", soon)
        with pytest.raises(Conflict, match="make one without `expires` first"):
            await tenants.revoke(OPERATOR, "", ending.id)
        await tenants.revoke(OPERATOR, "", over.id)  # of no use to anybody
        again = await first_keys(tenants)
        assert (again.owner, (await first_keys(tenants)).admin) == (None, None)
        assert (await tenants.key(again.admin)).expires is None
        await tenants.revoke(OPERATOR, "", ending.id)

    in_registry(empty_redis, use)


def test_an_admin_has_no_tasks(hub) -> None:
    for method, path in (("GET", "/v1/tasks"), ("DELETE", "/v1/tasks/x"), ("POST", "/v1/tasks/x/classify")):
        answer = hub.http.request(method, path, headers=hub.admin)
        assert (answer.status_code, answer.json()["detail"]) == (
            403,
            "an admin key has no tasks; use a key of the tenant that owns them",
        )
