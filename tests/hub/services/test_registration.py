"""Uploads of adapter files: few of a tenant at once, in the order of their arrival, and other tenants beside them."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from hub.admission.authentication import Caller
from hub.admission.quotas import UPLOADS, UPLOADS_QUEUED
from hub.errors import LimitReached
from hub.services.registration import RegistrationService

UNUSED: Any = None  # `upload` uses no collaborator


def owner(tenant: str) -> Caller:
    return Caller("0123456789ab", "key", "owner", "127.0.0.1", tenant)


def test_four_uploads_of_a_tenant_run_at_once_and_further_ones_take_turns() -> None:
    service = RegistrationService(
        registry=UNUSED,
        cache=UNUSED,
        store=UNUSED,
        sources=UNUSED,
        classification=UNUSED,
        collector=UNUSED,
        store_threads=UNUSED,
        parse_threads=UNUSED,
        source_threads=UNUSED,
        max_adapter_bytes=1,
    )

    async def use() -> None:
        began: list[int] = []
        ends = [asyncio.Event() for _ in range(UPLOADS + UPLOADS_QUEUED)]

        async def upload(number: int) -> None:
            async with service.upload(owner("crowd")):
                began.append(number)
                await ends[number].wait()

        uploads = [asyncio.create_task(upload(i)) for i in range(len(ends))]
        await asyncio.sleep(0.05)
        assert began == [0, 1, 2, 3]
        with pytest.raises(LimitReached):
            await upload(0)
        async with AsyncExitStack() as others:
            for _ in range(UPLOADS):
                await asyncio.wait_for(others.enter_async_context(service.upload(owner("other"))), 5)
        ends[2].set()
        await uploads[2]
        await asyncio.sleep(0.05)
        assert began == [0, 1, 2, 3, 4]
        uploads[5].cancel()  # its client has gone
        for end in ends:
            end.set()
        await asyncio.gather(*uploads, return_exceptions=True)
        assert began == [0, 1, 2, 3, 4, *range(6, len(ends))]

    asyncio.run(use())
