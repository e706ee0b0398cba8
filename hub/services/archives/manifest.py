"""`tenant.json`, the first member of a tenant's archive: tasks with their versions, aliases, sharing and settings."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...admin_schemas import TenantInfo
from ...field_types import Name, VersionNumber, Weight
from ...registry.models import DEFAULT_SETTINGS, WholeTask
from ...registry.tasks import MAX_ALIAS_HISTORY
from ...registry.versions import StoredVersion, StoredVersions
from ...schemas import LATEST, Sharing, TaskSettings, VersionInfo
from .dataset_archive import DatasetSize, ExportedDatasets

FORMAT = "karst-tenant/1"

Targets = Annotated[dict[VersionNumber, Weight], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskEntry(_Strict):
    """A task in `tenant.json`."""

    name: Name
    last_number: Annotated[int, Field(ge=0, le=10**12)]
    versions: list[VersionInfo]
    aliases: dict[Name, Targets]
    history: dict[Name, Annotated[list[Targets], Field(max_length=MAX_ALIAS_HISTORY)]]
    sharing: Sharing
    settings: TaskSettings = DEFAULT_SETTINGS
    dataset: DatasetSize | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "TaskEntry":
        numbers = [v.version for v in self.versions]
        for which, values in (("number", numbers), ("digest", [v.digest for v in self.versions])):
            if len(set(values)) < len(values):
                raise ValueError(f"two versions have the same {which}")
        if numbers and (min(numbers) < 1 or max(numbers) > self.last_number):
            raise ValueError(f"a version number is outside 1 to {self.last_number}, the last number")
        if numbers and LATEST not in self.aliases:
            raise ValueError(f"the alias {LATEST!r} is missing")
        for alias, targets in self.aliases.items():
            if alias.isdecimal() or not targets.keys() <= set(numbers):
                raise ValueError(f"alias {alias!r} is a number, or points at a missing version")
        if not self.history.keys() <= self.aliases.keys():
            raise ValueError("the history names a missing alias")
        for version in self.versions:
            if datetime.fromisoformat(version.registered).tzinfo is None:
                raise ValueError(f"the registration time of version {version.version} has no time zone")
        return self


class Manifest(_Strict):
    """The content of `tenant.json`."""

    format: Literal["karst-tenant/1"]
    tenant: Name
    limits: dict[str, Any]
    tasks: list[TaskEntry]

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: list[TaskEntry]) -> list[TaskEntry]:
        if len({t.name for t in tasks}) < len(tasks):
            raise ValueError("two tasks have the same name")
        return tasks


def manifest_parts(info: TenantInfo, entries: Mapping[str, bytes], datasets: ExportedDatasets) -> list[bytes]:
    """Return the parts of `tenant.json`.

    Args:
        entries: of tasks by name, as `task_text` returns them.
    """
    limits = info.limits.model_dump(mode="json")
    head = json.dumps({"format": FORMAT, "tenant": info.tenant, "limits": limits}, ensure_ascii=False)
    parts = [f'{head[:-1]}, "tasks": ['.encode()]
    for number, (name, entry) in enumerate(entries.items()):
        images, trainings = datasets.images.get(name, 0), datasets.trainings.counts.get(name, 0)
        dataset = {"images": images} | ({"trainings": trainings} if trainings else {})
        end = f', "dataset": {json.dumps(dataset)}}}' if images or trainings else "}"
        parts += [b", " if number else b"", entry, end.encode()]
    return [*parts, b"]}"]


def task_text(task: WholeTask) -> tuple[bytes, dict[str, int]]:
    """Return the JSON of a task without its dataset and its last brace, and the size of each version's file by digest.

    The versions' texts are not parsed: they may have 100 MB, and all tenants would wait.
    """
    stored = _stored(task)
    versions = ", ".join(version.json for version in stored)
    body: dict[str, Any] = {
        "aliases": task.aliases,
        "history": task.history,
        "sharing": task.sharing.model_dump(mode="json"),
    }
    # Only if there is something: a hub without settings, datasets or archived trainings refuses the members.
    body |= {"settings": task.settings.given()} if task.settings.given() else {}
    name, last_number = json.dumps(task.name), max([task.last_number, *task.versions])
    rest = json.dumps(body, ensure_ascii=False)[1:-1]
    entry = f'{{"name": {name}, "last_number": {last_number}, "versions": [{versions}], {rest}'
    return entry.encode(), {served.digest: served.size_bytes for served in map(StoredVersion.served, stored)}


def _stored(task: WholeTask) -> Sequence[StoredVersion]:
    """Return the versions of a task that was read from the registry."""
    return task.versions.stored() if isinstance(task.versions, StoredVersions) else []
