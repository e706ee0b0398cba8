"""Program of `test_s3`: the store and references on s3fs and moto's S3 server, and the signature of gcsfs.

A process of its own, because the S3 packages need other versions than the tests do.
"""

import hashlib
import inspect
import sys
from datetime import UTC, datetime, timedelta

import fsspec
from moto.server import ThreadedMotoServer

from hub.errors import InvalidRequest, TooLarge, Unavailable
from hub.storage.remote_sources import RemoteSources
from hub.storage.store import Store

DATA = b"adapter" * 1000
DIGEST = hashlib.sha256(DATA).hexdigest()


def check_sources() -> None:
    """Read references: a file, one that is too large, and one that is missing."""
    fs = fsspec.filesystem("s3")
    fs.mkdir("adapters")
    fs.pipe_file("adapters/ok/a.safetensors", DATA)
    sources = RemoteSources(["s3://adapters/ok/"], max_bytes=len(DATA))
    assert sources.fetch("s3://adapters/ok/a.safetensors") == DATA
    fs.pipe_file("adapters/ok/a.safetensors", DATA + b"1")
    refused(TooLarge, lambda: sources.fetch("s3://adapters/ok/a.safetensors"))
    refused(InvalidRequest, lambda: sources.fetch("s3://adapters/ok/b.safetensors"))
    refused(InvalidRequest, lambda: sources.fetch("s3://adapters/other/a.safetensors"))


def check_store() -> None:
    """Put, read, list and delete files."""
    fsspec.filesystem("s3").mkdir("hub")
    store = Store("s3://hub/store")
    assert [*store.files()] == []
    assert store.owner() is None
    store.set_owner("registry-1")
    assert store.owner() == "registry-1"
    store.put(DIGEST, DATA)
    store.put(DIGEST, DATA)
    assert store.get(DIGEST) == DATA
    found = store.find(DIGEST)
    assert found is not None
    assert (found.digest, found.size_bytes) == (DIGEST, len(DATA))
    assert abs(found.modified - datetime.now(UTC)) < timedelta(minutes=5)
    assert [file.digest for file in store.files()] == [DIGEST]
    assert store.delete(DIGEST)
    assert store.find(DIGEST) is None
    refused(Unavailable, lambda: store.get(DIGEST))
    refused(Unavailable, lambda: Store("s3://no-such-bucket/store").put(DIGEST, DATA))


def check_gcsfs() -> None:
    """Accept gcsfs's `cat_file` with the names that the hub uses."""
    from gcsfs import GCSFileSystem

    inspect.signature(GCSFileSystem._cat_file).bind(None, "bucket/object", start=0, end=10)


def refused(kind: type[Exception], call: object) -> None:
    try:
        call()  # type: ignore[operator]  # each call is a function without arguments
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def main() -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False)
    server.start()
    try:
        check_sources()
        check_store()
        check_gcsfs()
    finally:
        server.stop()
    print("all checks passed")


if __name__ == "__main__":
    main()
