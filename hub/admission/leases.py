"""Arithmetic of leases: the tokens and permits of one tenant that one gateway holds. No Redis, no event loop.

A token admits one request or one image; permits bound the images in flight. The gateway takes both from Redis in lots,
so most calls need no round trip.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..admin_schemas import TenantLimits

LEASE_S = 0.05  # a lot has the tokens of this time
PERMIT_SHARE = 16  # a lot has this fraction of the tenant's permits


class Amounts(NamedTuple):
    """Tokens for requests, tokens for images, and permits for images in flight."""

    requests: int = 0
    images: int = 0
    permits: int = 0


@dataclass(frozen=True)
class Refusal:
    """The limit that a call would exceed, and the time until a retry can succeed."""

    limit: str
    wait_s: float


@dataclass(frozen=True)
class Settlement:
    """The state that a gateway writes to Redis: permits that it keeps, images in flight, and a batch of counts."""

    permits: int
    in_flight: int
    batch: int
    counts: dict[str, int]


class Lease:
    """One tenant's lease at one gateway, and the counts since the last settlement."""

    def __init__(self, created: str, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            created: creation time of the tenant. A later tenant of the same name gets a lease of its own.
            clock: seconds, for the time without Redis.
        """
        self.created = created
        self.permits = 0
        self.in_flight = 0
        self._clock = clock
        self._requests = 0.0
        self._images = 0.0
        self._peak_in_flight = 0  # since the last settlement
        self._used = False  # since the last settlement
        self._idle = False  # not used between the last two settlements
        self._counts = {"requests": 0, "images": 0, "refused": 0}
        self._unconfirmed: Settlement | None = None
        self._refilled_at: float | None = None  # by the gateway itself, while Redis is unavailable

    @property
    def disposable(self) -> bool:
        """Whether the gateway can drop the lease without losing anything."""
        return self._idle and not (self._used or self.permits or self.in_flight or self._unconfirmed)

    def touch(self) -> None:
        """Note a call, which keeps the tokens until the next settlement."""
        self._used = True

    def covers(self, requests: int, images: int) -> bool:
        """Return whether the lease has the tokens and permits of a call."""
        return self._requests >= requests and self._images >= images and self.permits - self.in_flight >= images

    def missing(self, requests: int, images: int) -> Amounts:
        """Return the amounts that a call needs beyond the lease."""
        return Amounts(
            max(0, math.ceil(requests - self._requests)),
            max(0, math.ceil(images - self._images)),
            max(0, images - (self.permits - self.in_flight)),
        )

    def add(self, taken: Amounts) -> None:
        """Add a lot from Redis."""
        self._refilled_at = None
        self._requests += taken.requests
        self._images += taken.images
        self.permits += taken.permits

    def refill_alone(self, limits: TenantLimits, requests: int, images: int) -> Refusal | None:
        """Refill by the clock, up to the whole limits, while Redis is unavailable. Return a refusal, if any."""
        now = self._clock()
        elapsed_s = 1.0 if self._refilled_at is None else now - self._refilled_at
        self._refilled_at = now
        request_rate, image_rate = limits.requests_per_second, limits.images_per_second
        self._requests = min(max(1.0, request_rate), self._requests + elapsed_s * request_rate)
        self._images = min(max(1.0, image_rate), self._images + elapsed_s * image_rate)
        self.permits = limits.images_in_flight
        if self._requests < requests:
            return Refusal("requests_per_second", (1 - self._requests) / request_rate)
        threshold = min(images, image_rate)  # a call larger than the bucket waits for a full one and leaves a debt
        if self._images < threshold:
            return Refusal("images_per_second", (threshold - self._images) / image_rate)
        if self.permits - self.in_flight < images:
            return Refusal("images_in_flight", 1.0)
        return None

    def spend_request(self) -> None:
        """Spend the token of one request and count the request."""
        self._requests -= 1
        self._counts["requests"] += 1

    def start_images(self, images: int) -> None:
        """Spend the tokens of images, count them, and put them in flight."""
        self._images -= images
        self.in_flight += images
        self._peak_in_flight = max(self._peak_in_flight, self.in_flight)
        self._counts["images"] += images

    def end_images(self, images: int) -> None:
        """Take images out of flight."""
        self.in_flight -= images

    def count_refusal(self) -> None:
        """Count a refused call."""
        self._counts["refused"] += 1

    def settle(self, next_batch: Callable[[], int]) -> Settlement:
        """Give up unused tokens and permits, and return the state to write to Redis.

        A settlement that was not confirmed keeps its batch of counts, since Redis may have received it.

        Args:
            next_batch: source of batch numbers, increasing over all leases of the gateway.
        """
        self._idle, self._used = not self._used, False
        if self._idle:  # a debt remains
            self._requests, self._images = min(self._requests, 0.0), min(self._images, 0.0)
        # The rest is free for other gateways.
        self.permits = min(self.permits, max(self._peak_in_flight, self.in_flight))
        self._peak_in_flight = self.in_flight
        if self._unconfirmed is None:
            batch, counts = next_batch(), {name: n for name, n in self._counts.items() if n}
            self._counts = dict.fromkeys(self._counts, 0)
        else:
            batch, counts = self._unconfirmed.batch, self._unconfirmed.counts
        self._unconfirmed = Settlement(self.permits, self.in_flight, batch, counts)
        return self._unconfirmed

    def confirm(self) -> None:
        """Note that Redis has stored the last settlement."""
        self._unconfirmed = None


def wanted(needed: Amounts, limits: TenantLimits) -> Amounts:
    """Return the amounts to ask for: at least a lot of each amount that a call needs."""
    lots = (
        math.ceil(limits.requests_per_second * LEASE_S),
        math.ceil(limits.images_per_second * LEASE_S),
        math.ceil(limits.images_in_flight / PERMIT_SHARE),
    )
    return Amounts(*(max(need, lot) if need else 0 for need, lot in zip(needed, lots, strict=True)))
