"""Failover between two real redis-servers: every connection stays open to the demoted one."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from adapters import Adapter, Backbone
from hub.admin_schemas import LimitsChange
from hub.errors import Unavailable
from hub.registry.audit import OPERATOR
from hub.registry.events import STREAMS, EventLog
from hub.registry.health import RegistryWatch
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry
from tests.support.hub_app import OCTETS, REDIS_PATIENCE, running
from tests.support.models import png, wait_until
from tests.support.redis_servers import RedisServer, fail_over, redis_server, two_servers


def connected(url: str, use: Callable[[RegistryConnection], Awaitable[None]]) -> None:
    """Run `use(connection)` on an event loop of its own."""

    async def main() -> None:
        connection = RegistryConnection(url, patience=REDIS_PATIENCE)
        try:
            await use(connection)
        finally:
            await connection.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_changes_reach_the_new_primary_when_connections_to_the_old_one_stay_open(tmp_path: Path) -> None:
    with two_servers(tmp_path) as (first, second, address):

        async def use(connection: RegistryConnection) -> None:
            tenants, registry = TenantRegistry(connection), TaskRegistry(connection)
            await asyncio.gather(*(tenants.create(OPERATOR, f"before{i}", LimitsChange()) for i in range(8)))
            fail_over(first, second, address)
            await asyncio.gather(*(tenants.create(OPERATOR, f"after{i}", LimitsChange()) for i in range(8)))
            assert len((await tenants.page(1000, "")).tenants) == 16
            assert {count for count, _ in await tenants.activity(["before1", "after1"])} == {0}  # a pipeline
            assert await registry.dump("after1") == []

        connected(address.url, use)
        assert {f"after{i}" for i in range(8)} <= set(second.client.hkeys("karst:tenants"))


def test_a_read_reaches_the_new_primary_when_the_old_server_lost_its_primary(tmp_path: Path) -> None:
    """MASTERDOWN: such a server refuses reads, also in pipelines."""
    with two_servers(tmp_path) as (first, second, address):

        async def use(connection: RegistryConnection) -> None:
            tenants = TenantRegistry(connection)
            await tenants.create(OPERATOR, "one", LimitsChange())
            wait_until(lambda: bool(second.client.exists("karst:tenants")))
            second.promote()
            first.client.config_set("replica-serve-stale-data", "no")
            first.client.replicaof("127.0.0.1", 1)  # no server listens there
            with pytest.raises(redis.exceptions.MasterDownError):
                first.client.get("any")
            address.target = second.port
            assert (await tenants.usage("one")).tenant == "one"
            assert [info.tenant for info in (await tenants.page(1000, "")).tenants] == ["one"]

        connected(address.url, use)


def test_a_change_is_made_when_the_server_has_loaded_its_data(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--rdbcompression", "no") as server:
        for i in range(200):
            server.client.set(f"other:{i}", "x" * 100_000)
        server.client.save()
    # Redis answers after each 2 MB, which it loads in 0.1 s.
    with redis_server(tmp_path, "--key-load-delay", "5000", wait=False) as server:
        wait_until(lambda: is_loading(server))

        async def use(connection: RegistryConnection) -> None:
            tenants = TenantRegistry(connection)
            while True:
                with suppress(Unavailable):
                    await tenants.create(OPERATOR, "one", LimitsChange())
                    return
                await asyncio.sleep(0.01)

        connected(server.url, use)
        assert server.client.hkeys("karst:tenants") == ["one"]


def is_loading(server: RedisServer) -> bool:
    try:
        server.client.get("any")
    except redis.exceptions.BusyLoadingError:
        return True
    except redis.ConnectionError:  # it has not started yet
        return False
    raise AssertionError("the server has loaded its data already")


def test_a_change_is_refused_when_no_primary_exists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with two_servers(tmp_path) as (_, second, address):
        address.target = second.port

        async def use(connection: RegistryConnection) -> None:
            tenants = TenantRegistry(connection)
            with pytest.raises(Unavailable, match=r"refused a command\. The hub's log has the reason") as caught:
                await tenants.create(OPERATOR, "one", LimitsChange())
            assert "READONLY" not in caught.value.detail
            assert (await tenants.page(1000, "")).tenants == []  # reads go on

        connected(address.url, use)
    assert "READONLY" in caplog.text
    assert "This server is a replica. Point HUB_REDIS_URL at the primary" in caplog.text


def test_reads_leave_a_demoted_server_when_the_watch_finds_it(tmp_path: Path) -> None:
    """A replica answers reads, so no command fails. Its data become stale when its own link breaks."""
    with two_servers(tmp_path) as (first, second, address):

        async def use(connection: RegistryConnection) -> None:
            restarts: list[int] = []
            watch = RegistryWatch(connection, lambda: restarts.append(1))
            tenants = TenantRegistry(connection)
            assert (await tenants.page(1000, "")).tenants == []
            await watch.check()
            second.promote()
            first.client.replicaof("127.0.0.1", 1)  # no server listens there: stale reads
            address.target = second.port
            await watch.check()
            assert restarts == [1]
            await watch.check()
            assert restarts == [1]
            second.client.hset("karst:tenants", "new", '{"created": "2026-01-01", "limits": {}}')
            assert [info.tenant for info in (await tenants.page(1000, "")).tenants] == ["new"]

        connected(address.url, use)


def test_a_reader_of_events_learns_that_its_server_was_demoted(tmp_path: Path) -> None:
    with two_servers(tmp_path) as (first, second, address):

        async def use(connection: RegistryConnection) -> None:
            events = EventLog(connection)
            await events.spans()
            reading = asyncio.create_task(events.read(dict.fromkeys(STREAMS, "0-0"), 5000))
            while not int(first.client.info("clients")["blocked_clients"]):
                await asyncio.sleep(0.01)
            fail_over(first, second, address)
            with pytest.raises(Unavailable):
                await reading
            await TenantRegistry(connection).create(OPERATOR, "new", LimitsChange())
            found = await events.read(dict.fromkeys(STREAMS, "0-0"), 5000)
            assert [event.name for event in found] == ["new"] * len(STREAMS)

        connected(address.url, use)


def test_a_gateway_registers_and_sees_changes_after_a_failover(
    backbone: Backbone, adapters: list[Adapter], tmp_path: Path
) -> None:
    with (
        two_servers(tmp_path / "redis") as (first, second, address),
        running(address.url, backbone, tmp_path / "store", redis_patience=1) as hub,
        hub.another_gateway() as other,
    ):
        path = "/v1/tasks/flowers/versions"
        assert hub.http.post(path, content=adapters[0].data, headers=OCTETS).status_code == 201
        wait_until(lambda: other.post("/v1/tasks/flowers/classify", content=png()).status_code == 200)
        fail_over(first, second, address)
        reply = hub.http.post(path, content=adapters[1].data, headers=OCTETS)
        assert reply.status_code == 201, reply.text
        wait_until(lambda: bool(other.post("/v1/tasks/flowers/classify", content=png()).json().get("version") == 2))


def test_a_gateway_forgets_changes_that_the_new_primary_lacks(
    backbone: Backbone, adapters: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replication is asynchronous: a failover may lose the last changes, and a cached task must not outlive them."""
    monkeypatch.setattr("hub.registry.health.WATCH_INTERVAL_S", 0.1)
    with (
        two_servers(tmp_path / "redis") as (first, second, address),
        running(address.url, backbone, tmp_path / "store", redis_patience=1) as hub,
    ):

        def serves(version: int) -> bool:
            reply = hub.http.post("/v1/tasks/flowers/classify", content=png()).json()
            return bool(reply.get("version") == version)

        path = "/v1/tasks/flowers/versions"
        assert hub.http.post(path, content=adapters[0].data, headers=OCTETS).status_code == 201
        wait_until(lambda: bool(second.client.exists("karst:t:default:task:flowers")))
        second.promote()  # the next change does not reach it
        assert hub.http.post(path, content=adapters[1].data, headers=OCTETS).json()["version"] == 2
        wait_until(lambda: serves(2))
        first.client.replicaof("127.0.0.1", second.port)
        address.target = second.port
        wait_until(lambda: serves(1))
