"""A tenant's rates and images in flight over several gateways, with a real Redis."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import redis

from adapters import Adapter
from hub.admin_schemas import LimitsChange, TenantInfo
from hub.admission.rate_limits import PERMIT_EXPIRY_S, RateLimiter
from hub.errors import LimitReached, NotFound
from hub.local.embedded_redis import embedded_redis
from hub.registry.audit import OPERATOR
from hub.registry.keys import KeyRegistry
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tenants import TenantRegistry
from tests.support.hub_app import OCTETS, REDIS_PATIENCE, Hub, in_registry
from tests.support.models import png


class LateCache:
    """Cache of a gateway that no change event reaches: it returns a tenant until `forget_tenant`."""

    def __init__(self, tenants: TenantRegistry) -> None:
        self._tenants = tenants
        self._known: dict[str, TenantInfo] = {}

    async def tenant(self, tenant: str) -> TenantInfo:
        if tenant not in self._known:
            self._known[tenant] = await self._tenants.get(tenant)
        return self._known[tenant]

    def invalidate_tenant(self, tenant: str) -> None:
        self._known.pop(tenant, None)


class Gateway:
    """A limiter with its cache."""

    def __init__(self, database: RegistryConnection, permit_expiry_s: float = PERMIT_EXPIRY_S) -> None:
        self.database = database
        self.tenants = TenantRegistry(database)
        self.cache = LateCache(self.tenants)
        self._permit_expiry_s = permit_expiry_s
        self.restart()

    def restart(self) -> None:
        """Drop the leases and keep the cache."""
        keys = KeyRegistry(self.database)
        self.limiter = RateLimiter(self.database, self.cache, keys, permit_expiry_s=self._permit_expiry_s)

    async def spend(self, images: int = 1) -> bool:
        """Make one call of images that ends at once. Return whether it was admitted."""
        try:
            await self.limiter.request("t")
            async with self.limiter.images("t", images):
                return True
        except LimitReached:
            return False

    async def keys(self) -> list[str]:
        return [key async for key in self.database.redis.scan_iter("karst:t:t:*")]


Use = Callable[[Gateway, Gateway, Gateway], Awaitable[None]]


def with_gateways(
    url: str, use: Use, *, permit_expiry_s: float = PERMIT_EXPIRY_S, patience: float = 100, **limits: float
) -> None:
    """Run `use` with three gateways and a tenant `t` that has these limits.

    The gateways wait for Redis also on a busy machine; otherwise they would admit calls without it.
    """

    async def run(database: RegistryConnection) -> None:
        await TenantRegistry(database).create(OPERATOR, "t", LimitsChange.model_validate(limits))
        await use(*(Gateway(database, permit_expiry_s) for _ in range(3)))

    in_registry(url, run, patience=patience)


@pytest.mark.parametrize(("limits", "images"), [({"requests_per_second": 40}, 1), ({"images_per_second": 160}, 4)])
def test_rate_holds_over_all_gateways(empty_redis: str, limits: dict[str, float], images: int) -> None:
    async def use(*gateways: Gateway) -> None:
        began = time.monotonic()
        admitted = 0
        while time.monotonic() - began < 0.7:
            admitted += sum(await asyncio.gather(*(gateway.spend(images) for gateway in gateways)))
            await asyncio.sleep(0.001)
        elapsed_s = time.monotonic() - began
        # At first a full bucket (one second), then the rate. Each gateway may hold an unspent lot of two calls.
        assert 40 - 3 * 2 <= admitted <= 40 * (1 + elapsed_s) + 1

    with_gateways(empty_redis, use, **limits)


def test_call_is_charged_as_its_images_count_and_never_more_than_the_limit_in_flight(empty_redis: str) -> None:
    async def use(gateway: Gateway, *_others: Gateway) -> None:
        async with gateway.limiter.images("t", 1, 6):
            with pytest.raises(LimitReached, match="20 images in flight"):
                async with gateway.limiter.images("t", 1, 15):
                    pass
            async with gateway.limiter.images("t", 1, 14):
                pass
        async with gateway.limiter.images("t", 2, 50):
            with pytest.raises(LimitReached, match="20 images in flight"):
                async with gateway.limiter.images("t", 1):
                    pass
        with pytest.raises(LimitReached, match="this call has 21"):
            async with gateway.limiter.images("t", 21):
                pass
        await gateway.limiter.settle()
        assert (await gateway.tenants.usage("t")).counted.images == 6 + 14 + 20

    with_gateways(empty_redis, use, images_in_flight=20)


def test_redis_that_hangs_delays_no_request(tmp_path: Path) -> None:
    """Neither a call that takes tokens from Redis, nor one during a settlement."""

    async def use(gateway: Gateway, *_others: Gateway) -> None:
        settling = asyncio.create_task(gateway.limiter.run())
        try:
            for attempt in range(3):
                until = time.monotonic() + 0.5 + 0.17 * attempt  # each attempt hits another moment of the interval
                while time.monotonic() < until:
                    assert await gateway.spend()
                    await asyncio.sleep(0.02)
                os.kill(server, signal.SIGSTOP)
                until = time.monotonic() + 1.0
                while time.monotonic() < until:
                    async with asyncio.timeout(3):  # the socket's timeout is 5 s
                        assert await gateway.spend()
                    await asyncio.sleep(0.01)
                os.kill(server, signal.SIGCONT)
        finally:
            os.kill(server, signal.SIGCONT)
            settling.cancel()

    with embedded_redis(tmp_path) as url:
        with redis.Redis.from_url(url) as client:
            server = int(client.info("server")["process_id"])
        with_gateways(url, use, patience=1, requests_per_second=400, images_per_second=400)


def test_images_in_flight_hold_over_all_gateways(empty_redis: str) -> None:
    async def use(*gateways: Gateway) -> None:
        async with AsyncExitStack() as held:
            refused, admitted = [], 0
            for i in range(40):
                try:
                    await held.enter_async_context(gateways[i % 3].limiter.images("t", 1))
                    admitted += 1
                except LimitReached as error:
                    refused.append(error)
            assert 18 <= admitted <= 20  # a lot has two permits
            message = "images_in_flight: this tenant's limit of 20 images in flight is reached"
            assert refused[0].detail == message
            assert refused[0].errors[0].field == "images_in_flight"
            assert (refused[0].retry_after_s or 0) >= 1
            for gateway in gateways:
                await gateway.limiter.settle()
            assert (await gateways[0].tenants.usage("t")).used.images_in_flight == admitted
        for gateway in gateways:  # a lease is idle after a whole interval without a call
            await gateway.limiter.settle()
            await gateway.limiter.settle()
        assert (await gateways[0].tenants.usage("t")).used.images_in_flight == 0
        assert await gateways[2].spend(20)
        with pytest.raises(LimitReached, match="this call has 21"):
            async with gateways[0].limiter.images("t", 21):
                pass

    with_gateways(empty_redis, use, images_in_flight=20)


def test_refusal_says_when_to_retry_when_the_rate_is_slow(empty_redis: str) -> None:
    async def use(gateway: Gateway, *_others: Gateway) -> None:
        assert await gateway.spend()
        with pytest.raises(LimitReached) as caught:
            await gateway.limiter.request("t")
        assert caught.value.errors[0].field == "requests_per_second"
        assert 5 <= (caught.value.retry_after_s or 0) <= 10

    with_gateways(empty_redis, use, requests_per_second=0.1)


def test_call_larger_than_the_bucket_waits_for_a_full_one_and_leaves_a_debt(empty_redis: str) -> None:
    async def use(gateway: Gateway, *_others: Gateway) -> None:
        assert await gateway.spend(30)
        with pytest.raises(LimitReached) as caught:
            async with gateway.limiter.images("t", 1):
                pass
        assert 25 <= (caught.value.retry_after_s or 0) <= 30  # 29 of debt and one image, at one per second

    with_gateways(empty_redis, use, images_per_second=1)


def test_permits_are_free_again_when_their_gateway_has_died(empty_redis: str) -> None:
    async def use(dead: Gateway, alive: Gateway, _third: Gateway) -> None:
        await dead.limiter.images("t", 10).__aenter__()
        assert not await alive.spend(10)
        async with asyncio.timeout(10):
            while not await alive.spend(10):
                await asyncio.sleep(0.05)

    with_gateways(empty_redis, use, permit_expiry_s=0.3, images_in_flight=15)


def test_counts_of_all_gateways_add_up(empty_redis: str) -> None:
    async def use(*gateways: Gateway) -> None:
        admitted = [await gateways[i % 3].spend(2) for i in range(30)]
        for gateway in gateways:
            await gateway.limiter.settle()
        counted = (await gateways[0].tenants.usage("t")).counted
        assert (counted.requests, counted.images, counted.refused) == (30, 2 * sum(admitted), 30 - sum(admitted))
        assert 0 < counted.refused < 30

    with_gateways(empty_redis, use, images_per_second=20)


def test_deleted_tenant_is_not_found_and_leaves_nothing(empty_redis: str) -> None:
    async def use(gateway: Gateway, *_others: Gateway) -> None:
        assert await gateway.spend()
        await gateway.tenants.delete(OPERATOR, "t")
        gateway.cache.invalidate_tenant("t")
        with pytest.raises(NotFound):
            await gateway.spend()
        await gateway.limiter.settle()
        assert await gateway.keys() == []

    with_gateways(empty_redis, use)


def test_late_gateway_recreates_nothing_of_a_deleted_tenant(empty_redis: str) -> None:
    async def use(gateway: Gateway, late: Gateway, _third: Gateway) -> None:
        assert await gateway.spend()
        assert await late.spend()
        late.restart()  # its next call asks Redis, with the tenant from its cache
        await gateway.tenants.delete(OPERATOR, "t")
        with pytest.raises(NotFound):
            await late.spend()
        for each in (gateway, late):
            await each.limiter.settle()
        assert await gateway.keys() == []
        assert await gateway.database.redis.zscore("karst:active", "t") is None

    with_gateways(empty_redis, use)


def test_new_tenant_of_the_same_name_inherits_nothing(empty_redis: str) -> None:
    """No counts, permits or tokens of the deleted tenant, which gateways still hold or have in their caches."""

    async def use(gateway: Gateway, late: Gateway, _third: Gateway) -> None:
        for _ in range(10):  # the whole lot: the next request asks Redis, with the tenant from the cache
            await late.limiter.request("t")
        async with gateway.limiter.images("t", 5):
            await gateway.tenants.delete(OPERATOR, "t")
            await gateway.tenants.create(OPERATOR, "t", LimitsChange(images_per_second=10))
            for each in (gateway, late):
                await each.limiter.settle()
            usage = await gateway.tenants.usage("t")
            assert usage.counted.model_dump() == {"requests": 0, "images": 0, "refused": 0}
            assert usage.used.images_in_flight == 0
            assert await late.spend(10)  # a full bucket
        for each in (gateway, late):
            await each.limiter.settle()
        assert (await gateway.tenants.usage("t")).counted.model_dump() == {"requests": 1, "images": 10, "refused": 0}

    with_gateways(empty_redis, use, images_per_second=10)


def test_gateway_admits_a_full_bucket_and_refuses_more_when_redis_is_away(tmp_path: Path) -> None:
    """`test_leases` has the rate in time."""

    async def use(url: str, stop_redis: Callable[[], object]) -> None:
        database = RegistryConnection(url, patience=REDIS_PATIENCE)
        await TenantRegistry(database).create(OPERATOR, "t", LimitsChange(requests_per_second=20))
        gateway = Gateway(database)
        assert await gateway.spend()
        began = time.monotonic()
        stop_redis()
        admitted = 0
        while await gateway.spend():
            admitted += 1
        assert 20 <= admitted <= 20 * (1 + time.monotonic() - began) + 1
        await database.close()

    server = embedded_redis(tmp_path)
    url = server.__enter__()
    asyncio.run(use(url, lambda: server.__exit__(None, None, None)))


def test_reached_limit_is_429_with_the_limit_s_name(hub: Hub, adapters: Sequence[Adapter]) -> None:
    slow = hub.key_of("slow")
    change = {"limits": {"requests_per_second": 3}}
    assert hub.http.patch("/v1/tenants/slow", json=change, headers=hub.admin).status_code == 200
    answers = [hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS | slow)]
    answers += [hub.http.post("/v1/tasks/flowers/classify", content=png(), headers=slow) for _ in range(30)]
    refused = [a for a in answers if a.status_code == 429]
    assert answers[0].status_code == 201
    assert len(answers) - len(refused) >= 3
    assert refused[0].json()["type"] == "urn:karst-hub:problem:limit-reached"
    message = "requests_per_second: this tenant's limit of 3 requests per second is reached"
    assert refused[0].json()["detail"] == message
    assert refused[0].headers["retry-after"] == "1"
    usage = hub.http.get("/v1/tenants/slow/usage", headers=hub.admin).json()
    assert usage["limits"]["requests_per_second"] == 3
