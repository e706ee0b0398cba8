"""The error for an invalid adapter, which names every wrong tensor and field."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_PROBLEMS = 50  # of one error; the check of a file ends when it has found more
_SHOWN = 5  # problems in the message, which goes into log lines
_MAX_WHERE, _MAX_MESSAGE = 200, 500  # characters, since both may repeat any text of the file


@dataclass(frozen=True)
class Problem:
    """One defect of an adapter: `where` is a tensor, a metadata field, an option, or `file`."""

    where: str
    message: str

    def __post_init__(self) -> None:
        for name, limit in (("where", _MAX_WHERE), ("message", _MAX_MESSAGE)):
            text: str = getattr(self, name)
            if len(text) > limit:
                object.__setattr__(self, name, f"{text[:limit]}...")


class AdapterError(ValueError):
    """An adapter that cannot be used; `problems` has one entry per wrong tensor or field."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        if len(problems) > MAX_PROBLEMS:
            self.problems[MAX_PROBLEMS - 1 :] = [Problem("file", "has more problems; the check ended here")]
        more = len(self.problems) - _SHOWN
        text = "; ".join(f"{p.where}: {p.message}" for p in self.problems[:_SHOWN])
        super().__init__(text + (f"; and {more} more" if more > 0 else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


def enough(problems: Sequence[Problem]) -> bool:
    """Return whether a check may end, because its error would show no further problem."""
    return len(problems) > MAX_PROBLEMS


def file_error(message: str) -> AdapterError:
    """Return an error about the file as a whole."""
    return AdapterError([Problem("file", message)])
