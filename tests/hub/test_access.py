"""Keys: kept hashed, one first key only, and a caller's key may only classify."""

import asyncio

import redis

from hub.access import CALLER, first_key, hash_key
from hub.registry import KeyRecord, Registry, connect
from tests.hub.conftest import OCTETS, bearer
from tests.support import png


def test_a_caller_s_key_classifies_and_changes_nothing(hub, adapters) -> None:
    url = "/v1/tasks/flowers"
    hub.http.post(f"{url}/versions", content=adapters[0].data, headers=OCTETS)
    add_key(hub.redis_url, "kh_caller", KeyRecord("default", CALLER, "test"))
    before = hub.registered()
    caller = OCTETS | bearer("kh_caller")
    assert hub.http.post(f"{url}/classify", content=png(), headers=caller).status_code == 200
    assert hub.http.get(url, headers=caller).status_code == 200
    for answer in (
        hub.http.post(f"{url}/versions", content=adapters[1].data, headers=caller),
        hub.http.put(f"{url}/aliases/stable", json={"version": 1}, headers=bearer("kh_caller")),
        hub.http.delete(f"{url}/versions/1", headers=caller),
        hub.http.delete(url, headers=caller),
    ):
        assert answer.status_code == 403
        assert answer.json()["detail"] == "a key with role 'caller' may only classify; use a key with role 'owner'"
    assert hub.registered() == before


def test_another_tenant_s_task_is_the_same_404_as_none(hub, adapters) -> None:
    hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
    add_key(hub.redis_url, "kh_other", KeyRecord("other", "owner", "test"))
    other = bearer("kh_other")
    foreign, absent = (
        hub.http.post(f"/v1/tasks/{task}/classify", content=png(), headers=other) for task in ("flowers", "nothing")
    )
    assert foreign.status_code == absent.status_code == 404
    assert foreign.text.replace("flowers", "nothing") == absent.text
    assert hub.http.get("/v1/tasks", headers=other).json() == {"tasks": []}
    assert hub.http.delete("/v1/tasks/flowers", headers=other).status_code == 404
    assert hub.http.get("/v1/tasks/flowers").status_code == 200


def test_the_first_key_is_made_once_and_kept_hashed(empty_redis) -> None:
    async def twice() -> tuple[str | None, str | None]:
        registry = Registry(connect(empty_redis))
        try:
            return await first_key(registry), await first_key(registry)
        finally:
            await registry.close()

    key, again = asyncio.run(twice())
    assert key is not None
    assert (key[:3], len(key), again) == ("kh_", 46, None)
    with redis.Redis.from_url(empty_redis, decode_responses=True) as client:
        assert list(client.hgetall("karst:keys")) == [hash_key(key)]
        assert key not in str(client.hgetall("karst:keys"))


def add_key(redis_url: str, key: str, record: KeyRecord) -> None:
    async def add() -> None:
        registry = Registry(connect(redis_url))
        try:
            await registry.add_key(hash_key(key), record)
        finally:
            await registry.close()

    asyncio.run(add())
