"""Readers of class folders, alone or inside the folders of splits."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..files import BESIDE_CLASSES, SUFFIXES, LeftOutFiles, image_files, is_system, record_loose, subfolders
from ..image_set import EncodedImage, ImageSet
from ..labels import label_text, natural_sort_key
from ..layouts import Split, by_split, split_of

EMPTY = "class folders without images"
_SHOWN = 5  # names in a message


def read_folder(root: Path, labels: Sequence[str] | None = None) -> ImageSet:
    """Read a folder with one folder of images per class. Folder names are the labels, in natural order (9 before 10).

    The images of a class may lie in subfolders of its folder.

    Args:
        labels: classes of the task, if they are known already. Otherwise the folders define them.

    Raises:
        DataError: the folder does not exist, has fewer than two classes, is a folder of datasets, has a class with
            files of which none is an image, a class that is not in `labels`, or a class name that is not UTF-8.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected a folder with one folder of images per class")
    left_out = LeftOutFiles()
    images = {folder: image_files(folder, left_out) for folder in subfolders(root, left_out)}
    record_loose(root, BESIDE_CLASSES, left_out)
    empty = [folder for folder, files in images.items() if not files]
    for folder in empty:
        _refuse_without_images(folder)
        del images[folder]
    left_out.add(EMPTY, empty, matters=True)
    folders = sorted(images, key=lambda folder: natural_sort_key(folder.name))
    found = tuple(label_text(folder.name, str(folder)) for folder in folders)
    if labels is None:
        _refuse_datasets(root, images)
        if len(folders) < 2:
            raise DataError(
                f"{root}: {len(folders)} class folders with images, but a task needs at least 2; add folders of images"
                + _hint(folders, empty)
            )
    names = found if labels is None else tuple(labels)
    if unknown := [name for name in found if name not in names]:
        raise DataError(
            f"{root}: classes {', '.join(unknown)} are not among the task's labels {', '.join(names)}; "
            "rename or remove these folders"
        )
    if not folders:
        raise DataError(f"{root}: no class folders; expected one for each of {', '.join(names)}")
    sources: list[Path | EncodedImage] = []
    targets: list[int] = []
    for folder, name in zip(folders, found, strict=True):
        sources += images[folder]
        targets += [names.index(name)] * len(images[folder])
    return ImageSet(tuple(sources), tuple(targets), names, left_out.found())


def split_folders(path: Path, left_out: LeftOutFiles) -> dict[Split, Path]:
    """Return the folders `train`, `val`, `test` (or a synonym, in any case) of a folder, by split.

    Args:
        left_out: records the files of the other folders, and those outside all folders.

    Raises:
        DataError: two folders are the same split.
    """
    folders = subfolders(path, left_out)
    record_loose(path, "images outside the folders of the splits", left_out)
    for folder in folders:
        if split_of(folder.name) is None:
            reason = f"images in {folder.name}/, which is no split (train, val, test) beside the others"
            left_out.add(reason, image_files(folder, left_out), matters=True)
    return by_split(path, {folder.name: folder for folder in folders if split_of(folder.name)})


def _refuse_without_images(folder: Path) -> None:
    """Refuse a class folder that has files, but no image. An empty folder is only left out."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not is_system(path)]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if files:
        shown = ", ".join(str(path.relative_to(folder)) for path in files[:_SHOWN])
        more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
        raise DataError(
            f"{folder}: no images, only {shown}{more}; expected files that end in {', '.join(SUFFIXES)}. Convert "
            "the files, or move the folder elsewhere if it is not a class"
        )


def _refuse_datasets(root: Path, images: dict[Path, list[Path]]) -> None:
    """Refuse a folder whose folders are datasets, or may be: otherwise the datasets would become the classes."""
    sets = [folder for folder in images if any(_is_split_of_classes(child) for child in subfolders(folder))]
    nested = {folder: sorted({file.relative_to(folder).parts[0] for file in files}) for folder, files in images.items()}
    deep = all(file.parent != folder for folder, files in images.items() for file in files)
    several = [folder for folder, names in nested.items() if len(names) > 1]
    if len(images) < 2 or (not sets and not (deep and several)):
        return
    shown = ", ".join(folder.name for folder in list(images)[:_SHOWN])
    if sets:
        raise DataError(f"{root}: its folders are datasets of their own: {shown}; give one of them, such as {sets[0]}")
    inner = ", ".join(f"{several[0].name}/{name}" for name in nested[several[0]][:_SHOWN])
    raise DataError(
        f"{root}: its folders {shown} have no images of their own, only folders of images such as {inner}. If the "
        f"folders are datasets, give one of them, such as {several[0]}. If they are the classes, move the images up, "
        "or give a table with the columns path and label"
    )


def _is_split_of_classes(folder: Path) -> bool:
    return split_of(folder.name) == "train" and bool(subfolders(folder))


def _hint(folders: Sequence[Path], empty: Sequence[Path]) -> str:
    """Return further advice for a dataset with fewer than two classes."""
    if len(folders) == 1 and len(inner := subfolders(folders[0])) > 1:
        return f". {folders[0]} has the folders {', '.join(path.name for path in inner[:_SHOWN])}: give it instead"
    return f". Without images: {', '.join(path.name for path in empty[:_SHOWN])}" if empty else ""
