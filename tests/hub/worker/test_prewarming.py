"""What a worker is told to have ready: pinned tasks by name, and what was used last."""

import asyncio

import pytest

from hub.errors import Unavailable
from hub.registry.audit import OPERATOR
from hub.schemas import VersionInfo
from hub.worker.prewarming import Warmth
from tests.hub.registry.test_tasks import with_registry


def version(digest: str) -> VersionInfo:
    return VersionInfo(
        version=0, digest=digest, labels=["a", "b"], backbone="demo", fingerprint="f", config={}, preprocess={},
        metrics=None, size_bytes=1, registered="2026-01-01T00:00:00Z",
    )  # fmt: skip


def test_pinned_names_follow_their_aliases(empty_redis) -> None:
    async def use(registry):
        for digest in ("d1", "d2"):
            await registry.register(OPERATOR, "team", "flowers", version(digest), ["latest"])
        await registry.set_alias(OPERATOR, "team", "flowers", "both", {1: 90, 2: 10})
        await registry.register(OPERATOR, "other", "flowers", version("d3"), ["latest"])
        warmth = Warmth(empty_redis, ["team/flowers", "team/flowers@both", "team/flowers@1", "team/absent", "x/y@9"])
        pinned = await warmth.pinned()
        assert sorted(pinned.values()) == ["d1", "d1", "d2", "d2"]
        assert pinned["team/flowers:2"] == "d2"

    with_registry(empty_redis, use, tenants=("team", "other"))


def test_busy_is_what_was_used_last(empty_redis, monkeypatch) -> None:
    async def use():
        warmth = Warmth(empty_redis, [])
        now = 1000.0
        monkeypatch.setattr("time.time", lambda: now)
        await warmth.note(["a", "b"])
        now = 1001.0
        await warmth.note(["b", "c"])
        now = 999.0  # a worker whose clock is late takes nothing back
        await warmth.note(["c"])
        await warmth.note([])
        assert set(await warmth.busy(2)) == {"b", "c"}
        assert (await warmth.busy(10))[2:] == ["a"]

    asyncio.run(use())


def test_a_registry_that_is_away_is_said() -> None:
    with pytest.raises(Unavailable):
        asyncio.run(Warmth("redis://127.0.0.1:1", ["a/b"]).pinned())
