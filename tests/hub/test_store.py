"""The store: written once and whole, read back against the digest, on a folder and on an object store's API."""

import hashlib
import os

import pytest

from hub.errors import Unavailable
from hub.store import Store

DATA = b"adapter" * 100
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize("url", ["{folder}/new/store", "memory://bucket/prefix"])
def test_what_was_put_comes_back(tmp_path, url) -> None:
    store = Store(url.format(folder=tmp_path))
    with pytest.raises(Unavailable, match=f"the adapter store has no file {DIGEST}"):
        store.get(DIGEST)
    store.put(DIGEST, DATA)
    store.put(DIGEST, DATA)
    assert store.get(DIGEST) == DATA


@pytest.mark.parametrize("damaged", [DATA[:-1], b"B" + DATA[1:]])
def test_a_damaged_file_is_never_served_and_is_mended_by_the_next_put(tmp_path, damaged) -> None:
    store = Store(str(tmp_path))
    store.put(DIGEST, DATA)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(damaged)
    with pytest.raises(Unavailable, match="is damaged: its sha256 is another"):
        store.get(DIGEST)
    store.put(DIGEST, DATA)
    assert store.get(DIGEST) == DATA


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch) -> None:
    store = Store(str(tmp_path))

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable, match=r"cannot be written: .*No space left on device"):
        store.put(DIGEST, DATA)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
