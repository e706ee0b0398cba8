"""Versions as the registry stores them, and the parts of a version that most requests need.

A version's text is its JSON, up to 512 KiB with all metrics. A list needs only the summary beside it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..errors import InvalidAdapter
from ..field_types import MeasuredAccuracy
from ..schemas import VersionInfo

MAX_VERSION_BYTES = 512 * 1024  # of a version's JSON, which the registry holds in memory
MAX_NAMED_LABELS = 5  # in a message


class VersionSummary(BaseModel):
    """The facts about a version that lists show, and the size of its file."""

    model_config = ConfigDict(frozen=True)

    size_bytes: int
    classes: int
    registered: str | None = None  # a task without versions has no time
    accuracy: MeasuredAccuracy | None = None
    train_images: int | None = None

    @classmethod
    def of(cls, version: VersionInfo) -> "VersionSummary":
        """Return the summary of a version."""
        return cls(
            size_bytes=version.size_bytes,
            classes=len(version.labels),
            registered=version.registered,
            accuracy=version.measured_accuracy(),
            train_images=version.train_images(),
        )

    def text(self) -> str:
        """Return the stored text: the file's size, which the Lua scripts read, and JSON."""
        return f"{self.size_bytes} {self.model_dump_json()}"

    @classmethod
    def parse(cls, text: str) -> "VersionSummary":
        """Return the summary of a stored text."""
        return cls.model_validate_json(text.partition(" ")[2])


class ServedVersion(BaseModel):
    """The facts about a version that a classification needs: those of `VersionInfo` without config and metrics."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int
    digest: str
    labels: list[str]
    preprocess: dict[str, Any]
    size_bytes: int
    coverage: list[tuple[float, float]] | None = None
    typicality: bool | None = None


@dataclass(frozen=True)
class StoredVersion:
    """A version's number and its stored JSON, which has all but the number."""

    number: int
    text: str

    @property
    def json(self) -> str:
        """The JSON of `VersionInfo`. No member is parsed, so a reply of hundreds of kilobytes costs little."""
        return f'{{"version":{self.number},{self.text[1:]}'

    def info(self) -> VersionInfo:
        """Return the whole version."""
        return VersionInfo(version=self.number, **json.loads(self.text))

    def served(self) -> ServedVersion:
        """Return what a classification needs. The parser skips the other members."""
        return ServedVersion.model_validate_json(self.json)


@dataclass(frozen=True)
class Live:
    """The version behind a task's alias `latest`.

    Attributes:
        targets: the alias's targets as stored; empty if the task has no such alias, or does not exist.
        version: the newest of them.
    """

    targets: str = ""
    version: VersionInfo | None = None


NOTHING_LIVE = Live()


class StoredVersions(Mapping[int, VersionInfo]):
    """Versions by number. Each text is parsed at its first access."""

    def __init__(self, texts: Mapping[int, str]) -> None:
        self._stored = {number: StoredVersion(number, texts[number]) for number in sorted(texts)}
        self._parsed: dict[int, VersionInfo] = {}

    def __getitem__(self, number: int) -> VersionInfo:
        if number not in self._parsed:
            self._parsed[number] = self._stored[number].info()
        return self._parsed[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def stored(self) -> Sequence[StoredVersion]:
        """Return the versions as they are stored, in order."""
        return [*self._stored.values()]


def version_body(version: VersionInfo) -> str:
    """Return the stored JSON of a version.

    Raises:
        InvalidAdapter: the JSON is too long.
    """
    text = version.model_dump_json(exclude={"version"})
    if len(text) > MAX_VERSION_BYTES:
        message = f"labels and metrics take {len(text)} bytes (limit {MAX_VERSION_BYTES}); shorten them"
        raise InvalidAdapter.at("metrics", message)
    return text


def label_difference(old: Sequence[str], new: Sequence[str]) -> str:
    """Return how the labels of two versions differ, in words; empty if they are equal."""
    if [*old] == [*new]:
        return ""
    added, missing = [x for x in new if x not in {*old}], [x for x in old if x not in {*new}]
    parts = [f"{name}: {_some(labels)}" for name, labels in (("new", added), ("missing", missing)) if labels]
    return "; ".join(parts) or "the same labels in another order"


def _some(labels: Sequence[str]) -> str:
    more = len(labels) - MAX_NAMED_LABELS
    return ", ".join(map(repr, labels[:MAX_NAMED_LABELS])) + (f" and {more} more" if more > 0 else "")
