"""Reader of local datasets in the layouts of Hugging Face's `datasets` library. Nothing is downloaded.

Two layouts are read: the output of `save_to_disk`, and Parquet files with an image column. `metadata.py` reads image
folders with a metadata file. Images stay encoded and on disk until they are read. `datasets` copies Parquet files into
its own cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError, ImageError
from ..files import LeftOut, LeftOutFiles
from ..image_set import EncodedImage
from ..labels import label_text
from ..layouts import Rows, SplitRows, by_split, split_of

PARQUET_FOLDERS = (".", "data")  # folders of the shards: `train.parquet`, `data/train-00000-of-00002.parquet`


def is_local_dataset(source: Path) -> bool:
    """Return whether `read_local_dataset` can read this folder or Parquet file."""
    if source.is_file():
        return source.suffix == ".parquet" and _has_images(source)
    return _is_saved(source) or bool(_shards(source))


def read_local_dataset(source: Path) -> SplitRows:
    """Return the rows of each split, with the class names of a `ClassLabel` column. A single split may have any name.

    Raises:
        DataError: `datasets` is not installed or cannot read the dataset, the image or label column is missing or
            ambiguous, the columns of the splits differ, or a row has no label.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(f"{source}: this dataset needs datasets: pip install 'karst-hub[train]'") from error
    try:
        with _quiet(datasets):
            loaded = _load(datasets, source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: datasets cannot read it: {error}") from error
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    features = {name: part.features for name, part in splits.items()}
    first, *others = features.values()
    if any(other != first for other in others):
        raise DataError(
            f"{source}: the columns of the splits {', '.join(splits)} differ; save all splits with the same columns"
        )
    image = _image_column(datasets, source, first)
    label = _label_column(datasets, source, first)
    names = None
    if isinstance(first[label], datasets.ClassLabel):
        names = tuple(label_text(name, f"{source}, column {label!r}") for name in first[label].names)
    rows = {name: _rows(datasets, source, name, part, image, label, names) for name, part in splits.items()}
    if len(rows) == 1:
        rows = {split_of(name) or "train": part for name, part in rows.items()}
    return SplitRows(by_split(source, rows), names, _left_out(source))


def _load(datasets: Any, source: Path) -> Any:
    if source.is_dir() and _is_saved(source):
        return datasets.load_from_disk(str(source))
    shards = {"train": [source]} if source.is_file() else _shards(source)
    files = {name: [str(path) for path in paths] for name, paths in shards.items()}
    return datasets.load_dataset("parquet", data_files=files)


def _rows(
    datasets: Any, source: Path, split: str, part: Any, image: str, label: str, names: tuple[str, ...] | None
) -> Rows:
    encoded = part.select_columns([image])
    if isinstance(part.features[image], datasets.Image):
        encoded = encoded.cast_column(image, datasets.Image(decode=False))
    rows: Rows = []
    for i, value in enumerate(part[label][:]):
        name = f"{source} ({split}, row {i})"
        if names is not None and (value is None or not 0 <= value < len(names)):
            # -1 marks a test label that is not published.
            raise DataError(f"{name}: column {label!r} is {value}; add the label, or remove the row")
        rows.append(
            (EncodedImage(name, _RowReader(encoded, image, i)), label_text(names[value] if names else value, name))
        )
    return rows


class _RowReader:
    """Reader of one row's image bytes."""

    def __init__(self, encoded: Any, column: str, index: int) -> None:
        self._encoded, self._column, self._index = encoded, column, index

    def __call__(self) -> bytes:
        value = self._encoded[self._index][self._column]
        if value is None:
            raise ImageError(f"column {self._column!r} is empty; add the image, or remove the row")
        data: bytes | None = value["bytes"]
        return data if data is not None else Path(value["path"]).read_bytes()


def _image_column(datasets: Any, source: Path, features: Any) -> str:
    def holds_images(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})

    return _single_column(
        source, "image", [name for name, feature in features.items() if holds_images(feature)], features
    )


def _label_column(datasets: Any, source: Path, features: Any) -> str:
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [name for name in ("label", "labels") if name in features]
    return _single_column(source, "label", classes or plain, features)


def _single_column(source: Path, wanted: str, candidates: list[str], features: Any) -> str:
    if len(candidates) > 1 and wanted in candidates:
        return wanted
    if len(candidates) != 1:
        raise DataError(
            f"{source}: expected one column of {wanted}s, found {', '.join(candidates) or 'none'} among "
            f"{', '.join(features)}; rename the column to use to {wanted!r}"
        )
    return candidates[0]


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _shards(folder: Path) -> dict[str, list[Path]]:
    """Return the Parquet files by split, the first word of their names: `train-00000-of-00002.parquet` is `train`."""
    shards: dict[str, list[Path]] = {}
    for part in PARQUET_FOLDERS:
        for path in sorted((folder / part).glob("*.parquet")):
            shards.setdefault(path.stem.split("-")[0], []).append(path)
    return shards


def _left_out(source: Path) -> tuple[LeftOut, ...]:
    """Return the Parquet files of a folder that are in none of the folders of the shards."""
    left_out = LeftOutFiles()
    if source.is_dir() and not _is_saved(source):
        read = {path for shards in _shards(source).values() for path in shards}
        others = [path for path in sorted(source.rglob("*.parquet")) if path not in read]
        left_out.add("Parquet files outside the folder and its data/", others, matters=True)
    return left_out.found()


def _has_images(path: Path) -> bool:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: Parquet needs pyarrow: pip install 'karst-hub[train]'") from error
    try:
        schema = pyarrow.parquet.read_schema(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    return any(pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0 for field in schema)


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Disable the progress bars of `datasets` and its download counts, which would need a network."""
    were_disabled, counts = datasets.are_progress_bars_disabled(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if not were_disabled:
            datasets.enable_progress_bars()
