"""Hostile tars, each for one line of the reader. The hub refuses each and keeps nothing of it."""

import copy
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters import Adapter
from hub.errors import InvalidRequest
from tests.support.tenant_archives import MAX_ADAPTER_BYTES, Case, Members, Run, members, runner, written


@pytest.fixture
def case(empty_redis: str, adapters: Sequence[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(empty_redis, adapters, tmp_path, monkeypatch)


def changed(**fields: Any) -> Callable[[Members], bytes]:
    """Return a maker of tars with changed manifest fields.

    `task__name` is a field of the first task, `version__labels` one of its first version.
    """

    def make(entries: Members) -> bytes:
        manifest = json.loads(entries[0][1])
        places = {"task": manifest["tasks"][0], "version": manifest["tasks"][0]["versions"][0]}
        for name, value in fields.items():
            kind, _, rest = name.rpartition("__")
            places.get(kind, manifest)[rest] = value
        return written([("tenant.json", json.dumps(manifest).encode()), *entries[1:]])

    return make


def doubled_task(entries: Members) -> bytes:
    manifest = json.loads(entries[0][1])
    manifest["tasks"].append(copy.deepcopy(manifest["tasks"][0]))
    return written([("tenant.json", json.dumps(manifest).encode()), *entries[1:]])


def member(kind: bytes, **fields: Any) -> Callable[[Members], bytes]:
    """Return a maker of tars with a member of another kind before the files."""

    def make(entries: Members) -> bytes:
        extra = tarfile.TarInfo(entries[1][0])
        extra.type = kind
        for name, value in fields.items():
            setattr(extra, name, value)
        first = written(entries[:1])[: 512 + -(-len(entries[0][1]) // 512) * 512]
        return first + extra.tobuf(tarfile.GNU_FORMAT) + written(entries[1:])

    return make


def pax(entries: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in entries:
            extended = tarfile.TarInfo(name)
            extended.size = len(data)
            extended.pax_headers = {"comment": "x"}
            archive.addfile(extended, io.BytesIO(data))
    return buffer.getvalue()


def damaged(entries: Members) -> bytes:
    name, data = entries[1]
    return written([entries[0], (name, data[:-1] + bytes([data[-1] ^ 1])), *entries[2:]])


def swapped(entries: Members) -> bytes:
    return written([entries[0], (entries[1][0], entries[2][1]), (entries[2][0], entries[1][1]), *entries[3:]])


def negative_size(entries: Members) -> bytes:
    """Return a tar whose first size is negative, in base 256. A reader that adds it would never end."""
    block = bytearray(written(entries)[:512])
    block[124:136] = b"\xff" * 12
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + written(entries)[512:]


HOSTILE: dict[str, tuple[Callable[[Members], bytes], str]] = {
    "empty": (lambda _: b"", "truncated or damaged"),
    "zeros": (lambda _: bytes(10240), "has no valid end"),
    "noise": (lambda _: b"noise" * 1000, "not a tar"),
    "a few words": (lambda _: b"# karst-hub", "not a tar"),
    "gzip": (lambda e: gzip.compress(written(e)), "not a tar"),
    "truncated in a header": (lambda e: written(e)[:300], "truncated or damaged"),
    "truncated in a file": (lambda e: written(e)[: -len(e[-1][1]) // 2 - 10240], "truncated or damaged"),
    "end missing": (lambda e: written(e).rstrip(b"\0"), "truncated or damaged"),
    "end incomplete": (lambda e: written(e)[: 512 * (len(written(e).rstrip(b"\0")) // 512 + 2)], "has no valid end"),
    "text after the end": (lambda e: written(e) + b"more", "has no valid end"),
    "second tar after the end": (lambda e: written(e) + written(e), "has no valid end"),
    "endless zeros": (lambda e: written(e) + bytes(10**6), "has no valid end"),
    "negative size": (negative_size, "the limit is"),
    "manifest missing": (lambda e: written(e[1:]), "not first"),
    "manifest later": (lambda e: written([*e[1:], e[0]]), "not first"),
    "manifest twice": (lambda e: written([e[0], *e]), "is a duplicate"),
    "file twice": (lambda e: written([*e, e[1]]), "is a duplicate"),
    "file missing": (lambda e: written(e[:-1]), "is only in"),
    "unknown file": (lambda e: written([*e, (f"files/{'0' * 64}.safetensors", b"")]), "is only in"),
    "other file": (lambda e: written([*e, ("files/README", b"")]), "is neither"),
    "other folder": (lambda e: written([e[0], (e[1][0].replace("files/", "file/"), e[1][1])]), "is neither"),
    "absolute": (lambda e: written([e[0], ("/" + e[1][0], e[1][1]), *e[2:]]), "is neither"),
    "parent folder": (lambda e: written([e[0], ("../" + e[1][0], e[1][1]), *e[2:]]), "is neither"),
    "with a dot": (lambda e: written([e[0], ("./" + e[1][0], e[1][1]), *e[2:]]), "is neither"),
    "capitals": (lambda e: written([e[0], (e[1][0].upper(), e[1][1]), *e[2:]]), "is neither"),
    "symbolic link": (member(tarfile.SYMTYPE, linkname="/etc/passwd"), "is neither"),
    "hard link": (member(tarfile.LNKTYPE, linkname="tenant.json"), "is neither"),
    "folder": (member(tarfile.DIRTYPE, name="files"), "is neither"),
    "device": (member(tarfile.CHRTYPE), "is neither"),
    "FIFO": (member(tarfile.FIFOTYPE), "is neither"),
    "long name": (member(tarfile.GNUTYPE_LONGNAME, size=10**12), "is neither"),
    "sparse": (member(tarfile.GNUTYPE_SPARSE, size=10**12), "is neither"),
    "pax": (pax, "is neither"),
    "size of a terabyte": (member(tarfile.REGTYPE, size=10**12), "the limit is"),
    "size one byte over the limit": (member(tarfile.REGTYPE, size=MAX_ADAPTER_BYTES + 1), "the limit is"),
    "damaged file": (damaged, "is damaged: its sha256"),
    "swapped files": (swapped, "is damaged: its sha256"),
    "manifest not JSON": (lambda e: written([(e[0][0], b"{"), *e[1:]]), "tenant.json: the document: Invalid JSON"),
    "manifest not UTF-8": (lambda e: written([(e[0][0], b'"\xff"'), *e[1:]]), "tenant.json: the document"),
    "other format": (changed(format="karst-tenant/2"), "tenant.json: format"),
    "unknown field": (changed(keys=[]), "tenant.json: keys"),
    "unknown field of a task": (changed(task__owner="x"), "tenant.json: tasks.0.owner"),
    "unknown field of a version": (changed(version__secret="x"), "tenant.json: tasks.0.versions.0.secret"),
    "bad tenant": (changed(tenant="a:b"), "tenant.json: tenant"),
    "bad task": (changed(task__name="one:flowers"), "tenant.json: tasks.0.name"),
    "task twice": (doubled_task, "two tasks have the same name"),
    "aliases without versions": (changed(task__versions=[]), "points at a missing version"),
    "number too high": (changed(task__last_number=2), "outside 1 to 2"),
    "number too low": (changed(version__version=0), "outside 1 to 4"),
    "number twice": (changed(version__version=2), "same number"),
    "number not a number": (changed(version__version="x"), "tenant.json: tasks.0.versions.0.version"),
    "unknown digest": (changed(version__digest="0" * 64), "is only in"),
    "digest of a path": (changed(version__digest="../../etc/passwd"), "is only in"),
    "latest missing": (changed(task__aliases={"stable": {"1": 1}}, task__history={}), "the alias 'latest' is missing"),
    "alias of a missing version": (changed(task__aliases={"latest": {"9": 1}}, task__history={}), "a missing version"),
    "alias without targets": (changed(task__aliases={"latest": {}}, task__history={}), "tenant.json: tasks.0.aliases"),
    "alias of a number": (changed(task__aliases={"latest": {"1": 1}, "7": {"1": 1}}, task__history={}), "is a number"),
    "alias with a colon": (
        changed(task__aliases={"latest": {"1": 1}, "a:b": {"1": 1}}),
        "tenant.json: tasks.0.aliases",
    ),
    "weight of zero": (changed(task__aliases={"latest": {"1": 0}}), "tenant.json: tasks.0.aliases"),
    "history of a missing alias": (changed(task__history={"other": [{"1": 1}]}), "the history names a missing alias"),
    "history too long": (changed(task__history={"stable": [{"1": 1}] * 21}), "tenant.json: tasks.0.history"),
    "shared with a path": (changed(task__sharing={"tenants": ["../x"]}), "tenant.json: tasks.0.sharing"),
    "other labels": (changed(version__labels=["a", "b", "c"]), "contradicts its file"),
    "other backbone": (changed(version__backbone="other"), "contradicts its file"),
    "other fingerprint": (changed(version__fingerprint="0" * 64), "contradicts its file"),
    "other config": (changed(version__config={}), "contradicts its file"),
    "other preprocess": (changed(version__preprocess={}), "contradicts its file"),
    "other metrics": (changed(version__metrics={"accuracy": 1.0}), "contradicts its file"),
    "other size": (changed(version__size_bytes=1), "contradicts its file"),
    "registration time invalid": (changed(version__registered="<script>"), "tenant.json: tasks.0: Value error"),
    "registration time without zone": (changed(version__registered="2026-01-01T00:00:00"), "has no time zone"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_import_changes_nothing_when_the_tar_is_not_an_export(case: Run, name: str) -> None:
    async def use(case: Case) -> None:
        make, message = HOSTILE[name]
        assert message in await case.refused(InvalidRequest, make(members(await case.export())))
        assert case.stored("two") == []

    case(use)
