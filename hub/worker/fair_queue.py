"""Queue of images that gives every tenant its share of each batch: deficit round robin with saved-up turns.

Deficit round robin: Shreedhar and Varghese, SIGCOMM 1995. The unit of work is one image. Tenants take turns; a turn
is worth as many images as the tenant's weight. A tenant's own images leave in the order in which they came. An item
that costs more than one image's pass counts as more images, and its tenant skips the turns that it took too many.

A tenant with an empty queue saves its turns, up to `MAX_SAVED_IMAGES`. Saved turns put the tenant first, so a tenant
that sends less than its share never waits for a turn of a tenant that sends more. A heavy tenant saves nothing.

The queue is synchronous and has no clock. Each call that depends on time takes `now_s`, in seconds of any clock.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass, field
from math import inf
from typing import Generic, NamedTuple, TypeVar

from ..errors import LimitReached

WINDOW_S = 1.0  # the images sent by tenants are compared over the last one to two windows
MAX_SAVED_IMAGES = 16  # for a weight of 1
# A tenant is heavy at this many times the images per weight of the lightest tenant. At 3, a tenant of 16 images a call
# was heavy only at times: its neighbour sends fewer images the longer it waits, and then more again.
HEAVY_RATIO = 2.0
Item = TypeVar("Item")


class BatchSize(NamedTuple):
    """Limits of the number of images in the next batch: the largest one, unless said otherwise."""

    full: int  # while tenants send similar numbers of images
    short: int  # while some tenant is heavy; at most `full`
    beside: int = 1  # smallest number of images of a batch that starts beside another


@dataclass
class _TenantQueue(Generic[Item]):
    weight: float = 1.0
    deficit: float = 0.0  # images that the tenant may still take: of this turn, or saved up
    last_sent_s: float = 0.0
    items: deque[Item] = field(default_factory=deque)
    images: int = 0  # as how many the items count


class RecentImages:
    """Number of images, divided by weight, that each tenant sent in the last one to two windows."""

    def __init__(self) -> None:
        self._window_start_s = -inf
        self._current: dict[str, float] = {}
        self._previous: dict[str, float] = {}

    def add(self, tenant: str, images_per_weight: float, now_s: float) -> None:
        """Count images of a tenant, refused images included."""
        age_s = now_s - self._window_start_s
        if age_s >= WINDOW_S:
            self._previous = self._current if age_s < 2 * WINDOW_S else {}
            self._current, self._window_start_s = {}, now_s
        self._current[tenant] = self._current.get(tenant, 0.0) + images_per_weight

    def heavy_tenants(self, now_s: float) -> Set[str]:
        """Return the tenants that sent at least `HEAVY_RATIO` times as much as the lightest tenant."""
        if now_s - self._window_start_s >= 2 * WINDOW_S:
            return frozenset()
        tenants = self._current.keys() | self._previous
        sent = {tenant: self._current.get(tenant, 0.0) + self._previous.get(tenant, 0.0) for tenant in tenants}
        threshold = HEAVY_RATIO * min(sent.values())
        return {tenant for tenant, images in sent.items() if images >= threshold}


class FairQueue(Generic[Item]):
    """Queues of all tenants, and the next batch out of them."""

    def __init__(self, tenant_limit: int, images_of: Callable[[Item], int] = lambda _: 1) -> None:
        """
        Args:
            tenant_limit: largest number of queued images of one tenant.
            images_of: returns as how many images an item counts, at least 1.
        """
        self._images_of = images_of
        self._tenant_limit = tenant_limit
        self._ring: deque[str] = deque()  # tenants in the order of their turns; the same names as in `_queues`
        self._queues: dict[str, _TenantQueue[Item]] = {}
        self._recent = RecentImages()
        self._length = 0

    def __len__(self) -> int:
        """Return the number of queued images of all tenants."""
        return self._length

    def push(self, tenant: str, items: Sequence[Item], weight: float, now_s: float) -> None:
        """Queue items of a tenant.

        Args:
            weight: the tenant's share, relative to other tenants; more than 0.

        Raises:
            LimitReached: the tenant would have more than `tenant_limit` queued images. No item is queued.
        """
        images = sum(map(self._images_of, items))
        self._recent.add(tenant, images / weight, now_s)
        queue = self._queues.get(tenant)
        queued = queue.images if queue else 0
        if queued + images > self._tenant_limit:
            raise LimitReached(
                f"Too many images of this tenant are queued at this worker: {queued} queued, {images} more, "
                f"limit {self._tenant_limit}. Retry later, or send fewer images at once."
            )
        if queue is None:
            queue = self._queues[tenant] = _TenantQueue()
            self._ring.appendleft(tenant)
        elif not queue.items and queue.deficit >= 1:  # saved-up turns: the tenant is next
            self._ring.remove(tenant)
            self._ring.appendleft(tenant)
        queue.weight, queue.last_sent_s = weight, now_s
        queue.items.extend(items)
        queue.images += images
        self._length += images

    def discard(self, tenant: str, items: Collection[Item]) -> None:
        """Remove those of a tenant's items that are still queued. Items are compared by their hash."""
        queue = self._queues.get(tenant)
        if queue is None or not items:
            return
        removed = frozenset(items)
        kept = deque(item for item in queue.items if item not in removed)
        images = sum(map(self._images_of, kept))
        self._length -= queue.images - images
        queue.items, queue.images = kept, images

    def has_heavy_tenant(self, now_s: float) -> bool:
        """Return whether a tenant sends so much more than another that batches are short."""
        return bool(self._recent.heavy_tenants(now_s))

    def batch_limit(self, size: BatchSize, now_s: float) -> int:
        """Return the largest number of images in the next batch, saved-up turns not counted."""
        return self._batch_limit(size, self._recent.heavy_tenants(now_s))

    def pop_batch(self, size: BatchSize, now_s: float) -> list[Item]:
        """Take the next batch out of the queues; an empty list if nothing is queued.

        Saved-up turns may fill a short batch up to `size.full`. The last item may exceed the limit.
        """
        heavy = self._recent.heavy_tenants(now_s)
        limit = self._batch_limit(size, heavy)
        batch: list[Item] = []
        taken = 0  # images
        while taken < min(limit, self._length):
            tenant = self._ring[0]
            queue = self._queues[tenant]
            if not queue.items:
                self._skip_turn(tenant, queue, tenant in heavy, now_s)
                continue
            if queue.deficit < 1:
                queue.deficit += queue.weight
            room = limit if tenant in heavy else size.full
            while queue.items and queue.deficit >= 1 and taken < room:
                batch.append(queue.items.popleft())
                images = self._images_of(batch[-1])
                taken += images
                queue.images -= images
                queue.deficit -= images
            if queue.deficit < 1 or not queue.items:
                self._ring.rotate(-1)
        self._length -= taken
        return batch

    def _skip_turn(self, tenant: str, queue: _TenantQueue[Item], heavy: bool, now_s: float) -> None:
        """Save the first tenant's turn, or forget a tenant that sent nothing for two windows."""
        self._ring.rotate(-1)
        if not heavy:
            queue.deficit = min(queue.deficit + queue.weight, MAX_SAVED_IMAGES * queue.weight)
        if now_s - queue.last_sent_s >= 2 * WINDOW_S:
            self._ring.pop()
            del self._queues[tenant]

    def _batch_limit(self, size: BatchSize, heavy: Set[str]) -> int:
        """Return `size.full`, or less beside a heavy tenant.

        The light tenants' queued images may make a short batch larger: larger batches cost less per image, and light
        tenants get at least half of such a batch.
        """
        if not heavy:
            return size.full
        longest = max((queue.images for queue in self._queues.values()), default=0)
        return max(size.short, min(self._length - longest, size.full))
