"""A task, and the Redis hash in which the registry stores it.

v:N        JSON of version N without its number
d:DIGEST   N
a:ALIAS    JSON {N: weight}: the alias's targets
h:ALIAS    JSON [JSON {N: weight}, ...]: its former targets, oldest first
s:NAME     JSON of a member of the `TaskSettings` that was set
share      JSON of the `Sharing`
n          the number of versions
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import InvalidAdapter, NotFound
from ..schemas import LATEST, Sharing, TaskInfo, TaskSettings, TaskSummary, VersionInfo

MAX_VERSION_BYTES = 512 * 1024  # of a version's JSON, which the registry holds in memory
NOT_SHARED = Sharing()
DEFAULT_SETTINGS = TaskSettings()


@dataclass(frozen=True)
class Task:
    """A task of the registry.

    Attributes:
        versions: number -> version, in order.
        aliases: alias -> {number: weight}, in order.
        history: alias -> former targets, oldest first.
        last_number: the highest number that was ever assigned; 0 outside a dump.
    """

    name: str
    versions: Mapping[int, VersionInfo]
    aliases: Mapping[str, Mapping[int, int]]
    sharing: Sharing = NOT_SHARED
    history: Mapping[str, Sequence[Mapping[int, int]]] = field(default_factory=dict)
    last_number: int = 0
    settings: TaskSettings = DEFAULT_SETTINGS

    @property
    def current(self) -> VersionInfo:
        """The version of the alias `latest`. A task without versions has none."""
        return self.versions[max(self.aliases.get(LATEST) or self.versions)]

    @property
    def labels(self) -> list[str]:
        """The labels of the current version; those of the settings for a task without versions."""
        return self.current.labels if self.versions else list(self.settings.labels)

    @cached_property
    def _named_tenants(self) -> frozenset[str]:
        return frozenset(self.sharing.tenants)

    def is_shared_with(self, tenant: str) -> bool:
        """Return whether another tenant may use the task. The time does not depend on the number of tenants."""
        return self.sharing.public or tenant in self._named_tenants

    def targets(self, reference: str) -> Mapping[int, int]:
        """Return the versions of a reference, a version's number or an alias: number -> weight.

        Raises:
            NotFound: the task has no such version or alias.
        """
        number = {str(n): n for n in self.versions}.get(reference)
        if number is not None:
            return {number: 1}
        if reference in self.aliases:
            return self.aliases[reference]
        known = [*map(str, self.versions), *self.aliases]
        if not known:
            raise NotFound.at(
                "version", f"task {self.name!r} has no version yet; train it, or register an adapter file"
            )
        message = f"task {self.name!r} has no version or alias {reference!r}; it has {', '.join(known)}"
        raise NotFound.at("version", message)

    def version(self, number: int) -> VersionInfo:
        """Return a version by its number.

        Raises:
            NotFound: the task has no such version.
        """
        return self.versions[next(iter(self.targets(str(number))))]

    def info(self) -> TaskInfo:
        """Return the task as clients see it."""
        return TaskInfo(
            task=self.name,
            labels=self.labels,
            versions=list(self.versions.values()),
            aliases={alias: dict(targets) for alias, targets in self.aliases.items()},
            sharing=self.sharing,
            unknown_below=self.settings.unknown_below,
            promote=self.settings.promote,
            keep=self.settings.keep,
        )

    def summary(self) -> TaskSummary:
        """Return the task as clients see it in a list."""
        aliases = {alias: dict(targets) for alias, targets in self.aliases.items()}
        latest = max(aliases[LATEST]) if LATEST in aliases else None
        current = self.current if self.versions else None
        return TaskSummary(
            task=self.name,
            latest=latest,
            classes=len(self.labels),
            aliases=aliases,
            accuracy=current.measured_accuracy() if current else None,
            train_images=current.train_images() if current else None,
            registered=current.registered if current else None,
        )


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
MAX_NAMED_LABELS = 5  # in a message


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


def task_not_found(task: str) -> NotFound:
    """Return the same error for a task that does not exist and for one that the client may not see."""
    return NotFound.at("task", f"there is no task {task!r}")


def parse_task(name: str, fields: Mapping[str, str]) -> Task:
    """Return the task of a Redis hash."""
    versions: dict[int, str] = {}
    aliases: dict[str, dict[int, int]] = {}
    history: dict[str, list[dict[int, int]]] = {}
    settings: dict[str, Any] = {}
    for key, value in fields.items():
        kind, _, rest = key.partition(":")
        if kind == "v":
            versions[int(rest)] = value
        elif kind == "a":
            aliases[rest] = _parse_targets(value)
        elif kind == "h":
            history[rest] = [_parse_targets(text) for text in json.loads(value)]
        elif kind == "s" and rest in TaskSettings.model_fields:  # a newer hub may have written further settings
            settings[rest] = json.loads(value)
    sharing = Sharing.model_validate_json(fields["share"]) if "share" in fields else NOT_SHARED
    return Task(
        name,
        _Versions(versions),
        dict(sorted(aliases.items())),
        sharing,
        history,
        settings=TaskSettings(**settings) if settings else DEFAULT_SETTINGS,
    )


class _Versions(Mapping[int, VersionInfo]):
    """Versions by number. Each JSON text is parsed at its first access, since most requests need one version only."""

    def __init__(self, texts: Mapping[int, str]) -> None:
        self._texts = dict(sorted(texts.items()))
        self._parsed: dict[int, VersionInfo] = {}

    def __getitem__(self, number: int) -> VersionInfo:
        if number not in self._parsed:
            self._parsed[number] = VersionInfo(version=number, **json.loads(self._texts[number]))
        return self._parsed[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


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


def setting_texts(settings: TaskSettings) -> dict[str, str]:
    """Return the stored JSON of each member that was set."""
    return {name: json.dumps(value) for name, value in settings.given().items()}


def task_fields(task: Task) -> dict[str, str]:
    """Return the Redis hash of a task, which `parse_task` reads."""
    fields = {"share": task.sharing.model_dump_json(), "n": str(len(task.versions))}
    fields |= {f"s:{name}": text for name, text in setting_texts(task.settings).items()}
    for number, version in task.versions.items():
        fields |= {f"v:{number}": version_body(version), f"d:{version.digest}": str(number)}
    fields |= {f"a:{alias}": _targets_body(targets) for alias, targets in task.aliases.items()}
    histories = {alias: [_targets_body(targets) for targets in former] for alias, former in task.history.items()}
    return fields | {f"h:{alias}": json.dumps(former) for alias, former in histories.items()}


def _parse_targets(text: str) -> dict[int, int]:
    return {int(n): int(weight) for n, weight in sorted(json.loads(text).items(), key=lambda item: int(item[0]))}


def _targets_body(targets: Mapping[int, int]) -> str:
    return json.dumps({str(n): targets[n] for n in sorted(targets)}, separators=(",", ":"))
