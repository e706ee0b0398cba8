"""A gateway's HTTP application put together: settings and workers -> everything behind its routes. No Ray."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import FastAPI

from ..admission.authentication import Access
from ..admission.rate_limits import Limiter
from ..concurrency import Turns
from ..errors import Unavailable
from ..observability import logs, tracing
from ..registry.cache import RegistryCache
from ..registry.connection import Database
from ..registry.tasks import Registry
from ..registry.tenants import Tenants
from ..services.administration import Administration
from ..services.classification import Service
from ..services.image_decoding import Images
from ..services.registration import Changes
from ..settings import Settings
from ..storage.remote_sources import Sources
from ..storage.store import Store
from ..worker_api import Workers
from .dependencies import Doors
from .edge import protect
from .openapi import finish
from .tasks import create_api

T = TypeVar("T")
SPARE_DECODERS = 3  # times the decoding threads; they start only in the place of one that takes too long
TENANT_CALLS = 64
TENANT_WAITING = 448


def make_api(
    settings: Settings,
    workers: Workers,
    meter: logs.Meter | None = None,
    *,
    tenant_calls: int = TENANT_CALLS,
    tenant_waiting: int = TENANT_WAITING,
) -> FastAPI:
    """One gateway's HTTP application with all its collaborators; `state.cache` is what it remembers.

    Args:
        settings: with `redis_url` and `store_url` set.
        meter: counts requests; None: outside of Ray Serve, which else gives every request its id and returns it.
        tenant_calls: of one tenant that the gateway works on at once.
        tenant_waiting: that wait for that; more are refused.
    """
    if meter is not None:  # this process is the gateway's own
        logs.start(settings.log_format, settings.log_level)
        tracing.start(settings.traces_exporter, settings.otlp_protocol)
    threads = max(4, os.cpu_count() or 1)
    # The store may be slow; images must not wait behind it.
    decoders = ThreadPoolExecutor(threads * (1 + SPARE_DECODERS), "decode")
    executor = ThreadPoolExecutor(threads, "gateway")

    def off_loop(function: Callable[..., T], *args: Any) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(executor, function, *args)

    database = Database(str(settings.redis_url))
    registry, tenants, store = Registry(database), Tenants(database), Store(str(settings.store_url))
    cache = RegistryCache(registry, tenants)
    limiter = Limiter(database, cache, tenants)
    service = Service(
        registry=registry,
        cache=cache,
        limiter=limiter,
        images=Images(
            decoders,
            at_once=threads,
            spare=threads * SPARE_DECODERS,
            max_bytes=settings.max_image_bytes,
            max_pixels=settings.max_image_pixels,
        ),
        workers=workers,
    )
    changes = Changes(
        registry=registry,
        cache=cache,
        store=store,
        sources=Sources(settings.sources, max_bytes=settings.max_adapter_bytes),
        service=service,
        off_loop=off_loop,
        max_adapter_bytes=settings.max_adapter_bytes,
    )
    administration = Administration(
        database=database,
        registry=registry,
        tenants=tenants,
        cache=cache,
        store=store,
        changes=changes,
        off_loop=off_loop,
        max_adapter_bytes=settings.max_adapter_bytes,
    )

    @asynccontextmanager
    async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
        beside = {asyncio.create_task(cache.follow()), asyncio.create_task(limiter.run())}
        yield
        while beside:  # again and again: a cancellation that meets a time limit of the Redis client can be lost
            for task in beside:
                task.cancel()
            _, beside = await asyncio.wait(beside, timeout=1)
        with suppress(Unavailable):
            await limiter.settle()
        await database.close()
        decoders.shutdown(wait=False)
        executor.shutdown(wait=False)
        if meter is not None:
            tracing.stop()

    api = create_api(
        service,
        changes,
        administration,
        Doors(Access(cache, limiter)),
        Turns(tenant_calls, tenant_calls + tenant_waiting),
        lifespan,
        max_request_bytes=settings.max_request_bytes,
        max_adapter_bytes=settings.max_adapter_bytes,
    )
    finish(api)
    protect(
        api,
        kept_bytes=max(settings.max_request_bytes, settings.max_adapter_bytes),
        direct=settings.haproxy,
        cors_origins=settings.cors_origins,
        tls=settings.tls_cert is not None,
    )
    api.state.cache = cache
    logs.watch(api, meter, id_is_returned=meter is not None)
    return api
