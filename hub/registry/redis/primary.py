"""Connections to the primary server of the registry, which another server replaces at a failover."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import BusyLoadingError, ResponseError

from .errors import NOT_PRIMARY, NotPrimary, error_code


@dataclass
class Failovers:
    """Number of failovers that a pool has seen. Connections of an earlier number may lead to a former primary."""

    count: int = 0


class PrimaryConnection(AbstractConnection):
    """A connection that is dropped when the server answers that it is not the primary.

    After a failover the old connections may stay open to a server that refuses every change. A new connection looks the
    address up again, so it reaches the new primary.
    """

    def __init__(self, *, failovers: Failovers, **options: Any) -> None:
        super().__init__(**options)
        self._failovers = failovers
        self._seen = failovers.count

    async def connect(self) -> None:
        """Connect, unless a connection exists since the last failover. The pool calls this before each use."""
        if self._seen != self._failovers.count:
            await self.disconnect(nowait=True)
            self._seen = self._failovers.count
        await super().connect()  # type: ignore[no-untyped-call]  # redis-py has no type here

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Read a reply. `NotPrimary` makes the Redis client connect and send the command once more."""
        try:
            return await super().read_response(*args, **options)
        except (ResponseError, BusyLoadingError) as error:
            code = error_code(error)
            if code not in NOT_PRIMARY:
                raise
            await self.disconnect(nowait=True)
            self._failovers.count += 1
            raise NotPrimary(code, str(error)) from error


class _TCPConnection(PrimaryConnection, Connection):
    pass


class _TLSConnection(PrimaryConnection, SSLConnection):
    pass


class _SocketConnection(PrimaryConnection, UnixDomainSocketConnection):
    pass


CONNECTIONS: Mapping[type[AbstractConnection], type[PrimaryConnection]] = {
    Connection: _TCPConnection,
    SSLConnection: _TLSConnection,
    UnixDomainSocketConnection: _SocketConnection,
}
