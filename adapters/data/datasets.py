"""Where labelled images come from: every layout that `karst-hub train` reads, brought to image sets.

Only lists are read here; images are opened later, and `checks.py` looks for problems in them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from . import huggingface as hf
from .huggingface import Rows
from .images import DataError, Encoded, ImageSet, natural, read_folder

KINDS = """a folder with a folder of images for each class, or such folders inside train/ and optionally val/ and test/
a .csv or .parquet file with the columns path and label, and optionally split
a VTAB-1K folder with train800.txt, val200.txt, train800val200.txt and test.txt
a few-shot folder with annotations/train_meta.list.num_shot_K.seed_S, val_meta.list and test_meta.list
a local set of Hugging Face's datasets: saved with save_to_disk, Parquet files, or images with a metadata file"""

Kind = Literal["folder", "split folders", "table", "vtab", "few-shot", "datasets"]
Part = Literal["train", "validation", "test"]

PARTS: Mapping[str, Part] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
VTAB: Mapping[Part, str] = {"train": "train800.txt", "validation": "val200.txt", "test": "test.txt"}
VTAB_FINAL = "train800val200.txt"
FEW_SHOT = re.compile(r"train_meta\.list\.num_shot_(\d+)\.seed_(\d+)")
FEW_SHOT_HELD: Mapping[Part, str] = {"validation": "val_meta.list", "test": "test_meta.list"}


@dataclass(frozen=True)
class Splits:
    """A task's images; every part has the same labels.

    Attributes:
        published: the parts are a benchmark's own lists, which are not to be changed.
    """

    train: ImageSet
    validation: ImageSet | None = None
    test: ImageSet | None = None
    published: bool = False

    def parts(self) -> dict[Part, ImageSet]:
        """What is there, training first."""
        found: dict[Part, ImageSet | None] = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: images for name, images in found.items() if images is not None}

    def with_part(self, part: Literal["validation", "test"], images: ImageSet) -> "Splits":
        """The same with another validation or test set; what is made of several sets is no published list."""
        changed = replace(self, validation=images) if part == "validation" else replace(self, test=images)
        return replace(changed, published=False)


def read(source: Path, *, shots: int | None = None, seed: int = 0, final: bool = False) -> Splits:
    """The lists of a local set, its kind recognised by what is there (`KINDS`).

    Args:
        shots, seed: which training list of a few-shot folder.
        final: train on VTAB-1K's train800val200 without validation, the protocol's last run.

    Raises:
        DataError: nothing there, nothing of a known kind, a list with a line that cannot be read, or an option of
            another kind.
    """
    kind = recognise(source)
    if final and kind != "vtab":
        raise DataError(f"{source}: a final run is for VTAB-1K lists, and this is no folder with {VTAB['train']}")
    if shots is None and kind == "few-shot":
        raise DataError(f"{source}: say which few-shot list (--shots, --split-seed): {_shots_there(source) or 'none'}")
    if shots is not None and kind != "few-shot":
        raise DataError(
            f"{source}: shots are for few-shot lists, and this is no folder with annotations/train_meta.list.*"
        )
    if kind == "folder":
        return Splits(read_folder(source))
    if kind == "split folders":
        folders = _split_folders(source)
        train = read_folder(folders["train"])
        held = {part: read_folder(folders[part], train.labels) for part in ("validation", "test") if part in folders}
        return Splits(train, held.get("validation"), held.get("test"))
    rows, names = _lists(source, kind, shots=shots, seed=seed, final=final)
    labels = names or tuple(sorted({label for part in rows.values() for _, label in part}, key=natural))
    if final:
        rows.pop("validation", None)  # its images are among the training images
    if "train" not in rows:
        missing = f"; expected {VTAB_FINAL if final else VTAB['train']}" if kind == "vtab" else ""
        raise DataError(f"{source}: no training images, only {', '.join(rows) or 'nothing'}{missing}")
    sets = {part: _image_set(source, part_rows, labels) for part, part_rows in rows.items()}
    return Splits(sets["train"], sets.get("validation"), sets.get("test"), published=kind in ("vtab", "few-shot"))


def read_part(source: Path, part: Literal["validation", "test"], labels: Sequence[str]) -> ImageSet:
    """One more set of images for a task whose labels are known, of any kind that `read` knows.

    Of a set with splits, its own validation or test images; of one without, all images.

    Raises:
        DataError: as `read`, or a label that is not among `labels`, or no such part.
    """
    kind = recognise(source)
    if kind == "folder":
        return read_folder(source, labels)
    if kind == "split folders":
        folders = _split_folders(source)
        return read_folder(_pick(source, part, folders), labels)
    rows, _ = _lists(source, kind)
    return _image_set(source, _pick(source, part, rows), labels)


def recognise(source: Path) -> Kind:
    """The kind of a set, by what is there.

    Raises:
        DataError: nothing is there, or nothing of a known kind.
    """
    if source.is_file():
        if source.suffix == ".parquet":
            return "datasets" if hf.is_local_set(source) else "table"
        if source.suffix == ".csv":
            return "table"
    elif source.is_dir():
        if any((source / name).is_file() for name in (VTAB["train"], VTAB_FINAL)):
            return "vtab"
        if _shots_there(source) or any((source / "annotations" / name).is_file() for name in FEW_SHOT_HELD.values()):
            return "few-shot"
        if hf.is_local_set(source):
            return "datasets"
        if (source / "train").is_dir() and _has_folders(source / "train"):
            return "split folders"
        if _has_folders(source):
            return "folder"
    else:
        raise DataError(f"{source}: no such folder or file; images are read from this machine only")
    raise DataError(
        f"{source}: no set of images that is known here; expected one of:\n" + _indented(KINDS.splitlines())
    )


def _lists(
    source: Path, kind: Kind, *, shots: int | None = None, seed: int = 0, final: bool = False
) -> tuple[dict[Part, Rows], tuple[str, ...] | None]:
    if kind == "vtab":
        return _vtab(source, final), None
    if kind == "few-shot":
        return _few_shot(source, shots, seed), None
    if kind == "table":
        return _table(source), None
    found, names = hf.read_local_set(source)
    if len(found) == 1:
        return {PARTS.get(next(iter(found)), "train"): next(iter(found.values()))}, names
    return _by_part(source, found), names


def _vtab(folder: Path, final: bool) -> dict[Part, Rows]:
    """VTAB-1K as its users keep it: one folder a data set, the lists beside `images/` (google-research/task_adaptation,
    in the form of the SSF and NOAH repositories)."""
    lists: dict[Part, str] = {**VTAB, **({"train": VTAB_FINAL} if final else {})}
    return {part: _list_file(folder / name, [folder]) for part, name in lists.items() if (folder / name).is_file()}


def _few_shot(folder: Path, shots: int | None, seed: int) -> dict[Part, Rows]:
    """The few-shot lists of NOAH (github.com/ZhangYuanhan-AI/NOAH, data/few-shot): no folder in them but that of
    the images, which each data set keeps elsewhere."""
    annotations = folder / "annotations"
    files = {part: annotations / name for part, name in FEW_SHOT_HELD.items() if (annotations / name).is_file()}
    if shots is not None:
        files["train"] = annotations / f"train_meta.list.num_shot_{shots}.seed_{seed}"
        if not files["train"].is_file():
            raise DataError(f"{files['train']}: no such list; {_shots_there(folder) or 'no training lists'} are there")
    roots = [folder, folder / "images", folder / "jpg"]
    if folder.parent.name == "few-shot_split":  # lists kept apart: FGFS/few-shot_split/<set>, images in FGFS/<set>
        roots.append(folder.parent.parent / folder.name)
    return {part: _list_file(path, roots) for part, path in files.items()}


def _shots_there(folder: Path) -> str:
    """The training lists of a few-shot folder, for messages; empty if there are none."""
    found = sorted((int(m[1]), int(m[2])) for p in folder.glob("annotations/*") if (m := FEW_SHOT.fullmatch(p.name)))
    return ", ".join(f"{shots} shots with seed {seed}" for shots, seed in found)


def _list_file(path: Path, roots: Sequence[Path]) -> Rows:
    """Lines `path label`; a path may hold spaces. Its root is the first of `roots` that has one of the images."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    named: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not re.fullmatch(r"\d+", label):
            raise DataError(
                f"{path}, line {number}: expected a path, a space and the number of a class, found {line!r}"
            )
        named.append((name, str(int(label))))
    if not named:
        raise DataError(f"{path}: no lines in it; expected a path and a label on each")
    root = next((root for root in roots if any((root / name).is_file() for name, _ in named[:100])), None)
    if root is None:
        looked = ", ".join(str(root) for root in roots)
        raise DataError(f"{path}: {named[0][0]} and the others it lists are not in {looked}")
    return [(root / name, label) for name, label in named]


def _table(path: Path) -> dict[Part, Rows]:
    """A CSV or Parquet file: `path` from the file's folder on, `label`, and `split` if there are several parts."""
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: a table needs pandas: pip install 'karst-hub[train]'") from error
    try:
        if path.suffix == ".csv":  # as text: label 007 is not 7, and NA is a label like others
            table = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        else:
            table = pandas.read_parquet(path)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error
    missing = [name for name in ("path", "label") if name not in table.columns]
    if missing:
        raise DataError(f"{path}: no column {' and no '.join(missing)} among {', '.join(map(str, table.columns))}")
    splits = table["split"] if "split" in table.columns else ["train"] * len(table)
    found: dict[str, Rows] = {}
    for row, (name, label, split) in enumerate(zip(table["path"], table["label"], splits, strict=True)):
        for column, value in (("path", name), ("label", label), ("split", split)):
            if _is_missing(value):
                raise DataError(f"{path}, row {row}: {column} is empty")
        if isinstance(label, float):
            raise DataError(f"{path}, row {row}: label {label} is a number with a fraction; expected text or integers")
        found.setdefault(str(split), []).append((path.parent / str(name), str(label)))
    if not found:
        raise DataError(f"{path}: no rows in it")
    return _by_part(path, found)


def _is_missing(value: Any) -> bool:
    return value is None or value != value or str(value) in ("", "<NA>")


def _by_part(source: Path, found: Mapping[str, Any]) -> dict[Part, Any]:
    """Splits by what they are for; `val`, `valid` and `validation` are one."""
    parts: dict[Part, Any] = {}
    for name, value in found.items():
        part = PARTS.get(name)
        if part is None or part in parts:
            why = "stands for a part that is there already" if part else f"is none of {', '.join(PARTS)}"
            raise DataError(f"{source}: split {name!r} {why}")
        parts[part] = value
    return parts


def _split_folders(source: Path) -> dict[Part, Path]:
    return _by_part(source, {p.name: p for p in sorted(source.iterdir()) if p.is_dir() and p.name in PARTS})


def _pick(source: Path, part: Part, parts: Mapping[Part, Any]) -> Any:
    if part in parts:
        return parts[part]
    if set(parts) == {"train"}:
        return parts["train"]
    raise DataError(f"{source}: has no {part} images, only {', '.join(parts)}")


def _image_set(source: Path, rows: Iterable[tuple[Path | Encoded, str]], labels: Sequence[str]) -> ImageSet:
    index = {label: i for i, label in enumerate(labels)}
    rows = list(rows)
    unknown = sorted({label for _, label in rows} - set(index), key=natural)
    if unknown:
        raise DataError(f"{source}: labels {', '.join(unknown)} are not among the task's labels {', '.join(labels)}")
    return ImageSet(tuple(image for image, _ in rows), tuple(index[label] for _, label in rows), tuple(labels))


def _has_folders(folder: Path) -> bool:
    return any(p.is_dir() and not p.name.startswith(".") for p in folder.iterdir())


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)
