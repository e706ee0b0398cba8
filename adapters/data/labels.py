"""Labels: how a value becomes text, in which order labels are sorted, and which labels look like one class.

Every reader of a dataset uses these rules, so that a label reads the same in every layout.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .errors import DataError

_SHOWN_CHARACTERS = 60


def label_text(value: Any, where: str) -> str:
    """Return a label as text: text unchanged, UTF-8 bytes decoded, integers in decimal, booleans as True or False.

    Args:
        where: the place of the label, which begins the error message.

    Raises:
        DataError: the value is missing, empty, a fraction, not UTF-8, or of another type.
    """
    if is_missing(value):
        raise DataError(f"{where}: label is empty; fill it in, or remove the row")
    if isinstance(value, bytes | bytearray):
        try:
            return label_text(bytes(value).decode(), where)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: label {_shown(value)} is not UTF-8; save the labels as UTF-8") from error
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: label {_shown(value)} is not UTF-8; rename it") from error
        return str(value)
    if isinstance(value, bool | np.bool_ | int | np.integer):
        return str(value)
    if isinstance(value, float | np.floating):
        raise DataError(f"{where}: label {value} is a fraction; expected text or an integer")
    raise DataError(
        f"{where}: label {_shown(value)} is of type {type(value).__name__}; expected one text or integer per image"
    )


def is_missing(value: Any) -> bool:
    """Return whether a cell has no value: None, NaN, pandas' NA, or text without a visible character."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, bytes | bytearray):
        return not bytes(value).strip()
    return type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float | np.floating) and value != value)


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels in natural order."""
    return tuple(sorted(set(labels), key=natural_sort_key))


def natural_sort_key(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key for names in natural order: 9 before 10.

    Different names have different keys. Otherwise the order of 1 and 01 would depend on the process's hash seed.
    """
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    digits = [(part, part.lstrip("0")) for part in parts]
    # Digits compare by their number of places first, since int() refuses very long numbers.
    return [(0, len(bare), bare) if "0" <= part[0] <= "9" else (1, 0, part) for part, bare in digits], text


def near_duplicates(labels: Sequence[str]) -> list[tuple[str, ...]]:
    """Return groups of labels that differ only in case, spaces or Unicode form, such as cat and Cat."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", label).casefold())
        groups.setdefault(" ".join(key.split()), []).append(label)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def shown_apart(labels: Sequence[str]) -> str:
    """Return labels in quotes, with escapes where two of them would look the same."""
    looks = {unicodedata.normalize("NFC", label) for label in labels}
    show = repr if len(looks) == len(labels) else ascii
    return ", ".join(show(label) for label in labels)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
