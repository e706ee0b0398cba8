"""The connection to Redis: failures without waiting, and recovery."""

import asyncio
import contextlib
import os
import random
import signal
from pathlib import Path

import pytest

from hub.errors import Unavailable
from hub.local.embedded_redis import embedded_redis
from hub.registry.redis.connection import RegistryConnection
from tests.support.hub_app import REDIS_PATIENCE


def test_commands_fail_at_once_after_a_failure_until_redis_answers(tmp_path: Path) -> None:
    started = []

    async def command() -> int:
        started.append(1)
        return 1

    async def use(url: str, server: contextlib.ExitStack) -> None:
        connection = RegistryConnection(url, patience=REDIS_PATIENCE)
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
        connection = RegistryConnection(empty_redis, patience=REDIS_PATIENCE)
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


def test_a_cancellation_that_redis_py_drops_ends_the_caller(empty_redis: str) -> None:
    async def dropping() -> int:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return 1

    async def use() -> None:
        connection = RegistryConnection(empty_redis, patience=REDIS_PATIENCE)
        try:
            call = asyncio.create_task(connection.execute(dropping()))
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait((call,))
            assert call.cancelled()
            # An own timeout that redis-py drops cancels nothing.
            assert await connection.execute(dropping(), timeout_s=0.01) == 1
        finally:
            await connection.close()

    asyncio.run(use())


def test_callers_end_when_they_are_cancelled_at_random_moments_of_their_commands(empty_redis: str) -> None:
    """Without `cancellations_kept` some of these tasks run on for ever."""
    generator = random.Random(1)

    async def read_for_ever(connection: RegistryConnection) -> None:
        while True:
            await connection.execute(connection.redis.get("karst:absent"))

    async def use() -> None:
        connection = RegistryConnection(empty_redis, patience=REDIS_PATIENCE)
        try:
            for _ in range(10):
                readers = [asyncio.create_task(read_for_ever(connection)) for _ in range(20)]
                await asyncio.sleep(0.05)
                for reader in readers:
                    await asyncio.sleep(generator.random() / 1000)
                    reader.cancel()
                _, running = await asyncio.wait(readers, timeout=10)
                assert not running
        finally:
            await connection.close()

    asyncio.run(asyncio.wait_for(use(), 120))
