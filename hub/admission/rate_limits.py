"""Rate limits and images in flight of each tenant over all gateways, and the tenant's counts.

Redis has the truth: two token buckets and a table of permits. A gateway leases tokens and permits in lots (`leases`)
and returns unused ones within a second. A round trip to Redis per call would cost more: `benchmarks/rate_limits.py`
measures both. While Redis is unavailable, each gateway enforces the tenant's whole limits by itself.

`redis/lua/leases.lua` compares the tenant's creation time, so a later tenant of the same name inherits nothing.

    t:{tenant}:rate      hash    requests, images: tokens left; at: time of that, in seconds since 1970
    t:{tenant}:flight    hash    gateway -> permits:images in flight:expiry in milliseconds since 1970
    t:{tenant}:settled   hash    gateway -> number of the last batch of counts that it sent
"""

import asyncio
import itertools
import logging
import math
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from ..admin_schemas import TenantInfo, TenantLimits
from ..errors import LimitReached, Unavailable
from ..registry.keys import KeyRegistry
from ..registry.redis.connection import RegistryConnection
from ..registry.redis.scripts import LEASES
from .leases import Amounts, Lease, Refusal, wanted

logger = logging.getLogger(__name__)

SETTLE_INTERVAL_S = 0.5
MAX_ATTEMPTS = 3
REDIS_TIMEOUT_S = 0.25  # then this gateway admits a call alone, because Redis is too slow
PERMIT_EXPIRY_S = 10.0  # then the permits of a gateway that died are free
NAMES = {
    "requests_per_second": "requests per second",
    "images_per_second": "images per second",
    "images_in_flight": "images in flight",
}


class TenantCache(Protocol):
    """The part of the registry cache that the limiter needs."""

    async def tenant(self, tenant: str) -> TenantInfo:
        """Return a tenant; raises NotFound or Unavailable."""

    def invalidate_tenant(self, tenant: str) -> None:
        """Read the tenant from the registry next time."""


class LeaseReply(BaseModel):
    """Reply of a function in `leases.lua`.

    Attributes:
        limit, wait_s: the limit that is reached and the time until a retry can succeed, for `limit`.
        requests, images, permits: the amounts taken, for `done`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    outcome: Literal["done", "limit", "no_tenant"]
    limit: str = ""
    wait_s: float = 0.0
    requests: int = 0
    images: int = 0
    permits: int = 0


class RateLimiter:
    """One gateway's leases of all tenants' limits. `run` must run beside it."""

    def __init__(
        self,
        database: RegistryConnection,
        cache: TenantCache,
        keys: KeyRegistry,
        *,
        permit_expiry_s: float = PERMIT_EXPIRY_S,
    ) -> None:
        """
        Args:
            permit_expiry_s: time without settlement after which Redis frees this gateway's permits.
        """
        self._db = database
        self._cache = cache
        self._keys = keys
        self._permit_expiry_s = permit_expiry_s
        self._gateway = uuid.uuid4().hex[:12]
        self._leases: dict[str, Lease] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._used_keys: dict[str, float] = {}
        self._batches = itertools.count(1)

    async def request(self, tenant: str) -> None:
        """Count one request of any kind.

        Raises:
            LimitReached, NotFound, Unavailable: as for `images`.
        """
        lease, _ = await self._open(tenant, requests=1, images=0)
        lease.spend_request()

    @asynccontextmanager
    async def images(self, tenant: str, images: int, counted: int = 0) -> AsyncIterator[float]:
        """Count images, which are in flight until the context ends.

        Args:
            images: number of images.
            counted: as how many images they count, if more. A call is charged at most the tenant's `images_in_flight`:
                otherwise a low limit would refuse a large image for ever.

        Yields:
            The tenant's weight relative to other tenants.

        Raises:
            LimitReached: one of the tenant's limits; the error's field names it.
            NotFound: the tenant was deleted.
            Unavailable: the gateway does not know the tenant, and the registry does not answer.
        """
        if counted > images:
            in_flight = (await self._cache.tenant(tenant)).limits.images_in_flight
            images = max(images, min(counted, in_flight))
        lease, limits = await self._open(tenant, requests=0, images=images)
        lease.start_images(images)
        try:
            yield limits.weight
        finally:
            lease.end_images(images)

    def note_key(self, id: str, now_s: float) -> None:
        """Note the use of a key, in seconds since 1970; `run` writes it to the registry."""
        self._used_keys[id] = now_s

    async def run(self) -> None:
        """Write counts and key uses to Redis and renew permits, twice a second, until cancelled."""
        while True:
            await asyncio.sleep(SETTLE_INTERVAL_S)
            try:
                await self.settle()
            except Unavailable as error:
                logger.warning("counts are kept until the registry answers: %s", error.detail)
            except Exception:
                logger.exception("counts are kept until the registry answers")

    async def settle(self) -> None:
        """Write counts and key uses to Redis once, and return unused tokens and permits.

        Raises:
            Unavailable: Redis does not answer; the gateway keeps the counts.
        """
        if self._used_keys:
            used, self._used_keys = self._used_keys, {}
            try:
                await self._keys.record_use(used)
            except BaseException:
                self._used_keys = used | self._used_keys
                raise
        for tenant, lease in list(self._leases.items()):
            await self._settle(tenant, lease)

    async def _settle(self, tenant: str, lease: Lease) -> None:
        lock = self._locks[tenant]
        async with lock:  # otherwise this settlement could overwrite the permits of a concurrent `_take`
            settlement = lease.settle(lambda: next(self._batches))
            await self._call(
                "settle",
                tenant,
                lease,
                permits=settlement.permits,
                in_flight=settlement.in_flight,
                batch=settlement.batch,
                counts=settlement.counts,
            )
            lease.confirm()
        if lease.disposable and self._leases.get(tenant) is lease and not lock.locked():
            del self._leases[tenant], self._locks[tenant]

    async def _open(self, tenant: str, *, requests: int, images: int) -> tuple[Lease, TenantLimits]:
        """Return the tenant's lease, with the tokens and permits of a call."""
        for _ in range(MAX_ATTEMPTS):
            info = await self._cache.tenant(tenant)
            lease = self._leases.get(tenant)
            if lease is None or lease.created != info.created:
                lease = self._leases[tenant] = Lease(info.created)
            lease.touch()
            if await self._fill(tenant, info.limits, lease, requests, images):
                return lease, info.limits
            self._cache.invalidate_tenant(tenant)  # deleted, and the change event has not reached this gateway yet
        raise Unavailable("The tenant was deleted and created again. Retry.")

    async def _fill(self, tenant: str, limits: TenantLimits, lease: Lease, requests: int, images: int) -> bool:
        """Take lots until the lease covers a call. Return False if the tenant was deleted."""
        if lease.covers(requests, images):
            return True
        async with self._locks[tenant]:
            # Another call may spend the lot first. After the last attempt the call passes and leaves a debt: a call
            # larger than the bucket is never covered while Redis is unavailable.
            for _ in range(MAX_ATTEMPTS):
                if lease.covers(requests, images):
                    break
                if not await self._take(tenant, limits, lease, requests, images):
                    return False
        return True

    async def _take(self, tenant: str, limits: TenantLimits, lease: Lease, requests: int, images: int) -> bool:
        """Take one lot from Redis, or refill alone without Redis. Return False if the tenant was deleted."""
        if images > limits.images_in_flight:
            raise self._refuse(lease, limits, Refusal("images_in_flight", 60.0), f"; this call has {images}")
        needed = lease.missing(requests, images)
        try:
            reply = await self._call(
                "take",
                tenant,
                lease,
                limits={name: getattr(limits, name) for name in NAMES},
                needed=needed._asdict(),
                wanted=wanted(needed, limits)._asdict(),
                permits=lease.permits,
                in_flight=lease.in_flight,
            )
        except Unavailable:
            refusal = lease.refill_alone(limits, requests, images)
            if refusal is not None:
                raise self._refuse(lease, limits, refusal) from None
            return True
        if reply.outcome == "no_tenant":
            return False
        if reply.outcome == "limit":
            raise self._refuse(lease, limits, Refusal(reply.limit, reply.wait_s))
        lease.add(Amounts(reply.requests, reply.images, reply.permits))
        return True

    async def _call(self, function: str, tenant: str, lease: Lease, **argument: Any) -> LeaseReply:
        argument |= {
            "tenant": tenant,
            "created": lease.created,
            "gateway": self._gateway,
            "expiry_ms": round(1000 * self._permit_expiry_s),
        }
        reply = await self._db.call(LEASES, function, timeout_s=REDIS_TIMEOUT_S, **argument)
        return LeaseReply.model_validate_json(reply)

    def _refuse(self, lease: Lease, limits: TenantLimits, refusal: Refusal, detail: str = "") -> LimitReached:
        lease.count_refusal()
        message = f"this tenant's limit of {getattr(limits, refusal.limit):g} {NAMES[refusal.limit]} is reached{detail}"
        return LimitReached.at(refusal.limit, message, retry_after_s=max(1, math.ceil(refusal.wait_s)))
