"""References: one plain spelling under a listed prefix, nothing told of what lies outside; real links and FIFOs."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from hub.errors import TooLarge, Unavailable
from hub.storage.remote_sources import Sources, parse_prefixes
from tests.support.remote_sources import DATA, refusal

ALLOWED = (
    "s3://bucket/adapters/",
    "https://Adapters.Example/v1",
    "hf://org/",
    "hf://org/repo@v1/",
    "file:///srv/adapters",
)


# ---- which references are looked at, at all


@pytest.fixture
def looked_at(monkeypatch) -> Sources:
    """Sources that tell of every reference that passes the prefixes, in place of reading it."""

    def seen(*_args: object) -> bytes:
        return b"looked"

    monkeypatch.setattr("hub.storage.remote_sources._read_below", seen)
    monkeypatch.setattr(Sources, "_download", seen)
    monkeypatch.setattr(Sources, "_read_object", seen)
    monkeypatch.setattr(fsspec, "get_filesystem_class", seen)  # neither s3fs nor gcsfs is needed
    return Sources(ALLOWED, max_bytes=1000)


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
def test_what_lies_under_a_prefix_is_looked_at(looked_at, source) -> None:
    assert looked_at.fetch(source) == b"looked"


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
        "hf://org/repo@refs/pr/1/a",  # anybody's
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
def test_everything_else_is_refused_unlooked_at(looked_at, source) -> None:
    assert "secret" not in refusal(looked_at, source)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("S3://bucket/adapters/a=1/b+c,d.safetensors", "s3://bucket/adapters/a=1/b+c,d.safetensors"),
        ("HTTPS://ADAPTERS.example:443/v1/a", "https://adapters.example/v1/a"),
        ("https://adapters.example:8443/v1/a", "https://adapters.example:8443/v1/a"),
        ("hf://org/repo@v1/a.safetensors", "hf://org/repo@v1/a.safetensors"),
        ("file:///srv/adapters/a", "file:///srv/adapters/a"),
    ],
)
def test_a_reference_is_told_in_one_spelling(source, told) -> None:
    assert Sources([], max_bytes=1).told(source) == told


@pytest.mark.parametrize(
    "source", ["https://user:secret@host/a", "s3://key:secret@bucket/a", "https://host/a?X-Amz-Signature=secret"]
)
def test_what_holds_a_secret_is_never_told(source) -> None:
    with pytest.raises(ValueError, match=r"password|no query") as caught:
        Sources([], max_bytes=1).told(source)
    assert "secret" not in str(caught.value)


def test_without_prefixes_everything_is_refused_and_says_why(tmp_path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    assert "HUB_SOURCES" in refusal(Sources([], max_bytes=1000), f"file://{tmp_path}/a")


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("file:///", "not the whole file system"),
        ("file://srv/a", "three slashes"),
        ("hf://", "name of a bucket or an account"),
        ("https://", "plain host name"),
        ("https://user:pw@host/", "plain host name"),
        ("https://host:0/", "port"),
        ("https://host:99999/", "port"),
        ("http://host/", "never read"),
        ("s3://bucket/a b/", "letters, digits"),
        ("bucket/a", "begin with one of s3://"),
    ],
)
def test_a_wrong_prefix_is_named(prefix, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_prefixes([prefix])
    assert repr(prefix.replace("user:pw", "...")) in str(caught.value)
    assert "pw" not in str(caught.value)


def test_a_prefix_whose_package_is_missing_is_refused_at_once(monkeypatch) -> None:
    def missing(_scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"HUB_SOURCES has a prefix of s3://, but: Install s3fs"):
        Sources(["s3://bucket/"], max_bytes=1)


# ---- file://


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    allowed = tmp_path / "allowed"
    (allowed / "deep").mkdir(parents=True)
    (allowed / "a.safetensors").write_bytes(DATA)
    (allowed / "deep" / "b.safetensors").write_bytes(DATA[1:])
    (tmp_path / "secret").write_bytes(b"secret")
    return allowed


@pytest.fixture
def files(folder) -> Sources:
    return Sources([f"file://{folder}"], max_bytes=len(DATA))


def test_files_are_read(files, folder) -> None:
    assert files.fetch(f"file://{folder}/a.safetensors") == DATA
    assert files.fetch(f"file://{folder}/deep/b.safetensors") == DATA[1:]


def test_a_file_over_the_limit_is_refused(files, folder) -> None:
    (folder / "a.safetensors").write_bytes(DATA + b"!")
    assert f"more than the {len(DATA)} bytes" in refusal(files, f"file://{folder}/a.safetensors", TooLarge)


def test_links_that_stay_inside_are_followed_and_the_prefix_may_be_one(files, folder, tmp_path) -> None:
    (folder / "latest").symlink_to("deep/../a.safetensors")
    (folder / "shallow").symlink_to(folder / "deep")
    assert files.fetch(f"file://{folder}/latest") == DATA
    assert files.fetch(f"file://{folder}/shallow/b.safetensors") == DATA[1:]
    (tmp_path / "alias").symlink_to(folder)
    assert Sources([f"file://{tmp_path}/alias"], max_bytes=1000).fetch(f"file://{tmp_path}/alias/latest") == DATA


def test_one_answer_for_whatever_is_no_file_inside(files, folder, tmp_path) -> None:
    """Whether something is there outside makes no difference."""
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
        told = {name: refusal(files, f"file://{folder}/{name}") for name in names}
    assert set(told.values()) == {"source: there is no such file, or none that the hub may read"}


def test_a_sibling_with_the_same_beginning_is_outside(files, folder, tmp_path) -> None:
    (tmp_path / "allowed2").mkdir()
    (tmp_path / "allowed2" / "c").write_bytes(DATA)
    (folder / "to_sibling").symlink_to(tmp_path / "allowed2" / "c")
    assert "no such file" in refusal(files, f"file://{folder}/to_sibling")


@pytest.mark.parametrize("place", ["deep", "deep/b.safetensors"])
def test_a_link_that_is_put_there_after_the_check_is_not_followed(files, folder, tmp_path, monkeypatch, place) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.safetensors").write_bytes(b"secret")
    real = os.path.commonpath

    def swap(paths):
        (folder / place).rename(tmp_path / "moved")
        (folder / place).symlink_to(outside if place == "deep" else outside / "b.safetensors")
        return real(paths)

    monkeypatch.setattr(os.path, "commonpath", swap)
    assert "no such file" in refusal(files, f"file://{folder}/deep/b.safetensors")


# ---- object stores, by fsspec's memory


@pytest.fixture
def objects() -> Iterator[Sources]:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/adapters/a", DATA)
    fs.pipe_file("/bucket/secret", b"secret")
    yield Sources(["memory://bucket/adapters/"], max_bytes=len(DATA), object_stores=("memory",))
    fs.rm("/bucket", recursive=True)


def test_objects_are_read_within_the_limit(objects) -> None:
    assert objects.fetch("memory://bucket/adapters/a") == DATA
    fsspec.filesystem("memory").pipe_file("/bucket/adapters/large", DATA + b"!")
    refusal(objects, "memory://bucket/adapters/large", TooLarge)
    fsspec.filesystem("memory").pipe_file("/bucket/adapters/folder/b", DATA)
    for name in ("absent", "folder", "a/b"):
        assert refusal(objects, f"memory://bucket/adapters/{name}") == "source: there is no such file"
    assert "HUB_SOURCES" in refusal(objects, "memory://bucket/secret")


def test_an_object_stores_error_is_told_without_credentials(objects, monkeypatch) -> None:
    def broken(*_args: object, **_kwargs: object) -> bytes:
        raise RuntimeError(
            "403 for https://user:password1@s3.example/a?X-Amz-Signature=c0ffee&Key=short with "
            "hf_abcdefghijklmnopqrstuvwxyz0123456789\nsecond line"
        )

    monkeypatch.setattr(MemoryFileSystem, "cat_file", broken)
    told = refusal(objects, "memory://bucket/adapters/a", Unavailable)
    assert told == "the source cannot be read: 403 for https://s3.example/a with ..."
