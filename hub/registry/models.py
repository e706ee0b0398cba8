"""A task, and the Redis hash in which the registry stores it.

v:N        JSON of version N without its number, up to 512 KiB; read one by one
i:N        summary of version N; absent in a version that an older hub has written
d:DIGEST   N
a:ALIAS    JSON {N: weight}: the alias's targets
h:ALIAS    JSON [JSON {N: weight}, ...]: its former targets, oldest first
s:NAME     JSON of a member of the `TaskSettings` that was set
share      JSON of the `Sharing`
n          the number of versions
b          the bytes of all fields, as the tenant's sum counts them; absent until the first change by this hub
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import NotFound
from ..schemas import LATEST, Sharing, TaskSettings, TaskSummary, VersionInfo
from .versions import StoredVersions, VersionSummary

NOT_SHARED = Sharing()
DEFAULT_SETTINGS = TaskSettings()
NO_VERSION = VersionSummary(size_bytes=0, classes=0)  # of a task without versions


@dataclass(frozen=True)
class Task:
    """A task of the registry, without the content of its versions.

    Attributes:
        digests: number of each version -> digest of its file, in order.
        aliases: alias -> {number: weight}, in order.
    """

    name: str
    digests: Mapping[int, str]
    aliases: Mapping[str, Mapping[int, int]]
    sharing: Sharing = NOT_SHARED
    settings: TaskSettings = DEFAULT_SETTINGS

    @property
    def current(self) -> int:
        """The number of the version of the alias `latest`. A task without versions has none."""
        return max(self.aliases.get(LATEST) or self.digests)

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
        number = {str(n): n for n in self.digests}.get(reference)
        if number is not None:
            return {number: 1}
        if reference in self.aliases:
            return self.aliases[reference]
        known = [*map(str, self.digests), *self.aliases]
        if not known:
            message = f"task {self.name!r} has no version yet; train it, or register an adapter file"
            raise NotFound.at("version", message)
        message = f"task {self.name!r} has no version or alias {reference!r}; it has {', '.join(known)}"
        raise NotFound.at("version", message)


@dataclass(frozen=True)
class WholeTask(Task):
    """A task with all that an import needs to make an equal one.

    Attributes:
        versions: number -> version, in order.
        history: alias -> former targets, oldest first.
        last_number: the highest number that was ever assigned.
    """

    versions: Mapping[int, VersionInfo] = field(default_factory=dict)
    history: Mapping[str, Sequence[Mapping[int, int]]] = field(default_factory=dict)
    last_number: int = 0

    def summary(self) -> TaskSummary:
        """Return the task as clients see it in a list."""
        aliases = {alias: dict(targets) for alias, targets in self.aliases.items()}
        current = VersionSummary.of(self.versions[self.current]) if self.digests else NO_VERSION
        return task_summary(self.name, aliases, current)


def task_summary(name: str, aliases: Mapping[str, dict[int, int]], current: VersionSummary) -> TaskSummary:
    """Return a task as clients see it in a list."""
    latest = max(aliases[LATEST]) if LATEST in aliases else None
    return TaskSummary(
        task=name,
        latest=latest,
        classes=current.classes,
        aliases=dict(sorted(aliases.items())),
        accuracy=current.accuracy,
        train_images=current.train_images,
        registered=current.registered,
    )


def task_not_found(task: str) -> NotFound:
    """Return the same error for a task that does not exist and for one that the client may not see."""
    return NotFound.at("task", f"there is no task {task!r}")


def parse_task(name: str, fields: Mapping[str, str]) -> Task:
    """Return the task of a Redis hash. Versions and former targets need not be among the fields."""
    digests: dict[int, str] = {}
    aliases: dict[str, dict[int, int]] = {}
    settings: dict[str, Any] = {}
    for key, value in fields.items():
        kind, _, rest = key.partition(":")
        if kind == "d":
            digests[int(value)] = rest
        elif kind == "a":
            aliases[rest] = parse_targets(value)
        elif kind == "s" and rest in TaskSettings.model_fields:  # a newer hub may have written further settings
            settings[rest] = json.loads(value)
    sharing = Sharing.model_validate_json(fields["share"]) if "share" in fields else NOT_SHARED
    return Task(
        name,
        dict(sorted(digests.items())),
        dict(sorted(aliases.items())),
        sharing,
        settings=TaskSettings(**settings) if settings else DEFAULT_SETTINGS,
    )


def whole_task(task: Task, fields: Mapping[str, str], texts: Mapping[int, str], last_number: int) -> WholeTask:
    """Return a task with its history and the texts of its versions."""
    former = {name[2:]: json.loads(text) for name, text in fields.items() if name.startswith("h:")}
    history = {alias: [parse_targets(text) for text in texts] for alias, texts in former.items()}
    return WholeTask(
        task.name,
        task.digests,
        task.aliases,
        task.sharing,
        task.settings,
        versions=StoredVersions(texts),
        history=history,
        last_number=last_number,
    )


def setting_texts(settings: TaskSettings) -> dict[str, str]:
    """Return the stored JSON of each member that was set."""
    return {name: json.dumps(value) for name, value in settings.given().items()}


def task_fields(task: WholeTask) -> dict[str, str]:
    """Return the Redis hash of a task without the texts of its versions."""
    fields = {"share": task.sharing.model_dump_json(), "n": str(len(task.versions))}
    fields |= {f"s:{name}": text for name, text in setting_texts(task.settings).items()}
    for number, version in task.versions.items():
        fields |= {f"d:{version.digest}": str(number), f"i:{number}": VersionSummary.of(version).text()}
    fields |= {f"a:{alias}": _targets_body(targets) for alias, targets in task.aliases.items()}
    histories = {alias: [_targets_body(targets) for targets in former] for alias, former in task.history.items()}
    return fields | {f"h:{alias}": json.dumps(former) for alias, former in histories.items()}


def parse_targets(text: str) -> dict[int, int]:
    """Return an alias's targets, which are stored as JSON: number -> weight, in order."""
    return {int(n): int(weight) for n, weight in sorted(json.loads(text).items(), key=lambda item: int(item[0]))}


def _targets_body(targets: Mapping[int, int]) -> str:
    return json.dumps({str(n): targets[n] for n in sorted(targets)}, separators=(",", ":"))


def choose_version(task: Task, reference: str, canary: str | None = None) -> int:
    """Return the version of a number or an alias. If an alias has several versions, draw one by weight.

    The draw is random, or a hash of `canary`. Versions divide the range from 0 to the sum of weights in order, so a
    canary version whose weight grows keeps the callers that it had.
    """
    targets = task.targets(reference)
    if len(targets) == 1:
        return next(iter(targets))
    total = sum(targets.values())
    if canary is None:
        at = random.randrange(total)  # noqa: S311
    else:
        at = int.from_bytes(hashlib.sha256(f"{task.name}/{canary}".encode()).digest()) * total >> 256
    for number, weight in targets.items():  # noqa: B007
        at -= weight
        if at < 0:
            break
    return number
