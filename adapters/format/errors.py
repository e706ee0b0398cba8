"""What is wrong with an adapter, as an error that names every tensor and field."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an adapter: `where` is a tensor, a metadata field, or `file`."""

    where: str
    message: str


class AdapterError(ValueError):
    """An adapter that cannot be used as it is; `problems` names each tensor or field and what would be right."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(f"{p.where}: {p.message}" for p in self.problems[:5]) + _more(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


def file_error(message: str) -> AdapterError:
    return AdapterError([Problem("file", message)])


def _more(problems: Sequence[Problem]) -> str:
    return f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
