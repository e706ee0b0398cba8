"""The registry's rules against a real Redis: atomic changes, numbers given once, events."""

import asyncio

import pytest

from hub.errors import Conflict, InvalidRequest, NotFound, Unavailable
from hub.registry.audit import OPERATOR
from hub.schemas import Sharing
from tests.support.hub_app import version, with_registry


def test_fifty_writers_at_once_get_fifty_numbers(empty_redis) -> None:
    async def use(registry):
        jobs = (registry.register(OPERATOR, "t", "flowers", version(f"{i:064x}"), ["latest"]) for i in range(50))
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
        made = await asyncio.gather(
            *(registry.register(OPERATOR, "t", "x", version("a" * 64), ["latest"]) for _ in range(20))
        )
        assert {kept.version for kept, _ in made} == {1}
        assert sum(created for _, created in made) == 1

    with_registry(empty_redis, use)


def test_tenants_never_meet(empty_redis) -> None:
    async def use(registry):
        await registry.register(OPERATOR, "one", "flowers", version("a" * 64), ["latest"])
        await registry.register(OPERATOR, "two", "flowers", version("b" * 64), ["latest"])
        assert (await registry.task("one", "flowers")).current.digest == "a" * 64
        assert (await registry.task("two", "flowers")).current.digest == "b" * 64
        await registry.delete_task(OPERATOR, "one", "flowers")
        assert [t.name for t in await registry.tasks("two")] == ["flowers"]
        with pytest.raises(NotFound, match="there is no task 'flowers'"):
            await registry.task("one", "flowers")

    with_registry(empty_redis, use)


def test_refused_changes_leave_everything_as_it_was(empty_redis) -> None:
    async def use(registry):
        await registry.register(OPERATOR, "t", "x", version("a" * 64), ["latest", "stable"])
        await registry.register(OPERATOR, "t", "x", version("b" * 64), ["latest"])
        before, event = await registry.task("t", "x"), await registry.event_span()
        with pytest.raises(Conflict, match="alias 'stable' of task 'x' points at version 1"):
            await registry.delete_version(OPERATOR, "t", "x", 1)
        with pytest.raises(InvalidRequest, match="task 'x' has no version 3"):
            await registry.set_alias(OPERATOR, "t", "x", "canary", {1: 90, 3: 10})
        with pytest.raises(NotFound, match="has no version or alias '9'; it has 1, 2, latest, stable"):
            await registry.delete_version(OPERATOR, "t", "x", 9)
        with pytest.raises(NotFound):
            await registry.set_alias(OPERATOR, "t", "y", "canary", {1: 1})
        assert await registry.task("t", "x") == before
        assert await registry.event_span() == event

    with_registry(empty_redis, use)


def test_every_change_is_an_event(empty_redis) -> None:
    async def use(registry):
        _, start = await registry.event_span()
        await registry.register(OPERATOR, "t", "x", version("a" * 64), ["latest"])
        await registry.set_alias(OPERATOR, "t", "x", "stable", {1: 1})
        await registry.register(OPERATOR, "t", "x", version("b" * 64), ["latest"])
        await registry.set_alias(OPERATOR, "t", "x", "stable", {2: 1})
        await registry.delete_version(OPERATOR, "t", "x", 1)
        await registry.delete_task(OPERATOR, "t", "x")
        events = await registry.events(start, 10)
        assert [(e.tenant, e.kind, e.name) for e in events] == [("t", "task", "x")] * 6
        assert await registry.events(events[-1].id, 10) == []

    with_registry(empty_redis, use)


def test_a_registry_that_does_not_answer_is_unavailable(tmp_path) -> None:
    async def use(registry):
        with pytest.raises(Unavailable, match="the registry does not answer") as caught:
            await registry.task("t", "x")
        assert caught.value.retry_after_s == 2

    with_registry(f"unix://{tmp_path}/nobody.sock", use, tenants=())


def test_what_is_dumped_is_restored_in_another_registry(empty_redis) -> None:
    async def use(registry):
        for i in range(3):
            await registry.register(OPERATOR, "one", "x", version(f"{i:064x}"), ["latest", "stable"])
        await registry.set_alias(OPERATOR, "one", "x", "canary", {1: 90, 3: 10})
        await registry.delete_version(OPERATOR, "one", "x", 2)
        await registry.share(OPERATOR, "one", "x", Sharing(tenants=["t"]))
        await registry.register(OPERATOR, "one", "y", version("a" * 64), ["latest"])
        dump = await registry.dump("one")
        await registry.restore(OPERATOR, "two", dump)
        assert await registry.dump("two") == dump
        assert [owner for owner, _ in await registry.shared_with("t")] == ["one", "two"]
        with pytest.raises(Conflict, match="has these tasks already: x, y"):
            await registry.restore(OPERATOR, "two", dump)
        kept, created = await registry.register(OPERATOR, "two", "x", version("b" * 64), ["latest"])
        assert (kept.version, created) == (4, True)

    with_registry(empty_redis, use)


def test_no_version_can_begin_while_its_file_is_removed(empty_redis) -> None:
    async def use(registry):
        assert await registry.claim_orphan("a" * 64)
        with pytest.raises(Unavailable, match="the store is removing an old copy"):
            await registry.register(OPERATOR, "t", "x", version("a" * 64), ["latest"])
        await registry._redis.delete("karst:gc:" + "a" * 64)  # the minute is over
        await registry.register(OPERATOR, "t", "x", version("a" * 64), ["latest"])
        assert not await registry.claim_orphan("a" * 64)
        await registry.register(OPERATOR, "one", "y", version("a" * 64), ["latest"])
        await registry.delete_task(OPERATOR, "t", "x")
        assert not await registry.claim_orphan("a" * 64)  # the other tenant holds it
        await registry.delete_task(OPERATOR, "one", "y")
        assert await registry.claim_orphan("a" * 64)

    with_registry(empty_redis, use)
