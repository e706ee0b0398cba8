"""Garbage: files in the store that no version holds. A registration that failed leaves one, so does a deletion."""

import time
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Protocol

from ..schemas import Collected
from ..storage.store import OffLoop, Store

LISTED_AT_ONCE = 1000
HURRY_S = 30.0  # half of a claim's life: a removal that has not begun by then is left for the next time


class Orphans(Protocol):
    """The registry's part."""

    async def claim_orphan(self, digest: str) -> bool:
        """Whether no version holds this digest; if so none can begin to until a minute is over."""


async def collect(
    registry: Orphans, store: Store, off_loop: OffLoop, older_than_s: float, now: datetime | None = None
) -> Collected:
    """Remove every file that no version holds, and that was not put for `older_than_s` seconds.

    A registration puts its file first and makes its version after. Its `put` makes the file young, which keeps it from
    here. Where it comes too late for that, the claim does. It stands for a minute and outlives the removal, so that the
    registration is refused (`Unavailable`) and not left without a file; the caller's next try puts the file again. No
    claim is ended early: another collection may rely on it.

    Args:
        now: what ages are measured from; None: the clock.

    Raises:
        Unavailable: registry or store are away; what was removed by then is gone.
    """
    before = (now or datetime.now(UTC)) - timedelta(seconds=older_than_s)
    unfinished = await off_loop(store.delete_unfinished, before)
    removed, size_bytes, kept = len(unfinished), sum(unfinished), 0
    files = store.files()
    while listed := await off_loop(lambda: list(islice(files, LISTED_AT_ONCE))):
        for file in listed:
            if file.modified < before and await _remove(registry, store, off_loop, file.digest, before):
                removed += 1
                size_bytes += file.size_bytes
            else:
                kept += 1
    return Collected(removed=removed, bytes=size_bytes, kept=kept)


async def _remove(registry: Orphans, store: Store, off_loop: OffLoop, digest: str, before: datetime) -> bool:
    until = time.monotonic() + HURRY_S
    return await registry.claim_orphan(digest) and await off_loop(_remove_if_old, store, digest, before, until)


def _remove_if_old(store: Store, digest: str, before: datetime, until: float) -> bool:
    """Look again: between listing and claim somebody may have put it."""
    file = store.find(digest)
    return file is not None and file.modified < before and time.monotonic() < until and store.delete(digest)
