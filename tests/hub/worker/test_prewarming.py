"""Prewarming: the digests of pinned tasks, and the adapters that workers used last."""

import asyncio

import pytest

from hub.errors import Unavailable
from hub.registry.audit import OPERATOR
from hub.registry.tasks import Registry
from hub.schemas import VersionInfo
from hub.worker.prewarming import Prewarming
from tests.support.hub_app import with_registry


def version(digest: str) -> VersionInfo:
    return VersionInfo(
        version=0, digest=digest, labels=["a", "b"], backbone="demo", fingerprint="f", config={}, preprocess={},
        metrics=None, size_bytes=1, registered="2026-01-01T00:00:00Z",
    )  # fmt: skip


def test_pinned_names_follow_their_aliases(empty_redis: str) -> None:
    async def use(registry: Registry) -> None:
        for digest in ("d1", "d2"):
            await registry.register(OPERATOR, "team", "flowers", version(digest), ["latest"])
        await registry.set_alias(OPERATOR, "team", "flowers", "both", {1: 90, 2: 10})
        await registry.register(OPERATOR, "other", "flowers", version("d3"), ["latest"])
        names = ["team/flowers", "team/flowers@both", "team/flowers@1", "team/absent", "x/y@9"]
        pinned = await Prewarming(empty_redis, names).pinned()
        assert pinned == {
            "team/flowers:2": "d2",
            "team/flowers@both:1": "d1",
            "team/flowers@both:2": "d2",
            "team/flowers@1:1": "d1",
        }

    with_registry(empty_redis, use, tenants=("team", "other"))


def test_recent_digests_are_ordered_by_their_last_use(empty_redis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        prewarming = Prewarming(empty_redis, [])
        now_s = 1000.0
        monkeypatch.setattr("time.time", lambda: now_s)
        await prewarming.record_digests(["a", "b"])
        now_s = 1001.0
        await prewarming.record_digests(["b", "c"])
        now_s = 999.0  # the clock of another worker is late; its report does not replace a later one
        await prewarming.record_digests(["c"])
        await prewarming.record_digests([])
        assert set(await prewarming.recent_digests(2)) == {"b", "c"}
        assert (await prewarming.recent_digests(10))[2:] == ["a"]

    asyncio.run(use())


def test_prewarming_is_unavailable_when_the_registry_does_not_answer() -> None:
    with pytest.raises(Unavailable):
        asyncio.run(Prewarming("redis://127.0.0.1:1", ["a/b"]).pinned())
