"""The registry's Redis while a gateway runs: a policy that evicts stops changes, and nothing else."""

import asyncio
import logging
from pathlib import Path

import pytest

from adapters import Adapter, Backbone
from hub.admin_schemas import LimitsChange
from hub.errors import Unavailable
from hub.registry.audit import OPERATOR
from hub.registry.health import RegistryWatch, read_facts
from hub.registry.keys import KeyRegistry
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tenants import TenantRegistry
from tests.support.hub_app import OCTETS, REDIS_PATIENCE, running
from tests.support.models import png, wait_until
from tests.support.redis_servers import RedisServer, redis_server

POLICIES = ["allkeys-lru", "allkeys-lfu", "allkeys-random", "volatile-lru", "volatile-ttl"]


def test_changes_are_refused_while_the_policy_evicts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main(url: str) -> None:
        connection = RegistryConnection(url, patience=REDIS_PATIENCE)
        try:
            watch, tenants = RegistryWatch(connection, lambda: None), TenantRegistry(connection)
            await watch.check()
            await tenants.create(OPERATOR, "one", LimitsChange())
            for policy in POLICIES:
                server.client.config_set("maxmemory-policy", policy)
                await watch.check()
                with pytest.raises(
                    Unavailable, match=r"accepts no changes now\. The hub's log has the reason"
                ) as caught:
                    await tenants.create(OPERATOR, "two", LimitsChange())
                assert policy not in caught.value.detail
                assert f"The maxmemory-policy of this Redis is {policy}." in caplog.text
            assert [info.tenant for info in (await tenants.page(1000, "")).tenants] == ["one"]
            await KeyRegistry(connection).record_use({"id": 1.0})  # counts of limits wait behind it
            server.client.config_set("maxmemory-policy", "noeviction")
            await watch.check()
            await tenants.create(OPERATOR, "two", LimitsChange())
            assert "accepts changes again" in caplog.text
        finally:
            await connection.close()

    caplog.set_level(logging.WARNING)
    with redis_server(tmp_path) as server:
        asyncio.run(main(server.url))


def test_the_log_repeats_a_reason_rarely(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main(url: str) -> None:
        connection = RegistryConnection(url, patience=REDIS_PATIENCE)
        try:
            watch, tenants = RegistryWatch(connection, lambda: None), TenantRegistry(connection)
            for _ in range(10):
                await watch.check()
                with pytest.raises(Unavailable):
                    await tenants.create(OPERATOR, "one", LimitsChange())
        finally:
            await connection.close()

    with redis_server(tmp_path, "--maxmemory-policy", "allkeys-lru") as server:
        asyncio.run(main(server.url))
    assert len([record for record in caplog.records if record.name.startswith("hub.registry")]) == 1


def test_a_gateway_classifies_but_changes_nothing_while_the_policy_evicts(
    backbone: Backbone, adapters: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub.registry.health.WATCH_INTERVAL_S", 0.1)
    path = "/v1/tasks/flowers/versions"
    with redis_server(tmp_path / "redis") as server, running(server.url, backbone, tmp_path / "store") as hub:
        assert hub.http.post(path, content=adapters[0].data, headers=OCTETS).status_code == 201

        def refusal() -> str:
            reply = hub.http.put("/v1/tasks/flowers/aliases/stable", json={"version": 1})
            return str(reply.json()["detail"]) if reply.status_code == 503 else ""

        server.client.config_set("maxmemory-policy", "allkeys-lru")
        wait_until(lambda: refusal().startswith("The registry (Redis) accepts no changes now"))
        assert "allkeys" not in refusal()
        told = hub.http.get("/v1/status", headers=hub.admin).json()["changes_refused"]
        assert told.startswith("The maxmemory-policy of this Redis is allkeys-lru.")
        assert hub.http.post("/v1/tasks/flowers/classify", content=png()).status_code == 200
        server.client.config_set("maxmemory-policy", "noeviction")
        wait_until(lambda: not refusal())
        assert hub.http.get("/v1/status", headers=hub.admin).json()["changes_refused"] is None


def test_a_running_watch_tells_after_each_check_whether_changes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub.registry.health.WATCH_INTERVAL_S", 0.02)
    told: list[bool] = []

    async def told_again(what: bool, times: int = 3) -> None:
        told.clear()
        async with asyncio.timeout(10):
            while told[-times:] != [what] * times:
                await asyncio.sleep(0.01)

    async def main(server: RedisServer) -> None:
        connection = RegistryConnection(server.url, patience=REDIS_PATIENCE)
        running = asyncio.create_task(RegistryWatch(connection, lambda: None, told.append).run())
        try:
            await told_again(False)
            server.client.config_set("maxmemory-policy", "allkeys-lru")
            await told_again(True)
            server.client.shutdown(nosave=True)
            await told_again(True)  # the last known state holds
        finally:
            running.cancel()
            await asyncio.wait([running])
            await connection.close()

    with redis_server(tmp_path) as server:
        asyncio.run(main(server))


def test_facts_name_the_mode_and_the_primary(tmp_path: Path) -> None:
    async def facts(url: str) -> str | None:
        connection = RegistryConnection(url, patience=REDIS_PATIENCE)
        try:
            return (await read_facts(connection)).fault()
        finally:
            await connection.close()

    with redis_server(tmp_path / "a") as one, redis_server(tmp_path / "b", "--cluster-enabled", "yes") as clustered:
        assert asyncio.run(facts(one.url)) is None
        assert "cluster mode" in str(asyncio.run(facts(clustered.url)))
