"""Refusals of layouts that are known and not read: each by its name, with what to do."""

from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from ..files import subfolders
from ..layouts import split_of

_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
_COCO_NAMES = ("*_annotations.coco.json", "instances_*.json", "captions_*.json", "person_keypoints_*.json")
_BOXES = "whose labels belong to boxes and not to images"
_REMEDY = (
    "export it as class folders (Roboflow: Folder Structure; FiftyOne: ImageClassificationDirectoryTree), or give a "
    "table with the columns path and label"
)


def refuse_foreign(path: Path) -> None:
    """Refuse an archive, or an export in the layout of an object detector.

    Raises:
        DataError: with the name of the layout, and what to do.
    """
    if path.is_file():
        if path.suffix.lower() in _ARCHIVES:
            raise DataError(f"{path}: an archive; unpack it, and give the folder")
        if path.suffix.lower() == ".json" and _is_coco(path):
            raise DataError(f"{path}: a COCO export, {_BOXES}; {_REMEDY}")
        return
    for layout, found, reason in _exports(path):
        raise DataError(f"{path}: {layout} ({found.relative_to(path)}), {reason}; {_REMEDY}")


def _exports(path: Path) -> Iterator[tuple[str, Path, str]]:
    """Yield (layout, the file or folder that shows it, why it is not read)."""
    parts = [path, *(folder for folder in subfolders(path) if split_of(folder.name))]
    for part in [*parts, path / "annotations"]:
        yield from (("a COCO export", found, _BOXES) for name in _COCO_NAMES for found in sorted(part.glob(name)))
    for part in parts:
        yield from (("a Create ML export", found, _BOXES) for found in sorted(part.glob("*.createml.json")))
        if (part / "images").is_dir() and next((part / "labels").rglob("*.txt"), None) is not None:
            yield "a YOLO export", part / "labels", _BOXES
        if (part / "JPEGImages").is_dir() and (part / "Annotations").is_dir():
            yield "a Pascal VOC export", part / "Annotations", _BOXES
        yield from (("TensorFlow records", found, "which are not read") for found in sorted(part.glob("*.tfrecord*")))


def _is_coco(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(1 << 16)
    return b'"images"' in start and (b'"annotations"' in start or b'"categories"' in start or b'"file_name"' in start)
