"""Change events: every change of the registry appends one to a Redis stream, and every gateway reads them."""

from dataclasses import dataclass

from .redis.connection import RegistryConnection, as_entries

STREAM = "karst:events"
SPAN_TIMEOUT_S = 1.0
MAX_EVENTS_PER_READ = 1000


@dataclass(frozen=True)
class Event:
    """A change.

    Attributes:
        id: its position in the stream.
        kind: what changed: `task`, `key` or `tenant`.
        name: the task's, key's or tenant's.
    """

    id: str
    tenant: str
    kind: str
    name: str


class EventLog:
    """Reader of change events. Every method raises `Unavailable` if Redis does not answer.

    The Lua scripts publish the events, in the same step as the change.
    """

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection

    async def span(self) -> tuple[str, str]:
        """Return the ids of the oldest and the newest kept event; `0-0` if there are none."""
        redis = self._connection.dedicated
        ends = []
        for command in (redis.xrange, redis.xrevrange):  # called one by one: a failure leaves no command un-awaited
            reply = await self._connection.execute(command(STREAM, count=1), timeout_s=SPAN_TIMEOUT_S, dedicated=True)
            ends.append(as_entries(reply))
        oldest, newest = ends
        return (oldest[0][0], newest[0][0]) if oldest and newest else ("0-0", "0-0")

    async def read(self, after: str, wait_ms: int) -> list[Event]:
        """Return events after this id, oldest first. Wait up to `wait_ms` milliseconds for the first one."""
        command = self._connection.dedicated.xread({STREAM: after}, block=wait_ms, count=MAX_EVENTS_PER_READ)
        reply = await self._connection.execute(command, timeout_s=wait_ms / 1000 + 0.5, dedicated=True)
        streams = reply.items() if isinstance(reply, dict) else reply or []
        return [Event(id=id, **fields) for _, entries in streams for id, fields in as_entries(entries)]
