"""Files of a dataset: which are images, and the record of the files that a reader leaves out."""

from pathlib import Path

import pytest
from PIL import Image

from adapters.data.files import OTHER, RAW, SYSTEM, LeftOut, LeftOutFiles, image_files, is_image, subfolders
from tests.support.models import png

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000")


def write(root: Path, *names: str, content: bytes | None = None) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(sum(name.encode()), size=(8, 8)) if content is None else content)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_is_an_image_by_its_first_bytes_when_it_has_no_known_suffix(tmp_path: Path, format: str) -> None:
    for name in ("photo", "photo.large", "photo.1"):
        Image.new("RGB", (16, 16)).save(tmp_path / name, format)
        assert is_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.jfif", "a.HEIC", "a.avif", "a.jp2", "a.jxl", "a.tif"])
def test_a_file_is_an_image_by_its_suffix_when_its_bytes_are_damaged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"damaged")
    assert is_image(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", b"BM and some more text, which is no bitmap"),
        ("empty", b""),
        ("table.csv", b"path,label\n"),
        ("._0.jpg", b"\0\5\x16\7"),
        (".hidden.png", b"\x89PNG\r\n\x1a\n"),
        ("raw.dng", b"II*\0 a raw camera image is a TIFF"),
        ("clip.mp4", b"\0\0\0\x18ftypmp42 a film"),
    ],
)
def test_a_file_is_no_image_when_neither_suffix_nor_bytes_say_so(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert not is_image(tmp_path / name)


def test_image_files_are_found_in_subfolders_and_the_others_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "b.png", "2023/a.png", "2023/deep/c.PNG", "2024/without_suffix")
    write(tmp_path, "._b.png", "2023/.DS_Store", "__MACOSX/._a.png", "Thumbs.db", content=b"system")
    write(tmp_path, "notes.txt", "2023/list.csv", content=b"text")
    write(tmp_path, "raw.NEF", content=b"MM\0*")
    write(tmp_path, ".cache/old.png")
    left_out = LeftOutFiles()
    found = [str(path.relative_to(tmp_path)) for path in image_files(tmp_path, left_out)]
    assert found == ["2023/a.png", "2023/deep/c.PNG", "2024/without_suffix", "b.png"]
    assert {(entry.reason, entry.count, entry.matters) for entry in left_out.found()} == {
        *((SYSTEM, 4, False), (OTHER, 2, False), (RAW, 1, True), ("hidden files", 1, False)),
    }
    assert left_out.found()[0].reason == RAW  # the entries that matter come first
    assert subfolders(tmp_path) == [tmp_path / "2023", tmp_path / "2024"]


def test_image_files_end_when_a_link_leads_to_a_parent_folder(tmp_path: Path) -> None:
    write(tmp_path / "set", "cat/0.png")
    write(tmp_path / "elsewhere", "1.png")
    (tmp_path / "set" / "cat" / "loop").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set" / "cat" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = image_files(tmp_path / "set", LeftOutFiles())
    assert sorted(path.name for path in found) == ["0.png", "1.png"]


def test_left_out_files_show_their_count_and_five_examples() -> None:
    left_out = LeftOutFiles()
    left_out.add("images of no class", [f"{i}.png" for i in range(4)], matters=True)
    left_out.add("images of no class", [f"{i}.png" for i in range(4, 8)], matters=True)
    left_out.add("nothing", [], matters=True)
    (one,) = left_out.found()
    assert str(one) == "8 images of no class: 0.png, 1.png, 2.png, 3.png, 4.png and 3 more"
    joined = LeftOutFiles()
    joined.add_all([one, LeftOut("images of no class", 1, ("z.png",), True)])
    assert [(entry.count, len(entry.examples)) for entry in joined.found()] == [(9, 5)]
