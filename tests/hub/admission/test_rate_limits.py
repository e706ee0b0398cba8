"""A tenant's rates and images in flight, over several gateways, against a real Redis."""

import asyncio
import os
import signal
import time
from contextlib import AsyncExitStack

import pytest
import redis

from hub.admission.rate_limits import Limiter
from hub.errors import LimitReached, NotFound
from hub.local.embedded_redis import embedded_redis
from hub.registry.audit import OPERATOR
from hub.registry.cache import RegistryCache
from hub.registry.connection import Database
from hub.registry.tasks import Registry
from hub.registry.tenants import Tenants
from hub.schemas import LimitsChange
from tests.support.hub_app import OCTETS, in_registry
from tests.support.models import png


class Gateway:
    """A limiter with the cache that it asks."""

    def __init__(self, database: Database) -> None:
        self.tenants = Tenants(database)
        self.cache = RegistryCache(Registry(database), self.tenants)
        self.limiter = Limiter(database, self.cache, self.tenants)

    async def spend(self, images: int = 1) -> bool:
        """Whether a call went through; it is over at once."""
        try:
            await self.limiter.request("t")
            async with self.limiter.images("t", images):
                return True
        except LimitReached:
            return False


def limited(url: str, use, **limits) -> None:
    async def run(database: Database) -> None:
        await Tenants(database).create(OPERATOR, "t", LimitsChange(**limits))
        await use(*(Gateway(database) for _ in range(3)))

    in_registry(url, run)


@pytest.mark.parametrize(("limits", "images"), [({"requests_per_second": 40}, 1), ({"images_per_second": 160}, 4)])
def test_a_rate_holds_over_all_gateways(empty_redis, limits, images) -> None:
    async def use(*gateways):
        began = time.monotonic()
        went = 0
        while time.monotonic() - began < 1.5:
            went += sum(await asyncio.gather(*(gateway.spend(images) for gateway in gateways)))
            await asyncio.sleep(0.001)
        taken = time.monotonic() - began
        # A full bucket at first (a second's worth), then the rate; each gateway may keep a lot of 1/20 s unspent.
        assert went <= 40 * (1 + taken) + 1
        assert went >= 40 * (1 + taken) * 0.8

    limited(empty_redis, use, **limits)


def test_a_redis_that_hangs_holds_up_no_request(tmp_path) -> None:
    """Neither where a call takes tokens from it, nor where counts are written down meanwhile."""

    async def use(gateway, *_others):
        beside = [asyncio.create_task(gateway.cache.follow()), asyncio.create_task(gateway.limiter.run())]
        try:
            for again in range(4):
                until = (
                    time.monotonic() + 0.5 + 0.13 * again
                )  # at another moment of the half second between two writings
                while time.monotonic() < until:
                    assert await gateway.spend()
                    await asyncio.sleep(0.02)
                os.kill(server, signal.SIGSTOP)
                slowest, until = 0.0, time.monotonic() + 1.5
                while time.monotonic() < until:
                    began = time.monotonic()
                    assert await gateway.spend()
                    slowest = max(slowest, time.monotonic() - began)
                    await asyncio.sleep(0.01)
                os.kill(server, signal.SIGCONT)
                assert slowest < 3  # a call to a Redis that hangs takes 5 s
        finally:
            os.kill(server, signal.SIGCONT)
            for task in beside:
                task.cancel()

    with embedded_redis(tmp_path) as url:
        with redis.Redis.from_url(url) as client:
            server = client.info("server")["process_id"]
        limited(url, use, requests_per_second=400, images_per_second=400)


def test_images_in_flight_hold_over_all_gateways(empty_redis) -> None:
    async def use(*gateways):
        async with AsyncExitStack() as held:
            refused, went = [], 0
            for i in range(40):
                try:
                    await held.enter_async_context(gateways[i % 3].limiter.images("t", 1))
                    went += 1
                except LimitReached as error:
                    refused.append(error)
            assert 18 <= went <= 20  # permits go in twos
            assert refused[0].detail == "the tenant's limit of 20 images in flight is reached"
            assert refused[0].errors[0].field == "images_in_flight"
            assert refused[0].retry_after_s >= 1
            for gateway in gateways:
                await gateway.limiter.settle()
            assert (await gateways[0].tenants.usage("t")).used.images_in_flight == went
        for gateway in gateways:  # the first settling says that all is quiet, the second that it stayed so
            await gateway.limiter.settle()
            await gateway.limiter.settle()
        assert (await gateways[0].tenants.usage("t")).used.images_in_flight == 0
        assert await gateways[2].spend(20)
        with pytest.raises(LimitReached, match="this call alone has 21"):
            async with gateways[0].limiter.images("t", 21):
                pass

    limited(empty_redis, use, images_in_flight=20)


def test_a_slow_rate_says_when_to_come_back(empty_redis) -> None:
    async def use(gateway, *_others):
        assert await gateway.spend()
        with pytest.raises(LimitReached) as caught:
            await gateway.limiter.request("t")
        assert caught.value.errors[0].field == "requests_per_second"
        assert 5 <= caught.value.retry_after_s <= 10

    limited(empty_redis, use, requests_per_second=0.1)


def test_a_call_larger_than_the_bucket_waits_for_a_full_one_and_leaves_a_debt(empty_redis) -> None:
    async def use(gateway, *_others):
        assert await gateway.spend(30)
        with pytest.raises(LimitReached) as caught:
            async with gateway.limiter.images("t", 1):
                pass
        assert caught.value.retry_after_s == 3  # 20 of debt and one image, at 10 a second

    limited(empty_redis, use, images_per_second=10)


def test_a_gateway_that_died_gives_its_permits_back(empty_redis, monkeypatch) -> None:
    monkeypatch.setattr("hub.admission.rate_limits._TAKE", _with_short_lives())

    async def use(dead, alive, _third):
        await dead.limiter.images("t", 10).__aenter__()
        assert not await alive.spend(10)
        await asyncio.sleep(1.2)
        assert await alive.spend(10)

    limited(empty_redis, use, images_in_flight=15)


def test_counts_survive_and_are_all_there(empty_redis) -> None:
    async def use(*gateways):
        went = [await gateways[i % 3].spend(2) for i in range(30)]
        for gateway in gateways:
            await gateway.limiter.settle()
        counted = (await Gateway(gateways[0].limiter._db).tenants.usage("t")).counted
        assert (counted.requests, counted.images, counted.refused) == (30, 2 * sum(went), 30 - sum(went))
        assert 0 < counted.refused < 30

    limited(empty_redis, use, images_per_second=20)


def test_a_tenant_that_is_no_more(empty_redis) -> None:
    async def use(gateway, *_others):
        assert await gateway.spend()
        await gateway.tenants.delete(OPERATOR, "t")
        gateway.cache.forget_tenant("t")
        with pytest.raises(NotFound):
            await gateway.spend()
        await gateway.limiter.settle()
        assert [k async for k in gateway.limiter._db.redis.scan_iter("karst:t:t:*")] == []

    limited(empty_redis, use)


def test_no_gateway_brings_back_what_a_deleted_tenant_had(empty_redis) -> None:
    async def use(gateway, stale, _third):
        stale.cache._following = True
        assert await gateway.spend()
        assert await stale.spend()
        stale.limiter._purses.clear()  # so that it asks Redis, with what it remembers of the tenant
        await gateway.tenants.delete(OPERATOR, "t")
        with pytest.raises(NotFound):
            await stale.spend()
        for each in (gateway, stale):
            await each.limiter.settle()
        redis = gateway.limiter._db.redis
        assert [key async for key in redis.scan_iter("karst:t:t:*")] == []
        assert await redis.zscore("karst:active", "t") is None

    limited(empty_redis, use)


def test_a_tenant_of_the_same_name_inherits_nothing(empty_redis) -> None:
    """Whatever gateways still hold for the one before: counts to write down, permits, tokens, what they remember."""

    async def use(gateway, stale, _third):
        stale.cache._following = True
        assert await stale.spend()
        async with gateway.limiter.images("t", 5):
            await gateway.tenants.delete(OPERATOR, "t")
            await gateway.tenants.create(OPERATOR, "t", LimitsChange(images_per_second=10))
            stale.limiter._purses["t"].requests = 0  # it has to ask, and remembers the tenant before
            for each in (gateway, stale):
                await each.limiter.settle()
            usage = await gateway.tenants.usage("t")
            assert usage.counted.model_dump() == {"requests": 0, "images": 0, "refused": 0}
            assert usage.used.images_in_flight == 0
            assert await stale.spend(10)  # a full bucket
        for each in (gateway, stale):
            await each.limiter.settle()
        assert (await gateway.tenants.usage("t")).counted.model_dump() == {"requests": 1, "images": 10, "refused": 0}

    limited(empty_redis, use, images_per_second=10)


def test_while_the_registry_is_away_a_gateway_holds_the_rate_by_itself(tmp_path) -> None:
    async def use(server, url):
        database = Database(url)
        await Tenants(database).create(OPERATOR, "t", LimitsChange(requests_per_second=20))
        gateway = Gateway(database)
        gateway.cache._following = True
        assert await gateway.spend()
        server.__exit__(None, None, None)
        began, went = time.monotonic(), 0
        while time.monotonic() - began < 1:
            went += await gateway.spend()
            await asyncio.sleep(0.001)
        assert 20 <= went <= 45
        await database.close()

    server = embedded_redis(tmp_path)
    asyncio.run(use(server, server.__enter__()))


def test_over_http_it_is_429_with_the_limit_s_name(hub, adapters) -> None:
    hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
    change = {"limits": {"requests_per_second": 3}}
    hub.http.patch("/v1/tenants/default", json=change, headers=hub.admin)
    time.sleep(1)  # what was spent at the old rate is over
    answers = [hub.http.post("/v1/tasks/flowers/classify", content=png()) for _ in range(8)]
    refused = [a for a in answers if a.status_code == 429]
    assert 3 <= len(refused) <= 5
    assert refused[0].json()["type"] == "urn:karst-hub:problem:limit-reached"
    assert refused[0].json()["detail"] == "the tenant's limit of 3 requests a second is reached"
    assert refused[0].headers["retry-after"] == "1"
    time.sleep(1)
    assert hub.http.get("/v1/usage").json()["limits"]["requests_per_second"] == 3


def _with_short_lives() -> str:
    from hub.admission import rate_limits as limits

    return limits._TAKE.replace(f"+ {limits.LAPSED_MS})", "+ 1000)")
