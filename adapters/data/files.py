"""Files of a dataset's folders: which of them are images, and a record of those that a reader leaves out."""

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from .formats.refusals import brands_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # named in messages
# Formats that phones and tools write. A reader takes them too: the decoder reads each one, or names it in its refusal.
_OTHER_SUFFIXES = (".jpe", ".jfif", ".apng", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl")
_RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")
_SYSTEM_FILES = {".ds_store", "thumbs.db", "desktop.ini", "ehthumbs.db"}
_SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information"}
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # sizes, in bytes
_EXAMPLES = 5

SYSTEM = "files that macOS, Windows or a NAS added"
HIDDEN = "hidden files"
OTHER = "files that are not images"
RAW = "raw camera images, which are not read; export them as JPEG or PNG"
BESIDE_CLASSES = "images outside the class folders"


@dataclass(frozen=True)
class LeftOut:
    """Files of a dataset that its reader did not take, for one reason.

    Attributes:
        reason: a noun phrase in the plural.
        count: number of files.
        examples: paths of the first files.
        matters: whether a user may miss the files: images, or a class without images.
    """

    reason: str
    count: int
    examples: tuple[str, ...]
    matters: bool

    def __str__(self) -> str:
        more = f" and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
        return f"{self.count} {self.reason}: {', '.join(self.examples)}{more}"


class LeftOutFiles:
    """Collector of the files that a reader leaves out."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, bool], int] = {}
        self._examples: dict[tuple[str, bool], list[str]] = {}

    def add(self, reason: str, files: Collection[Path | str], *, matters: bool, count: int | None = None) -> None:
        """Record files with the reason why the reader leaves them out.

        Args:
            matters: as in `LeftOut`.
            count: number of files, if `files` are only examples.
        """
        key = reason, matters
        self._counts[key] = self._counts.get(key, 0) + (len(files) if count is None else count)
        examples = self._examples.setdefault(key, [])
        examples += [str(file) for file in files][: _EXAMPLES - len(examples)]

    def add_all(self, found: Iterable[LeftOut]) -> None:
        """Record the files that another reader left out."""
        for one in found:
            self.add(one.reason, one.examples, matters=one.matters, count=one.count)

    def found(self) -> tuple[LeftOut, ...]:
        """Return one entry per reason, those that matter first."""
        entries = [LeftOut(key[0], n, tuple(self._examples[key]), key[1]) for key, n in self._counts.items() if n]
        return tuple(sorted(entries, key=lambda entry: not entry.matters))


def image_files(
    folder: Path, left_out: LeftOutFiles, *, recursive: bool = True, own: Collection[Path] = ()
) -> list[Path]:
    """Return the image files of a folder in the order of their paths. Record its other files.

    Args:
        recursive: also search the subfolders, and the folders that symbolic links name.
        own: files of the layout itself, which are neither returned nor recorded.
    """
    images: list[Path] = []
    pending, seen = [folder], set()
    while pending:
        here = pending.pop()
        if (real := os.path.realpath(here)) in seen:  # a link to a parent folder; otherwise the search would not end
            continue
        seen.add(real)
        with os.scandir(here) as entries:
            names = sorted(entry.name for entry in entries if not entry.is_dir())
        for path in (here / name for name in names):
            if is_image(path):
                images.append(path)
            elif path not in own:
                reason, matters = _why_not(path)
                left_out.add(reason, [path], matters=matters)
        if recursive:
            pending += reversed(subfolders(here, left_out))
    return sorted(images)


def record_loose(folder: Path, reason: str, left_out: LeftOutFiles) -> None:
    """Record all files that lie directly in a folder; `reason` is that of the images."""
    left_out.add(reason, image_files(folder, left_out, recursive=False), matters=True)


def record_unlisted(listed: Iterable[Path], reason: str, left_out: LeftOutFiles, *, matters: bool) -> None:
    """Record the images that lie beside listed images, in the same folders, and that are not listed."""
    known = {os.path.normpath(path) for path in listed}
    folders = sorted({os.path.dirname(path) for path in known})
    for folder in filter(os.path.isdir, folders):
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.is_dir())
        paths = [Path(folder) / name for name in names if os.path.normpath(os.path.join(folder, name)) not in known]
        left_out.add(reason, [path for path in paths if is_image(path)], matters=matters)


def subfolders(folder: Path, left_out: LeftOutFiles | None = None) -> list[Path]:
    """Return the folders in a folder, by name, except hidden ones and those of an operating system.

    Args:
        left_out: records the files of the other folders.
    """
    found = []
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    for path in (folder / name for name in names):
        if not is_system(path) and not path.name.startswith("."):
            found.append(path)
        elif left_out is not None:
            files = [Path(here) / name for here, _, names in os.walk(path) for name in names]
            left_out.add(SYSTEM if is_system(path) else HIDDEN, sorted(files), matters=False)
    return found


def has_images(folder: Path) -> bool:
    """Return whether an image lies directly in the folder."""
    return any(path.is_file() and is_image(path) for path in folder.iterdir())


def is_system(path: Path) -> bool:
    """Return whether an operating system or a NAS added the file or folder, such as `._0.jpg` and `__MACOSX`."""
    return is_system_name(path.name)


def is_system_name(name: str) -> bool:
    """Return whether operating systems give this name to a file or folder that they add."""
    name = name.casefold()
    return name in _SYSTEM_FILES or name in _SYSTEM_FOLDERS or name.startswith("._")


def is_image(path: Path) -> bool:
    """Return whether a file is an image, by its suffix, or by its first bytes if the suffix is unknown."""
    if is_system(path) or path.name.startswith("."):
        return False
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or suffix in _OTHER_SUFFIXES:
        return True
    return suffix not in _RAW_SUFFIXES and path.is_file() and _starts_like_an_image(path)


def _why_not(path: Path) -> tuple[str, bool]:
    """Return the reason why a file is not taken, and whether that matters."""
    if is_system(path):
        return SYSTEM, False
    if path.name.startswith("."):
        return HIDDEN, False
    return (RAW, True) if path.suffix.lower() in _RAW_SUFFIXES else (OTHER, False)


def _starts_like_an_image(path: Path) -> bool:
    """Return whether the first bytes are those of JPEG, PNG, GIF, WebP, BMP, TIFF, HEIF, AVIF or JPEG 2000."""
    try:
        with path.open("rb") as file:
            start = file.read(18)
    except OSError:
        return False
    return (
        start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[:2] == b"BM" and len(start) == 18 and start[14] in _BMP_HEADERS and not any(start[15:18]))
        or not brands_of(start).isdisjoint({"AVIF", "HEIC"})
        or start.startswith(b"\0\0\0\x0cjP  \r\n\x87\n")
    )
