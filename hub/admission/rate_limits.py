"""Rates and images in flight of each tenant, held over all gateways; and the counts that they leave.

The truth is two token buckets and a table of permits in Redis. A gateway takes tokens and permits from there in small
lots and spends them by itself, so that most calls ask nobody; what it does not spend lapses within a second. While
the registry is away each gateway holds the tenant to its rates alone. What was taken and counted for a tenant is never
written for another one of the same name: both scripts compare when it was made.

    t:{tenant}:rate      hash    requests, images: tokens left; at: when, in seconds since 1970
    t:{tenant}:flight    hash    gateway -> permits:images in flight:until when, in milliseconds since 1970
    t:{tenant}:settled   hash    gateway -> the last lot of counts that it sent
"""

import asyncio
import itertools
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import LimitReached, Unavailable
from ..registry.cache import RegistryCache
from ..registry.connection import RegistryConnection
from ..registry.keys import KeyRegistry
from ..schemas import TenantLimits

logger = logging.getLogger(__name__)

TICK_S = 0.5
LOT_S = 0.05  # a gateway takes as many tokens as the tenant may spend in this time
TRIES = 3
TAKE_S = 0.25  # the longest that a call waits for Redis here
LOTS = 16  # and this part of its permits
LAPSED_MS = 10_000  # permits of a gateway that is silent for so long are free again

# ARGV: tenant, gateway, requests a second, images a second, images in flight, then what is needed and what is wanted
# of each: requests, images, permits; the gateway's own permits, and images in flight; when the tenant was made.
# Replies: {requests, images, permits} that were taken, {which limit, milliseconds to wait}, or {'tenant'}: it is gone.
# A bucket holds what may be spent in a second. A call that needs more than that waits for a full one and leaves a debt.
_TAKE = """
local info = redis.call('HGET', 'karst:tenants', ARGV[1])
if not info or cjson.decode(info)['created'] ~= ARGV[14] then return {'tenant'} end
local base = 'karst:t:' .. ARGV[1]
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local state = redis.call('HMGET', base .. ':rate', 'requests', 'images', 'at')
local since = math.max(0, now - tonumber(state[3] or 0))
local names, taken, left = {'requests', 'images'}, {}, {}
for i = 1, 2 do
  local rate, need, want = tonumber(ARGV[i + 2]), tonumber(ARGV[i + 5]), tonumber(ARGV[i + 8])
  local most = math.max(1, rate)
  local tokens = math.min(most, tonumber(state[i] or most) + since * rate)
  local least = math.min(need, most)
  if need > 0 and tokens < least then return {names[i] .. '_per_second', math.ceil((least - tokens) / rate * 1000)} end
  taken[i] = math.max(need, math.min(want, math.floor(tokens)))
  left[i] = tokens - taken[i]
end
local others = 0
local held = redis.call('HGETALL', base .. ':flight')
for i = 1, #held, 2 do
  local permits, _, till = string.match(held[i + 1], '([^:]+):([^:]+):([^:]+)')
  if tonumber(till) < now * 1000 then redis.call('HDEL', base .. ':flight', held[i])
  elseif held[i] ~= ARGV[2] then others = others + tonumber(permits) end
end
local own, need, want = tonumber(ARGV[12]), tonumber(ARGV[8]), tonumber(ARGV[11])
local free = tonumber(ARGV[5]) - others - own
if free < need then return {'images_in_flight', 1000} end
taken[3] = math.max(need, math.min(want, free))
local till = string.format('%.0f', now * 1000 + LAPSED)
redis.call('HSET', base .. ':flight', ARGV[2], (own + taken[3]) .. ':' .. ARGV[13] .. ':' .. till)
redis.call('HSET', base .. ':rate', 'requests', tostring(left[1]), 'images', tostring(left[2]),
  'at', string.format('%.6f', now))
local keep = 60  -- a debt is not forgotten before it is paid
for i = 1, 2 do
  local rate = tonumber(ARGV[i + 2])
  keep = math.max(keep, math.min(1e9, math.ceil((math.max(1, rate) - left[i]) / rate) + 1))
end
redis.call('EXPIRE', base .. ':rate', string.format('%.0f', keep))
redis.call('EXPIRE', base .. ':flight', 60)
return taken
""".replace("LAPSED", str(LAPSED_MS))

# ARGV: tenant, gateway, its permits:images in flight (or nothing), number of this lot of counts, when the tenant was
# made, `name:n` of each count
_SETTLE = """
local info = redis.call('HGET', 'karst:tenants', ARGV[1])
if not info or cjson.decode(info)['created'] ~= ARGV[5] then return end
local base = 'karst:t:' .. ARGV[1]
if ARGV[3] == '' then redis.call('HDEL', base .. ':flight', ARGV[2])
else
  local till = redis.call('TIME')[1] * 1000 + LAPSED
  redis.call('HSET', base .. ':flight', ARGV[2], ARGV[3] .. ':' .. string.format('%.0f', till))
  redis.call('EXPIRE', base .. ':flight', 60)
end
if #ARGV > 5 and tonumber(redis.call('HGET', base .. ':settled', ARGV[2]) or 0) < tonumber(ARGV[4]) then
  redis.call('HSET', base .. ':settled', ARGV[2], ARGV[4])  -- sent again, a lot counts once
  redis.call('EXPIRE', base .. ':settled', 86400)
  for i = 6, #ARGV do
    local name, n = string.match(ARGV[i], '([^:]+):([^:]+)')
    redis.call('HINCRBY', base .. ':counts', name, n)
  end
end
if #ARGV > 5 then
  local now = tonumber(redis.call('TIME')[1])
  redis.call('ZADD', 'karst:active', now, ARGV[1])
  redis.call('ZREMRANGEBYSCORE', 'karst:active', '-inf', now - 3600)
end
""".replace("LAPSED", str(LAPSED_MS))


@dataclass
class _Purse:
    """What a gateway has of a tenant's: tokens and permits to spend, and what it did since the last tick."""

    created: str  # when the tenant was made; another one of its name has a purse of its own
    requests: float = 0
    images: float = 0
    permits: int = 0
    in_flight: int = 0
    peak: int = 0  # of images in flight, since the last tick
    pending: dict[str, int] = field(default_factory=dict)  # counts that were sent, and perhaps did not arrive
    lot: int = 0  # their number
    counts: dict[str, int] = field(default_factory=lambda: {"requests": 0, "images": 0, "refused": 0})
    spent: bool = False
    alone_since: float | None = None  # when it last filled itself, the registry being away
    taking: asyncio.Lock = field(default_factory=asyncio.Lock)

    def covers(self, requests: int, images: int) -> bool:
        return self.requests >= requests and self.images >= images and self.permits - self.in_flight >= images


class Limiter:
    """One gateway's part of every tenant's limits. `run` must run beside it."""

    def __init__(self, database: RegistryConnection, cache: RegistryCache, keys: KeyRegistry) -> None:
        self._db = database
        self._cache = cache
        self._keys = keys
        self._name = uuid.uuid4().hex[:12]
        self._purses: dict[str, _Purse] = {}
        self._used_keys: dict[str, float] = {}
        self._lots = itertools.count(1)  # the gateway's, since purses come and go

    async def request(self, tenant: str) -> None:
        """Count a request of whatever kind; raises what `images` raises."""
        purse, _ = await self._open(tenant, requests=1, images=0)
        purse.requests -= 1
        purse.counts["requests"] += 1

    @asynccontextmanager
    async def images(self, tenant: str, images: int) -> AsyncIterator[float]:
        """Count images, which are in flight until the context ends.

        Yields:
            The tenant's weight beside others.

        Raises:
            LimitReached: one of its limits; names it.
            NotFound: the tenant is no more.
            Unavailable: the tenant is new here, while the registry does not answer.
        """
        purse, limits = await self._open(tenant, requests=0, images=images)
        purse.images -= images
        purse.in_flight += images
        purse.peak = max(purse.peak, purse.in_flight)
        purse.counts["images"] += images
        try:
            yield limits.weight
        finally:
            purse.in_flight -= images

    def note_key(self, id: str, now_s: float) -> None:
        """A key was used; `run` writes it down."""
        self._used_keys[id] = now_s

    async def run(self) -> None:
        """Twice a second: write counts and uses down, renew permits in use, let go of the others. For ever."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.settle()
            except Unavailable as error:
                logger.warning("counts wait: %s", error.detail)
            except Exception:
                logger.exception("counts wait")

    async def settle(self) -> None:
        """
        Raises:
            Unavailable: Redis does not answer; nothing is lost.
        """
        if self._used_keys:
            used, self._used_keys = self._used_keys, {}
            try:
                await self._keys.record_use(used)
            except BaseException:
                self._used_keys = used | self._used_keys
                raise
        for tenant, purse in list(self._purses.items()):
            await self._settle(tenant, purse)

    async def _settle(self, tenant: str, purse: _Purse) -> None:
        async with purse.taking:  # else its word on permits could overtake that of a taking
            idle, purse.spent = not purse.spent, False
            if idle:
                purse.requests, purse.images = min(purse.requests, 0), min(purse.images, 0)
            purse.permits = min(purse.permits, max(purse.peak, purse.in_flight))  # other gateways may need the rest
            purse.peak = purse.in_flight
            if not purse.pending:
                purse.pending = {name: n for name, n in purse.counts.items() if n}
                purse.counts, purse.lot = dict.fromkeys(purse.counts, 0), next(self._lots)
            held = f"{purse.permits}:{purse.in_flight}" if purse.permits else ""
            counts = (f"{name}:{n}" for name, n in purse.pending.items())
            # Requests wait for `taking`, too. A lot that arrived after all counts once.
            lot: tuple[str | int, ...] = held, purse.lot, purse.created, *counts
            await self._db.evaluate(_SETTLE, tenant, self._name, *lot, timeout_s=TAKE_S)
            purse.pending = {}
        busy = purse.permits or purse.in_flight or purse.taking.locked() or purse.spent
        if idle and not busy and self._purses.get(tenant) is purse:
            del self._purses[tenant]

    async def _open(self, tenant: str, *, requests: int, images: int) -> tuple[_Purse, TenantLimits]:
        """The tenant's purse with at least so much in it."""
        for _ in range(TRIES):
            info = await self._cache.tenant(tenant)
            purse = self._purses.get(tenant)
            if purse is None or purse.created != info.created:
                purse = self._purses[tenant] = _Purse(info.created)
            purse.spent = True
            if await self._fill(tenant, info.limits, purse, requests, images):
                return purse, info.limits
            self._cache.invalidate_tenant(tenant)  # it was deleted, and this gateway did not hear of it yet
        raise Unavailable("the tenant is being made anew; try again")

    async def _fill(self, tenant: str, limits: TenantLimits, purse: _Purse, requests: int, images: int) -> bool:
        """Take until the purse covers a call, as far as that goes; False if the tenant is no more."""
        if purse.covers(requests, images):
            return True
        async with purse.taking:
            for _ in range(TRIES):  # another call may spend what this one has taken
                if purse.covers(requests, images):
                    break
                if not await self._take(tenant, limits, purse, requests, images):
                    return False
        return True

    async def _take(self, tenant: str, limits: TenantLimits, purse: _Purse, requests: int, images: int) -> bool:
        """One more lot from Redis, or from the purse's own; False if the tenant is no more."""
        rates = limits.requests_per_second, limits.images_per_second
        needs = (
            max(0, math.ceil(requests - purse.requests)),
            max(0, math.ceil(images - purse.images)),
            max(0, images - (purse.permits - purse.in_flight)),
        )
        lots = (*(math.ceil(rate * LOT_S) for rate in rates), math.ceil(limits.images_in_flight / LOTS))
        wants = [max(need, lot) if need else 0 for need, lot in zip(needs, lots, strict=True)]
        if images > limits.images_in_flight:
            raise self._refuse(purse, limits, "images_in_flight", 60.0, f"; this call alone has {images}")
        try:
            taken: Any = await self._db.evaluate(
                _TAKE,
                tenant,
                self._name,
                *rates,
                limits.images_in_flight,
                *needs,
                *wants,
                purse.permits,
                purse.in_flight,
                purse.created,
                timeout_s=TAKE_S,
            )
        except Unavailable:
            self._fill_alone(purse, limits, requests, images)
            return True
        if taken == ["tenant"]:
            return False
        purse.alone_since = None
        if isinstance(taken[0], str):
            raise self._refuse(purse, limits, taken[0], taken[1] / 1000)
        purse.requests += taken[0]
        purse.images += taken[1]
        purse.permits += taken[2]
        return True

    def _fill_alone(self, purse: _Purse, limits: TenantLimits, requests: int, images: int) -> None:
        now = time.monotonic()
        since = 1.0 if purse.alone_since is None else now - purse.alone_since
        purse.alone_since = now
        purse.requests = min(max(1.0, limits.requests_per_second), purse.requests + since * limits.requests_per_second)
        purse.images = min(max(1.0, limits.images_per_second), purse.images + since * limits.images_per_second)
        purse.permits = limits.images_in_flight
        if purse.requests < requests:
            raise self._refuse(purse, limits, "requests_per_second", (1 - purse.requests) / limits.requests_per_second)
        least = min(images, limits.images_per_second)
        if purse.images < least:
            raise self._refuse(purse, limits, "images_per_second", (least - purse.images) / limits.images_per_second)
        if purse.permits - purse.in_flight < images:
            raise self._refuse(purse, limits, "images_in_flight", 1.0)

    def _refuse(self, purse: _Purse, limits: TenantLimits, which: str, wait_s: float, more: str = "") -> LimitReached:
        purse.counts["refused"] += 1
        named = which.replace("_per_second", " a second").replace("_", " ")
        message = f"the tenant's limit of {getattr(limits, which):g} {named} is reached{more}"
        return LimitReached.at(which, message, retry_after_s=max(1, math.ceil(wait_s)))
