"""Authentication: keys are hashed, shown once and revoked everywhere; roles; tenants do not see each other."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis

from adapters import Adapter
from hub.errors import Conflict
from hub.local.bootstrap import create_first_keys
from hub.registry.audit import OPERATOR
from hub.registry.keys import KeyRegistry, hash_key, key_id
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tenants import TenantRegistry
from tests.support.hub_app import OCTETS, Hub, bearer, first_keys_of, in_registry
from tests.support.models import png, wait_until


def test_caller_key_can_classify_and_cannot_change_anything(hub: Hub, adapters: Sequence[Adapter]) -> None:
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
        assert answer.json()["detail"] == "A key with role 'caller' may only classify. Use a key with role 'owner'."
    assert hub.registered() == before


def test_task_of_another_tenant_gets_the_same_404_as_a_missing_task(hub: Hub, adapters: Sequence[Adapter]) -> None:
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


def test_equal_files_of_two_tenants_are_stored_once_and_stay_independent(hub: Hub, adapters: Sequence[Adapter]) -> None:
    other = hub.key_of("other")
    for tenant in (dict[str, str](), other):
        answer = hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS | tenant)
        assert (answer.status_code, answer.json()["version"]) == (201, 1)
    assert len(hub.stored()) == 1
    hub.http.delete("/v1/tasks/flowers", headers=other)
    assert hub.http.post("/v1/tasks/flowers/classify", content=png()).status_code == 200
    assert hub.http.post("/v1/gc", json={"older_than_s": 0}, headers=hub.admin).json()["removed"] == 0
    hub.http.delete("/v1/tasks/flowers")
    assert hub.http.post("/v1/gc", json={"older_than_s": 0}, headers=hub.admin).json()["removed"] == 1
    assert hub.stored() == []


def test_first_keys_are_created_once_and_stored_as_hashes(empty_redis: str) -> None:
    keys = first_keys_of(empty_redis)
    again = first_keys_of(empty_redis)
    assert (again.owner, again.admin) == (None, None)
    with redis.Redis.from_url(empty_redis, decode_responses=True) as client:
        kept = client.hgetall("karst:keys")
        for key in (keys.owner, keys.admin):
            assert key is not None
            assert (key[:3], len(key)) == ("kh_", 46)
            assert json.loads(kept[key_id(key)])["hash"] == hash_key(key)
            assert key not in str(kept)


def test_new_admin_key_is_created_when_the_admin_keys_are_lost(empty_redis: str) -> None:
    keys = first_keys_of(empty_redis)
    with redis.Redis.from_url(empty_redis) as client:
        client.delete("karst:admins")
    again = first_keys_of(empty_redis)
    assert again.owner is None
    assert again.admin not in (None, keys.admin)


def test_revoked_key_is_refused_at_once_here_and_soon_at_other_gateways(hub: Hub) -> None:
    made = hub.http.post("/v1/tenants/default/keys", json={"name": "camera", "role": "caller"}).json()
    camera = bearer(made["key"])
    with hub.another_gateway() as elsewhere:
        for _ in range(3):
            assert elsewhere.get("/v1/tasks", headers=camera).status_code == 200
            assert hub.http.get("/v1/tasks", headers=camera).status_code == 200
        assert hub.http.delete(f"/v1/tenants/default/keys/{made['id']}").status_code == 204
        assert hub.http.get("/v1/tasks", headers=camera).status_code == 401
        wait_until(lambda: elsewhere.get("/v1/tasks", headers=camera).status_code == 401)
        for _ in range(3):
            assert elsewhere.get("/v1/tasks", headers=camera).status_code == 401
    assert hub.http.delete(f"/v1/tenants/default/keys/{made['id']}").status_code == 404


def test_key_is_refused_when_it_has_expired(hub: Hub) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=2)
    made = hub.http.post("/v1/tenants/default/keys", json={"name": "k", "expires": soon.isoformat()}).json()
    assert made["role"] == "caller"
    wait_until(lambda: hub.http.get("/v1/tasks", headers=bearer(made["key"])).status_code == 401)
    assert "expired at" in hub.http.get("/v1/tasks", headers=bearer(made["key"])).json()["detail"]
    naive = {"name": "k", "expires": "2030-01-01T00:00:00"}
    assert hub.http.post("/v1/tenants/default/keys", json=naive).json()["errors"][0]["field"] == "expires"


def test_list_of_keys_shows_the_last_use_and_never_a_key(hub: Hub) -> None:
    made = hub.http.post("/v1/tenants/default/keys", json={"name": "camera"}).json()

    def listed() -> dict[str, dict[str, Any]]:
        return {k["id"]: k for k in hub.http.get("/v1/tenants/default/keys").json()["keys"]}

    assert listed()[made["id"]]["last_used"] is None
    assert "key" not in listed()[made["id"]]
    assert made["key"] not in hub.http.get("/v1/tenants/default/keys").text
    hub.http.get("/v1/tasks", headers=bearer(made["key"]))
    wait_until(lambda: listed()[made["id"]]["last_used"] is not None)


def test_last_admin_key_cannot_be_revoked(hub: Hub) -> None:
    (only,) = hub.http.get("/v1/admin/keys", headers=hub.admin).json()["keys"]
    assert hub.http.delete(f"/v1/admin/keys/{only['id']}", headers=hub.admin).status_code == 409
    other = hub.http.post("/v1/admin/keys", json={"name": "second"}, headers=hub.admin).json()
    assert hub.http.delete(f"/v1/admin/keys/{only['id']}", headers=bearer(other["key"])).status_code == 204
    assert hub.http.get("/v1/tenants", headers=hub.admin).status_code == 401
    assert hub.http.get("/v1/tenants", headers=bearer(other["key"])).status_code == 200


def test_admin_key_with_expiry_date_does_not_replace_the_last_one_without(hub: Hub) -> None:
    (only,) = hub.http.get("/v1/admin/keys", headers=hub.admin).json()["keys"]
    ids = {}
    for name, seconds in (("expired", -60), ("expires", 3600)):
        expires = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
        made = hub.http.post("/v1/admin/keys", json={"name": name, "expires": expires}, headers=hub.admin)
        assert made.status_code == 201
        ids[name] = made.json()["id"]
    refused = hub.http.delete(f"/v1/admin/keys/{only['id']}", headers=hub.admin)
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (409, "id")
    assert refused.json()["detail"] == (
        "id: cannot revoke the last admin key without an expiry date; create another one first"
    )
    for id in ids.values():
        assert hub.http.delete(f"/v1/admin/keys/{id}", headers=hub.admin).status_code == 204
    assert hub.http.get("/v1/tenants", headers=hub.admin).status_code == 200


def test_start_creates_an_admin_key_when_all_have_an_expiry_date(empty_redis: str) -> None:
    first_keys_of(empty_redis)
    soon, past = (datetime.now(UTC) + timedelta(hours=hours) for hours in (1, -1))

    async def use(database: RegistryConnection) -> None:
        tenants, keys = TenantRegistry(database), KeyRegistry(database)
        ending, over = [await keys.create(OPERATOR, "", "admin", "k", expires) for expires in (soon, past)]
        lasting = [key.id for key in await keys.all("") if key.expires is None]
        await database.redis.srem("karst:admins", *lasting)
        with pytest.raises(Conflict, match="expires: no admin key without an expiry date exists; create one first"):
            await keys.create(OPERATOR, "", "admin", "k", soon)
        with pytest.raises(Conflict, match="id: cannot revoke the last admin key without an expiry date"):
            await keys.revoke(OPERATOR, "", ending.id)
        await keys.revoke(OPERATOR, "", over.id)  # of no use to anybody
        again = await create_first_keys(tenants, keys)
        assert (again.owner, (await create_first_keys(tenants, keys)).admin) == (None, None)
        assert again.admin is not None
        record = await keys.find(key_id(again.admin))
        assert record is not None
        assert record.expires is None
        await keys.revoke(OPERATOR, "", ending.id)

    in_registry(empty_redis, use)


def test_admin_key_has_no_tasks(hub: Hub) -> None:
    for method, path in (("GET", "/v1/tasks"), ("DELETE", "/v1/tasks/x"), ("POST", "/v1/tasks/x/classify")):
        answer = hub.http.request(method, path, headers=hub.admin)
        assert (answer.status_code, answer.json()["detail"]) == (
            403,
            "An admin key has no tasks. Use a key of the tenant that owns them.",
        )
