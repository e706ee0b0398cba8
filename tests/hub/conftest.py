"""Fixtures: a real Redis, a real store and the real HTTP application, with an engine instead of Ray."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from adapters import Adapter, Backbone, load_backbone
from hub.local.embedded_redis import embedded_redis
from tests.support.asgi import listening
from tests.support.hub_app import Hub, running
from tests.support.models import random_adapter


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded_redis(tmp_path_factory.mktemp("redis")) as url:
        with redis.Redis.from_url(url) as client:
            client.config_set("appendonly", "no")  # else a slow disk delays replies beyond the hub's time limits
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
    """Return four adapters with the same labels, so that all can be versions of one task."""
    return [random_adapter(backbone, seed=i) for i in range(4)]


@pytest.fixture
def hub(empty_redis: str, backbone: Backbone, tmp_path: Path) -> Iterator[Hub]:
    with running(empty_redis, backbone, tmp_path / "store") as hub:
        yield hub


@pytest.fixture
def url(hub: Hub) -> Iterator[str]:
    """Serve a second gateway of the hub on a real port."""
    with listening(hub.another_gateway().app) as url:
        yield url
