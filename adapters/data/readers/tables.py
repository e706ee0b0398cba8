"""Reader of tables: CSV and Parquet files with one row per image."""

from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import LeftOutFiles, record_unlisted
from ..labels import is_missing, label_text
from ..layouts import Rows, SplitRows, by_split


def read_table(path: Path) -> SplitRows:
    """Read a CSV or Parquet file with the columns `path`, `label` and, if there are several splits, `split`.

    Paths are relative to the file's folder.

    Raises:
        DataError: pandas is not installed, the file cannot be read, a column or value is missing, a label has no text
            (`labels.label_text`), or a split has an unknown name.
    """
    table = load_table(path)
    missing = [name for name in ("path", "label") if name not in table.columns]
    if missing:
        columns = ", ".join(map(str, table.columns))
        raise DataError(f"{path}: column {' and '.join(missing)} missing; columns found: {columns}")
    splits = table["split"] if "split" in table.columns else ["train"] * len(table)
    rows: dict[str, Rows] = {}
    for number, (name, label, split) in enumerate(zip(table["path"], table["label"], splits, strict=True)):
        where = f"{path}, row {number}"
        for column, value in (("path", name), ("split", split)):
            if is_missing(value):
                raise DataError(f"{where}: {column} is empty; fill it in, or remove the row")
        rows.setdefault(_text(split), []).append((path.parent / _text(name), label_text(label, where)))
    if not rows:
        raise DataError(f"{path}: no rows; expected one row per image")
    left_out = LeftOutFiles()
    listed = [image for part in rows.values() for image, _ in part if isinstance(image, Path)]
    record_unlisted(listed, f"images that {path.name} does not list", left_out, matters=True)
    return SplitRows(by_split(path, rows), left_out=left_out.found())


def load_table(path: Path) -> Any:
    """Return a CSV or Parquet file as a pandas table. The values of a CSV are text, exactly as in the file.

    Raises:
        DataError: pandas is not installed, or the file cannot be read.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: a table needs pandas: pip install 'karst-hub[train]'") from error
    try:
        if path.suffix == ".csv":  # read as text, otherwise label 007 would become 7 and label NA a missing value
            return pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        return pandas.read_parquet(path)
    except (ValueError, OSError) as error:  # errors of pandas and pyarrow are ValueErrors
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error


def _text(value: Any) -> str:
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)
