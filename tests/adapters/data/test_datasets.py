"""Dataset layouts: each gives the same image sets; errors name what does not fit."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from adapters import DataError
from adapters.data.datasets import DatasetSplits, read_dataset, read_split
from adapters.data.image_set import EncodedImage, ImageSet
from adapters.data.images import decode_image
from tests.support.image_sets import image_file
from tests.support.models import png


def write(root: Path, *names: str) -> None:
    """Write a valid image to each path; its pixels depend on the name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(sum(name.encode()), size=(8, 8)))


def names(images: ImageSet | None, root: Path) -> list[tuple[str, str]]:
    """Decode all images; return their paths below root, and their labels."""
    assert images is not None
    assert all(decode_image(images.read(i)).size == (8, 8) for i in range(len(images)))
    return [
        (str(image_file(images, i).relative_to(root)), images.labels[target]) for i, target in enumerate(images.targets)
    ]


def row_labels(images: ImageSet | None) -> list[str]:
    """Decode images that are rows of a table; return their labels."""
    assert images is not None
    assert all(isinstance(source, EncodedImage) for source in images.sources)
    assert all(decode_image(images.read(i)).size == (8, 8) for i in range(len(images)))
    return [images.labels[target] for target in images.targets]


# Folders


def test_read_dataset_gives_one_split_when_a_folder_has_class_folders(tmp_path: Path) -> None:
    write(tmp_path, "cat/0.png", "dog/0.png")
    splits = read_dataset(tmp_path)
    assert names(splits.train, tmp_path) == [("cat/0.png", "cat"), ("dog/0.png", "dog")]
    assert (splits.validation, splits.test, splits.published) == (None, None, False)


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_read_dataset_gives_three_splits_when_class_folders_are_inside_split_folders(
    tmp_path: Path, validation: str
) -> None:
    write(tmp_path, "train/cat/0.png", "train/dog/0.png", f"{validation}/dog/1.png", "test/cat/2.png")
    splits = read_dataset(tmp_path)
    assert splits.train.labels == ("cat", "dog")
    assert names(splits.validation, tmp_path) == [(f"{validation}/dog/1.png", "dog")]
    assert names(splits.test, tmp_path) == [("test/cat/2.png", "cat")]


def test_read_dataset_accepts_a_class_when_its_name_is_train(tmp_path: Path) -> None:
    write(tmp_path, "plane/0.png", "train/0.png")
    assert read_dataset(tmp_path).train.labels == ("plane", "train")


def test_read_dataset_names_the_folder_when_split_folders_do_not_fit(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/0.png", "train/dog/0.png", "test/zebra/2.png")
    with pytest.raises(
        DataError,
        match=r"test: classes zebra are not among the task's labels cat, dog; rename or remove these folders$",
    ):
        read_dataset(tmp_path)
    write(tmp_path, "val/cat/0.png", "valid/cat/1.png")
    with pytest.raises(DataError, match=r"split 'valid' is a second validation split; merge the two, or remove one$"):
        read_dataset(tmp_path)


# Tables


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_read_dataset_reads_a_table_when_it_has_paths_labels_and_splits(tmp_path: Path, kind: str) -> None:
    write(tmp_path, "images/a b.png", "images/1.png", "images/2.png", "3.png")
    table = pandas.DataFrame(
        {
            "path": ["images/a b.png", "images/1.png", "images/2.png", "3.png"],
            "label": ["9", "NA", "10", "9"],
            "split": ["train", "train", "val", "test"],
        }
    )
    file = tmp_path / f"list.{kind}"
    table.to_csv(file, index=False) if kind == "csv" else table.to_parquet(file)
    splits = read_dataset(file)
    assert splits.train.labels == ("9", "10", "NA")
    assert names(splits.train, tmp_path) == [("images/a b.png", "9"), ("images/1.png", "NA")]
    assert names(splits.validation, tmp_path) == [("images/2.png", "10")]
    assert names(splits.test, tmp_path) == [("3.png", "9")]


def test_labels_stay_text_when_they_are_in_a_csv_and_may_be_integers_in_parquet(tmp_path: Path) -> None:
    write(tmp_path, "0.png", "1.png")
    (tmp_path / "list.csv").write_text("\ufefflabel,path\n007,0.png\n7,1.png\n", "utf-8")
    splits = read_dataset(tmp_path / "list.csv")
    assert sorted(splits.train.labels) == ["007", "7"]
    assert (splits.validation, splits.test) == (None, None)
    pandas.DataFrame({"path": ["0.png", "1.png"], "label": [10, 9]}).to_parquet(tmp_path / "list.parquet")
    assert read_dataset(tmp_path / "list.parquet").train.labels == ("9", "10")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class\na.png,x\n", r"list.csv: column label missing; columns found: path, class$"),
        ("file\na.png\n", r"list.csv: column path and label missing; columns found: file$"),
        ("path,label\na.png,\n", r"list.csv, row 0: label is empty; fill it in, or remove the row$"),
        ("path,label,split\na.png,x,holdout\n", r"list.csv: unknown split 'holdout'; expected one of train, .*test, "),
        ("path,label,split\na.png,x,test\n", r"list.csv: no training split; splits found: test$"),
        ("path,label\n", r"list.csv: no rows; expected one row per image$"),
        ("", r"list.csv: cannot be read as csv: "),
        ('path,label\n"a.png,x\n', r"list.csv: cannot be read as csv: "),
    ],
)
def test_read_dataset_names_the_row_or_column_when_a_csv_is_invalid(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path / "list.csv")


def test_read_dataset_names_the_file_when_a_parquet_table_is_invalid(tmp_path: Path) -> None:
    file = tmp_path / "list.parquet"
    file.write_bytes(b"text")
    with pytest.raises(DataError, match=r"list.parquet: cannot be read as Parquet: "):
        read_dataset(file)
    pandas.DataFrame({"path": ["0.png", "1.png"], "label": [1.5, 2.0]}).to_parquet(file)
    with pytest.raises(DataError, match=r"row 0: label 1.5 is a fraction; expected text or an integer"):
        read_dataset(file)


# VTAB-1K


@pytest.fixture
def vtab(tmp_path: Path) -> Path:
    root = tmp_path / "caltech101"
    lists = {
        "train800.txt": ["images/train/0.jpg 0", "images/train/with space.jpg 10", "images/train/2.jpg 9"],
        "val200.txt": ["images/train/3.jpg 10"],
        "test.txt": ["images/test/0.jpg 0", "images/test/1.jpg 57"],
    }
    lists["train800val200.txt"] = lists["train800.txt"] + lists["val200.txt"]
    for name, lines in lists.items():
        write(root, *(line.rpartition(" ")[0] for line in lines))
        (root / name).write_text("\n".join(lines) + "\n")
    return root


def test_read_dataset_gives_published_splits_when_a_folder_has_vtab_lists(vtab: Path) -> None:
    splits = read_dataset(vtab)
    assert splits.published
    assert splits.train.labels == ("0", "9", "10", "57")  # in numeric order, over all lists
    assert names(splits.train, vtab / "images/train") == [("0.jpg", "0"), ("with space.jpg", "10"), ("2.jpg", "9")]
    assert names(splits.validation, vtab / "images/train") == [("3.jpg", "10")]
    assert names(splits.test, vtab / "images/test") == [("0.jpg", "0"), ("1.jpg", "57")]


def test_read_dataset_gives_no_validation_split_when_the_vtab_run_is_final(vtab: Path) -> None:
    splits = read_dataset(vtab, final=True)
    assert len(splits.train) == 4
    assert splits.validation is None
    assert splits.test == read_dataset(vtab).test
    assert splits.train.labels == read_dataset(vtab).train.labels


def test_read_dataset_names_the_list_and_line_when_a_list_is_invalid(vtab: Path) -> None:
    (vtab / "val200.txt").write_text("images/train/3.jpg 10\n\nimages/train/4.jpg\n")
    with pytest.raises(DataError, match=r"val200.txt, line 3: expected a path, a space and a class number, "):
        read_dataset(vtab)
    (vtab / "val200.txt").write_text("elsewhere/3.jpg 10\n")
    with pytest.raises(
        DataError, match=r"val200.txt: no image found for elsewhere/3.jpg .*; put the images into .*caltech101$"
    ):
        read_dataset(vtab)
    (vtab / "val200.txt").write_bytes(b"\xff\xfe 1\n")
    with pytest.raises(DataError, match=r"val200.txt: not UTF-8 text"):
        read_dataset(vtab)
    (vtab / "val200.txt").write_text("\n")
    with pytest.raises(DataError, match=r"val200.txt: no lines; expected"):
        read_dataset(vtab)
    (vtab / "train800val200.txt").unlink()
    (vtab / "val200.txt").unlink()
    with pytest.raises(DataError, match=r"no training split; splits found: test; expected train800val200.txt$"):
        read_dataset(vtab, final=True)


# Few-shot


def few_shot(annotations: Path, images: Path, prefix: str = "") -> None:
    """Write lists in NOAH's format. As in its Oxford Pets, one training list names each image twice."""
    lists = {
        "train_meta.list.num_shot_1.seed_0": ["a_1.jpg 0", "a_1.jpg 0", "b_1.jpg 1", "b_1.jpg 1"],
        "train_meta.list.num_shot_2.seed_1": ["a_1.jpg 0", "a_2.jpg 0", "b_1.jpg 1", "b_2.jpg 1"],
        "val_meta.list": ["b_3.jpg 1"],
        "test_meta.list": ["a_4.jpg 0"],
    }
    annotations.mkdir(parents=True)
    for name, lines in lists.items():
        prefixed = [prefix + line for line in lines]
        write(images, *(line.rpartition(" ")[0] for line in prefixed))
        (annotations / name).write_text("\n".join(prefixed) + "\n")


@pytest.mark.parametrize("below", ["", "images", "jpg"])
def test_read_dataset_finds_the_images_when_few_shot_lists_omit_their_folder(tmp_path: Path, below: str) -> None:
    few_shot(tmp_path / "annotations", tmp_path / below, prefix="cars_train/")
    splits = read_dataset(tmp_path, shots=2, seed=1)
    root = tmp_path / below / "cars_train"
    assert splits.published
    assert names(splits.train, root) == [("a_1.jpg", "0"), ("a_2.jpg", "0"), ("b_1.jpg", "1"), ("b_2.jpg", "1")]
    assert names(splits.validation, root) == [("b_3.jpg", "1")]
    assert names(splits.test, root) == [("a_4.jpg", "0")]
    assert len(read_dataset(tmp_path, shots=1).train) == 4


def test_read_dataset_finds_the_images_when_few_shot_lists_are_in_few_shot_split(tmp_path: Path) -> None:
    few_shot(tmp_path / "few-shot_split/oxford-pets/annotations", tmp_path / "oxford-pets")
    splits = read_dataset(tmp_path / "few-shot_split/oxford-pets", shots=1)
    assert names(splits.test, tmp_path) == [("oxford-pets/a_4.jpg", "0")]


def test_read_dataset_names_the_available_lists_when_no_few_shot_list_is_selected(tmp_path: Path) -> None:
    few_shot(tmp_path / "annotations", tmp_path)
    available = "1 shots with seed 0, 2 shots with seed 1"
    with pytest.raises(
        DataError, match=rf"choose a few-shot list with --shots and --split-seed; available: {available}$"
    ):
        read_dataset(tmp_path)
    with pytest.raises(DataError, match=rf"num_shot_2.seed_0: no such list; available: {available}$"):
        read_dataset(tmp_path, shots=2)


# Hugging Face's datasets

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})


def rows(labels: list[Any], features: datasets.Features | None = FEATURES, first: int = 0) -> datasets.Dataset:
    images = [{"bytes": png(first + i, size=(8, 8)), "path": None} for i in range(len(labels))]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_read_dataset_reads_rows_when_a_dataset_was_saved_to_disk(tmp_path: Path) -> None:
    rows([0, 1, 1]).save_to_disk(str(tmp_path / "set"))
    splits = read_dataset(tmp_path / "set")
    assert splits.train.labels == ("dog", "cat")  # in the order of ClassLabel
    assert row_labels(splits.train) == ["dog", "cat", "cat"]
    assert splits.train.read(2) == png(2, size=(8, 8))
    assert str(splits.train.sources[2]) == f"{tmp_path / 'set'} (train, row 2)"
    assert (splits.validation, splits.test, splits.published) == (None, None, False)


def test_read_dataset_reads_all_splits_when_a_dataset_dict_was_saved_to_disk(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    parts = {
        "train": rows(["b", "a"], features),
        "validation": rows(["b"], features, 5),
        "test": rows(["a"], features, 7),
    }
    parts = {name: part.add_column("id", list(range(len(part)))) for name, part in parts.items()}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    splits = read_dataset(tmp_path / "set")
    assert splits.train.labels == ("a", "b")
    assert [row_labels(part) for part in (splits.train, splits.validation, splits.test)] == [["b", "a"], ["b"], ["a"]]


def test_read_dataset_reads_image_files_when_a_saved_dataset_points_to_them(tmp_path: Path) -> None:
    write(tmp_path, "0.png", "1.png")
    paths = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    dataset = datasets.Dataset.from_dict({"image": paths, "label": [0, 1]}, features=FEATURES)
    dataset.save_to_disk(str(tmp_path / "set"))
    splits = read_dataset(tmp_path / "set")
    assert row_labels(splits.train) == ["dog", "cat"]
    assert splits.train.read(0) == (tmp_path / "0.png").read_bytes()


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use a separate cache, and fail the test if it opens a network connection."""
    connections: list[object] = []
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: connections.append(address))
    yield
    assert connections == []


@pytest.mark.usefixtures("offline_cache")
def test_read_dataset_reads_shards_when_a_folder_has_parquet_files(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name, part in (("train-00000-of-00002", rows([1])), ("train-00001-of-00002", rows([0])), ("test", rows([1]))):
        part.to_parquet(str(root / "data" / f"{name}.parquet"))
    splits = read_dataset(root)
    assert splits.train.labels == ("dog", "cat")
    assert (row_labels(splits.train), row_labels(splits.test)) == (["cat", "dog"], ["cat"])
    one = read_dataset(root / "data" / "train-00000-of-00002.parquet")
    assert row_labels(one.train) == ["cat"]


def test_read_dataset_reads_labels_when_an_image_folder_has_metadata(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write(root, "train/0.png", "train/1.png", "test/2.png")
    (root / "train/metadata.csv").write_text("file_name,label\n0.png,x\n1.png,y\n")
    (root / "test/metadata.csv").write_text("file_name,label\n2.png,y\n")
    splits = read_dataset(root)
    assert names(splits.train, root) == [("train/0.png", "x"), ("train/1.png", "y")]
    assert names(splits.test, root) == [("test/2.png", "y")]


def test_read_dataset_names_the_column_when_a_saved_dataset_does_not_fit(tmp_path: Path) -> None:
    rows([0, 1, -1]).save_to_disk(str(tmp_path / "hidden"))
    with pytest.raises(
        DataError, match=r"hidden \(train, row 2\): column 'label' is -1; add the label, or remove the row$"
    ):
        read_dataset(tmp_path / "hidden")
    rows([0, 1]).remove_columns("image").save_to_disk(str(tmp_path / "no-image"))
    with pytest.raises(
        DataError, match=r"expected one column of images, found none among label; rename the column to use"
    ):
        read_dataset(tmp_path / "no-image")
    coarse = rows([0, 1]).rename_column("label", "fine").add_column("coarse", [0, 1])
    coarse = coarse.cast_column("coarse", datasets.ClassLabel(names=["a", "b"]))
    coarse.save_to_disk(str(tmp_path / "two-labels"))
    with pytest.raises(DataError, match=r"expected one column of labels, found fine, coarse among image, fine, coarse"):
        read_dataset(tmp_path / "two-labels")
    coarse.rename_column("coarse", "label").save_to_disk(str(tmp_path / "named"))
    assert read_dataset(tmp_path / "named").train.labels == ("a", "b")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken: datasets cannot read it: "):
        read_dataset(tmp_path / "broken")


# Any layout


def test_read_dataset_names_all_layouts_when_the_layout_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.png 0\n")
    for source in (tmp_path, tmp_path / "list.txt"):
        with pytest.raises(DataError, match=r"unknown dataset layout; expected one of:\n  a folder") as error:
            read_dataset(source)
        assert all(word in str(error.value) for word in (".csv", "train800.txt", "num_shot_K", "save_to_disk"))
    with pytest.raises(
        DataError, match=r"^ylecun/mnist: no such folder or file; datasets are read from this machine, never downloaded"
    ):
        read_dataset(Path("ylecun/mnist"))


@pytest.mark.parametrize(
    ("library", "source"), [("pandas", "list.csv"), ("pyarrow", "list.parquet"), ("datasets", "set")]
)
def test_read_dataset_names_the_extra_when_a_library_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, source: str
) -> None:
    (tmp_path / "list.csv").write_text("path,label\n0.png,x\n")
    pandas.DataFrame({"path": ["0.png"], "label": ["x"]}).to_parquet(tmp_path / "list.parquet")
    rows([0, 1]).save_to_disk(str(tmp_path / "set"))
    monkeypatch.setitem(sys.modules, library, None)  # makes its import raise ModuleNotFoundError
    with pytest.raises(DataError, match=rf"{source}: .* needs {library}: pip install 'karst-hub\[train\]'$"):
        read_dataset(tmp_path / source)


def test_read_dataset_refuses_an_option_when_it_belongs_to_another_layout(tmp_path: Path) -> None:
    write(tmp_path, "cat/0.png", "dog/0.png")
    with pytest.raises(DataError, match=r"--final needs a VTAB-1K folder .*; leave out --final$"):
        read_dataset(tmp_path, final=True)
    with pytest.raises(DataError, match=r"--shots needs a few-shot folder .*; leave out --shots$"):
        read_dataset(tmp_path, shots=1)


def test_read_split_reads_the_split_when_it_has_any_layout(tmp_path: Path, vtab: Path) -> None:
    labels = ("cat", "dog")
    write(tmp_path, "plain/dog/0.png", "parts/train/cat/0.png", "parts/test/cat/1.png", "0.png")
    assert names(read_split(tmp_path / "plain", "test", labels), tmp_path) == [("plain/dog/0.png", "dog")]
    assert names(read_split(tmp_path / "parts", "test", labels), tmp_path) == [("parts/test/cat/1.png", "cat")]
    with pytest.raises(DataError, match=r"parts: no validation split; splits found: test, train$"):
        read_split(tmp_path / "parts", "validation", labels)
    (tmp_path / "list.csv").write_text("path,label\n0.png,dog\n")
    part = read_split(tmp_path / "list.csv", "validation", labels)
    assert (names(part, tmp_path), part.targets) == ([("0.png", "dog")], (1,))
    rows([0]).save_to_disk(str(tmp_path / "set"))
    assert read_split(tmp_path / "set", "test", labels).targets == (1,)
    assert len(read_split(vtab, "test", ("0", "57", "58"))) == 2
    few_shot(tmp_path / "pets/annotations", tmp_path / "pets")
    assert read_split(tmp_path / "pets", "validation", ("0", "1")).targets == (1,)
    with pytest.raises(
        DataError,
        match=r"caltech101: labels 0, 57 are not among the task's labels cat, dog; correct or remove these rows$",
    ):
        read_split(vtab, "test", labels)


def test_with_split_clears_published_when_the_test_split_is_replaced(vtab: Path) -> None:
    splits = read_dataset(vtab)
    changed = splits.with_split("test", splits.train)
    assert (changed.test, changed.validation, changed.published) == (splits.train, splits.validation, False)
    assert list(changed.by_name()) == ["train", "validation", "test"]
    assert list(DatasetSplits(splits.train, test=splits.test).by_name()) == ["train", "test"]
