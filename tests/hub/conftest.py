"""A real Redis, a real store and the real HTTP application; only Ray is left out, by a ten-line engine."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import redis
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient

from adapters import Adapter, Backbone, Bank, BankLimits, Slot, load_backbone
from adapters.data import normalise
from hub.access import Access, first_key
from hub.answers import Answer, Pass
from hub.cache import RegistryCache
from hub.embedded import embedded_redis
from hub.images import Images
from hub.registry import Registry, connect
from hub.routes import create_api
from hub.service import Service
from hub.store import Store
from hub.turns import Turns
from tests.support import random_adapter

OCTETS = {"content-type": "application/octet-stream"}
MAX_IMAGE_BYTES = 200_000
MAX_IMAGE_PIXELS = 1_000_000
MAX_ADAPTER_BYTES = 300_000


class Engine:
    """`service.Workers` over a bank in this process: what the workers do, without Ray."""

    def __init__(self, bank: Bank, store: Store) -> None:
        self._bank = bank
        self._store = store
        self.slots: dict[str, tuple[Slot, Adapter]] = {}
        self.prefetched: list[str] = []

    async def limits(self) -> BankLimits:
        return self._bank.limits

    async def prefetch(self, digest: str) -> None:
        self.prefetched.append(digest)

    async def classify(self, tenant: str, digest: str, images: Sequence[np.ndarray]) -> list[Answer]:
        if digest not in self.slots:
            adapter = Adapter.read(self._store.get(digest))
            self.slots[digest] = self._bank.put(adapter), adapter
        slot, adapter = self.slots[digest]
        mean, std = (torch.tensor(adapter.preprocess[name]) for name in ("mean", "std"))
        pixels = normalise(torch.from_numpy(np.stack(images)), mean, std)
        rows = self._bank.forward(pixels, [slot] * len(images))
        return [Answer(row.softmax(0).numpy(), Pass("engine", len(images), 1, 0.0, 0.0, 0.0)) for row in rows]


@dataclass(frozen=True)
class Hub:
    """The application under test, a client with the owner's key, and what stands behind it."""

    http: TestClient
    key: str
    engine: Engine
    store_folder: Path
    redis_url: str
    cache: RegistryCache

    def another_gateway(self) -> TestClient:
        """A second gateway over the same registry, store and engine."""
        api, _ = make_api(self.redis_url, Store(str(self.store_folder)), self.engine)
        return TestClient(api, headers=bearer(self.key))

    def remembers(self, task: str) -> bool:
        """Whether the gateway could classify with this task without Redis."""
        return ("default", task) in self.cache._tasks

    def stored(self) -> list[str]:
        """Every file in the store."""
        return sorted(p.name for p in self.store_folder.rglob("*") if p.is_file())

    def registered(self) -> dict[str, str]:
        """Everything in Redis but the keys, as text: equal before and after means unchanged."""
        client = redis.Redis.from_url(self.redis_url, decode_responses=True)
        try:
            names = [name for name in client.keys("karst:t:*") if isinstance(name, str)]
            kinds = {name: client.type(name) for name in names}
            return {n: str(client.hgetall(n) if kinds[n] == "hash" else client.smembers(n)) for n in sorted(names)}
        finally:
            client.close()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def empty_redis(redis_url: str) -> str:
    client = redis.Redis.from_url(redis_url)
    client.flushall()
    client.close()
    return redis_url


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load_backbone("demo")


@pytest.fixture(scope="session")
def adapters(backbone: Backbone) -> list[Adapter]:
    return [random_adapter(backbone, seed=i, classes=3 + i) for i in range(4)]


@pytest.fixture
def hub(empty_redis: str, backbone: Backbone, tmp_path: Path) -> Iterator[Hub]:
    with running(empty_redis, backbone, tmp_path / "store") as hub:
        yield hub


@contextmanager
def running(redis_url: str, backbone: Backbone, store_folder: Path) -> Iterator[Hub]:
    """A `Hub` over this Redis and folder, with a new key."""
    store = Store(str(store_folder))
    engine = Engine(Bank(backbone, slots=8, max_rank=8, max_kernels=4), store)
    key = asyncio.run(_key(redis_url))
    api, cache = make_api(redis_url, store, engine)
    with TestClient(api, headers=bearer(key), raise_server_exceptions=False) as http:
        yield Hub(http, key, engine, store_folder, redis_url, cache)


def make_api(redis_url: str, store: Store, engine: Engine) -> tuple[FastAPI, RegistryCache]:
    """One gateway's application, as `hub.app.make_api` makes it, over an engine of ours."""
    executor = ThreadPoolExecutor(2)
    registry = Registry(connect(redis_url))
    cache = RegistryCache(registry)
    service = Service(
        registry=registry,
        cache=cache,
        store=store,
        images=Images(executor, at_once=2, max_bytes=MAX_IMAGE_BYTES, max_pixels=MAX_IMAGE_PIXELS),
        workers=engine,
        executor=executor,
        max_adapter_bytes=MAX_ADAPTER_BYTES,
    )

    @asynccontextmanager
    async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
        follower = asyncio.create_task(cache.follow())
        yield
        follower.cancel()
        await registry.close()
        executor.shutdown()

    api = create_api(
        service,
        Access(cache),
        Turns(4, 8),
        lifespan,
        max_request_bytes=4 * MAX_IMAGE_BYTES,
        max_adapter_bytes=MAX_ADAPTER_BYTES,
    )
    return api, cache


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def _key(redis_url: str) -> str:
    registry = Registry(connect(redis_url))
    try:
        key = await first_key(registry)
    finally:
        await registry.close()
    assert key is not None
    return key
