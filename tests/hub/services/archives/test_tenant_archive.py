"""Export and import of a tenant: complete under another name and in another store, or nothing changes."""

import hashlib
import json
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters import Adapter, Backbone
from hub.admin_schemas import LimitsChange
from hub.errors import Conflict, InvalidAdapter, InvalidRequest, LimitReached, TooLarge, Unavailable
from hub.registry.audit import OPERATOR
from hub.registry.tasks import TaskRegistry
from hub.schemas import Sharing, TaskSettings
from hub.services.archives.tenant_archive import export_tenant
from tests.support.datasets import unpaced_reads
from tests.support.hub_app import OCTETS, running
from tests.support.models import calibrated_adapter, png, with_metadata
from tests.support.tenant_archives import Case, Run, members, runner, written


@pytest.fixture
def case(empty_redis: str, adapters: Sequence[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(empty_redis, adapters, tmp_path, monkeypatch)


def test_import_equals_the_exported_tenant(case: Run, adapters: Sequence[Adapter]) -> None:
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
        # The imported tenant continues like the original: numbers, rollback, stored bytes, shares.
        assert (await case.register("two", "flowers", adapters[3])).version == 5
        rolled = await case.registry.roll_back(OPERATOR, "two", "flowers", "stable")
        assert rolled.aliases["stable"] == {2: 1}
        used = [(await case.tenants.usage(name)).used for name in ("one", "two")]
        assert used[0].tasks == used[1].tasks == 2
        assert used[1].stored_bytes - used[0].stored_bytes == len(adapters[3].data)
        assert "two:leaves" in await case.listed("one")

    case(use)


def test_export_is_a_plain_tar_and_equal_each_time(case: Run, adapters: Sequence[Adapter]) -> None:
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
        await case.restore(python)  # with the zeros that some tools add at the end

    case(use)


def test_import_keeps_settings_coverage_and_typicality(case: Run, backbone: Backbone) -> None:
    adapter = calibrated_adapter(backbone)

    async def use(case: Case) -> None:
        assert "settings" not in json.loads(members(await case.export())[0][1])["tasks"][0]
        await case.register("one", "flowers", adapter)
        await case.registry.put(OPERATOR, "one", "flowers", TaskSettings(unknown_below=0.05))
        entries = members(await case.export())
        manifest = json.loads(entries[0][1])
        assert [task.get("settings") for task in manifest["tasks"]] == [{"unknown_below": 0.05}, None]
        flowers, leaves = await case.restore(written(entries))
        assert (flowers.settings.unknown_below, leaves.settings.unknown_below) == (0.05, 0.01)
        assert flowers.versions[flowers.current].typicality is True
        assert flowers.versions[flowers.current].coverage == [*(adapter.coverage or ())]
        assert await case.registry.dump("two") == await case.registry.dump("one")

    case(use)


def test_import_keeps_a_task_without_versions(case: Run) -> None:
    async def use(case: Case) -> None:
        await case.registry.put(OPERATOR, "one", "empty", TaskSettings(labels=["rose"], promote="always"))
        restored = {task.name: task for task in await case.restore(await case.export())}
        assert restored["empty"].versions == {}
        assert restored["empty"].settings.labels == ["rose"]
        assert await case.registry.dump("two") == await case.registry.dump("one")

    case(use)


def test_import_adds_coverage_and_typicality_when_an_older_hub_did_not_state_them(
    case: Run, backbone: Backbone
) -> None:
    adapter = calibrated_adapter(backbone)

    async def use(case: Case) -> None:
        await case.register("one", "flowers", adapter)
        entries = members(await case.export())
        manifest = json.loads(entries[0][1])
        stated = manifest["tasks"][0]["versions"][-1]
        wrong = json.loads(entries[0][1])
        wrong["tasks"][0]["versions"][-1]["coverage"] = [[0.5, 0.5]]
        files = entries[1:]
        detail = await case.refused(InvalidRequest, written([("tenant.json", json.dumps(wrong).encode()), *files]))
        assert "contradicts its file" in detail
        del stated["coverage"], stated["typicality"]
        flowers, _ = await case.restore(written([("tenant.json", json.dumps(manifest).encode()), *files]))
        assert flowers.versions[flowers.current].coverage
        assert flowers.versions[flowers.current].typicality

    case(use)


def test_import_succeeds_when_the_tenant_is_empty(case: Run) -> None:
    async def use(case: Case) -> None:
        assert await case.restore(await case.export("two")) == []

    case(use)


def test_import_names_existing_tasks_and_changes_nothing(case: Run, adapters: Sequence[Adapter]) -> None:
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
def test_import_is_refused_when_it_exceeds_a_limit(case: Run, limit: dict[str, int]) -> None:
    async def use(case: Case) -> None:
        await case.tenants.change_limits(OPERATOR, "two", LimitsChange(**limit))
        assert "too many" in await case.refused(LimitReached, await case.export())

    case(use)


def test_import_is_refused_while_it_arrives_when_it_is_too_large(case: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(case: Case) -> None:
        monkeypatch.setattr("hub.services.archives.tenant_archive.max_archive_bytes", lambda _limits: 100_000)
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


def test_import_leaves_nothing_when_the_upload_breaks_off(case: Run) -> None:
    async def use(case: Case) -> None:
        tar = await case.export()

        async def broken() -> AsyncIterator[bytes]:
            yield tar[: len(tar) // 2]
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await case.restore(broken())
        assert case.stored("two") == []
        assert await case.registry.dump("two") == []

    case(use)


def test_export_fails_before_the_first_byte_when_the_store_lacks_a_file(case: Run, adapters: Sequence[Adapter]) -> None:
    async def use(case: Case) -> None:
        (path,) = (case.folder / "one").rglob(f"{adapters[0].digest}.safetensors")
        path.write_bytes(adapters[0].data[:-1])
        with pytest.raises(Unavailable, match=f"no intact file {adapters[0].digest}"):
            await case.export()
        path.unlink()
        with pytest.raises(Unavailable, match=f"no intact file {adapters[0].digest}"):
            await case.export()

    case(use)


def test_export_breaks_off_and_cannot_be_imported_when_a_file_disappears(
    case: Run, adapters: Sequence[Adapter]
) -> None:
    async def use(case: Case) -> None:
        export = await export_tenant(case.registry, unpaced_reads(), case.stores["one"], None, await case.info("one"))
        last = max(a.digest for a in adapters[:3])
        case.stores["one"].delete(last)
        got = bytearray()

        async def read() -> None:
            async for chunk in export.chunks:
                got.extend(chunk)

        with pytest.raises(Unavailable, match=f"has no file {last}"):
            await read()
        assert len(got) < export.size_bytes
        assert "truncated or damaged" in await case.refused(InvalidRequest, bytes(got))
        assert case.stored("two") == []

    case(use)


def test_import_puts_a_file_again_when_garbage_collection_removed_it(case: Run, adapters: Sequence[Adapter]) -> None:
    async def use(case: Case) -> None:
        class Late(TaskRegistry):
            async def restore(self, *args: Any) -> None:
                case.stores["two"].delete(adapters[1].digest)
                await super().restore(*args)

        late = Late(case.connection)
        await case.restore(await case.export(), registry=late)
        assert case.stored("two") == sorted(a.digest for a in adapters[:3])

    case(use)


def test_import_is_unavailable_when_the_disk_is_full(case: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(case: Case) -> None:
        tar = await case.export()
        monkeypatch.setattr(tempfile, "tempdir", str(case.folder / "absent"))
        assert "cannot store the upload on its disk" in await case.refused(Unavailable, tar)

    case(use)


def test_import_names_the_file_that_does_not_fit_this_hub(case: Run, adapters: Sequence[Adapter]) -> None:
    async def use(case: Case) -> None:
        entries = members(await case.export())
        bad = with_metadata(adapters[0], format="karst/9")
        renamed = adapters[0].digest, hashlib.sha256(bad).hexdigest()
        manifest = entries[0][1].replace(renamed[0].encode(), renamed[1].encode())
        files = [(name.replace(*renamed), bad if renamed[0] in name else data) for name, data in entries[1:]]
        detail = await case.refused(InvalidAdapter, written([("tenant.json", manifest), *files]))
        assert detail.startswith(f"file {renamed[1]}: format")
        assert case.stored("two") == []

    case(use)


def test_source_export_import_and_garbage_collection_work_over_http(
    empty_redis: str, backbone: Backbone, adapters: Sequence[Adapter], tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "b").write_bytes(adapters[1].data)
    with running(empty_redis, backbone, tmp_path / "store", sources=(f"file://{folder}",)) as hub:

        def register(**body: Any) -> Any:
            return hub.http.post("/v1/tasks/flowers/versions", **body)

        def collect() -> dict[str, int]:
            removed: dict[str, int] = hub.http.post("/v1/gc", json={"older_than_s": 0}, headers=hub.admin).json()
            return removed

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
