"""Readers of the lists of benchmarks: VTAB-1K and few-shot."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from ..files import LeftOutFiles, record_unlisted
from ..labels import label_text
from ..layouts import Rows, Split, SplitRows

VTAB_LISTS: Mapping[Split, str] = {"train": "train800.txt", "validation": "val200.txt", "test": "test.txt"}
VTAB_FINAL_LIST = "train800val200.txt"
FEW_SHOT_TRAIN_LIST = re.compile(r"train_meta\.list\.num_shot_(\d+)\.seed_(\d+)")
FEW_SHOT_LISTS: Mapping[Split, str] = {"validation": "val_meta.list", "test": "test_meta.list"}
_ROOT_PROBES = 100  # paths of a list that are looked up to find the folder of its images


def read_vtab(folder: Path, final: bool) -> SplitRows:
    """Read the lists of a VTAB-1K data set.

    One folder per data set, with the lists beside `images/`: google-research/task_adaptation in the form of the SSF
    and NOAH repositories.

    Args:
        final: read train800val200.txt as the training list.

    Raises:
        DataError: a list cannot be read.
    """
    lists: dict[Split, str] = {**VTAB_LISTS, **({"train": VTAB_FINAL_LIST} if final else {})}
    return _taken(
        {split: _read_list(folder / name, [folder]) for split, name in lists.items() if (folder / name).is_file()}
    )


def read_few_shot(folder: Path, shots: int | None, seed: int) -> SplitRows:
    """Read the few-shot lists of NOAH (github.com/ZhangYuanhan-AI/NOAH, data/few-shot).

    The paths in these lists omit the folder of the images, which differs between data sets.

    Args:
        shots, seed: select the training list; without `shots` only the other lists are read.

    Raises:
        DataError: the training list does not exist, or a list cannot be read.
    """
    annotations = folder / "annotations"
    files = {split: annotations / name for split, name in FEW_SHOT_LISTS.items() if (annotations / name).is_file()}
    if shots is not None:
        files["train"] = annotations / f"train_meta.list.num_shot_{shots}.seed_{seed}"
        if not files["train"].is_file():
            raise DataError(
                f"{files['train']}: no such list; available: {few_shot_lists(folder) or 'no training lists'}"
            )
    roots = [folder, folder / "images", folder / "jpg"]
    if folder.parent.name == "few-shot_split":  # lists in FGFS/few-shot_split/<set>, images in FGFS/<set>
        roots.append(folder.parent.parent / folder.name)
    return _taken({split: _read_list(path, roots) for split, path in files.items()})


def few_shot_lists(folder: Path) -> str:
    """Return the training lists of a few-shot folder as text for messages; empty if there are none."""
    matches = [m for p in folder.glob("annotations/*") if (m := FEW_SHOT_TRAIN_LIST.fullmatch(p.name))]
    return ", ".join(
        f"{shots} shots with seed {seed}" for shots, seed in sorted((int(m[1]), int(m[2])) for m in matches)
    )


def _taken(rows: dict[Split, Rows]) -> SplitRows:
    """Return the rows, and the images beside theirs: a benchmark selects from a larger dataset."""
    left_out = LeftOutFiles()
    listed = (image for split in rows.values() for image, _ in split if isinstance(image, Path))
    record_unlisted(listed, "images that the lists do not name", left_out, matters=False)
    return SplitRows(rows, left_out=left_out.found())


def _read_list(path: Path, roots: Sequence[Path]) -> Rows:
    """Read lines `path label`. Paths may contain spaces. Their root is the first of `roots` with one of the images."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text; save it as UTF-8: {error}") from error
    rows: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not re.fullmatch(r"[0-9]{1,18}", label):
            raise DataError(f"{path}, line {number}: expected a path, a space and a class number, found {line!r}")
        rows.append((name, label_text(int(label), f"{path}, line {number}")))
    if not rows:
        raise DataError(f"{path}: no lines; expected a path and a class number per line")
    root = next((root for root in roots if any((root / name).is_file() for name, _ in rows[:_ROOT_PROBES])), None)
    if root is None:
        raise DataError(
            f"{path}: no image found for {rows[0][0]} and the paths after it; put the images into "
            f"{' or '.join(map(str, roots))}"
        )
    return [(root / name, label) for name, label in rows]
