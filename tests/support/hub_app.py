"""The hub's HTTP application over a real Redis and a real store, with an engine in this process instead of Ray."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import redis
import torch
from fastapi import FastAPI
from numpy.typing import NDArray
from starlette.testclient import TestClient

from adapters import Adapter, Backbone, Bank, BankLimits, Slot
from adapters.data.images import normalise, preprocess_of
from hub.admin_schemas import LimitsChange
from hub.api.app import create_app
from hub.errors import Conflict, InvalidAdapter
from hub.local.bootstrap import FirstKeys, create_first_keys
from hub.registry.audit import OPERATOR
from hub.registry.keys import KeyRegistry
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tenants import TenantRegistry
from hub.settings import Settings
from hub.storage.store import OWNER, Store
from hub.worker_api import Answer, PassStats, TaskAnswers
from tests.support.trainers import ProcessTrainer

T = TypeVar("T")
REDIS_PATIENCE: float = 10  # see `RegistryConnection`; on a busy machine a test's process may stand still for seconds
OCTETS = {"content-type": "application/octet-stream"}
MAX_IMAGE_BYTES = 200_000
MAX_IMAGE_PIXELS = 1_000_000
MAX_ADAPTER_BYTES = 300_000
CHANGED_KEYS = {"tasks", "task", "numbers", "bytes", "keys", "shared", "audit"}


class Engine:
    """The workers' interface over a bank in this process, without Ray."""

    def __init__(self, bank: Bank, store: Store) -> None:
        self._bank = bank
        self._store = store
        self.slots: dict[str, tuple[Slot, Adapter]] = {}
        self.prefetched: list[str] = []
        self.feature_images = 0
        self.idle_images = 0
        self.calls: list[tuple[str, list[str]]] = []  # of `classify_tasks`: key and digests
        self.invalid: set[str] = set()  # digests that a worker cannot load

    async def limits(self) -> BankLimits:
        return self._bank.limits

    async def prefetch(self, digest: str) -> None:
        self.prefetched.append(digest)

    async def features(self, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float16]]:
        config = preprocess_of(self._bank.limits.backbone)
        mean, std = (torch.tensor(config[name]) for name in ("mean", "std"))
        self.feature_images += len(images)
        pooled = self._bank.frozen_features(normalise(torch.from_numpy(np.stack(images)), mean, std))
        return [row.numpy() for row in pooled.half()]

    async def classify(
        self, tenant: str, digest: str, images: Sequence[NDArray[np.uint8]], weight: float, *, idle: bool = False
    ) -> list[Answer]:
        self.idle_images += idle * len(images)
        slot, adapter = self._loaded(digest)
        mean, std = (torch.tensor(adapter.preprocess[name]) for name in ("mean", "std"))
        pixels = normalise(torch.from_numpy(np.stack(images)), mean, std)
        stats = PassStats("engine", len(images), 1, 0.0, 0.0, 0.0)
        scores = self._bank.score(pixels, [slot] * len(images))
        return [Answer(x.logits.softmax(0).numpy(), stats, x.typicality) for x in scores]

    async def classify_tasks(
        self, tenant: str, digests: Sequence[str], image: NDArray[np.uint8], weight: float, key: str
    ) -> TaskAnswers:
        self.calls.append((key, list(digests)))
        found, invalid = [], {}
        for digest in digests:
            if digest in self.invalid:
                invalid[digest] = InvalidAdapter("it does not fit this backbone")
                continue
            ((answer),) = await self.classify(tenant, digest, [image], weight)
            typicality = float("nan") if answer.typicality is None else answer.typicality
            found.append((digest, answer.probabilities, typicality, answer.computed))
        return TaskAnswers.of(found, invalid)

    def _loaded(self, digest: str) -> tuple[Slot, Adapter]:
        """Return an adapter in its slot; the first one makes room for it if necessary."""
        if digest not in self.slots:
            if not self._bank.free:
                self._bank.evict(self.slots.pop(next(iter(self.slots)))[0])
            adapter = Adapter.read(self._store.get(digest))
            self.slots[digest] = self._bank.put(adapter), adapter
        return self.slots[digest]


@dataclass(frozen=True)
class Hub:
    """The application under test, a client with the owner's key, and the parts behind the application."""

    http: TestClient
    key: str
    admin_key: str
    engine: Engine
    trainer: ProcessTrainer
    store_folder: Path
    redis_url: str
    api: FastAPI
    settings: Mapping[str, Any]

    def another_gateway(self, trainer: ProcessTrainer | None = None) -> TestClient:
        """Return a second gateway with the same settings over the same registry, store and engine.

        A gateway's connections belong to one event loop, so a server of a test needs a gateway of its own.
        """
        api = make_api(self.redis_url, self.store_folder, self.engine, trainer, **self.settings)
        return TestClient(api, headers=bearer(self.key))

    def key_of(self, tenant: str, role: str = "owner") -> dict[str, str]:
        """Return the header of a new key; create the tenant if it does not exist."""
        return bearer(key_of(self.redis_url, tenant, role))

    @property
    def admin(self) -> dict[str, str]:
        """The header of the admin key."""
        return bearer(self.admin_key)

    def remembers(self, task: str) -> bool:
        """Return whether the gateway can classify with this task without Redis."""
        return self.api.state.cache.cached_task("default", task) is not None

    def stored(self) -> list[str]:
        """Return the name of every file in the store, except that with the registry's id, also while it is written."""
        return sorted(p.name for p in self.store_folder.rglob("*") if OWNER not in p.name and p.is_file())

    def registered(self) -> dict[str, str]:
        """Return the tenants' part of Redis as text: two equal results mean that nothing changed.

        The accounts of the limits are left out: gateways write them at any time, also between two calls of a test.
        """
        with redis.Redis.from_url(self.redis_url, decode_responses=True) as client:
            names = [str(name) for name in client.keys("karst:t:*")]
            names = sorted(name for name in names if name.split(":")[3] in CHANGED_KEYS)
            read: dict[str, Callable[[str], object]] = {
                "hash": client.hgetall,
                "set": client.smembers,
                "string": client.get,
                "stream": client.xlen,
            }
            return {name: str(read[str(client.type(name))](name)) for name in names}


@contextmanager
def running(
    redis_url: str, backbone: Backbone, store_folder: Path, *, trainer: ProcessTrainer | None = None, **settings: Any
) -> Iterator[Hub]:
    """Run a `Hub` over this empty Redis and folder, with new keys. See `make_api` for the settings.

    Args:
        trainer: runs the hub's training jobs; None: processes.
    """
    engine = Engine(Bank(backbone, slots=8, max_rank=8, max_kernels=4), Store(str(store_folder)))
    keys = first_keys_of(redis_url)
    assert keys.owner is not None
    assert keys.admin is not None
    trainer = trainer or ProcessTrainer()
    api = make_api(redis_url, store_folder, engine, trainer, **settings)
    with TestClient(api, headers=bearer(keys.owner), raise_server_exceptions=False) as http:
        yield Hub(http, keys.owner, keys.admin, engine, trainer, store_folder, redis_url, api, settings)


def make_api(
    redis_url: str,
    store_folder: Path,
    engine: Engine,
    trainer: ProcessTrainer | None = None,
    *,
    redis_patience: float = REDIS_PATIENCE,
    **settings: Any,
) -> FastAPI:
    """Return one gateway's application over the given engine. Without a trainer it runs no jobs.

    Args:
        redis_patience: see `RegistryConnection`.
    """
    given: dict[str, Any] = {
        "backbone": "demo",
        "redis_url": redis_url,
        "store_url": str(store_folder),
        "max_image_bytes": MAX_IMAGE_BYTES,
        "max_image_pixels": MAX_IMAGE_PIXELS,
        "max_adapter_bytes": MAX_ADAPTER_BYTES,
    } | settings
    options: dict[str, Any] = {"tenant_calls": 4, "tenant_waiting": 4, "redis_patience": redis_patience}
    return create_app(Settings(**given), engine, trainer, **options)


def bearer(key: str) -> dict[str, str]:
    """Return the header that carries a key."""
    return {"authorization": f"Bearer {key}"}


def first_keys_of(redis_url: str) -> FirstKeys:
    """Return the first keys of an empty registry."""
    return in_registry(redis_url, lambda db: create_first_keys(TenantRegistry(db), KeyRegistry(db)))


def in_registry(
    redis_url: str, use: Callable[[RegistryConnection], Awaitable[T]], *, patience: float = REDIS_PATIENCE
) -> T:
    """Run `use(database)` on its own event loop. See `RegistryConnection` for `patience`."""

    async def run() -> T:
        database = RegistryConnection(redis_url, patience=patience)
        try:
            return await use(database)
        finally:
            await database.close()

    return asyncio.run(run())


def key_of(redis_url: str, tenant: str, role: str = "owner") -> str:
    """Return a new key; create the tenant if it does not exist."""

    async def make(database: RegistryConnection) -> str:
        tenants = TenantRegistry(database)
        with suppress(Conflict):
            await tenants.create(OPERATOR, tenant, LimitsChange())
        return (await KeyRegistry(database).create(OPERATOR, tenant, role, "test")).key

    return in_registry(redis_url, make)
