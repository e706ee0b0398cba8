"""The store writes a file once and completely, and checks its digest on each read; a folder and an object store."""

import hashlib
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from adapters import Adapter
from hub.errors import Unavailable
from hub.storage.store import OWNER, Store
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import png

DATA = b"adapter" * 100
DIGEST = hashlib.sha256(DATA).hexdigest()
OTHER = hashlib.sha256(DATA[1:]).hexdigest()
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture(params=["{folder}/new/store", "memory://bucket/prefix"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return Store(request.param.format(folder=tmp_path))


def modified(store: Store) -> datetime:
    file = store.find(DIGEST)
    assert file is not None
    return file.modified


def age(path: Path) -> None:
    os.utime(path, (LONG_AGO.timestamp(), LONG_AGO.timestamp()))


def test_get_returns_the_bytes_of_put(store: Store) -> None:
    with pytest.raises(Unavailable, match=f"The adapter store has no file {DIGEST}"):
        store.get(DIGEST)
    assert store.find(DIGEST) is None
    store.put(DIGEST, DATA)
    store.put(DIGEST, DATA)
    assert store.get(DIGEST) == DATA


def test_put_missing_writes_a_file_that_was_removed_and_no_other(store: Store) -> None:
    store.put(DIGEST, DATA)
    store.put_missing(DIGEST, b"not these bytes")
    assert store.get(DIGEST) == DATA
    store.delete(DIGEST)
    store.put_missing(DIGEST, DATA)
    assert store.get(DIGEST) == DATA


def test_files_are_listed_with_size_and_time_until_deleted(store: Store) -> None:
    assert list(store.files()) == []
    began = datetime.now(UTC) - timedelta(seconds=1)
    store.put(DIGEST, DATA)
    store.put(OTHER, DATA[1:])
    found = {file.digest: file for file in store.files()}
    assert {digest: file.size_bytes for digest, file in found.items()} == {DIGEST: 700, OTHER: 699}
    assert all(began < file.modified < datetime.now(UTC) + timedelta(seconds=1) for file in found.values())
    assert store.find(DIGEST) == found[DIGEST]
    assert store.delete(DIGEST)
    assert not store.delete(DIGEST)
    assert store.find(DIGEST) is None
    assert [file.digest for file in store.files()] == [OTHER]


@pytest.mark.parametrize("damaged", [DATA[:-1], b"B" + DATA[1:]])
def test_damaged_file_is_refused_until_the_next_put(tmp_path: Path, damaged: bytes) -> None:
    store = Store(str(tmp_path))
    store.put(DIGEST, DATA)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(damaged)
    with pytest.raises(Unavailable, match="is damaged: its sha256 differs"):
        store.get(DIGEST)
    store.put(DIGEST, DATA)
    assert store.get(DIGEST) == DATA


def test_put_leaves_nothing_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(str(tmp_path))

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable, match=f"The adapter store cannot write file {DIGEST}"):
        store.put(DIGEST, DATA)
    assert f"the adapter store cannot write file {DIGEST}: OSError: [Errno 28] No space left on device" in caplog.text
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_put_only_refreshes_the_time_when_the_file_is_intact(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put(DIGEST, DATA)
    (path,) = tmp_path.rglob("*.safetensors")
    age(path)
    before = path.stat().st_ino
    assert modified(store) == LONG_AGO
    store.put(DIGEST, DATA)
    assert modified(store) > datetime.now(UTC) - timedelta(minutes=1)
    assert path.stat().st_ino == before


def test_put_refreshes_the_time_of_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("memory://bucket/young")
    store.put(DIGEST, DATA)
    fs = fsspec.filesystem("memory")
    fs.store[f"/bucket/young/{DIGEST[:2]}/{DIGEST}.safetensors"].created = LONG_AGO
    assert modified(store) == LONG_AGO
    store.put(DIGEST, DATA)
    assert modified(store) > datetime.now(UTC) - timedelta(minutes=1)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), PermissionError(1, "not yours")])
def test_put_writes_a_new_file_when_it_cannot_refresh_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Garbage collection removed the file in between, or another user owns it."""
    store = Store(str(tmp_path))
    store.put(DIGEST, DATA)
    (path,) = tmp_path.rglob("*.safetensors")
    before = path.stat().st_ino

    def fails(_path: Path) -> None:
        raise error

    monkeypatch.setattr(os, "utime", fails)
    keep = path.open("rb")  # so that the new file cannot get the old one's inode
    store.put(DIGEST, DATA)
    keep.close()
    assert path.stat().st_ino != before
    assert store.get(DIGEST) == DATA


def test_only_old_temporary_files_are_removed_and_other_files_skipped(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put(DIGEST, DATA)
    folder = tmp_path / DIGEST[:2]
    wrong_folder = tmp_path / ("00" if DIGEST[:2] != "00" else "01")
    wrong_folder.mkdir()
    foreign = [
        tmp_path / "README",
        tmp_path / f"{DIGEST}.safetensors",
        wrong_folder / f"{DIGEST}.safetensors",
        folder / "README",
        folder / f"{DIGEST}.safetensors.bak",
        folder / f"{DIGEST.upper()}.safetensors",
        folder / f".{DIGEST}.safetensors.backup",  # six characters: not one of ours
        tmp_path / f".{DIGEST}.safetensors.abcd1234",
    ]
    old, young = (folder / f".{DIGEST}.safetensors.{end}" for end in ("abcd1234", "_0123456"))
    for path in (*foreign, old, young):
        path.write_bytes(b"12345")
        age(path)
    os.utime(young)
    (folder / "folder").mkdir()
    (tmp_path / "lost+found").mkdir()
    assert [file.digest for file in store.files()] == [DIGEST]
    assert store.delete_unfinished(datetime.now(UTC) - timedelta(hours=1)) == [5]
    assert not old.exists()
    assert young.exists()
    assert all(path.exists() for path in foreign)


def test_listing_is_unavailable_when_the_folder_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(str(tmp_path))
    store.put(DIGEST, DATA)

    def away(*_args: object, **_kwargs: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "scandir", away)
    with pytest.raises(Unavailable, match="The adapter store cannot list its files"):
        list(store.files())
    assert "the adapter store cannot list its files: OSError: [Errno 5] Input/output error" in caplog.text


WHERE = "Could not connect to https://minio.internal:9000/a-bucket/a/path"


@pytest.mark.parametrize(
    ("method", "call", "action"),
    [
        ("pipe_file", lambda store: store.put(DIGEST, DATA), "write file {}"),
        ("cat_file", lambda store: store.get(DIGEST), "read file {}"),
        ("info", lambda store: store.find(DIGEST), "read file {}"),
        ("rm_file", lambda store: store.delete(DIGEST), "remove file {}"),
        ("ls", lambda store: list(store.files()), "list its files"),
    ],
)
def test_error_of_an_object_store_is_only_in_the_log(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
    call: Callable[[Store], object],
    action: str,
) -> None:
    def away(*_args: object, **_kwargs: object) -> None:
        raise OSError(WHERE)

    store = Store("memory://a-bucket/prefix")
    monkeypatch.setattr(MemoryFileSystem, method, away)
    with pytest.raises(Unavailable) as caught:
        call(store)
    assert caught.value.detail == f"The adapter store cannot {action.format(DIGEST)}. The hub's log has the cause."
    assert WHERE in caplog.text


def test_responses_never_reveal_the_store_s_location(
    hub: Hub, adapters: Sequence[Adapter], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When it is full, its files are damaged, or it is unavailable."""
    url = "/v1/tasks/flowers/versions"

    def failing(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device", str(hub.store_folder))

    assert hub.http.post(url, content=adapters[0].data, headers=OCTETS).status_code == 201
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        answers = [hub.http.post(url, content=adapters[1].data, headers=OCTETS)]
    (path,) = hub.store_folder.rglob("*.safetensors")
    path.write_bytes(b"damaged")
    answers += [hub.http.get(f"{url}/1/file"), hub.http.post("/v1/tasks/flowers/classify", content=png())]
    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "cat_file", failing)
        patch.setattr(LocalFileSystem, "info", failing)
        answers += [hub.http.get(f"{url}/1/file"), hub.http.get("/v1/tenants/default/export")]
    assert [a.status_code for a in answers] == [503] * len(answers)
    assert all("is damaged" in a.json()["detail"] for a in answers[1:3])
    assert not [a.text for a in answers if str(hub.store_folder) in a.text or "No space" in a.text]
    assert caplog.text.count(str(hub.store_folder)) >= len(answers)


@pytest.mark.parametrize(("folder_mode", "file_mode"), [(None, 0o600), (0o700, 0o600), (0o2770, 0o660), (0o755, 0o644)])
def test_files_have_the_permissions_of_the_stores_folder(
    tmp_path: Path, folder_mode: int | None, file_mode: int
) -> None:
    """A group that shares a store makes the folder itself; a folder that the hub makes is private."""
    folder = tmp_path / "store"
    if folder_mode is not None:
        folder.mkdir()
        folder.chmod(folder_mode)
    store = Store(str(folder))
    store.put(DIGEST, DATA)
    store.set_owner("a" * 32)
    file = folder / DIGEST[:2] / f"{DIGEST}.safetensors"
    expected = 0o700 if folder_mode is None else folder_mode
    assert [path.stat().st_mode & 0o7777 for path in (folder, file.parent)] == [expected, expected]
    assert [path.stat().st_mode & 0o777 for path in (file, folder / OWNER)] == [file_mode, file_mode]
