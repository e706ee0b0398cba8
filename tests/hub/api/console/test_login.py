"""Login links: a code gives keys once."""

import asyncio
import time
from typing import Any

import pytest
from redis import Redis

from hub.admin_schemas import Login
from hub.admission.login_codes import LoginCodes
from hub.errors import NotFound, Unauthenticated
from hub.registry.redis.connection import RegistryConnection
from tests.support.hub_app import REDIS_PATIENCE, Hub, bearer, in_registry


def code_of(hub: Hub, tenant: str = "default", *, admin: bool = False) -> str:
    return in_registry(hub.redis_url, lambda database: LoginCodes(database).create(tenant, admin=admin))


def log_in(hub: Hub, code: str) -> Any:
    return hub.http.post("/v1/login", headers=bearer(code))


def test_code_gives_an_owners_key_that_expires(hub: Hub) -> None:
    given = log_in(hub, code_of(hub)).json()
    assert (given["tenant"], given["admin_key"]) == ("default", None)
    [key] = [
        key
        for key in hub.http.get("/v1/tenants/default/keys", headers=bearer(given["key"])).json()["keys"]
        if key["name"] == "console"
    ]
    assert (key["role"], key["expires"]) == ("owner", given["expires"])


def test_code_with_admin_rights_gives_an_admin_key_too(hub: Hub) -> None:
    given = log_in(hub, code_of(hub, admin=True)).json()
    assert hub.http.get("/v1/status", headers=bearer(given["admin_key"])).status_code == 200
    assert hub.http.get("/v1/usage", headers=bearer(given["key"])).json()["tenant"] == "default"


def test_code_works_once(hub: Hub) -> None:
    code = code_of(hub)
    assert log_in(hub, code).status_code == 200
    again = log_in(hub, code)
    assert again.status_code == 401
    assert "karst-hub login-link" in again.json()["detail"]


def test_code_gives_one_login_when_many_clients_use_it_at_the_same_moment(hub: Hub) -> None:
    """Each through a registry connection of its own, as through several gateways."""
    code, clients = code_of(hub, admin=True), 20

    async def use() -> list[object]:
        databases = [RegistryConnection(hub.redis_url, patience=REDIS_PATIENCE) for _ in range(clients)]
        try:
            await asyncio.gather(*(database.execute(database.redis.ping()) for database in databases))
            calls = (LoginCodes(database).redeem(code) for database in databases)
            return await asyncio.gather(*calls, return_exceptions=True)
        finally:
            for database in databases:
                await database.close()

    found = asyncio.run(use())
    logins = [login for login in found if isinstance(login, Login)]
    assert len(logins) == 1
    assert sum(isinstance(error, Unauthenticated) for error in found) == clients - 1
    listed = hub.http.get("/v1/tenants/default/keys", headers=bearer(str(logins[0].key))).json()["keys"]
    assert [key["name"] for key in listed].count("console") == 1


@pytest.mark.parametrize("headers", [{"authorization": ""}, bearer("other")])
def test_login_without_a_known_code_is_refused(hub: Hub, headers: dict[str, str]) -> None:
    assert hub.http.post("/v1/login", headers=headers).status_code == 401


def test_registry_has_no_code_and_an_unused_one_expires(hub: Hub) -> None:
    code = code_of(hub)
    with Redis.from_url(hub.redis_url) as redis:
        [name] = redis.keys("karst:login:*")
        assert code.encode() not in name
        assert code.encode() not in redis.get(name)
        assert 0 < redis.ttl(name) <= 3600


def test_code_of_a_tenant_that_was_deleted_and_made_again_is_refused(hub: Hub) -> None:
    hub.http.post("/v1/tenants", json={"tenant": "again"}, headers=hub.admin)
    code = code_of(hub, "again")
    hub.http.delete("/v1/tenants/again", headers=hub.admin)
    time.sleep(1.1)  # the time of a tenant's creation has seconds
    hub.http.post("/v1/tenants", json={"tenant": "again"}, headers=hub.admin)
    assert log_in(hub, code).status_code == 401


def test_code_of_an_absent_tenant_is_refused_at_once(hub: Hub) -> None:
    with pytest.raises(NotFound, match="absent"):
        code_of(hub, "absent")
