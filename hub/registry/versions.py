"""Versions as the registry stores them, and the parts of a version that most requests need.

A version's text is its JSON, up to 512 KiB with all metrics. A list needs only the summary beside it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from ..errors import HubError, InvalidAdapter, LimitReached, Unavailable
from ..field_types import MeasuredAccuracy
from ..schemas import VersionInfo
from .redis.scripts import ChangeReply

MAX_VERSION_BYTES = 512 * 1024  # of a version's JSON, which the registry holds in memory
MAX_NAMED_LABELS = 5  # in a message
MAX_ALIASES = 100  # per task, besides `latest`
STAGED_S = 3600  # how long an import may take to write its versions
NOUNS = {  # of limits
    "versions": "versions per task",
    "registry_bytes": "bytes of metadata of tasks, versions and trainings",
    "shares": "tenants in the sharing of all tasks together",
    "shared_with_one": "tasks shared with one tenant",
}


class LatestMovedError(Exception):
    """Another change has moved the alias `latest` since the caller read it; read it again."""


class TrainingEndedError(Exception):
    """The job that made a version was cancelled, or another gateway has taken it over."""


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


class AdapterKind(BaseModel):
    """The part of an adapter's config that says whether it changes the backbone's features."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kernels: int = 1
    rescale: str = "channel"
    norms: bool = False

    @property
    def is_head(self) -> bool:
        """Whether the adapter is only a head on the frozen backbone's features; see `KarstConfig.is_head`."""
        return self.kernels == 0 and self.rescale == "none" and not self.norms


class ServedVersion(BaseModel):
    """The facts about a version that a classification needs: those of `VersionInfo` without metrics.

    Nearly all versions of a hub have the same preprocessing, and share one object in a gateway's memory.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int
    digest: str
    labels: list[str]
    preprocess: dict[str, Any]
    size_bytes: int
    config: AdapterKind = AdapterKind()
    coverage: list[tuple[float, float]] | None = None
    typicality: bool | None = None

    @field_validator("preprocess")
    @classmethod
    def _share(cls, preprocess: dict[str, Any]) -> dict[str, Any]:
        return _preprocess_of(json.dumps(preprocess, sort_keys=True))[1]

    @cached_property
    def preprocess_key(self) -> str:
        """A text that is equal for versions with the same preprocessing."""
        return _preprocess_of(json.dumps(self.preprocess, sort_keys=True))[0]


@lru_cache(maxsize=100)
def _preprocess_of(text: str) -> tuple[str, dict[str, Any]]:
    """Return the text and the dictionary that all versions with this JSON share."""
    return text, json.loads(text)


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
    size_bytes = len(text.encode())
    if size_bytes > MAX_VERSION_BYTES:
        message = f"labels and metrics take {size_bytes} bytes (limit {MAX_VERSION_BYTES}); shorten them"
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


def limit_refusal(reply: ChangeReply) -> HubError | None:
    """Return the error of a change of versions or aliases that the registry refused; None for a missing tenant."""
    match reply.outcome:
        case "limit":
            if reply.limit == "deleted_files":
                message = f"too many deleted files wait for their removal (limit {reply.maximum}); retry later"
                return LimitReached.at(reply.limit, message, retry_after_s=60)
            noun = NOUNS.get(reply.limit, reply.limit.replace("_", " "))
            remedy = "delete versions" if reply.limit == "registry_bytes" else "delete some or ask an admin to raise it"
            message = f"too many {noun} (limit {reply.maximum}); {remedy}"
            return LimitReached.at(reply.limit, message, retry_after_s=60)
        case "aliases_full":
            message = f"too many aliases of this task (limit {MAX_ALIASES}); delete some"
            return LimitReached.at("alias", message, retry_after_s=60)
        case "removing":
            return Unavailable(
                "Cannot register: the store is removing an old copy of this file. Try again.", retry_after_s=2
            )
        case "unstaged":
            return Unavailable(f"Cannot import: the registry took more than {STAGED_S} s. Retry later.")
    return None
