"""Labels: text of values, order, and labels that look like one class."""

import os
import subprocess
import sys
import unicodedata
from typing import Any

import numpy as np
import pandas
import pytest

from adapters import DataError
from adapters.data.labels import is_missing, label_text, natural_sort_key, near_duplicates, shown_apart, sorted_labels


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("cat", "cat"),
        (" cat ", " cat "),
        ("007", "007"),
        ("NA", "NA"),
        (b"cat", "cat"),
        ("é".encode(), "é"),
        (7, "7"),
        (np.int64(-7), "-7"),
        (True, "True"),
        (np.bool_(False), "False"),
        (np.str_("cat"), "cat"),
    ],
)
def test_label_text_is_the_same_for_a_value_in_any_layout(value: Any, text: str) -> None:
    found = label_text(value, "row 1")
    assert (found, type(found)) == (text, str)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "row 1: label is empty; fill it in, or remove the row"),
        (float("nan"), "row 1: label is empty"),
        (pandas.NA, "row 1: label is empty"),
        (pandas.NaT, "row 1: label is empty"),
        ("", "row 1: label is empty"),
        (" \t", "row 1: label is empty"),
        (b"", "row 1: label is empty"),
        (1.0, "row 1: label 1.0 is a fraction; expected text or an integer"),
        (np.float32(1.5), "row 1: label 1.5 is a fraction"),
        (b"\xff", r"row 1: label b'\\xff' is not UTF-8; save the labels as UTF-8"),
        ("\udcff", r"row 1: label '\\udcff' is not UTF-8; rename it"),
        (["cat"], r"row 1: label \['cat'\] is of type list; expected one text or integer per image"),
        (np.array(["cat"]), "of type ndarray"),
        ({"id": 1}, "of type dict"),
        (pandas.Timestamp("2024-01-01"), "of type Timestamp"),
        ([0] * 1000, r"label \[0, 0, .{50,60}\.\.\. is of type list"),
    ],
)
def test_label_text_refuses_a_value_that_is_no_label(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^.*{message}"):
        label_text(value, "row 1")


def test_is_missing_accepts_zero_and_false() -> None:
    values: tuple[Any, ...] = (0, False, 0.0, "0", b"0", [], "NA")
    assert not any(map(is_missing, values))


def test_sorted_labels_are_in_natural_order() -> None:
    assert sorted_labels(["b10", "10", "a", "9", "b9", "9"]) == ("9", "10", "a", "b9", "b10")
    long = "1" * 10_000  # int() refuses more than 4,300 digits
    assert sorted_labels([long, "2"]) == ("2", long)


def test_sorted_labels_have_one_order_when_the_hash_seed_changes() -> None:
    labels = ["1", "01", "001", "a1", "a01", "x", "٣", "3"]
    program = f"from adapters.data.labels import sorted_labels; print(sorted_labels({labels}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{sorted_labels(labels)}\n".encode()}
    assert len({str(natural_sort_key(label)) for label in labels}) == len(labels)


def test_near_duplicates_are_labels_that_differ_in_case_spaces_or_unicode_form() -> None:
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    labels = ["cat", "Cat", "dog", "dog ", "two  words", "two words", nfc, nfd, "STRASSE", "straße", "bird"]
    assert near_duplicates(labels) == [
        *(("cat", "Cat"), ("dog", "dog "), ("two  words", "two words"), (nfc, nfd), ("STRASSE", "straße")),
    ]
    assert shown_apart(("dog", "dog ")) == "'dog', 'dog '"
    assert shown_apart((nfc, nfd)) == r"'caf\xe9', 'cafe\u0301'"
