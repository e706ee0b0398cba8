"""Datasets at their limits: 100,000 images in review, near-duplicates among 10,000, a disk that is full for real."""

import asyncio
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from adapters import load_backbone
from hub.local.embedded_redis import embedded_redis
from hub.registry.audit import OPERATOR
from hub.registry.datasets.index import DatasetIndex
from hub.registry.redis.connection import RegistryConnection
from hub.services.datasets.features import FeatureSpec
from hub.services.datasets.review import COMPARED, UNLABELLED
from hub.storage.features import FeatureStore
from tests.support.datasets import digest_of, new_image, unpaced_reads
from tests.support.faults.disk import fill, small_disk
from tests.support.hub_app import OCTETS, Hub, bearer, in_registry, make_api, running
from tests.support.models import png, wait_until

pytestmark = pytest.mark.long
TASK = "/v1/tasks/flowers"
IMAGES = 100_000
STEP = 500
MAX_GROWTH_BYTES = 500 * 1024**2
DISK_MB = 16


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Hub]:
    with embedded_redis(tmp_path) as url, running(url, load_backbone("demo"), tmp_path / "store") as hub:
        assert hub.http.put(TASK, json={}).status_code == 201
        yield hub


def test_calls_for_100_000_images_look_at_a_bounded_number(app: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: list[int] = []

    async def fill_index(connection: RegistryConnection) -> None:
        index = DatasetIndex(connection, unpaced_reads())
        sizes.append((await connection.redis.info("memory"))["used_memory"])
        for start in range(0, IMAGES, STEP):
            images = [new_image(i) for i in range(start, start + STEP)]
            await index.add(OPERATOR, "default", "flowers", images, {"files": STEP}, patience_s=86400)
        sizes.append((await connection.redis.info("memory"))["used_memory"])

    app.http.patch("/v1/tenants/default", json={"limits": {"images": IMAGES}}, headers=app.admin)
    in_registry(app.redis_url, fill_index)
    spec = FeatureSpec.of(asyncio.run(app.engine.limits()))
    store, generator = FeatureStore(str(app.store_folder)), np.random.default_rng(0)
    rows = generator.normal(size=(COMPARED, spec.width)).astype(np.float16)
    store.put(spec.key, {digest_of(IMAGES - COMPARED + i): row for i, row in enumerate(rows)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = {}
    for name, considered in (("review", UNLABELLED), ("near-duplicates", COMPARED), ("images?count=100", 0)):
        started_s = time.monotonic()
        reply = app.http.get(f"{TASK}/{name}")
        seconds[name] = round(time.monotonic() - started_s, 2)
        assert reply.status_code == 200, reply.text
        assert reply.json().get("considered", 0) == considered
    growth_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert growth_bytes < MAX_GROWTH_BYTES
    with capsys.disabled():
        record_bytes = (sizes[1] - sizes[0]) / IMAGES
        print(f"\nseconds: {seconds}; growth: {growth_bytes / 1e6:.0f} MB; Redis per image: {record_bytes:.0f} bytes")


def test_nothing_is_lost_when_the_disk_of_the_store_is_full(app: Hub, tmp_path: Path) -> None:
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(tmp_path / "disk", DISK_MB))
        except PermissionError as error:
            pytest.skip(f"no small disk can be mounted here: {error}")
        http = stack.enter_context(
            TestClient(make_api(app.redis_url, disk / "store", app.engine, min_free_disk=0), headers=bearer(app.key))
        )
        assert http.post(f"{TASK}/images?label=rose", content=png(1), headers=OCTETS).json()["counts"]["added"] == 1
        wait_until(lambda: len(list(disk.rglob("*.f16"))) == 1)
        filling = fill(disk)
        for i in range(2, 5):
            refused = http.post(f"{TASK}/images?label=rose", content=png(i, (200, 200)), headers=OCTETS)
            assert refused.status_code in (503, 507), refused.text
            assert len(refused.json()["detail"]) < 500
        assert len(http.get(f"{TASK}/images").json()["images"]) == 1
        assert len(list(disk.rglob("*.image"))) == 1
        filling.unlink()
        for i in range(2, 5):
            added = http.post(f"{TASK}/images?label=rose", content=png(i, (200, 200)), headers=OCTETS)
            assert added.json()["counts"]["added"] == 1, added.text
        for image in http.get(f"{TASK}/images").json()["images"]:
            assert http.get(f"{TASK}/images/{image['digest']}").status_code == 200
