"""Hostile and unusual zips: bombs, nesting, links, paths, a million entries, damage."""

import io
import stat
import struct
import tracemalloc
import zipfile
from collections.abc import Callable

import pytest

from hub.errors import HubError, InvalidImage, InvalidRequest, TooLarge
from hub.services.datasets.zip_folders import MAX_ENTRIES, STEP_ENTRIES, ZipEntry, ZipFolders
from tests.support.models import png
from tests.support.zips import zip_of

MAX_IMAGE_BYTES = 200_000


def opened(data: bytes) -> ZipFolders:
    return ZipFolders(io.BytesIO(data), max_image_bytes=MAX_IMAGE_BYTES)


def listed(zipped: ZipFolders) -> list[ZipEntry]:
    return [entry for step in zipped.entries() for entry in step]


def read_all(data: bytes) -> dict[str, bytes | str]:
    """Return the bytes or the refusal of each entry."""
    zipped = opened(data)
    found: dict[str, bytes | str] = {}
    for entry in listed(zipped):
        try:
            found[entry.name] = zipped.read(entry)
        except InvalidImage as error:
            found[entry.name] = error.errors[0].message
    return found


def entries(data: bytes) -> dict[str, ZipEntry]:
    return {entry.name: entry for entry in listed(opened(data))}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_entries_have_their_bytes_and_the_labels_of_their_folders(compression: int) -> None:
    data = zip_of({"a/b/1.png": png(1), "2.png": png(2), "c\\3.png": png(3)}, compression=compression)
    assert read_all(data) == {"a/b/1.png": png(1), "2.png": png(2), "c/3.png": png(3)}
    assert [entry.label for entry in listed(opened(data))] == ["b", None, "c"]


def test_a_name_without_the_utf8_flag_and_a_decomposed_name_are_read() -> None:
    data = zip_of({"u\u0308ber/1.png": png(1)})
    without_flag = data.replace(struct.pack("<H", 1 << 11), b"\0\0")
    for zipped in (data, without_flag):
        assert [entry.label for entry in listed(opened(zipped))] == ["\u00fcber"]


@pytest.mark.parametrize("path", ["/etc/1.png", "../1.png", "a/../../1.png", "C:/1.png", "..\\..\\1.png"])
def test_a_path_out_of_the_zip_is_refused_by_name(path: str) -> None:
    found = read_all(zip_of({path: png(1), "a/2.png": png(2)}))
    assert found.pop("a/2.png") == png(2)
    assert "leads out of the zip" in str(found.popitem()[1])


def test_a_link_is_refused_by_name() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        link = zipfile.ZipInfo("a/passwd.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        written.writestr(link, "/etc/passwd")
    assert "a link" in str(read_all(buffer.getvalue())["a/passwd.png"])


def test_an_archive_inside_is_refused_by_name() -> None:
    assert "an archive inside" in str(read_all(zip_of({"a/more.zip": zip_of({"1.png": png(1)})}))["a/more.zip"])


def test_a_bomb_is_refused_before_it_expands() -> None:
    data = zip_of({"a/bomb.png": bytes(50_000_000)})
    tracemalloc.start()
    found = read_all(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "which no image does" in str(found["a/bomb.png"])
    assert peak < 5_000_000


def test_an_entry_that_lies_about_its_size_is_cut_at_that_size() -> None:
    data = zip_of({"a/1.png": bytes(500_000)})
    claimed = data.replace(struct.pack("<I", 500_000), struct.pack("<I", 1000))
    assert "damaged" in str(read_all(claimed)["a/1.png"])


def test_an_entry_over_the_limit_of_an_image_is_refused() -> None:
    data = zip_of({"a/1.png": png(1, (300, 300))}, compression=zipfile.ZIP_STORED)
    assert f"limit {MAX_IMAGE_BYTES}" in str(read_all(data)["a/1.png"])


def test_a_path_of_very_many_folders_is_refused_by_name() -> None:
    found = read_all(zip_of({"a/" * 20_000 + ".hidden": b"x", "a/" * 32 + "1.png": png(1)}))
    refusal, image = found.values()
    assert "more than 32 folders" in str(refusal)
    assert image == png(1)


def test_a_directory_is_read_in_steps_when_its_entries_are_left_out() -> None:
    zipped = opened(zip_of({f"a/.{n}": b"" for n in range(2 * STEP_ENTRIES + 1)} | {"a/1.png": png(1)}))
    assert [len(step) for step in zipped.entries()] == [0, 0, 1]


def test_a_million_entries_are_refused_without_memory_for_them() -> None:
    entry = b"PK\x01\x02" + bytes(42)
    directory = entry * 1_000_000
    end = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 10, 10, len(directory), 0, 0)
    with pytest.raises(TooLarge, match="entries"):
        listed(opened(directory + end))
    honest = b"PK\x06\x06" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, 10**6, 10**6, len(directory), 0)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, len(directory), 1)
    full = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with pytest.raises(TooLarge, match=f"1000000 entries .limit {MAX_ENTRIES}"):
        listed(opened(directory + honest + locator + full))


def test_entries_that_share_their_bytes_are_refused() -> None:
    data = zip_of({f"a/{i}.png": png(1) for i in range(3)}, compression=zipfile.ZIP_STORED)
    start = data.index(b"PK\x01\x02")
    directory = data[start : data.index(b"PK\x05\x06")]
    many = directory * 10
    end = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 30, 30, len(many), start, 0)
    with pytest.raises(InvalidRequest, match="share the same bytes"):
        listed(opened(data[:start] + many + end))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a zip" * 100,
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[200:],
        lambda data: data.replace(b"PK\x01\x02", b"PK\x01\x09"),
    ],
)
def test_a_damaged_zip_is_refused_as_a_whole(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(HubError):
        listed(opened(damage(zip_of({"a/1.png": png(1), "a/2.png": png(2)}))))


def test_a_flipped_byte_is_found_by_the_checksum() -> None:
    data = bytearray(zip_of({"a/1.png": png(1)}, compression=zipfile.ZIP_STORED))
    data[500] ^= 1
    assert "checksum differs" in str(read_all(bytes(data))["a/1.png"])


def test_an_encrypted_entry_and_a_bad_folder_name_are_refused_by_name() -> None:
    data = zip_of({"a/1.png": png(1)})
    encrypted = data.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")
    assert "encrypted" in str(read_all(encrypted)["a/1.png"])
    assert "300 characters" in next(iter(str(x) for x in read_all(zip_of({"x" * 300 + "/1.png": png(1)})).values()))
