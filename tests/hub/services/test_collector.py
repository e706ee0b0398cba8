"""Files that no version refers to: they count against their tenant until a collection has removed them."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from adapters import Adapter, Backbone
from hub.registry.redis.connection import RegistryConnection
from hub.storage.accounts import FileRegistry
from tests.support.hub_app import OCTETS, Hub, bearer, in_registry, make_api, running
from tests.support.models import png, wait_until, with_metadata

NONE: Mapping[str, str] = {}


def register(hub: Hub, data: bytes, task: str = "t", headers: Mapping[str, str] = NONE) -> Any:
    return hub.http.post(f"/v1/tasks/{task}/versions", content=data, headers=OCTETS | dict(headers))


def used(hub: Hub, **headers: str) -> tuple[int, int]:
    found = hub.http.get("/v1/usage", headers=headers).json()["used"]
    return found["stored_bytes"], found["deleted_bytes"]


def limit_bytes(hub: Hub, tenant: str, stored_bytes: int) -> None:
    body = {"limits": {"stored_bytes": stored_bytes}}
    assert hub.http.patch(f"/v1/tenants/{tenant}", json=body, headers=hub.admin).status_code == 200


def on_disk(hub: Hub) -> int:
    return sum(path.stat().st_size for path in hub.store_folder.rglob("*.safetensors"))


def test_store_stays_within_the_quota_when_a_tenant_registers_and_deletes(hub: Hub, adapters: list[Adapter]) -> None:
    files = [with_metadata(adapters[0], producer=f"{n:02}") for n in range(12)]
    quota = 3 * len(files[0])
    limit_bytes(hub, "default", quota)
    for file in files:
        assert register(hub, file).status_code == 201
        assert hub.http.delete("/v1/tasks/t").status_code == 204
        assert on_disk(hub) <= quota
        assert sum(used(hub)) == on_disk(hub)
    assert used(hub)[0] == 0


def test_versions_stay_when_room_is_made_for_a_registration(hub: Hub, adapters: list[Adapter]) -> None:
    files = [with_metadata(adapters[0], producer=f"{n:02}") for n in range(4)]
    limit_bytes(hub, "default", 2 * len(files[0]))
    assert register(hub, files[0], "kept").status_code == 201
    assert register(hub, files[1]).status_code == 201
    hub.http.delete("/v1/tasks/t")
    assert register(hub, files[2]).status_code == 201
    refused = register(hub, files[3])
    assert refused.status_code == 429
    assert refused.json()["errors"][0]["field"] == "stored_bytes"
    assert used(hub) == (2 * len(files[0]), 0)
    assert hub.http.post("/v1/tasks/kept/classify", content=png()).status_code == 200


def test_a_refused_file_counts_for_nothing(hub: Hub, adapters: list[Adapter], backbone: Backbone) -> None:
    other = with_metadata(adapters[0], labels='["p", "q", "r", "s", "t"]')
    assert register(hub, adapters[0].data).status_code == 201
    assert register(hub, other).status_code == 409
    assert used(hub) == (len(adapters[0].data), 0)
    assert on_disk(hub) == len(adapters[0].data)


def test_a_deleted_file_counts_for_its_last_tenant_until_another_one_registers_it(
    hub: Hub, adapters: list[Adapter]
) -> None:
    data, friend = adapters[0].data, hub.key_of("friend")
    for headers in ({}, friend):
        assert register(hub, data, headers=headers).status_code == 201
    hub.http.delete("/v1/tasks/t")
    assert used(hub) == (0, 0)  # the friend's version refers to the file
    hub.http.delete("/v1/tasks/t", headers=friend)
    assert used(hub, **friend) == (0, len(data))
    assert register(hub, data).status_code == 201
    assert (used(hub), used(hub, **friend)) == ((len(data), 0), (0, 0))


def test_a_new_tenant_pays_for_nothing_when_a_deleted_one_had_its_name(hub: Hub, adapters: list[Adapter]) -> None:
    friend = hub.key_of("friend")
    assert register(hub, adapters[0].data, headers=friend).status_code == 201
    assert hub.http.delete("/v1/tenants/friend", headers=hub.admin).status_code == 204
    assert used(hub, **hub.key_of("friend")) == (0, 0)
    assert register(hub, adapters[0].data).status_code == 201  # a file of the deleted tenant is free for others


def test_gateway_collects_by_itself(
    empty_redis: str, backbone: Backbone, adapters: list[Adapter], tmp_path: Path
) -> None:
    with running(empty_redis, backbone, tmp_path / "store", gc_interval_s=1, gc_age_s=60) as hub:
        assert register(hub, adapters[0].data, "kept").status_code == 201
        assert register(hub, adapters[1].data).status_code == 201
        hub.http.delete("/v1/tasks/t")
        assert hub.http.post("/v1/tasks/kept/images", content=png(1), headers=OCTETS).status_code == 200
        left = hub.store_folder / "images" / "00" / f"{'0' * 64}.image"
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(b"left by a crash")
        for pattern in ("*.safetensors", "*.image"):
            for path in hub.store_folder.rglob(pattern):
                os.utime(path, (time.time() - 120, time.time() - 120))
        wait_until(lambda: used(hub) == (len(adapters[0].data), 0) and not left.exists())
        assert on_disk(hub) == len(adapters[0].data)
        assert len(list(hub.store_folder.rglob("*.image"))) == 1  # the dataset's

        def collections() -> list[tuple[str, int]]:
            entries = hub.http.get("/v1/audit", headers=hub.admin).json()["entries"]
            return [(e["role"], e["detail"]["removed"]) for e in entries if e["action"] == "store.collect"]

        wait_until(lambda: sum(removed for _, removed in collections()) == 2)
        assert {role for role, _ in collections()} == {"hub"}


def test_one_gateway_at_a_time_has_the_turn_to_collect(empty_redis: str) -> None:
    async def use(database: RegistryConnection) -> None:
        files = FileRegistry(database)
        assert await files.begin("first", 60)
        assert not await files.begin("second", 60)
        assert not await files.extend("second", 60)
        assert await files.extend("first", 0)  # the turn is over
        assert not await files.extend("first", 60)
        assert await files.begin("second", 60)

    in_registry(empty_redis, use)


def test_registration_is_refused_and_classification_goes_on_when_the_disk_is_nearly_full(
    hub: Hub, adapters: list[Adapter]
) -> None:
    assert register(hub, adapters[0].data).status_code == 201
    api = make_api(hub.redis_url, hub.store_folder, hub.engine, min_free_disk=10**18)
    with TestClient(api, headers=bearer(hub.key)) as full:
        refused = full.post("/v1/tasks/u/versions", content=adapters[1].data, headers=OCTETS)
        assert refused.status_code == 507
        assert refused.json()["type"].endswith("insufficient-storage")
        assert "disk is nearly full" in refused.json()["detail"]
        tar = bytes(3 * 1024**2)
        assert full.post("/v1/tenants/default/import", content=tar, headers=hub.admin | OCTETS).status_code == 507
        assert full.post("/v1/tasks/t/classify", content=png()).status_code == 200
    assert used(hub) == (len(adapters[0].data), 0)
