"""Parsers of replies, and the reply that joins several replies of one kind."""

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeAlias, TypeVar

from pydantic import BaseModel

from ..schemas import Classified
from .transport import Call

Model = TypeVar("Model", bound=BaseModel)
AnyPath: TypeAlias = str | os.PathLike[str]
NO_PARAMS: Mapping[str, str] = {}
PER_IMAGE = ("predictions", "typicality", "unknown", "sets", "image")  # lists of `Classified` with one entry per image


def model(kind: type[Model]) -> Callable[[bytes], Model]:
    """Return a parser of replies. It ignores unknown fields: a newer hub may add fields."""
    return lambda content: kind.model_validate_json(content, extra="ignore")


def nothing(_content: bytes) -> None:
    """Parse an empty reply."""


def joined(parts: Sequence[Classified]) -> Classified:
    """Return the reply for all images of these replies, in order. A list that one reply lacks is left out."""
    lists = {name: [getattr(part, name) for part in parts] for name in PER_IMAGE}
    update = {name: None if None in found else [*chain(*found)] for name, found in lists.items()}
    return parts[0].model_copy(update=update)


def to_file(path: str, to: AnyPath, params: Mapping[str, str] = NO_PARAMS) -> Call[Path]:
    """Return a call that downloads a file, which appears only when complete."""
    return Call("GET", path, lambda _content: Path(to), params=params, download=Path(to))
