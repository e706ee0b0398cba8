"""The queue of classified images that a gateway keeps: one tenant's images leave room for those of others."""

import asyncio
from typing import Any

import numpy as np

from hub.registry.versions import ServedVersion
from hub.schemas import Keep
from hub.services.datasets.keeping import QUEUED_BYTES, Keeper
from hub.services.predictions import Predicted
from hub.worker_api import Answer, PassStats

VERSION = ServedVersion(version=1, digest="0" * 64, labels=["a", "b"], preprocess={}, size_bytes=1)
ANSWER = Answer(np.array([0.6, 0.4], np.float32), PassStats("w", 1, 1, 0.0, 0.0, 0.0))
LARGE = QUEUED_BYTES // 8


def idle_keeper() -> Keeper:
    """Return a keeper whose loop does not run, so that each image stays in the queue."""
    unused: Any = None
    return Keeper(kept=unused, images=unused, removal=unused, threads=unused, usage=unused, count=None)


def test_an_image_is_queued_when_another_tenant_has_filled_its_own_part() -> None:
    async def main() -> None:
        keeper, keep = idle_keeper(), Keep(images="all")

        async def queued(tenant: str, images: list[bytes]) -> list[bool]:
            predicted = Predicted(VERSION, [ANSWER] * len(images), 0.0, None)
            found = await keeper.take(tenant, "t", keep, predicted, images)
            assert found is not None
            return [digest is not None for digest in found]

        assert await queued("noisy", [bytes([i]) * LARGE for i in range(4)]) == [True, True, False, False]
        assert await queued("quiet", [b"q" * LARGE]) == [True]
        assert await queued("single", [b"s" * (QUEUED_BYTES // 2)]) == [True]  # larger than its part, and alone
        assert await queued("last", [b"l" * LARGE, b"m" * LARGE]) == [True, False]  # no room at all

    asyncio.run(main())
