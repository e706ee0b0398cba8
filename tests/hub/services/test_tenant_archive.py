"""A whole tenant as a tar: what goes in comes out, under another name and in another store; else nothing changes."""

import asyncio
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters import Adapter, AdapterError
from hub.errors import Conflict, HubError, InvalidAdapter, InvalidRequest, LimitReached, TooLarge, Unavailable
from hub.registry.audit import OPERATOR
from hub.registry.connection import RegistryConnection
from hub.registry.models import Task
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry
from hub.schemas import LimitsChange, Sharing, TenantInfo, VersionInfo
from hub.services.tenant_archive import export_tenant, facts, import_tenant
from hub.storage.store import Store
from hub.worker_api import invalid_adapter
from tests.hub.conftest import OCTETS, running
from tests.support.models import png, with_metadata

MAX_ADAPTER_BYTES = 1_000_000
Members = list[tuple[str, bytes]]


class Case:
    """Tenant `one` with two tasks and all that they can have, in a store of its own; tenant `two` with nothing."""

    def __init__(self, database: RegistryConnection, folder: Path, adapters: Sequence[Adapter]) -> None:
        self.connection = database
        self.registry = TaskRegistry(database)
        self.tenants = TenantRegistry(database)
        self.stores = {name: Store(str(folder / name)) for name in ("one", "two")}
        self.folder = folder
        self.adapters = adapters

    async def fill(self) -> None:
        await self.tenants.create(OPERATOR, "one", LimitsChange(tasks=7))
        await self.tenants.create(OPERATOR, "two", LimitsChange())
        for task, i in (("flowers", 0), ("flowers", 1), ("flowers", 2), ("flowers", 3), ("leaves", 1)):
            await self.register("one", task, self.adapters[i])
        registry = self.registry
        for targets in ({1: 1}, {2: 1}, {1: 90, 2: 10}):
            await registry.set_alias(OPERATOR, "one", "flowers", "stable", targets)
        await registry.set_alias(OPERATOR, "one", "flowers", "latest", {3: 1})
        await registry.delete_version(OPERATOR, "one", "flowers", 4)
        await registry.share(OPERATOR, "one", "flowers", Sharing(tenants=["two", "three"]))
        await registry.share(OPERATOR, "one", "leaves", Sharing(public=True))

    async def register(self, tenant: str, task: str, adapter: Adapter) -> VersionInfo:
        self.stores[tenant].put(adapter.digest, adapter.data)
        registered = "2026-01-01T00:00:00.000+00:00"
        version = VersionInfo(version=0, registered=registered, **facts(adapter))
        kept, _ = await self.registry.register(OPERATOR, tenant, task, version, ["latest"])
        return kept

    async def info(self, tenant: str) -> TenantInfo:
        return await self.tenants.get(tenant)

    async def export(self, tenant: str = "one") -> bytes:
        info = await self.info(tenant)
        export = await export_tenant(self.registry, self.stores[tenant], asyncio.to_thread, info)
        data = b"".join([chunk async for chunk in export.chunks])
        assert len(data) == export.size_bytes
        return data

    async def restore(self, tar: bytes | AsyncIterator[bytes], tenant: str = "two", **options: Any) -> list[Task]:
        options = {"max_adapter_bytes": MAX_ADAPTER_BYTES, "registry": self.registry} | options
        return await import_tenant(
            store=self.stores[tenant],
            off_loop=asyncio.to_thread,
            check=check,
            by=OPERATOR,
            info=await self.info(tenant),
            chunks=pieces(tar) if isinstance(tar, bytes) else tar,
            **options,
        )

    async def refused(self, kind: type[HubError], tar: bytes | AsyncIterator[bytes], **options: Any) -> str:
        """What an import is refused with; nothing of it is there then."""
        with pytest.raises(kind) as caught:
            await self.restore(tar, **options)
        assert await self.registry.tasks("two") == []
        return caught.value.detail

    def stored(self, tenant: str) -> list[str]:
        return sorted(file.digest for file in self.stores[tenant].files())


async def check(data: bytes) -> Adapter:
    try:
        return Adapter.read(data)
    except AdapterError as error:
        raise invalid_adapter(error) from error


async def pieces(data: bytes, size: int = 70_001) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


Run = Callable[[Callable[[Case], Coroutine[Any, Any, None]]], None]


def runner(url: str, adapters: Sequence[Adapter], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `use(case)` on a loop of its own; no temporary file may be left."""
    spool = folder / "spool"
    spool.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spool))

    def run(use: Callable[[Case], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            database = RegistryConnection(url)
            try:
                case = Case(database, folder, adapters)
                await case.fill()
                await use(case)
            finally:
                await database.close()

        asyncio.run(main())
        assert list(spool.iterdir()) == []

    return run


@pytest.fixture
def case(empty_redis, adapters, tmp_path, monkeypatch) -> Run:
    return runner(empty_redis, adapters, tmp_path, monkeypatch)


def members(tar: bytes) -> Members:
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        return [(m.name, archive.extractfile(m).read()) for m in archive.getmembers()]  # type: ignore[union-attr]


def written(entries: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar by Python's own writer."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=format) as archive:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_a_tenant_comes_out_as_it_went_in(case, adapters) -> None:
    async def use(case: Case) -> None:
        tar = await case.export()
        restored = await case.restore(tar)
        assert [task.name for task in restored] == ["flowers", "leaves"]
        before, after = await case.registry.dump("one"), await case.registry.dump("two")
        assert after == before == restored
        flowers, leaves = after
        assert (flowers.last_number, leaves.last_number) == (4, 1)
        assert flowers.aliases == {"latest": {3: 1}, "stable": {1: 90, 2: 10}}
        assert flowers.history["stable"] == [{1: 1}, {2: 1}]
        assert flowers.sharing == Sharing(tenants=["two", "three"])
        assert leaves.sharing == Sharing(public=True)
        assert case.stored("two") == sorted(adapters[i].digest for i in range(3))
        assert all(case.stores["two"].get(a.digest) == a.data for a in adapters[:3])
        # Each goes on as the other would: numbers, roll-back, limits of stored bytes, shares.
        assert (await case.register("two", "flowers", adapters[3])).version == 5
        rolled = await case.registry.roll_back(OPERATOR, "two", "flowers", "stable")
        assert rolled.aliases["stable"] == {2: 1}
        used = [(await case.tenants.usage(name)).used for name in ("one", "two")]
        assert used[0].tasks == used[1].tasks == 2
        assert used[1].stored_bytes - used[0].stored_bytes == len(adapters[3].data)
        assert ("two", "leaves") in [(owner, task.name) for owner, task in await case.registry.shared_with("one")]

    case(use)


def test_the_tar_is_what_anybody_reads_and_the_same_every_time(case, adapters) -> None:
    async def use(case: Case) -> None:
        tar = await case.export()
        assert tar == await case.export()
        names = [f"files/{digest}.safetensors" for digest in sorted(a.digest for a in adapters[:3])]
        entries = members(tar)
        assert [name for name, _ in entries] == ["tenant.json", *names]
        python = written(entries)
        assert tar == python[: len(tar)]
        manifest = json.loads(entries[0][1])
        assert list(manifest) == ["format", "tenant", "limits", "tasks"]
        assert manifest["format"] == "karst-tenant/1"
        assert manifest["limits"]["tasks"] == 7
        assert list(manifest["tasks"][0]) == ["name", "last_number", "versions", "aliases", "history", "sharing"]
        assert b"kh_" not in entries[0][1]
        await case.restore(python)  # with the zeros that tools put at the end

    case(use)


def test_an_empty_tenant_can_be_moved(case) -> None:
    async def use(case: Case) -> None:
        assert await case.restore(await case.export("two")) == []

    case(use)


def test_tasks_that_are_there_are_named_and_nothing_is_changed(case, adapters) -> None:
    async def use(case: Case) -> None:
        tar = await case.export()
        await case.register("two", "leaves", adapters[3])
        before = await case.registry.dump("two")
        with pytest.raises(Conflict, match=r"existing tasks: leaves\. Delete"):
            await case.restore(tar)
        assert await case.registry.dump("two") == before
        await case.registry.delete_task(OPERATOR, "two", "leaves")
        await case.restore(tar)
        with pytest.raises(Conflict, match=r"existing tasks: flowers, leaves\. Delete"):
            await case.restore(tar)

    case(use)


@pytest.mark.parametrize("limit", [{"tasks": 1}, {"versions": 2}, {"stored_bytes": 100}])
def test_the_tenants_limits_hold(case, limit) -> None:
    async def use(case: Case) -> None:
        await case.tenants.change_limits(OPERATOR, "two", LimitsChange(**limit))
        assert "too many" in await case.refused(LimitReached, await case.export())

    case(use)


def test_more_bytes_than_the_tenant_may_store_are_refused_while_they_come(case, monkeypatch) -> None:
    async def use(case: Case) -> None:
        monkeypatch.setattr("hub.services.tenant_archive.most_bytes", lambda _limits: 100_000)
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 10_000
                yield bytes(10_000)

        assert "100000 bytes" in await case.refused(TooLarge, endless())
        assert sent == 110_000
        assert case.stored("two") == []

    case(use)


def test_an_upload_that_breaks_off_leaves_nothing(case) -> None:
    async def use(case: Case) -> None:
        tar = await case.export()

        async def broken() -> AsyncIterator[bytes]:
            yield tar[: len(tar) // 2]
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await case.restore(broken())
        assert case.stored("two") == []
        assert await case.registry.tasks("two") == []

    case(use)


def test_a_file_that_the_store_lacks_is_found_before_the_first_byte(case, adapters) -> None:
    async def use(case: Case) -> None:
        (path,) = (case.folder / "one").rglob(f"{adapters[0].digest}.safetensors")
        path.write_bytes(adapters[0].data[:-1])
        with pytest.raises(Unavailable, match=f"no whole file {adapters[0].digest}"):
            await case.export()
        path.unlink()
        with pytest.raises(Unavailable, match=f"no whole file {adapters[0].digest}"):
            await case.export()

    case(use)


def test_a_file_that_goes_away_later_breaks_the_export_off_and_no_hub_imports_it(case, adapters) -> None:
    async def use(case: Case) -> None:
        export = await export_tenant(case.registry, case.stores["one"], asyncio.to_thread, await case.info("one"))
        last = max(a.digest for a in adapters[:3])
        case.stores["one"].delete(last)
        got = bytearray()

        async def read() -> None:
            async for chunk in export.chunks:
                got.extend(chunk)

        with pytest.raises(Unavailable, match=f"has no file {last}"):
            await read()
        assert len(got) < export.size_bytes
        assert "cut short" in await case.refused(InvalidRequest, bytes(got))
        assert case.stored("two") == []

    case(use)


def test_what_a_collection_took_meanwhile_is_put_again(case, adapters) -> None:
    async def use(case: Case) -> None:
        class Late(TaskRegistry):
            async def restore(self, *args: Any) -> None:
                case.stores["two"].delete(adapters[1].digest)
                await super().restore(*args)

        late = Late(case.connection)
        await case.restore(await case.export(), registry=late)
        assert case.stored("two") == sorted(a.digest for a in adapters[:3])

    case(use)


def test_a_full_disk_is_unavailable(case, monkeypatch) -> None:
    async def use(case: Case) -> None:
        tar = await case.export()
        monkeypatch.setattr(tempfile, "tempdir", str(case.folder / "absent"))
        assert "cannot keep the import" in await case.refused(Unavailable, tar)

    case(use)


def test_a_file_that_does_not_fit_this_hub_is_named(case, adapters) -> None:
    async def use(case: Case) -> None:
        entries = members(await case.export())
        bad = with_metadata(adapters[0], format="karst/9")
        renamed = adapters[0].digest, hashlib.sha256(bad).hexdigest()
        manifest = entries[0][1].replace(*(name.encode() for name in renamed))
        files = [(name.replace(*renamed), bad if renamed[0] in name else data) for name, data in entries[1:]]
        told = await case.refused(InvalidAdapter, written([("tenant.json", manifest), *files]))
        assert told.startswith(f"file {renamed[1]}: format")
        assert case.stored("two") == []

    case(use)


def test_fetched_moved_and_collected_over_http(empty_redis, backbone, adapters, tmp_path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "b").write_bytes(adapters[1].data)
    with running(empty_redis, backbone, tmp_path / "store", sources=(f"file://{folder}",)) as hub:

        def register(**body: Any) -> Any:
            return hub.http.post("/v1/tasks/flowers/versions", **body)

        def collect() -> dict[str, int]:
            return hub.http.post("/v1/gc", json={"older_than_s": 0}, headers=hub.admin).json()

        assert register(content=adapters[0].data, headers=OCTETS).status_code == 201
        by_reference = register(json={"source": f"file://{folder}/b", "digest": adapters[1].digest})
        assert (by_reference.status_code, by_reference.json()["digest"]) == (201, adapters[1].digest)
        assert register(json={"source": f"file://{folder}/b", "digest": "0" * 64}).status_code == 422
        absent = register(json={"source": f"file://{folder}/c"})
        assert (absent.status_code, absent.json()["errors"][0]["field"]) == (422, "source")

        signed = register(json={"source": "https://user:secret@host/b?X-Amz-Signature=secret"})
        assert (signed.status_code, "secret" in signed.text) == (422, False)
        audit = hub.http.get("/v1/tenants/default/audit").json()["entries"]
        sent, fetched = (e["detail"] for e in audit if e["action"] == "version.register")
        assert "source" not in sent
        assert fetched == {
            "task": "flowers",
            "version": 2,
            "digest": adapters[1].digest,
            "aliases": ["latest"],
            "source": f"file://{folder}/b",
        }
        assert "secret" not in str(audit)

        other = hub.key_of("other")
        tar = hub.http.get("/v1/tenants/default/export")
        assert (tar.status_code, tar.headers["content-length"]) == (200, str(len(tar.content)))
        where = "/v1/tenants/other/import"
        assert hub.http.post(where, content=tar.content).status_code == 403
        assert hub.http.post(where, content=tar.content, headers=hub.admin).status_code == 201
        assert hub.http.post(where, content=tar.content, headers=hub.admin).status_code == 409
        answer = hub.http.post("/v1/tasks/flowers/classify", content=png(), headers=other).json()
        assert (answer["version"], answer["digest"]) == (2, adapters[1].digest)

        hub.http.delete("/v1/tasks/flowers")
        assert collect() == {"removed": 0, "bytes": 0, "kept": 2}
        hub.http.delete("/v1/tenants/other", headers=hub.admin)
        assert collect()["removed"] == 2
        assert hub.stored() == []
