"""A task as the registry has it, and the Redis hash that it is kept in (`scripts` has the hash's fields)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import InvalidAdapter, NotFound
from ..schemas import LATEST, Sharing, TaskInfo, TaskSummary, VersionInfo

MAX_VERSION_BYTES = 512 * 1024  # of labels, metrics and the rest of a version, which lie in the registry's memory
NOT_SHARED = Sharing()


@dataclass(frozen=True)
class Task:
    """A task as the registry has it: version number -> version, alias -> {number: weight}, both in order."""

    name: str
    versions: Mapping[int, VersionInfo]
    aliases: Mapping[str, Mapping[int, int]]
    sharing: Sharing = NOT_SHARED
    history: Mapping[str, Sequence[Mapping[int, int]]] = field(default_factory=dict)  # of each alias, oldest first
    last_number: int = 0  # the highest that was ever given; only in a dump

    @property
    def current(self) -> VersionInfo:
        """The version that `latest` points at."""
        return self.versions[max(self.aliases.get(LATEST) or self.versions)]

    def targets(self, reference: str) -> Mapping[int, int]:
        """What a version's number or an alias stands for: number -> weight.

        Raises:
            NotFound: neither a version nor an alias of this task.
        """
        number = {str(n): n for n in self.versions}.get(reference)
        if number is not None:
            return {number: 1}
        if reference in self.aliases:
            return self.aliases[reference]
        known = [*map(str, self.versions), *self.aliases]
        message = f"task {self.name!r} has no version or alias {reference!r}; it has {', '.join(known)}"
        raise NotFound.at("version", message)

    def version(self, number: int) -> VersionInfo:
        """
        Raises:
            NotFound: no such version.
        """
        return self.versions[next(iter(self.targets(str(number))))]

    def info(self) -> TaskInfo:
        return TaskInfo(
            task=self.name,
            labels=self.current.labels,
            versions=list(self.versions.values()),
            aliases={alias: dict(targets) for alias, targets in self.aliases.items()},
            sharing=self.sharing,
        )

    def summary(self) -> TaskSummary:
        aliases = {alias: dict(targets) for alias, targets in self.aliases.items()}
        latest = max(aliases[LATEST]) if LATEST in aliases else None
        return TaskSummary(task=self.name, latest=latest, classes=len(self.current.labels), aliases=aliases)


def task_not_found(task: str) -> NotFound:
    """The one answer for a task that is not there, and for one that belongs to somebody else."""
    message = f"there is no task {task!r}"
    return NotFound.at("task", message)


def parse_task(name: str, fields: Mapping[str, str]) -> Task:
    versions: dict[int, str] = {}
    aliases, history = {}, {}
    for key, value in fields.items():
        kind, _, rest = key.partition(":")
        if kind == "v":
            versions[int(rest)] = value
        elif kind == "a":
            aliases[rest] = _targets(value)
        elif kind == "h":
            history[rest] = [_targets(text) for text in json.loads(value)]
    sharing = Sharing.model_validate_json(fields["share"]) if "share" in fields else NOT_SHARED
    return Task(name, _Versions(versions), dict(sorted(aliases.items())), sharing, history)


class _Versions(Mapping[int, VersionInfo]):
    """Versions by number, each read from its JSON when it is asked for: most tasks are asked for one."""

    def __init__(self, texts: Mapping[int, str]) -> None:
        self._texts = dict(sorted(texts.items()))
        self._read: dict[int, VersionInfo] = {}

    def __getitem__(self, number: int) -> VersionInfo:
        if number not in self._read:
            self._read[number] = VersionInfo(version=number, **json.loads(self._texts[number]))
        return self._read[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


def version_body(version: VersionInfo) -> str:
    """
    Raises:
        InvalidAdapter: more than a registry keeps of one.
    """
    text = version.model_dump_json(exclude={"version"})
    if len(text) > MAX_VERSION_BYTES:
        message = f"labels and metrics take {len(text)} bytes; at most {MAX_VERSION_BYTES} are kept"
        raise InvalidAdapter.at("metrics", message)
    return text


def _targets(text: str) -> dict[int, int]:
    return {int(n): int(weight) for n, weight in sorted(json.loads(text).items(), key=lambda item: int(item[0]))}


def task_fields(task: Task) -> dict[str, str]:
    """The task's hash: what `parse_task` reads."""

    def written(targets: Mapping[int, int]) -> str:
        return json.dumps({str(n): targets[n] for n in sorted(targets)}, separators=(",", ":"))

    fields = {"share": task.sharing.model_dump_json(), "n": str(len(task.versions))}
    for number, version in task.versions.items():
        fields |= {f"v:{number}": version_body(version), f"d:{version.digest}": str(number)}
    fields |= {f"a:{alias}": written(targets) for alias, targets in task.aliases.items()}
    return fields | {f"h:{alias}": json.dumps([written(t) for t in past]) for alias, past in task.history.items()}
