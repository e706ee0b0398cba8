"""Every layout becomes the same image sets: the right images, labels and parts; what does not fit is named."""

import gc
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pandas
import pytest

from adapters import DataError
from adapters.data.datasets import Splits, read, read_part
from adapters.data.images import Encoded, ImageSet, decode_image
from tests.support.models import png


def write(root: Path, *names: str) -> None:
    """A real image at each path, another picture for each name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(sum(name.encode()), size=(8, 8)))


def names(images: ImageSet | None, root: Path) -> list[tuple[str, str]]:
    """(path below root, label) of every image, all of which can be decoded."""
    assert images is not None
    assert all(decode_image(images.read(i)).size == (8, 8) for i in range(len(images)))
    return [
        (str(path.relative_to(root)), images.labels[target])
        for path, target in zip(images.paths, images.targets, strict=True)
    ]


def row_labels(images: ImageSet | None) -> list[str]:
    """Labels of images that are rows of a table."""
    assert images is not None
    assert all(isinstance(path, Encoded) for path in images.paths)
    assert all(decode_image(images.read(i)).size == (8, 8) for i in range(len(images)))
    return [images.labels[target] for target in images.targets]


# Folders


def test_a_folder_of_class_folders(tmp_path) -> None:
    write(tmp_path, "cat/0.png", "dog/0.png")
    splits = read(tmp_path)
    assert names(splits.train, tmp_path) == [("cat/0.png", "cat"), ("dog/0.png", "dog")]
    assert (splits.validation, splits.test, splits.published) == (None, None, False)


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_class_folders_inside_train_val_and_test(tmp_path, validation) -> None:
    write(tmp_path, "train/cat/0.png", "train/dog/0.png", f"{validation}/dog/1.png", "test/cat/2.png")
    splits = read(tmp_path)
    assert splits.train.labels == ("cat", "dog")
    assert names(splits.validation, tmp_path) == [(f"{validation}/dog/1.png", "dog")]
    assert names(splits.test, tmp_path) == [("test/cat/2.png", "cat")]


def test_a_class_may_be_called_train(tmp_path) -> None:
    write(tmp_path, "plane/0.png", "train/0.png")
    assert read(tmp_path).train.labels == ("plane", "train")


def test_split_folders_that_do_not_fit_are_named(tmp_path) -> None:
    write(tmp_path, "train/cat/0.png", "train/dog/0.png", "test/zebra/2.png")
    with pytest.raises(DataError, match=r"test: classes zebra are not among the task's labels cat, dog$"):
        read(tmp_path)
    write(tmp_path, "val/cat/0.png", "valid/cat/1.png")
    with pytest.raises(DataError, match=r"split 'valid' stands for a part that is there already$"):
        read(tmp_path)


# Tables


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_of_paths_and_labels(tmp_path, kind) -> None:
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
    splits = read(file)
    assert splits.train.labels == ("9", "10", "NA")
    assert names(splits.train, tmp_path) == [("images/a b.png", "9"), ("images/1.png", "NA")]
    assert names(splits.validation, tmp_path) == [("images/2.png", "10")]
    assert names(splits.test, tmp_path) == [("3.png", "9")]


def test_labels_of_a_csv_stay_text_and_those_of_parquet_may_be_integers(tmp_path) -> None:
    write(tmp_path, "0.png", "1.png")
    (tmp_path / "list.csv").write_text("\ufefflabel,path\n007,0.png\n7,1.png\n", "utf-8")
    splits = read(tmp_path / "list.csv")
    assert sorted(splits.train.labels) == ["007", "7"]
    assert (splits.validation, splits.test) == (None, None)
    pandas.DataFrame({"path": ["0.png", "1.png"], "label": [10, 9]}).to_parquet(tmp_path / "list.parquet")
    assert read(tmp_path / "list.parquet").train.labels == ("9", "10")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class\na.png,x\n", r"list.csv: no column label among path, class$"),
        ("file\na.png\n", r"list.csv: no column path and no label among file$"),
        ("path,label\na.png,\n", r"list.csv, row 0: label is empty$"),
        ("path,label,split\na.png,x,holdout\n", r"list.csv: split 'holdout' is none of train, .*test$"),
        ("path,label,split\na.png,x,test\n", r"list.csv: no training images, only test$"),
        ("path,label\n", r"list.csv: no rows in it$"),
        ("", r"list.csv: cannot be read as csv: "),
        ('path,label\n"a.png,x\n', r"list.csv: cannot be read as csv: "),
    ],
)
def test_a_csv_that_cannot_be_used_is_named(tmp_path, text, message) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "list.csv")


def test_a_parquet_that_cannot_be_used_is_named(tmp_path) -> None:
    file = tmp_path / "list.parquet"
    file.write_bytes(b"text")
    with pytest.raises(DataError, match=r"list.parquet: cannot be read as Parquet: "):
        read(file)
    pandas.DataFrame({"path": ["0.png", "1.png"], "label": [1.5, 2.0]}).to_parquet(file)
    with pytest.raises(DataError, match=r"row 0: label 1.5 is a number with a fraction"):
        read(file)


# VTAB-1K


@pytest.fixture
def vtab(tmp_path) -> Path:
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


def test_vtab_lists(vtab) -> None:
    splits = read(vtab)
    assert splits.published
    assert splits.train.labels == ("0", "9", "10", "57")  # by number, those of every list
    assert names(splits.train, vtab / "images/train") == [("0.jpg", "0"), ("with space.jpg", "10"), ("2.jpg", "9")]
    assert names(splits.validation, vtab / "images/train") == [("3.jpg", "10")]
    assert names(splits.test, vtab / "images/test") == [("0.jpg", "0"), ("1.jpg", "57")]


def test_vtab_s_final_run_trains_on_all_1000_and_validates_on_none(vtab) -> None:
    splits = read(vtab, final=True)
    assert len(splits.train) == 4
    assert splits.validation is None
    assert splits.test == read(vtab).test
    assert splits.train.labels == read(vtab).train.labels


def test_a_list_that_cannot_be_read_is_named_with_its_line(vtab) -> None:
    (vtab / "val200.txt").write_text("images/train/3.jpg 10\n\nimages/train/4.jpg\n")
    with pytest.raises(DataError, match=r"val200.txt, line 3: expected a path, a space and the number of a class, "):
        read(vtab)
    (vtab / "val200.txt").write_text("elsewhere/3.jpg 10\n")
    with pytest.raises(
        DataError, match=r"val200.txt: elsewhere/3.jpg and the others it lists are not in .*caltech101$"
    ):
        read(vtab)
    (vtab / "val200.txt").write_bytes(b"\xff\xfe 1\n")
    with pytest.raises(DataError, match=r"val200.txt: not UTF-8 text"):
        read(vtab)
    (vtab / "val200.txt").write_text("\n")
    with pytest.raises(DataError, match=r"val200.txt: no lines in it"):
        read(vtab)
    (vtab / "train800val200.txt").unlink()
    (vtab / "val200.txt").unlink()
    with pytest.raises(DataError, match=r"no training images, only test; expected train800val200.txt$"):
        read(vtab, final=True)


# Few-shot


def few_shot(annotations: Path, images: Path, prefix: str = "") -> None:
    """The lists as NOAH has them: Pets' own training lists name each image twice."""
    lists = {
        "train_meta.list.num_shot_1.seed_0": ["a_1.jpg 0", "a_1.jpg 0", "b_1.jpg 1", "b_1.jpg 1"],
        "train_meta.list.num_shot_2.seed_1": ["a_1.jpg 0", "a_2.jpg 0", "b_1.jpg 1", "b_2.jpg 1"],
        "val_meta.list": ["b_3.jpg 1"],
        "test_meta.list": ["a_4.jpg 0"],
    }
    annotations.mkdir(parents=True)
    for name, lines in lists.items():
        lines = [prefix + line for line in lines]
        write(images, *(line.rpartition(" ")[0] for line in lines))
        (annotations / name).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("below", ["", "images", "jpg"])
def test_few_shot_lists(tmp_path, below) -> None:
    few_shot(tmp_path / "annotations", tmp_path / below, prefix="cars_train/")
    splits = read(tmp_path, shots=2, seed=1)
    root = tmp_path / below / "cars_train"
    assert splits.published
    assert names(splits.train, root) == [("a_1.jpg", "0"), ("a_2.jpg", "0"), ("b_1.jpg", "1"), ("b_2.jpg", "1")]
    assert names(splits.validation, root) == [("b_3.jpg", "1")]
    assert names(splits.test, root) == [("a_4.jpg", "0")]
    assert len(read(tmp_path, shots=1).train) == 4


def test_few_shot_lists_that_are_kept_apart_from_the_images(tmp_path) -> None:
    few_shot(tmp_path / "few-shot_split/oxford-pets/annotations", tmp_path / "oxford-pets")
    splits = read(tmp_path / "few-shot_split/oxford-pets", shots=1)
    assert names(splits.test, tmp_path) == [("oxford-pets/a_4.jpg", "0")]


def test_a_few_shot_list_must_be_chosen_among_those_that_are_there(tmp_path) -> None:
    few_shot(tmp_path / "annotations", tmp_path)
    there = "1 shots with seed 0, 2 shots with seed 1"
    with pytest.raises(DataError, match=rf"say which few-shot list \(--shots, --split-seed\): {there}$"):
        read(tmp_path)
    with pytest.raises(DataError, match=rf"num_shot_2.seed_0: no such list; {there} are there$"):
        read(tmp_path, shots=2)


# Hugging Face's datasets

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})


def rows(labels: list, features: datasets.Features | None = FEATURES, first: int = 0) -> datasets.Dataset:
    images = [{"bytes": png(first + i, size=(8, 8)), "path": None} for i in range(len(labels))]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_a_saved_dataset(tmp_path) -> None:
    rows([0, 1, 1]).save_to_disk(str(tmp_path / "set"))
    splits = read(tmp_path / "set")
    assert splits.train.labels == ("dog", "cat")  # in ClassLabel's own order
    assert row_labels(splits.train) == ["dog", "cat", "cat"]
    assert splits.train.read(2) == png(2, size=(8, 8))
    assert str(splits.train.paths[2]) == f"{tmp_path / 'set'} (train, row 2)"
    assert (splits.validation, splits.test, splits.published) == (None, None, False)


def test_a_saved_dataset_dict_with_text_labels_and_another_column(tmp_path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    parts = {
        "train": rows(["b", "a"], features),
        "validation": rows(["b"], features, 5),
        "test": rows(["a"], features, 7),
    }
    parts = {name: part.add_column("id", list(range(len(part)))) for name, part in parts.items()}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    splits = read(tmp_path / "set")
    assert splits.train.labels == ("a", "b")
    assert [row_labels(part) for part in (splits.train, splits.validation, splits.test)] == [["b", "a"], ["b"], ["a"]]


def test_a_dataset_may_point_to_image_files(tmp_path) -> None:
    write(tmp_path, "0.png", "1.png")
    paths = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    set_ = datasets.Dataset.from_dict({"image": paths, "label": [0, 1]}, features=FEATURES)
    set_.save_to_disk(str(tmp_path / "set"))
    splits = read(tmp_path / "set")
    assert row_labels(splits.train) == ["dog", "cat"]
    assert splits.train.read(0) == (tmp_path / "0.png").read_bytes()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Iterator[None]:
    """A cache of the test's own; and nothing may be asked of a network."""
    asked: list = []
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    yield
    assert asked == []


@pytest.mark.usefixtures("cache")
def test_parquet_files_as_the_hub_has_them(tmp_path) -> None:
    root = tmp_path / "set"
    for name, part in (("train-00000-of-00002", rows([1])), ("train-00001-of-00002", rows([0])), ("test", rows([1]))):
        part.to_parquet(str(root / "data" / f"{name}.parquet"))
    splits = read(root)
    assert splits.train.labels == ("dog", "cat")
    assert (row_labels(splits.train), row_labels(splits.test)) == (["cat", "dog"], ["cat"])
    one = read(root / "data" / "train-00000-of-00002.parquet")
    assert row_labels(one.train) == ["cat"]


@pytest.fixture
def leftovers_end():
    """datasets leaves metadata files open in cycles: they end here, and not as another test's warning."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("cache", "leftovers_end")
def test_an_image_folder_with_metadata(tmp_path) -> None:
    root = tmp_path / "set"
    write(root, "train/0.png", "train/1.png", "test/2.png")
    (root / "train/metadata.csv").write_text("file_name,label\n0.png,x\n1.png,y\n")
    (root / "test/metadata.csv").write_text("file_name,label\n2.png,y\n")
    splits = read(root)
    assert (row_labels(splits.train), row_labels(splits.test)) == (["x", "y"], ["y"])


def test_datasets_that_do_not_fit_are_named(tmp_path) -> None:
    rows([0, 1, -1]).save_to_disk(str(tmp_path / "hidden"))
    with pytest.raises(DataError, match=r"hidden \(train, row 2\): column 'label' is -1; every image needs a label$"):
        read(tmp_path / "hidden")
    rows([0, 1]).remove_columns("image").save_to_disk(str(tmp_path / "no-image"))
    with pytest.raises(DataError, match=r"expected one column of images, found none among label; name the one to use"):
        read(tmp_path / "no-image")
    coarse = rows([0, 1]).rename_column("label", "fine").add_column("coarse", [0, 1])
    coarse = coarse.cast_column("coarse", datasets.ClassLabel(names=["a", "b"]))
    coarse.save_to_disk(str(tmp_path / "two-labels"))
    with pytest.raises(DataError, match=r"expected one column of labels, found fine, coarse among image, fine, coarse"):
        read(tmp_path / "two-labels")
    coarse.rename_column("coarse", "label").save_to_disk(str(tmp_path / "named"))
    assert read(tmp_path / "named").train.labels == ("a", "b")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken: datasets cannot read it: "):
        read(tmp_path / "broken")


# Whatever it is


def test_what_is_there_is_said_to_be_unknown_with_all_kinds(tmp_path) -> None:
    (tmp_path / "list.txt").write_text("a.png 0\n")
    for source in (tmp_path, tmp_path / "list.txt"):
        with pytest.raises(
            DataError, match=r"no set of images that is known here; expected one of:\n  a folder"
        ) as error:
            read(source)
        assert all(word in str(error.value) for word in (".csv", "train800.txt", "num_shot_K", "save_to_disk"))
    with pytest.raises(
        DataError, match=r"^ylecun/mnist: no such folder or file; images are read from this machine only"
    ):
        read(Path("ylecun/mnist"))


@pytest.mark.parametrize(
    ("library", "source"), [("pandas", "list.csv"), ("pyarrow", "list.parquet"), ("datasets", "set")]
)
def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch, library, source) -> None:
    (tmp_path / "list.csv").write_text("path,label\n0.png,x\n")
    pandas.DataFrame({"path": ["0.png"], "label": ["x"]}).to_parquet(tmp_path / "list.parquet")
    rows([0, 1]).save_to_disk(str(tmp_path / "set"))
    monkeypatch.setitem(sys.modules, library, None)  # as Python sees a module that is not there
    with pytest.raises(DataError, match=rf"{source}: .* needs {library}: pip install 'karst-hub\[train\]'$"):
        read(tmp_path / source)


def test_options_of_another_kind_are_refused(tmp_path) -> None:
    write(tmp_path, "cat/0.png", "dog/0.png")
    with pytest.raises(DataError, match=r"a final run is for VTAB-1K lists"):
        read(tmp_path, final=True)
    with pytest.raises(DataError, match=r"shots are for few-shot lists"):
        read(tmp_path, shots=1)


def test_one_more_part_of_any_kind(tmp_path, vtab) -> None:
    labels = ("cat", "dog")
    write(tmp_path, "plain/dog/0.png", "parts/train/cat/0.png", "parts/test/cat/1.png", "0.png")
    assert names(read_part(tmp_path / "plain", "test", labels), tmp_path) == [("plain/dog/0.png", "dog")]
    assert names(read_part(tmp_path / "parts", "test", labels), tmp_path) == [("parts/test/cat/1.png", "cat")]
    with pytest.raises(DataError, match=r"parts: has no validation images, only test, train$"):
        read_part(tmp_path / "parts", "validation", labels)
    (tmp_path / "list.csv").write_text("path,label\n0.png,dog\n")
    part = read_part(tmp_path / "list.csv", "validation", labels)
    assert (names(part, tmp_path), part.targets) == ([("0.png", "dog")], (1,))
    rows([0]).save_to_disk(str(tmp_path / "set"))
    assert read_part(tmp_path / "set", "test", labels).targets == (1,)
    assert len(read_part(vtab, "test", ("0", "57", "58"))) == 2
    few_shot(tmp_path / "pets/annotations", tmp_path / "pets")
    assert read_part(tmp_path / "pets", "validation", ("0", "1")).targets == (1,)
    with pytest.raises(DataError, match=r"caltech101: labels 0, 57 are not among the task's labels cat, dog$"):
        read_part(vtab, "test", labels)


def test_another_test_set_makes_published_lists_one_s_own(vtab) -> None:
    splits = read(vtab)
    changed = splits.with_part("test", splits.train)
    assert (changed.test, changed.validation, changed.published) == (splits.train, splits.validation, False)
    assert list(changed.parts()) == ["train", "validation", "test"]
    assert list(Splits(splits.train, test=splits.test).parts()) == ["train", "test"]
