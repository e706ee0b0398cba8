"""Change events: every change of the registry appends one to a Redis stream, and every gateway reads them.

Changes of keys and tenants are in a second stream too: many changes of tasks cannot push a revocation out of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .redis.connection import RegistryConnection, as_entries, as_text

STREAMS = ("karst:events", "karst:events:access")
NO_EVENT = "0-0"
SPAN_TIMEOUT_S = 1.0
MAX_EVENTS_PER_READ = 1000


@dataclass(frozen=True)
class Event:
    """A change.

    Attributes:
        stream, id: its position.
        kind: what changed: `task`, `dataset`, `key` or `tenant`.
        name: of the task (also for a dataset), key or tenant.
    """

    stream: str
    id: str
    tenant: str
    kind: str
    name: str


@dataclass(frozen=True)
class Span:
    """The ids of the oldest and the newest kept event of a stream; `0-0` if there are none."""

    oldest: str
    newest: str

    def has(self, id: str) -> bool:
        """Return whether no event after this one was removed, and the stream is the one that had it."""
        return _position(self.oldest) <= _position(id) <= _position(self.newest)


class EventLog:
    """Reader of change events. Every method raises `Unavailable` if Redis does not answer.

    The Lua scripts publish the events, in the same step as the change.
    """

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection

    async def spans(self) -> dict[str, Span]:
        """Return what is kept of each stream."""
        return {stream: await self._span(stream) for stream in STREAMS}

    async def read(self, after: Mapping[str, str], wait_ms: int) -> list[Event]:
        """Return events after these ids, oldest first in each stream. Wait for the first one, `wait_ms` milliseconds.

        Args:
            after: stream -> id.
        """
        positions: dict[Any, Any] = {**after}
        command = self._connection.dedicated.xread(positions, block=wait_ms, count=MAX_EVENTS_PER_READ)
        reply = await self._connection.execute(command, timeout_s=wait_ms / 1000 + 0.5, dedicated=True)
        streams = reply.items() if isinstance(reply, dict) else reply or []
        return [
            Event(as_text(stream), id, **fields) for stream, entries in streams for id, fields in as_entries(entries)
        ]

    async def _span(self, stream: str) -> Span:
        redis = self._connection.dedicated
        ends = []
        for command in (redis.xrange, redis.xrevrange):  # called one by one: a failure leaves no command un-awaited
            reply = await self._connection.execute(command(stream, count=1), timeout_s=SPAN_TIMEOUT_S, dedicated=True)
            ends.append(as_entries(reply))
        oldest, newest = ends
        return Span(oldest[0][0], newest[0][0]) if oldest and newest else Span(NO_EVENT, NO_EVENT)


def is_full(events: Sequence[Event]) -> bool:
    """Return whether a read stopped at its limit: the reader is behind, and the stream may remove what it lacks."""
    return len(events) >= MAX_EVENTS_PER_READ


def _position(event_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = event_id.partition("-")
    return int(milliseconds), int(sequence or 0)
