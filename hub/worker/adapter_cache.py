"""Adapters of one worker: store -> host memory -> bank slot.

A call takes a lease on an adapter. The adapter stays in its slot until the last lease ends. A call for a cold adapter
waits, for a bounded time, while one load serves all its calls; other calls do not wait. A load that needs a slot evicts
the least recently used adapter without a lease. An evicted adapter stays in host memory while there is room.

    ABSENT -> LOADING -> RESIDENT -> ABSENT               evicted: no leases
                 |           |
                 v           v
              FAILED     DRAINING -> ABSENT               takes no new leases, evicted when its last lease ends
                 |
                 v
              LOADING (first call after a pause) or ABSENT (no call for a long time)
"""

import asyncio
import copy
import logging
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto

from torch import Tensor

from adapters import Bank, Slot

from ..admission.quotas import ADAPTER_LOADS
from ..concurrency import TenantConcurrencyLimit
from ..errors import HubError, Unavailable
from .host_cache import HostAdapter, HostCache
from .stats import CacheCounts

logger = logging.getLogger(__name__)

MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0  # after a failed load; the pause doubles with each failure


class State(Enum):
    """State of an adapter on this worker."""

    ABSENT = auto()
    LOADING = auto()
    RESIDENT = auto()  # in a slot
    DRAINING = auto()  # in a slot, and takes no new leases
    FAILED = auto()  # the last load failed


_NEXT_STATES = {
    State.ABSENT: {State.LOADING},
    State.LOADING: {State.RESIDENT, State.FAILED},
    State.RESIDENT: {State.DRAINING, State.ABSENT},
    State.DRAINING: {State.ABSENT},
    State.FAILED: {State.LOADING, State.ABSENT},
}


@dataclass(frozen=True, eq=False)
class Resident:
    """An adapter in a slot, with the normalisation of its images."""

    digest: str
    slot: Slot
    mean: Tensor  # (3,) float32
    std: Tensor  # (3,) float32
    first_block: int  # see `Bank.first_block`

    @classmethod
    def of(cls, host: HostAdapter, digest: str, slot: Slot) -> "Resident":
        """Return an adapter in host memory that is now also in a slot."""
        return cls(digest, slot, host.mean, host.std, host.first_block)


@dataclass(eq=False)
class _Entry:
    """All that the cache knows of one adapter. Only `AdapterCache._change` sets the state."""

    digest: str
    state: State = State.ABSENT
    resident: Resident | None = None  # RESIDENT, DRAINING
    leases: int = 0  # RESIDENT, DRAINING
    error: HubError | None = None  # FAILED
    pause_s: float = 0.0  # after the last failure in a row
    retry_at_s: float = 0.0  # FAILED
    waits_for: str = ""  # LOADING, DRAINING: for the error text of a call whose wait times out
    # Calls that wait for the next state: a resident with a lease for the call, an error, or None to look again.
    waiters: "list[asyncio.Future[Resident | None]]" = field(default_factory=list)


class AdapterCache:
    """Adapters in the slots of one worker. Runs on one event loop."""

    def __init__(
        self,
        bank: Bank,
        host: HostCache,
        *,
        writer: Executor,
        wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            writer: writes slots. Not the threads that read files, since a slow store must not delay other loads.
            wait_s: longest time that a call waits for its adapter.
            clock: seconds; for pauses after failures, and durations of loads.
        """
        self._bank = bank
        self._host = host
        self._writer = writer
        self._wait_s = wait_s
        self._clock = clock
        self._entries: dict[str, _Entry] = {}  # all but ABSENT
        self._residents: OrderedDict[str, _Entry] = OrderedDict()  # RESIDENT, least recently used first
        self._draining = 0  # DRAINING adapters
        self._slots_taken = 0  # by RESIDENT and DRAINING adapters, and by loads that write one
        self._slot_queue: deque[asyncio.Future[None]] = deque()  # loads that wait for a slot
        self._pinned: frozenset[str] = frozenset()
        self.tenant_loads = TenantConcurrencyLimit(ADAPTER_LOADS)
        self._load_tasks: set[asyncio.Task[None]] = set()  # otherwise a running task may be garbage-collected
        self.counts = CacheCounts()

    @property
    def resident_count(self) -> int:
        """Number of adapters that calls can lease without waiting."""
        return len(self._residents)

    @property
    def loads_without_slot(self) -> int:
        """Number of loads that wait for a slot."""
        return len(self._slot_queue)

    def resident_digests(self) -> list[str]:
        """Return the adapters in slots, least recently used first."""
        return list(self._residents)

    def state(self, digest: str) -> State:
        """Return the state of an adapter."""
        entry = self._entries.get(digest)
        return State.ABSENT if entry is None else entry.state

    def resident(self, digest: str) -> Resident | None:
        """Return an adapter that calls can lease without waiting."""
        return self._residents[digest].resident if digest in self._residents else None

    @contextmanager
    def lease_resident(self, digests: Sequence[str]) -> Iterator[list[Resident] | None]:
        """Hold several adapters in their slots; None unless all can be leased without waiting."""
        if not all(digest in self._residents for digest in digests):
            yield None
            return
        residents = [self._leased(self._residents[digest]) for digest in digests]
        self.counts.hits += len(residents)
        try:
            yield residents
        finally:
            self.release(residents)

    @asynccontextmanager
    async def lease(self, digest: str, tenant: str = "") -> AsyncIterator[Resident]:
        """Hold an adapter in its slot.

        Args:
            tenant: the caller; at most `quotas.ADAPTER_LOADS` loads of a tenant run at once.

        Raises:
            Unavailable: the store cannot return the file, or the adapter is not in a slot within `wait_s`.
            InvalidAdapter: the file does not fit this worker's backbone.
        """
        entry = self._entries.get(digest)
        if entry is not None and entry.state is State.RESIDENT:
            self.counts.hits += 1
            resident = self._leased(entry)
        else:
            resident = await self._wait(digest, tenant)
        try:
            yield resident
        finally:
            self.release([resident])

    def retain(self, residents: Iterable[Resident]) -> None:
        """Add a lease to each of these leased adapters."""
        for resident in residents:
            self._entries[resident.digest].leases += 1

    def release(self, residents: Iterable[Resident]) -> None:
        """End a lease on each of these adapters."""
        for resident in residents:
            entry = self._entries[resident.digest]
            entry.leases -= 1
            if entry.state is State.DRAINING and not entry.leases:
                self._change(entry, State.ABSENT)
        self._hand_out_slots()

    def pin(self, digests: Sequence[str]) -> None:
        """Replace the set of adapters that are never evicted. One slot always stays evictable."""
        unique = list(dict.fromkeys(digests))
        limit = self._bank.slots - 1
        if len(unique) > limit:
            logger.warning("only the first %d of %d pinned adapters keep a slot; raise HUB_SLOTS", limit, len(unique))
        self._pinned = frozenset(unique[:limit])

    def preload(self, digest: str) -> None:
        """Load an adapter into a free slot before the first call; blocks the thread.

        Raises:
            Unavailable, InvalidAdapter: as `lease`.
        """
        host = self._host.load_now(digest)
        slot = self._bank.put(host.packed)
        self._slots_taken += 1
        entry = self._entries.setdefault(digest, _Entry(digest))
        self._change(entry, State.LOADING)
        self._change(entry, State.RESIDENT, resident=Resident.of(host, digest, slot))

    async def prefetch(self, digest: str) -> None:
        """Load an adapter before its first call. A failure is left to that call."""
        try:
            async with self.lease(digest):
                pass
        except HubError:
            pass

    def _change(
        self,
        entry: _Entry,
        state: State,
        *,
        resident: Resident | None = None,
        error: HubError | None = None,
    ) -> None:
        """Change the state of an adapter, and all that follows from it. No other code sets a state.

        Args:
            resident: the adapter in its slot, for RESIDENT.
            error: the reason, for FAILED.
        """
        if state not in _NEXT_STATES[entry.state]:
            raise RuntimeError(f"adapter {entry.digest}: no change from {entry.state.name} to {state.name}")
        before = entry.state
        self._draining += (state is State.DRAINING) - (before is State.DRAINING)
        entry.state, entry.error = state, error
        if before is State.RESIDENT:
            del self._residents[entry.digest]

        if state is State.LOADING:
            entry.waits_for = "its file"
        elif state is State.RESIDENT:
            entry.resident, entry.pause_s = resident, 0.0
            self._residents[entry.digest] = entry
            # The leases of all waiting calls are taken here, otherwise the adapter could be evicted before their use.
            self._wake(entry, lambda: self._leased(entry))
        elif state is State.DRAINING:
            entry.waits_for = "the end of the running batches that still use its slot"
        elif state is State.FAILED:
            assert error is not None  # noqa: S101 (for the type checker)
            self.counts.failures += 1
            entry.pause_s = min(2 * entry.pause_s, MAX_PAUSE_S) if entry.pause_s else MIN_PAUSE_S
            entry.retry_at_s = self._clock() + entry.pause_s
            self._wake(entry, lambda: copy.copy(error))
        elif state is State.ABSENT:
            if entry.resident is not None:
                self._bank.evict(entry.resident.slot)
                self._slots_taken -= 1
                self.counts.evictions += 1
                self._host.cached(entry.digest)  # now the most recently used one there
                entry.resident = None
            del self._entries[entry.digest]
            self._wake(entry, lambda: None)

    def _wake(self, entry: _Entry, outcome: "Callable[[], Resident | HubError | None]") -> None:
        """Give each waiting call an outcome of its own."""
        for waiter in entry.waiters:
            if waiter.done():  # its call timed out or was cancelled
                continue
            result = outcome()
            if isinstance(result, HubError):
                waiter.set_exception(result)
            else:
                waiter.set_result(result)
        entry.waiters.clear()

    def _leased(self, entry: _Entry) -> Resident:
        """Return a RESIDENT adapter with one more lease, as the most recently used one."""
        assert entry.resident is not None  # noqa: S101 (for the type checker)
        entry.leases += 1
        self._residents.move_to_end(entry.digest)
        return entry.resident

    async def _wait(self, digest: str, tenant: str) -> Resident:
        """Return a leased adapter that was not RESIDENT, loading it if no other call does.

        Raises:
            Unavailable, InvalidAdapter: as `lease`.
        """
        waits_for = ""
        try:
            async with asyncio.timeout(self._wait_s):
                while True:
                    entry = self._entries.setdefault(digest, _Entry(digest))
                    if entry.state is State.RESIDENT:
                        return self._leased(entry)
                    if entry.error is not None and self._clock() < entry.retry_at_s:
                        raise copy.copy(entry.error)
                    if entry.state in (State.ABSENT, State.FAILED):
                        self._change(entry, State.LOADING)
                        task = asyncio.create_task(self._load(entry, tenant))
                        self._load_tasks.add(task)
                        task.add_done_callback(self._load_tasks.discard)
                    try:
                        resident = await self._next_outcome(entry)
                    finally:
                        waits_for = entry.waits_for
                    if resident is not None:
                        return resident
        except TimeoutError as error:
            raise Unavailable(f"The adapter is not loaded yet: it waits for {waits_for}. Retry later.") from error

    async def _next_outcome(self, entry: _Entry) -> Resident | None:
        """Wait for `_wake`. A call that is cancelled meanwhile gives back its lease."""
        waiter: asyncio.Future[Resident | None] = asyncio.get_running_loop().create_future()
        entry.waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None and (resident := waiter.result()) is not None:
                self.release([resident])
            raise

    async def _load(self, entry: _Entry, tenant: str) -> None:
        """Load an adapter: LOADING -> RESIDENT or FAILED."""
        loop = asyncio.get_running_loop()
        started_s = self._clock()
        digest = entry.digest
        try:
            async with self.tenant_loads.acquire(tenant):
                host = await self._host.load(digest)
                entry.waits_for = f"a slot (all {self._bank.slots} slots of this worker are in use)"
                await self._take_slot()
                try:
                    slot = await loop.run_in_executor(self._writer, self._bank.put, host.packed)
                except BaseException:
                    self._slots_taken -= 1
                    raise
            self._change(entry, State.RESIDENT, resident=Resident.of(host, digest, slot))
            took_s = self._clock() - started_s
            self.counts.loads += 1
            self.counts.load_s += took_s
            logger.debug("adapter %s loaded in %.1f ms", digest, took_s * 1000)
        except HubError as error:
            self._fail(entry, error)
            logger.error("adapter %s cannot be loaded, next try after %g s: %s", digest, entry.pause_s, error)
        except Exception:  # such as a device without free memory
            self._fail(entry, Unavailable("The adapter cannot be loaded. Retry later; the hub's log has the reason."))
            logger.exception("adapter %s cannot be loaded, next try after %g s", digest, entry.pause_s)
        finally:
            self._hand_out_slots()

    def _fail(self, entry: _Entry, error: HubError) -> None:
        """Change to FAILED, and forget the failures that no call retried for `MAX_PAUSE_S`."""
        now_s = self._clock()
        for other in list(self._entries.values()):
            if other.state is State.FAILED and now_s > other.retry_at_s + MAX_PAUSE_S:
                self._change(other, State.ABSENT)
        self._change(entry, State.FAILED, error=error)

    async def _take_slot(self) -> None:
        """Wait for a slot; loads get slots in the order of their requests."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._slot_queue.append(turn)
        self._hand_out_slots()
        await turn

    def _hand_out_slots(self) -> None:
        """Give slots to waiting loads, and evict adapters for them."""
        while self._slot_queue and self._free_slot():
            turn = self._slot_queue.popleft()
            if not turn.done():  # its load was cancelled
                self._slots_taken += 1
                turn.set_result(None)

    def _free_slot(self) -> bool:
        """Return whether a slot is free, after an eviction if necessary.

        If every adapter is leased, one adapter for each waiting load drains: the least recently used one. Otherwise
        adapters in constant use would never free a slot.
        """
        if self._slots_taken < self._bank.slots:
            return True
        evictable = [entry for digest, entry in self._residents.items() if digest not in self._pinned]
        idle = next((entry for entry in evictable if not entry.leases), None)
        if idle is not None:
            self._change(idle, State.ABSENT)
            return True
        for entry in evictable[: max(0, len(self._slot_queue) - self._draining)]:
            self._change(entry, State.DRAINING)
        return False
