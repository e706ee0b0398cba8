"""Tars that no hub made, each for one line of the reader: every one is refused, and nothing of it is kept."""

import copy
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from typing import Any

import pytest

from hub.errors import InvalidRequest
from tests.support.tenant_archives import MAX_ADAPTER_BYTES, Case, Members, Run, members, runner, written


@pytest.fixture
def case(empty_redis, adapters, tmp_path, monkeypatch) -> Run:
    return runner(empty_redis, adapters, tmp_path, monkeypatch)


# What makes a tar of the members of an export.


def changed(**fields: Any) -> Callable[[Members], bytes]:
    """The manifest with other fields; `task__name` is of the first task, `version__labels` of its first version."""

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
    """A member of another kind before the files."""

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
    """Base 256, below zero: a reader that steps by it never ends."""
    block = bytearray(written(entries)[:512])
    block[124:136] = b"\xff" * 12
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + written(entries)[512:]


HOSTILE: dict[str, tuple[Callable[[Members], bytes], str]] = {
    "nothing": (lambda _: b"", "cut short"),
    "zeros": (lambda _: bytes(10240), "does not end"),
    "noise": (lambda _: b"noise" * 1000, "this is no tar"),
    "a few words": (lambda _: b"# karst-hub", "this is no tar"),
    "gzip": (lambda e: gzip.compress(written(e)), "this is no tar"),
    "cut in a header": (lambda e: written(e)[:300], "cut short"),
    "cut in a file": (lambda e: written(e)[: -len(e[-1][1]) // 2 - 10240], "cut short"),
    "no end": (lambda e: written(e).rstrip(b"\0"), "cut short"),
    "half an end": (lambda e: written(e)[: 512 * (len(written(e).rstrip(b"\0")) // 512 + 2)], "does not end"),
    "more behind the end": (lambda e: written(e) + b"more", "does not end"),
    "a second tar behind the end": (lambda e: written(e) + written(e), "does not end"),
    "endless zeros": (lambda e: written(e) + bytes(10**6), "does not end"),
    "negative size": (negative_size, "larger than is allowed"),
    "manifest missing": (lambda e: written(e[1:]), "not first"),
    "manifest later": (lambda e: written([*e[1:], e[0]]), "not first"),
    "manifest twice": (lambda e: written([e[0], *e]), "comes twice"),
    "file twice": (lambda e: written([*e, e[1]]), "comes twice"),
    "file missing": (lambda e: written(e[:-1]), "is only in"),
    "file too many": (lambda e: written([*e, (f"files/{'0' * 64}.safetensors", b"")]), "is only in"),
    "other file": (lambda e: written([*e, ("files/README", b"")]), "something else"),
    "other folder": (lambda e: written([e[0], (e[1][0].replace("files/", "file/"), e[1][1])]), "something else"),
    "absolute": (lambda e: written([e[0], ("/" + e[1][0], e[1][1]), *e[2:]]), "something else"),
    "upwards": (lambda e: written([e[0], ("../" + e[1][0], e[1][1]), *e[2:]]), "something else"),
    "with a dot": (lambda e: written([e[0], ("./" + e[1][0], e[1][1]), *e[2:]]), "something else"),
    "capitals": (lambda e: written([e[0], (e[1][0].upper(), e[1][1]), *e[2:]]), "something else"),
    "symbolic link": (member(tarfile.SYMTYPE, linkname="/etc/passwd"), "something else"),
    "hard link": (member(tarfile.LNKTYPE, linkname="tenant.json"), "something else"),
    "folder": (member(tarfile.DIRTYPE, name="files"), "something else"),
    "device": (member(tarfile.CHRTYPE), "something else"),
    "FIFO": (member(tarfile.FIFOTYPE), "something else"),
    "long name": (member(tarfile.GNUTYPE_LONGNAME, size=10**12), "something else"),
    "sparse": (member(tarfile.GNUTYPE_SPARSE, size=10**12), "something else"),
    "pax": (pax, "something else"),
    "a claim of a terabyte": (member(tarfile.REGTYPE, size=10**12), "larger than is allowed"),
    "a claim of a byte too many": (member(tarfile.REGTYPE, size=MAX_ADAPTER_BYTES + 1), "larger than is allowed"),
    "damaged file": (damaged, "is damaged: its sha256"),
    "swapped files": (swapped, "is damaged: its sha256"),
    "manifest no JSON": (lambda e: written([(e[0][0], b"{"), *e[1:]]), "tenant.json: the whole: Invalid JSON"),
    "manifest no UTF-8": (lambda e: written([(e[0][0], b'"\xff"'), *e[1:]]), "tenant.json: the whole"),
    "other format": (changed(format="karst-tenant/2"), "tenant.json: format"),
    "field too many": (changed(keys=[]), "tenant.json: keys"),
    "task's field too many": (changed(task__owner="x"), "tenant.json: tasks.0.owner"),
    "version's field too many": (changed(version__secret="x"), "tenant.json: tasks.0.versions.0.secret"),
    "bad tenant": (changed(tenant="a:b"), "tenant.json: tenant"),
    "bad task": (changed(task__name="one:flowers"), "tenant.json: tasks.0.name"),
    "task twice": (doubled_task, "two tasks have the same name"),
    "task without versions": (changed(task__versions=[]), "tenant.json: tasks.0.versions"),
    "number too high": (changed(task__last_number=2), "not within 1 to 2"),
    "number too low": (changed(version__version=0), "not within 1 to 4"),
    "number twice": (changed(version__version=2), "same number"),
    "version's other number": (changed(version__version="x"), "tenant.json: tasks.0.versions.0.version"),
    "digest of none": (changed(version__digest="0" * 64), "is only in"),
    "digest of a path": (changed(version__digest="../../etc/passwd"), "is only in"),
    "no latest": (changed(task__aliases={"stable": {"1": 1}}, task__history={}), "no alias 'latest'"),
    "alias to nowhere": (changed(task__aliases={"latest": {"9": 1}}, task__history={}), "is not there"),
    "alias of nothing": (changed(task__aliases={"latest": {}}, task__history={}), "tenant.json: tasks.0.aliases"),
    "alias of a number": (changed(task__aliases={"latest": {"1": 1}, "7": {"1": 1}}, task__history={}), "is a number"),
    "alias with a colon": (
        changed(task__aliases={"latest": {"1": 1}, "a:b": {"1": 1}}),
        "tenant.json: tasks.0.aliases",
    ),
    "weight of nothing": (changed(task__aliases={"latest": {"1": 0}}), "tenant.json: tasks.0.aliases"),
    "history of no alias": (changed(task__history={"other": [{"1": 1}]}), "history of an alias"),
    "history too long": (changed(task__history={"stable": [{"1": 1}] * 21}), "tenant.json: tasks.0.history"),
    "shared with a path": (changed(task__sharing={"tenants": ["../x"]}), "tenant.json: tasks.0.sharing"),
    "other labels": (changed(version__labels=["a", "b", "c"]), "is not what its file says"),
    "other backbone": (changed(version__backbone="other"), "is not what its file says"),
    "other fingerprint": (changed(version__fingerprint="0" * 64), "is not what its file says"),
    "other config": (changed(version__config={}), "is not what its file says"),
    "other preprocess": (changed(version__preprocess={}), "is not what its file says"),
    "other metrics": (changed(version__metrics={"accuracy": 1.0}), "is not what its file says"),
    "other size": (changed(version__size_bytes=1), "is not what its file says"),
    "registered never": (changed(version__registered="<script>"), "tenant.json: tasks.0: Value error"),
    "registered anywhere": (changed(version__registered="2026-01-01T00:00:00"), "at no certain time"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tar_that_no_hub_made_changes_nothing(case, name) -> None:
    async def use(case: Case) -> None:
        make, message = HOSTILE[name]
        assert message in await case.refused(InvalidRequest, make(members(await case.export())))
        assert case.stored("two") == []

    case(use)
