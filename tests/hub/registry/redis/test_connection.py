"""The connection to Redis: failures without waiting, and recovery."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from hub.errors import Unavailable
from hub.local.embedded_redis import embedded_redis
from hub.registry.redis.connection import RegistryConnection


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


def test_a_command_without_a_reply_in_time_fails_alone_while_redis_answers_others(empty_redis: str) -> None:
    async def use() -> None:
        connection = RegistryConnection(empty_redis)
        try:
            for _ in range(20):
                with pytest.raises(Unavailable, match="does not answer"):  # it blocks its own connection, not Redis
                    await connection.execute(connection.redis.blpop(["karst:empty"], 30), timeout_s=0.01)
                assert await connection.execute(connection.redis.exists("karst:tenants")) == 0
        finally:
            await connection.close()

    asyncio.run(asyncio.wait_for(use(), 60))


def test_commands_fail_at_once_when_redis_hangs_with_open_connections(tmp_path: Path) -> None:
    async def use(url: str) -> None:
        connection = RegistryConnection(url)
        info = await connection.execute(connection.redis.info("server"))
        os.kill(info["process_id"], signal.SIGSTOP)
        try:
            with pytest.raises(Unavailable, match="does not answer"):
                await connection.execute(connection.redis.exists("karst:tenants"), timeout_s=0.01)
            started: list[int] = []

            async def command() -> None:
                started.append(1)

            async def fails_at_once() -> bool:
                started.clear()
                with contextlib.suppress(Unavailable):
                    await connection.execute(command())
                return not started

            while not await fails_at_once():
                await asyncio.sleep(0.05)
            os.kill(info["process_id"], signal.SIGCONT)
            while await fails_at_once():
                await asyncio.sleep(0.05)
        finally:
            os.kill(info["process_id"], signal.SIGCONT)
            await connection.close()

    with embedded_redis(tmp_path) as url:
        asyncio.run(asyncio.wait_for(use(url), 60))
