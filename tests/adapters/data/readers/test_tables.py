"""Tables and metadata files: labels as written, and the images that no row lists."""

import json
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from adapters import DataError
from adapters.data.datasets import read_dataset
from tests.support.models import png


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(sum(name.encode()), size=(8, 8)))


def parquet(root: Path, labels: Any) -> Path:
    write(root, *(f"{i}.png" for i in range(len(labels))))
    table = pyarrow.table({"path": [f"{i}.png" for i in range(len(labels))], "label": labels})
    pyarrow.parquet.write_table(table, root / "list.parquet")
    return root / "list.parquet"


def metadata(root: Path, labels: list[Any], kind: str) -> Path:
    write(root, *(f"{i}.png" for i in range(len(labels))))
    rows = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)]
    if kind == "jsonl":
        (root / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif kind == "csv":
        pandas.DataFrame(rows).to_csv(root / "metadata.csv", index=False)
    else:
        pandas.DataFrame(rows).to_parquet(root / "metadata.parquet")
    return root


def test_parquet_labels_are_text_when_the_column_is_binary(tmp_path: Path) -> None:
    assert read_dataset(parquet(tmp_path, pyarrow.array([b"cat", b"dog"]))).train.labels == ("cat", "dog")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["cat"], ["dog"]], r"list.parquet, row 0: label array\(\['cat'\], .* is of type ndarray"),
        ([1.0, 2.0], r"row 0: label 1.0 is a fraction; expected text or an integer"),
        (["cat", None], r"row 1: label is empty"),
        ([b"\xff", b"dog"], r"row 0: label b'\\xff' is not UTF-8"),
    ],
)
def test_read_dataset_names_the_row_when_a_parquet_label_is_no_text(
    tmp_path: Path, labels: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_dataset(parquet(tmp_path, pyarrow.array(labels)))


def test_read_dataset_counts_the_images_that_a_table_does_not_list(tmp_path: Path) -> None:
    write(tmp_path, "images/0.png", "images/1.png", "images/2.png", "images/._0.png", "elsewhere/3.png")
    (tmp_path / "list.csv").write_text("path,label,split\nimages/0.png,a,Train\nimages/1.png,b,TRAIN\n")
    with pytest.raises(DataError, match=r"split 'TRAIN' is a second train split"):
        read_dataset(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("path,label,split\nimages/0.png,a,Train\n./images/../images/1.png,b,Train\n")
    (left_out,) = read_dataset(tmp_path / "list.csv").left_out
    assert (left_out.reason, left_out.count, left_out.matters) == ("images that list.csv does not list", 1, True)
    assert left_out.examples == (str(tmp_path / "images/2.png"),)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("labels", [["007", "010"], ["NA", "EU"], ["None", "null"], ["True", "False"]])
def test_metadata_labels_stay_as_written(tmp_path: Path, kind: str, labels: list[str]) -> None:
    assert set(read_dataset(metadata(tmp_path, labels, kind)).train.labels) == set(labels)


def test_metadata_labels_may_be_integers_and_booleans_when_they_are_json(tmp_path: Path) -> None:
    assert read_dataset(metadata(tmp_path / "a", [10, 9], "jsonl")).train.labels == ("9", "10")
    assert read_dataset(metadata(tmp_path / "b", [True, False], "jsonl")).train.labels == ("False", "True")
    assert read_dataset(metadata(tmp_path / "c", ["a\u2028b", "c"], "jsonl")).train.labels == ("a\u2028b", "c")
    with pytest.raises(DataError, match=r"metadata.jsonl, row 0: label \['cat'\] is of type list"):
        read_dataset(metadata(tmp_path / "d", [["cat"], ["dog"]], "jsonl"))


def test_read_dataset_counts_the_images_that_metadata_does_not_list(tmp_path: Path) -> None:
    metadata(tmp_path, ["a", "b"], "csv")
    write(tmp_path, "8.png", "more/9.png", "__MACOSX/._0.png")
    found = {entry.reason: entry.count for entry in read_dataset(tmp_path).left_out}
    assert found == {"images that the metadata does not list": 2, "files that macOS, Windows or a NAS added": 1}


def test_metadata_rows_belong_to_the_split_that_their_paths_name(tmp_path: Path) -> None:
    write(tmp_path, "train/0.png", "Test/1.png")
    (tmp_path / "metadata.csv").write_text("file_name,labels\ntrain/0.png,a\nTest/1.png,a\n")
    splits = read_dataset(tmp_path)
    assert (len(splits.train), splits.test and len(splits.test), splits.left_out) == (1, 1, ())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,class\n0.png,x\n", r"expected a column 'label', found file_name, class; rename"),
        ("metadata.csv", "file_name,label\n,x\n", r"metadata.csv, row 0: column 'file_name' is empty"),
        ("metadata.csv", "file_name,label\n", r": the metadata has no rows; expected one row per image$"),
        ("metadata.jsonl", '{"file_name": "0.png"\n', r"metadata.jsonl, line 1: not valid JSON"),
        ("metadata.jsonl", '["file_name"]\n', r"metadata.jsonl, line 1: a list; expected one JSON object per line"),
    ],
)
def test_read_dataset_names_the_row_when_metadata_is_invalid(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    write(tmp_path, "0.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path)
