"""Lua scripts that change several keys of the registry in one atomic step, and their loader.

Each script is a family of functions in `lua/`. A function takes one JSON object and returns one JSON object. Redis has
no modules for Lua, so a script is the text of its files in order: the helpers first, the family last.
"""

from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict

FOLDER = files(__package__) / "lua"


@dataclass(frozen=True)
class LuaScript:
    """A family of Lua functions. Redis gets the function's name as ARGV[1] and its argument, a JSON text, as ARGV[2].

    Attributes:
        names: of the files in `lua/`, without `.lua`; the last one defines and calls the functions.
    """

    names: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        """The script as Redis gets it."""
        return "".join(FOLDER.joinpath(f"{name}.lua").read_text("utf-8") for name in self.names)


TASKS = LuaScript(("changes", "public", "orphans", "dataset_keys", "task_hash", "sharing", "tasks"))
TENANTS = LuaScript(("changes", "public", "orphans", "dataset_keys", "task_hash", "sharing", "tenants"))
COLLECTION = LuaScript(("changes", "orphans", "collection"))
DATASETS = LuaScript(("changes", "public", "orphans", "dataset_keys", "task_hash", "dataset_records", "datasets"))
KEPT = LuaScript(("changes", "public", "orphans", "dataset_keys", "task_hash", "dataset_records", "kept"))
TRAININGS = LuaScript(("changes", "public", "orphans", "dataset_keys", "task_hash", "trainings"))
USAGE = LuaScript(("changes", "public", "orphans", "dataset_keys", "task_hash", "usage"))
READS = LuaScript(("changes", "public", "reads"))
KEYS = LuaScript(("changes", "keys"))
AUDIT = LuaScript(("changes", "audit"))
STATUS = LuaScript(("status",))
LEASES = LuaScript(("leases",))


class ChangeReply(BaseModel):
    """Reply of a function that changes the registry. Every outcome but `done` means that nothing was changed.

    Attributes:
        limit, maximum: the limit that is reached, for `limit`.
        names: what the outcome refers to: existing tasks, a missing version, an alias.
        number, created: the version's number, and whether it is new, for `done`.
        text: the stored JSON of a tenant, for `done`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    outcome: Literal[
        "done",
        "revoked",  # the caller's key was revoked in the meantime
        "absent",  # the tenant, task, version, alias or key does not exist
        "no_tenant",
        "exists",
        "limit",
        "no_tenants",  # a sharing names tenants that do not exist
        "aliases_full",
        "no_version",
        "alias_in_use",
        "no_history",
        "no_permanent_key",  # no other admin key without an expiry date exists
        "removing",  # a garbage collection removes the file
        "in_use",  # a version or dataset refers to the file, or is about to; further tasks exist; a gateway collects
        "no_image",  # the dataset has no such image
        "no_label",  # the dataset has no such label
        "labels_full",  # the dataset has the maximum number of labels
        "unstaged",  # versions of an import have expired
        "latest_moved",  # the alias `latest` has other targets than those that the caller read
        "ended",  # the job of a training was cancelled, or another gateway has it
    ]
    limit: str = ""
    maximum: int = 0
    names: tuple[str, ...] = ()
    number: int = 0
    created: bool = False
    text: str = ""
