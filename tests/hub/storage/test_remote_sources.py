"""References: one valid spelling below a listed prefix, and no information about other files; real links and FIFOs."""

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from hub.errors import InvalidRequest, TooLarge, Unavailable
from hub.storage.remote_sources import RemoteSources, parse_prefixes, permitted
from tests.support.remote_sources import DATA, refusal

ALLOWED = (
    "s3://bucket/adapters/",
    "https://Adapters.Example/v1",
    "hf://org/",
    "hf://org/repo@v1/",
    "file:///srv/adapters",
)
PREFIXES = parse_prefixes(ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        "s3://bucket/adapters/a.safetensors",
        "S3://bucket/adapters/2026/a=1/b+c,d.safetensors",
        "https://adapters.example/v1/a",
        "HTTPS://ADAPTERS.example:443/v1/a",
        "hf://org/repo/a.safetensors",
        "hf://org/repo@v1/a.safetensors",
        "file:///srv/adapters/deep/er/a.safetensors",
    ],
)
def test_reference_is_permitted_when_it_is_below_a_prefix(source: str) -> None:
    url, prefix = permitted(source, PREFIXES)
    assert url.is_below(prefix)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "adapters/a",
        "/srv/adapters/a",
        "s3://bucket/adapters",
        "s3://bucket/adapters/",
        "s3://bucket/adapters/a/",
        "s3://bucket/adaptersX/a",
        "s3://bucket/other/a",
        "s3://Bucket/adapters/a",
        "s3://bucket2/adapters/a",
        "s3://bucket/adapters/../other/a",
        "s3://bucket/adapters/./a",
        "s3://bucket/adapters//a",
        "s3://bucket//adapters/a",
        "s3://bucket/adapters/%2e%2e/a",
        "s3://bucket/adapters/%2E%2E%2Fother",
        "s3://bucket/adapters/a?versionId=1",
        "s3://bucket/adapters/a#b",
        "s3://bucket/adapters/*",
        "s3://bucket/adapters\\..\\a",
        "s3://key:secret@bucket/adapters/a",
        "s3://bucket/adapters/a::file:///etc/passwd",
        "simplecache::s3://bucket/adapters/a",
        "gs://bucket/adapters/a",
        "https://adapters.example/v10/a",
        "https://adapters.example/V1/a",
        "https://adapters.example./v1/a",
        "https://adapters.example:8443/v1/a",
        "https://adapters.example:0443/v1/a",
        "https://adapters.example:/v1/a",
        "https://adapters.example:443:443/v1/a",
        "https://adapters.example@evil.example/v1/a",
        "https://evil.example/v1/a",
        "https://adapters.example.evil.example/v1/a",
        "https://adapters.example\\@evil.example/v1/a",
        "https://adapters.example/v1/a\n",
        "https://adapters.example/v1/a b",
        "https://adapters.example/v1/\u00e4",
        "https://adapters\u3002example/v1/a",
        "https://[::1]/v1/a",
        "http://adapters.example/v1/a",
        "hf://other/repo/a",
        "hf://org/repo@refs/pr/1/a",  # every user may propose one
        "hf://org/repo@0123abc/a",
        "hf://org/repo@v1/a@b",
        "hf://datasets/org/repo/a",
        "file://srv/adapters/a",
        "file://localhost/srv/adapters/a",
        "file:/srv/adapters/a",
        "file:////srv/adapters/a",
        "file:///srv/adapters/../secret",
        "file:///srv/adapters/a\0b",
        "file:///srv/adapters/" + "a" * 2048,
        "memory://bucket/adapters/a",
        "ftp://adapters.example/v1/a",
    ],
)
def test_reference_is_refused_when_no_prefix_covers_it(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        permitted(source, PREFIXES)
    assert [e.field for e in caught.value.errors] == ["source"]
    assert "secret" not in caught.value.detail


def test_permitted_prefix_is_the_shortest_one() -> None:
    _, prefix = permitted("hf://org/repo@v1/a", PREFIXES)
    assert str(prefix) == "hf://org/repo@v1/"  # only a prefix may name a revision
    _, prefix = permitted("file:///srv/adapters/a", parse_prefixes(["file:///srv/adapters/", "file:///srv/"]))
    assert str(prefix) == "file:///srv/"


def test_fetch_refuses_a_file_outside_the_prefixes_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it would block
    (tmp_path / "adapters").mkdir()
    sources = RemoteSources([f"file://{tmp_path}/adapters/"], max_bytes=1000)
    outside = {refusal(sources, f"file://{tmp_path}/{name}") for name in ("fifo", "absent")}
    assert outside == {"source: not a file below a prefix that the operator lists in HUB_SOURCES"}


@pytest.mark.parametrize(
    ("source", "canonical"),
    [
        ("S3://bucket/adapters/a=1/b+c,d.safetensors", "s3://bucket/adapters/a=1/b+c,d.safetensors"),
        ("HTTPS://ADAPTERS.example:443/v1/a", "https://adapters.example/v1/a"),
        ("https://adapters.example:8443/v1/a", "https://adapters.example:8443/v1/a"),
        ("hf://org/repo@v1/a.safetensors", "hf://org/repo@v1/a.safetensors"),
        ("file:///srv/adapters/a", "file:///srv/adapters/a"),
    ],
)
def test_canonical_reference_has_one_spelling(source: str, canonical: str) -> None:
    assert RemoteSources([], max_bytes=1).canonical(source) == canonical


@pytest.mark.parametrize(
    "source", ["https://user:secret@host/a", "s3://key:secret@bucket/a", "https://host/a?X-Amz-Signature=secret"]
)
def test_error_hides_the_secret_when_a_reference_has_one(source: str) -> None:
    with pytest.raises(ValueError, match=r"without user or password|or query") as caught:
        RemoteSources([], max_bytes=1).canonical(source)
    assert "secret" not in str(caught.value)


def test_every_reference_is_refused_when_no_prefix_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    assert "HUB_SOURCES" in refusal(RemoteSources([], max_bytes=1000), f"file://{tmp_path}/a")


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("file:///", "not the whole file system"),
        ("file://srv/a", "three slashes"),
        ("hf://", "needs a bucket or an account"),
        ("https://", "needs a host name"),
        ("https://user:pw@host/", "needs a host name"),
        ("https://host:0/", "port"),
        ("https://host:99999/", "port"),
        ("http://host/", "is not supported"),
        ("s3://bucket/a b/", "letters, digits"),
        ("bucket/a", "must start with one of s3://"),
    ],
)
def test_error_names_the_prefix_when_it_is_invalid(prefix: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_prefixes([prefix])
    assert repr(prefix.replace("user:pw", "...")) in str(caught.value)
    assert "pw" not in str(caught.value)


def test_prefix_is_refused_at_start_when_its_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"^HUB_SOURCES: s3:// needs another package: Install s3fs"):
        RemoteSources(["s3://bucket/"], max_bytes=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    allowed = tmp_path / "allowed"
    (allowed / "deep").mkdir(parents=True)
    (allowed / "a.safetensors").write_bytes(DATA)
    (allowed / "deep" / "b.safetensors").write_bytes(DATA[1:])
    (tmp_path / "secret").write_bytes(b"secret")
    return allowed


@pytest.fixture
def files(folder: Path) -> RemoteSources:
    return RemoteSources([f"file://{folder}"], max_bytes=len(DATA))


def test_files_below_the_prefix_are_read(files: RemoteSources, folder: Path) -> None:
    assert files.fetch(f"file://{folder}/a.safetensors") == DATA
    assert files.fetch(f"file://{folder}/deep/b.safetensors") == DATA[1:]


def test_file_is_refused_when_it_exceeds_the_limit(files: RemoteSources, folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(DATA + b"!")
    assert f"more than {len(DATA)} bytes" in refusal(files, f"file://{folder}/a.safetensors", TooLarge)


def test_links_are_followed_when_they_stay_below_the_prefix(files: RemoteSources, folder: Path, tmp_path: Path) -> None:
    (folder / "latest").symlink_to("deep/../a.safetensors")
    (folder / "shallow").symlink_to(folder / "deep")
    assert files.fetch(f"file://{folder}/latest") == DATA
    assert files.fetch(f"file://{folder}/shallow/b.safetensors") == DATA[1:]
    (tmp_path / "alias").symlink_to(folder)
    assert RemoteSources([f"file://{tmp_path}/alias"], max_bytes=1000).fetch(f"file://{tmp_path}/alias/latest") == DATA


def test_all_unreadable_files_get_the_same_error(files: RemoteSources, folder: Path, tmp_path: Path) -> None:
    """Otherwise the error would reveal which files exist outside the prefix."""
    os.mkfifo(folder / "fifo")
    (folder / "to_secret").symlink_to(tmp_path / "secret")
    (folder / "to_nothing").symlink_to(tmp_path / "nothing")
    (folder / "to_device").symlink_to("/dev/zero")
    (folder / "to_fifo").symlink_to("fifo")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
        names = ["absent", "deep", "fifo", "socket", "to_secret", "to_nothing", "to_device", "to_fifo", "loop"]
        names += ["up/secret", "up/nothing", "up/allowed", "a.safetensors/b", "x" * 300]
        errors = {name: refusal(files, f"file://{folder}/{name}") for name in names}
    assert set(errors.values()) == {"source: no such file, or the hub may not read it"}


def test_sibling_folder_is_refused_when_its_name_starts_like_the_prefix(
    files: RemoteSources, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "allowed2").mkdir()
    (tmp_path / "allowed2" / "c").write_bytes(DATA)
    (folder / "to_sibling").symlink_to(tmp_path / "allowed2" / "c")
    assert "no such file" in refusal(files, f"file://{folder}/to_sibling")


@pytest.mark.parametrize("place", ["deep", "deep/b.safetensors"])
def test_link_is_not_followed_when_it_appears_after_the_check(
    files: RemoteSources, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.safetensors").write_bytes(b"secret")
    real = os.path.commonpath

    def swap(paths: Sequence[str]) -> str:
        (folder / place).rename(tmp_path / "moved")
        (folder / place).symlink_to(outside if place == "deep" else outside / "b.safetensors")
        return real(paths)

    monkeypatch.setattr(os.path, "commonpath", swap)
    assert "no such file" in refusal(files, f"file://{folder}/deep/b.safetensors")


@pytest.fixture
def objects() -> Iterator[RemoteSources]:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/adapters/a", DATA)
    fs.pipe_file("/bucket/secret", b"secret")
    yield RemoteSources(["memory://bucket/adapters/"], max_bytes=len(DATA), object_stores=("memory",))
    fs.rm("/bucket", recursive=True)


def test_objects_are_read_up_to_the_limit(objects: RemoteSources) -> None:
    assert objects.fetch("memory://bucket/adapters/a") == DATA
    fsspec.filesystem("memory").pipe_file("/bucket/adapters/large", DATA + b"!")
    refusal(objects, "memory://bucket/adapters/large", TooLarge)
    fsspec.filesystem("memory").pipe_file("/bucket/adapters/folder/b", DATA)
    for name in ("absent", "folder", "a/b"):
        assert refusal(objects, f"memory://bucket/adapters/{name}") == "source: no such file"
    assert "HUB_SOURCES" in refusal(objects, "memory://bucket/secret")


def test_error_of_an_object_store_hides_credentials(objects: RemoteSources, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object, **_kwargs: object) -> bytes:
        raise RuntimeError(
            "403 for https://user:password1@s3.example/a?X-Amz-Signature=c0ffee&Key=short with "
            "hf_abcdefghijklmnopqrstuvwxyz0123456789\nsecond line"
        )

    monkeypatch.setattr(MemoryFileSystem, "cat_file", broken)
    detail = refusal(objects, "memory://bucket/adapters/a", Unavailable)
    assert detail == (
        "The source cannot be read: 403 for https://...@s3.example/a?X-Amz-Signature=...&Key=... with ..."
    )
