"""The registry's rules against a real Redis: atomic changes, numbers given once, events."""

import asyncio

import pytest

from hub.errors import Conflict, InvalidRequest, NotFound, Unavailable
from hub.registry import Registry, connect
from hub.schemas import VersionInfo


def version(digest: str) -> VersionInfo:
    return VersionInfo(
        version=0,
        digest=digest,
        labels=["a", "b"],
        backbone="demo",
        fingerprint="f" * 64,
        config={},
        preprocess={},
        metrics=None,
        size_bytes=1,
        registered="2026-01-01T00:00:00+00:00",
    )


def with_registry(url: str, use):
    """Run `use(registry)` on a loop of its own."""

    async def run():
        registry = Registry(connect(url))
        try:
            return await use(registry)
        finally:
            await registry.close()

    return asyncio.run(run())


def test_fifty_writers_at_once_get_fifty_numbers(empty_redis) -> None:
    async def use(registry):
        jobs = (registry.register("t", "flowers", version(f"{i:064x}"), ["latest"]) for i in range(50))
        made = await asyncio.gather(*jobs)
        assert sorted(kept.version for kept, _ in made) == list(range(1, 51))
        assert all(created for _, created in made)
        task = await registry.task("t", "flowers")
        for i, (kept, _) in enumerate(made):
            assert task.versions[kept.version].digest == kept.digest == f"{i:064x}"
        assert len(task.aliases["latest"]) == 1

    with_registry(empty_redis, use)


def test_writers_of_the_same_bytes_get_one_version(empty_redis) -> None:
    async def use(registry):
        made = await asyncio.gather(*(registry.register("t", "x", version("a" * 64), ["latest"]) for _ in range(20)))
        assert {kept.version for kept, _ in made} == {1}
        assert sum(created for _, created in made) == 1

    with_registry(empty_redis, use)


def test_tenants_never_meet(empty_redis) -> None:
    async def use(registry):
        await registry.register("one", "flowers", version("a" * 64), ["latest"])
        await registry.register("two", "flowers", version("b" * 64), ["latest"])
        assert (await registry.task("one", "flowers")).current.digest == "a" * 64
        assert (await registry.task("two", "flowers")).current.digest == "b" * 64
        await registry.delete_task("one", "flowers")
        assert [t.name for t in await registry.tasks("two")] == ["flowers"]
        with pytest.raises(NotFound, match="there is no task 'flowers'"):
            await registry.task("one", "flowers")

    with_registry(empty_redis, use)


def test_refused_changes_leave_everything_as_it_was(empty_redis) -> None:
    async def use(registry):
        await registry.register("t", "x", version("a" * 64), ["latest", "stable"])
        await registry.register("t", "x", version("b" * 64), ["latest"])
        before, event = await registry.task("t", "x"), await registry.event_span()
        with pytest.raises(Conflict, match="alias 'stable' of task 'x' points at version 1"):
            await registry.delete_version("t", "x", 1)
        with pytest.raises(InvalidRequest, match="task 'x' has no version 3"):
            await registry.set_alias("t", "x", "canary", {1: 90, 3: 10})
        with pytest.raises(NotFound, match="has no version or alias '9'; it has 1, 2, latest, stable"):
            await registry.delete_version("t", "x", 9)
        with pytest.raises(NotFound):
            await registry.set_alias("t", "y", "canary", {1: 1})
        assert await registry.task("t", "x") == before
        assert await registry.event_span() == event

    with_registry(empty_redis, use)


def test_every_change_is_an_event(empty_redis) -> None:
    async def use(registry):
        _, start = await registry.event_span()
        await registry.register("t", "x", version("a" * 64), ["latest"])
        await registry.set_alias("t", "x", "stable", {1: 1})
        await registry.register("t", "x", version("b" * 64), ["latest"])
        await registry.set_alias("t", "x", "stable", {2: 1})
        await registry.delete_version("t", "x", 1)
        await registry.delete_task("t", "x")
        events = await registry.events(start, 10)
        assert [(e.tenant, e.task) for e in events] == [("t", "x")] * 6
        assert await registry.events(events[-1].id, 10) == []

    with_registry(empty_redis, use)


def test_a_registry_that_does_not_answer_is_unavailable(tmp_path) -> None:
    async def use(registry):
        with pytest.raises(Unavailable, match="the registry does not answer") as caught:
            await registry.task("t", "x")
        assert caught.value.retry_after_s == 2

    with_registry(f"unix://{tmp_path}/nobody.sock", use)
