"""Rate of refused adapter files: each costs the gateway a check, and none of the tenant's other limits."""

import math
import time
from collections.abc import Callable

from ..errors import LimitReached
from .quotas import REFUSED_UPLOADS

PERIOD_S = 60.0


class RefusedUploads:
    """Token bucket of each tenant at one gateway: `REFUSED_UPLOADS` refused files per minute. Threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spent: dict[str, tuple[float, float]] = {}  # tokens spent, at this time

    def require(self, tenant: str) -> None:
        """Check that the tenant may send one more file.

        Raises:
            LimitReached: too many files of this tenant were refused in the last minute.
        """
        excess = self._spent_now(tenant) - (REFUSED_UPLOADS - 1)
        if excess > 0:
            message = f"this tenant's limit of {REFUSED_UPLOADS} refused adapter files per minute is reached"
            wait_s = max(1, math.ceil(excess * PERIOD_S / REFUSED_UPLOADS))
            raise LimitReached.at("refused_uploads", message, retry_after_s=wait_s)

    def count(self, tenant: str) -> None:
        """Count a refused file, and forget tenants whose bucket is full again."""
        self._spent[tenant] = self._spent_now(tenant) + 1, self._clock()
        for name in [*self._spent]:
            if not self._spent_now(name):
                self._spent.pop(name, None)

    def _spent_now(self, tenant: str) -> float:
        spent, at_s = self._spent.get(tenant, (0.0, 0.0))
        return max(0.0, spent - (self._clock() - at_s) * REFUSED_UPLOADS / PERIOD_S)
