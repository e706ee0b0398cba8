"""Garbage collection beside registrations: a file that a version holds, or will hold, stays."""

import asyncio
import hashlib
import os
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from hub.admin_schemas import Collected, LimitsChange
from hub.errors import Conflict, Unavailable
from hub.registry.audit import OPERATOR
from hub.registry.health import RegistryIntegrity
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry
from hub.schemas import VersionInfo
from hub.services.garbage_collection import bind_store, collect_garbage
from hub.storage.store import OWNER, Store
from tests.support.hub_app import in_registry
from tests.support.models import wait_until
from tests.support.redis_servers import redis_server

HOUR_S = 3600


def data(i: int) -> bytes:
    return f"adapter {i}".encode()


def digest(i: int) -> str:
    return hashlib.sha256(data(i)).hexdigest()


def version(i: int) -> VersionInfo:
    return VersionInfo(
        version=0,
        digest=digest(i),
        labels=["a", "b"],
        backbone="demo",
        fingerprint="f" * 64,
        config={},
        preprocess={},
        metrics=None,
        size_bytes=len(data(i)),
        registered="2026-01-01T00:00:00+00:00",
    )


class Case:
    """A registry with tenant `t`, a store in a folder that belongs to it, and files that are two hours old."""

    def __init__(self, database: RegistryConnection, folder: Path) -> None:
        self.database = database
        self.registry = TaskRegistry(database)
        self.integrity = RegistryIntegrity(database)
        self.folder = folder
        self.store = Store(str(folder))

    def put(self, *numbers: int, old: bool = True) -> None:
        for i in numbers:
            self.store.put(digest(i), data(i))
            if old:
                then = datetime.now(UTC) - timedelta(hours=2)
                path = self.folder / digest(i)[:2] / f"{digest(i)}.safetensors"
                os.utime(path, (then.timestamp(), then.timestamp()))

    async def register(self, task: str, i: int) -> VersionInfo:
        kept, _ = await self.registry.register(OPERATOR, "t", task, version(i), ["latest"])
        return kept

    async def collect(self, older_than_s: float = HOUR_S, **options: Any) -> Collected:
        return await collect_garbage(self.registry, self.integrity, self.store, None, older_than_s, **options)

    def stored(self, *numbers: int) -> bool:
        return sorted(file.digest for file in self.store.files()) == sorted(digest(i) for i in numbers)


Use = Callable[[Case], Coroutine[Any, Any, None]]
Run = Callable[[Use], None]
RunAt = Callable[[str, Use], None]


@pytest.fixture
def case(empty_redis: str, case_at: RunAt) -> Run:
    """Return a function that runs `use(case)` on an event loop."""
    return lambda use: case_at(empty_redis, use)


@pytest.fixture
def case_at(tmp_path: Path) -> RunAt:
    """Return a function that runs `use(case)` with the Redis of a URL."""

    def run(url: str, use: Use) -> None:
        async def with_database(database: RegistryConnection) -> None:
            await TenantRegistry(database).create(OPERATOR, "t", LimitsChange())
            case = Case(database, tmp_path / "store")
            await bind_store(case.integrity, case.store, None)
            await use(case)

        in_registry(url, with_database)

    return run


def test_collection_removes_only_old_files_that_no_version_holds(case: Run) -> None:
    async def use(case: Case) -> None:
        case.put(1, 2, 3, 4)
        case.put(5, old=False)
        await case.register("flowers", 1)
        await case.register("leaves", 1)
        await case.register("leaves", 2)
        await case.register("leaves", 3)
        await case.registry.delete_version(OPERATOR, "t", "leaves", 2)
        await case.registry.delete_task(OPERATOR, "t", "flowers")  # `leaves` still holds file 1
        assert await case.collect() == Collected(removed=2, bytes=len(data(2)) + len(data(4)), kept=3)
        assert case.stored(1, 3, 5)
        assert await case.collect() == Collected(removed=0, bytes=0, kept=3)
        await case.registry.delete_task(OPERATOR, "t", "leaves")
        assert (await case.collect(0, now=datetime.now(UTC) + timedelta(seconds=1))).removed == 3
        assert case.stored()

    case(use)


def test_collection_removes_old_temporary_files_of_crashed_writes(case: Run) -> None:
    async def use(case: Case) -> None:
        assert await case.collect() == Collected(removed=0, bytes=0, kept=0)
        case.put(1, old=False)
        left = case.folder / digest(1)[:2] / f".{digest(1)}.safetensors.abcdefgh"
        left.write_bytes(b"123")
        assert await case.collect() == Collected(removed=0, bytes=0, kept=1)
        os.utime(left, (0, 0))
        assert await case.collect() == Collected(removed=1, bytes=3, kept=1)
        assert not left.exists()

    case(use)


def test_file_stays_when_it_is_put_after_the_listing(case: Run) -> None:
    async def use(case: Case) -> None:
        case.put(1)
        claim = case.registry.claim_orphan

        async def late(name: str) -> bool:
            case.put(1, old=False)
            return await claim(name)

        case.registry.claim_orphan = late  # type: ignore[assignment]  # a put at exactly this moment
        assert await case.collect() == Collected(removed=0, bytes=0, kept=1)
        assert case.stored(1)

    case(use)


def test_registration_is_refused_when_its_file_is_being_removed(case: Run) -> None:
    """Otherwise a version whose file was put just before the removal would have no file."""

    async def use(case: Case) -> None:
        case.put(1)
        delete = case.store.delete

        def late(name: str) -> bool:
            case.put(1, old=False)  # after the last check
            return delete(name)

        case.store.delete = late  # type: ignore[assignment]  # a put at exactly this moment
        assert (await case.collect()).removed == 1
        with pytest.raises(Unavailable, match="Try again"):
            await case.register("flowers", 1)
        assert await case.registry.dump("t") == []

    case(use)


def test_file_stays_when_the_claim_may_have_expired(case: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(case: Case) -> None:
        case.put(1)
        monkeypatch.setattr("hub.services.garbage_collection.CLAIM_USE_S", -1.0)
        assert await case.collect() == Collected(removed=0, bytes=0, kept=1)
        assert case.stored(1)

    case(use)


def test_every_version_keeps_its_file_when_registrations_and_collections_run_together(case: Run) -> None:
    async def use(case: Case) -> None:
        async def register(i: int) -> bool:
            await asyncio.to_thread(case.put, i, old=bool(i % 2))  # every other file is old at once
            try:
                await case.register(f"task{i}", i)
            except Unavailable:
                return False
            return True

        async def collect_often() -> None:
            for _ in range(5):
                await case.collect()

        *done, _, _ = await asyncio.gather(*(register(i) for i in range(40)), collect_often(), collect_often())
        await case.collect()
        registered = [i for i in range(40) if done[i]]
        assert {i for i in range(40) if not i % 2} <= set(registered)
        assert {t.digests[t.current] for t in await case.registry.dump("t")} == {digest(i) for i in registered}
        assert case.stored(*registered)

    case(use)


def lose(url: str, *names: str) -> None:
    """Delete keys of the registry, as an eviction does; all keys without names."""
    with redis.Redis.from_url(url) as client:
        if names:
            assert client.delete(*names) == len(names)
        else:
            client.flushall()


LOSSES: list[tuple[str, ...]] = [
    (),
    ("karst:digests",),
    ("karst:tenants",),
    ("karst:identity",),
    ("karst:t:t:tasks",),
    ("karst:t:t:task:leaves",),
    ("karst:identity", "karst:digests", "karst:t:t:tasks", "karst:t:t:task:leaves"),
]


@pytest.mark.parametrize("names", LOSSES, ids=lambda names: " ".join(names) or "all keys")
def test_collection_removes_nothing_when_the_registry_lost_keys(
    case: Run, empty_redis: str, names: tuple[str, ...]
) -> None:
    async def use(case: Case) -> None:
        case.put(1, 2)
        await case.register("flowers", 1)
        await case.register("leaves", 2)
        lose(empty_redis, *names)
        with pytest.raises(Conflict, match=r"lost (its )?keys"):
            await case.collect()
        assert case.stored(1, 2)

    case(use)


def test_collection_removes_nothing_when_a_lost_registry_is_in_use_again(case: Run, empty_redis: str) -> None:
    """The operator registers one adapter after the loss, before restoring the backup."""

    async def use(case: Case) -> None:
        case.put(1, 2)
        await case.register("flowers", 1)
        await case.register("leaves", 2)
        lose(empty_redis)
        await TenantRegistry(case.database).create(OPERATOR, "t", LimitsChange())
        await case.register("flowers", 1)
        for _ in range(2):
            with pytest.raises(Conflict, match="lost its keys"):
                await case.collect()
        await case.integrity.make_identity()
        with pytest.raises(Conflict, match="belongs to another registry"):
            await case.collect()
        assert case.stored(1, 2)
        (case.folder / OWNER).unlink()  # the operator gives the files up
        assert (await case.collect()).removed == 1
        assert case.stored(1)

    case(use)


def test_collection_removes_nothing_when_a_new_registry_has_a_store_with_files(case: Run) -> None:
    async def use(case: Case) -> None:
        case.put(1, 2)
        (case.folder / OWNER).unlink()  # a store of an earlier version of the hub
        with pytest.raises(Conflict, match="the registry has no version"):
            await case.collect()
        await case.register("flowers", 1)
        assert (await case.collect()).removed == 1

    case(use)


def test_collection_removes_nothing_when_redis_has_evicted_keys(case_at: RunAt, tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis") as server:

        async def use(case: Case) -> None:
            case.put(1, 2)
            await case.register("flowers", 1)
            server.client.config_set("maxmemory-policy", "allkeys-lru")
            with pytest.raises(Conflict, match="maxmemory-policy of this Redis is allkeys-lru"):
                await case.collect()
            server.client.config_set("maxmemory-policy", "volatile-lru")
            server.client.set("other", "x", ex=1000)  # only this key has an expiry, so only this key is evicted
            server.client.config_set("maxmemory", 1)
            wait_until(lambda: not server.client.exists("other"))
            server.client.config_set("maxmemory", 0)
            server.client.config_set("maxmemory-policy", "noeviction")
            with pytest.raises(Conflict, match="has evicted 1 keys since its start"):
                await case.collect()
            assert case.stored(1, 2)
            server.client.config_resetstat()
            assert (await case.collect()).removed == 1

        case_at(server.url, use)
