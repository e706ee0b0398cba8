"""The connection to Redis: failures without waiting, and recovery."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from hub.errors import Unavailable
from hub.local.embedded_redis import embedded_redis
from hub.registry.connection import RegistryConnection


def test_commands_fail_at_once_after_a_failure_until_redis_answers(tmp_path: Path) -> None:
    started = []

    async def command() -> int:
        started.append(1)
        return 1

    async def use(url: str, server: contextlib.ExitStack) -> None:
        connection = RegistryConnection(url)
        try:
            with pytest.raises(Unavailable, match="does not answer"):
                await connection.execute(connection.redis.time())
            with pytest.raises(Unavailable, match="Retry later"):
                await connection.execute(command())
            assert not started
            server.enter_context(embedded_redis(tmp_path))
            while not started:
                with contextlib.suppress(Unavailable):
                    assert await connection.execute(command()) == 1
                await asyncio.sleep(0)
        finally:
            await connection.close()

    with embedded_redis(tmp_path) as url:
        pass
    with contextlib.ExitStack() as server:
        asyncio.run(asyncio.wait_for(use(url, server), 60))
