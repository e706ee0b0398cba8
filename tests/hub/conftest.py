"""A real Redis, a real store and the real HTTP application; only Ray is left out, by a ten-line engine."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import redis
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient

from adapters import Adapter, Backbone, Bank, BankLimits, Slot, load_backbone
from adapters.data.images import normalise
from hub.api.app import create_app
from hub.errors import Conflict
from hub.local.bootstrap import FirstKeys, create_first_keys
from hub.local.embedded_redis import embedded_redis
from hub.registry.audit import OPERATOR
from hub.registry.connection import RegistryConnection
from hub.registry.keys import KeyRegistry
from hub.registry.tenants import TenantRegistry
from hub.schemas import LimitsChange
from hub.settings import Settings
from hub.storage.store import Store
from hub.worker_api import Answer, PassStats
from tests.support.asgi import listening
from tests.support.models import random_adapter

T = TypeVar("T")
CHANGED_KEYS = {"tasks", "task", "numbers", "bytes", "keys", "shared", "audit"}
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

    async def classify(self, tenant: str, digest: str, images: Sequence[np.ndarray], weight: float) -> list[Answer]:
        if digest not in self.slots:
            adapter = Adapter.read(self._store.get(digest))
            self.slots[digest] = self._bank.put(adapter), adapter
        slot, adapter = self.slots[digest]
        mean, std = (torch.tensor(adapter.preprocess[name]) for name in ("mean", "std"))
        pixels = normalise(torch.from_numpy(np.stack(images)), mean, std)
        rows = self._bank.forward(pixels, [slot] * len(images))
        return [Answer(row.softmax(0).numpy(), PassStats("engine", len(images), 1, 0.0, 0.0, 0.0)) for row in rows]


@dataclass(frozen=True)
class Hub:
    """The application under test, a client with the owner's key, and what stands behind it."""

    http: TestClient
    key: str
    admin_key: str
    engine: Engine
    store_folder: Path
    redis_url: str
    api: FastAPI

    def another_gateway(self) -> TestClient:
        """A second gateway over the same registry, store and engine."""
        return TestClient(make_api(self.redis_url, self.store_folder, self.engine), headers=bearer(self.key))

    def key_of(self, tenant: str, role: str = "owner") -> dict[str, str]:
        """The header of a new key; the tenant is made where it is not there."""
        return bearer(key_of(self.redis_url, tenant, role))

    @property
    def admin(self) -> dict[str, str]:
        """The admin key's header."""
        return bearer(self.admin_key)

    def stored(self) -> list[str]:
        """Every file in the store."""
        return sorted(p.name for p in self.store_folder.rglob("*") if p.is_file())

    def registered(self) -> dict[str, str]:
        """Return what changes of tenants' tasks and keys write to Redis, as text.

        Counts and limits are left out: gateways write them in the background.
        """
        client = redis.Redis.from_url(self.redis_url, decode_responses=True)
        try:
            names = [name for name in client.keys("karst:t:*") if name.split(":")[3] in CHANGED_KEYS]
            kinds = {name: client.type(name) for name in names}
            read = {"hash": client.hgetall, "set": client.smembers, "string": client.get, "stream": client.xlen}
            return {name: str(read[kinds[name]](name)) for name in sorted(names)}
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


@pytest.fixture
def url(hub: Hub) -> Iterator[str]:
    """A second gateway of the hub's, on a port of this machine."""
    with listening(hub.another_gateway().app) as url:
        yield url


@contextmanager
def running(redis_url: str, backbone: Backbone, store_folder: Path, **settings: object) -> Iterator[Hub]:
    """A `Hub` over this empty Redis and folder, with new keys."""
    engine = Engine(Bank(backbone, slots=8, max_rank=8, max_kernels=4), Store(str(store_folder)))
    keys = first_keys_of(redis_url)
    assert keys.owner is not None
    assert keys.admin is not None
    api = make_api(redis_url, store_folder, engine, **settings)
    with TestClient(api, headers=bearer(keys.owner), raise_server_exceptions=False) as http:
        yield Hub(http, keys.owner, keys.admin, engine, store_folder, redis_url, api)


def make_api(redis_url: str, store_folder: Path, engine: Engine, **settings: object) -> FastAPI:
    """One gateway's application, as the hub makes it, over an engine of ours."""
    settings = {
        "backbone": "demo",
        "redis_url": redis_url,
        "store_url": str(store_folder),
        "max_image_bytes": MAX_IMAGE_BYTES,
        "max_image_pixels": MAX_IMAGE_PIXELS,
        "max_adapter_bytes": MAX_ADAPTER_BYTES,
    } | settings
    return create_app(Settings(**settings), engine, tenant_calls=4, tenant_waiting=4)  # type: ignore[arg-type]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def first_keys_of(redis_url: str) -> FirstKeys:
    """The keys of a new registry."""
    return in_registry(redis_url, lambda db: create_first_keys(TenantRegistry(db), KeyRegistry(db)))


def in_registry(redis_url: str, use: Callable[[RegistryConnection], Awaitable[T]]) -> T:
    """Run `use(database)` on a loop of its own."""

    async def run() -> T:
        database = RegistryConnection(redis_url)
        try:
            return await use(database)
        finally:
            await database.close()

    return asyncio.run(run())


def key_of(redis_url: str, tenant: str, role: str = "owner") -> str:
    """A new key; the tenant is made where it is not there."""

    async def make(database: RegistryConnection) -> str:
        tenants = TenantRegistry(database)
        with suppress(Conflict):
            await tenants.create(OPERATOR, tenant, LimitsChange())
        return (await KeyRegistry(database).create(OPERATOR, tenant, role, "test")).key

    return in_registry(redis_url, make)
