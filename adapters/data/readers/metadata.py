"""Reader of image folders with a metadata file, in the layout of Hugging Face's `datasets`.

The files are read without that library, so that a label stays as it is written.
"""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import LeftOutFiles, image_files, subfolders
from ..labels import is_missing, label_text
from ..layouts import Rows, Split, SplitRows, split_of
from .tables import load_table

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_FILE_COLUMN, _LABEL_COLUMNS = "file_name", ("label", "labels")
_PROBE_BYTES = 4096  # the start of a metadata file, where its column names are


def has_metadata(folder: Path) -> bool:
    """Return whether the folder, or a folder of one of its splits, has a metadata file."""
    return bool(_metadata_files(folder))


def read_metadata(folder: Path) -> SplitRows:
    """Read the rows of all metadata files. A file in the folder of a split belongs to that split.

    A row of the file in the folder itself belongs to the split that the first part of its path names, else to the
    training split.

    Raises:
        DataError: a file cannot be read, has no column `file_name` or `label`, or a row has no file name or label.
    """
    rows: dict[Split, Rows] = {}
    left_out = LeftOutFiles()
    listed: set[Path] = set()
    files = _metadata_files(folder)
    for path in files:
        for number, record in enumerate(_records(path)):
            where = f"{path}, row {number}"
            if is_missing(record.get(_FILE_COLUMN)):
                raise DataError(f"{where}: column {_FILE_COLUMN!r} is empty; fill it in, or remove the row")
            name = str(record[_FILE_COLUMN])
            split = split_of(path.parent.name if path.parent != folder else Path(name).parts[0])
            image = Path(os.path.normpath(path.parent / name))
            listed.add(image)
            label = label_text(record[_label_column(path, record)], where)
            rows.setdefault(split or "train", []).append((image, label))
    if not rows:
        raise DataError(f"{folder}: the metadata has no rows; expected one row per image")
    found = image_files(folder, left_out, own=files)
    unlisted = [image for image in found if Path(os.path.normpath(image)) not in listed]
    left_out.add("images that the metadata does not list", unlisted, matters=True)
    return SplitRows(rows, left_out=left_out.found())


def _metadata_files(folder: Path) -> list[Path]:
    folders = [folder, *(child for child in subfolders(folder) if split_of(child.name))]
    return [path for here in folders for name in METADATA_FILES if _has_file_names(path := here / name)]


def _has_file_names(path: Path) -> bool:
    if not path.is_file():
        return False
    if path.suffix == ".parquet":
        return True
    with path.open("rb") as file:
        return _FILE_COLUMN.encode() in file.read(_PROBE_BYTES)


def _records(path: Path) -> list[dict[str, Any]]:
    if path.suffix != ".jsonl":
        found: list[dict[str, Any]] = load_table(path).to_dict("records")
        return found
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # splitlines() would also split at U+2028 within a text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text; save it as UTF-8: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error}); expected one object per line") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: a {type(record).__name__}; expected one JSON object per line")
        records.append(record)
    return records


def _label_column(path: Path, record: dict[str, Any]) -> str:
    for name in _LABEL_COLUMNS:
        if name in record:
            return name
    raise DataError(
        f"{path}: expected a column 'label', found {', '.join(map(str, record))}; rename the column to use to 'label'"
    )
