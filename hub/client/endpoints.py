"""Every method of `Client` and `AsyncClient`, written once: its parameters, its words, what is sent, what comes back.

Each function makes a `Call`, or `Many` of them; no function sends one. The clients' methods take the same arguments,
and return what stands in the brackets of `Call[...]`.
"""

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from ..errors import InvalidRequest
from ..schemas import (
    LATEST,
    AuditPage,
    Classified,
    Collected,
    HubStatus,
    KeyList,
    LimitsChange,
    NewKey,
    Registered,
    Results,
    TaskInfo,
    TaskList,
    TenantInfo,
    TenantLimits,
    TenantList,
    Usage,
    VersionInfo,
)
from .image_encoding import Picture, Pictures, each, encode
from .transport import Call, Many

Model = TypeVar("Model", bound=BaseModel)
AnyPath: TypeAlias = str | os.PathLike[str]
TaskPicture: TypeAlias = "tuple[str, Picture] | tuple[str, Picture, str]"

JSON = {"content-type": "application/json"}
BINARY = {"content-type": "application/octet-stream"}
TAR = {"content-type": "application/x-tar"}


# Tasks


def tasks() -> Call[TaskList]:
    """The tenant's tasks."""
    return Call("GET", "/v1/tasks", _model(TaskList))


def task(name: str) -> Call[TaskInfo]:
    """One task with its versions and aliases; another tenant's shared one as `tenant:task`."""
    return Call("GET", _path("tasks", name), _model(TaskInfo))


def version(name: str, version: int | str = LATEST) -> Call[VersionInfo]:
    """One version of a task, by its number or an alias: its digest, labels and preprocessing."""
    return Call("GET", _path("tasks", name, "versions", str(version)), _model(VersionInfo))


def register(
    name: str,
    adapter: AnyPath | bytes | None = None,
    *,
    source: str | None = None,
    digest: str | None = None,
    alias: str | None = None,
) -> Call[Registered]:
    """Register an adapter file as a version of a task; the same bytes again are the same version.

    Args:
        adapter: the file, or its bytes.
        source: instead: where the hub itself finds the file, such as `s3://bucket/flowers.safetensors`.
        digest: with `source`: the sha256 (hex) that the file must have.
        alias: also moved to this version; `latest` always is.
    """
    path, params = _path("tasks", name, "versions"), _some(alias=alias)
    if (adapter is None) == (source is None) or (digest is not None and source is None):
        raise _refused("adapter", "give either the adapter or a source; a digest only with a source")
    if source is not None:
        body = _json(_some(source=source, digest=digest))
        return Call("POST", path, _model(Registered), params=params, headers=JSON, content=body)
    if isinstance(adapter, bytes):
        return Call("POST", path, _model(Registered), params=params, headers=BINARY, content=adapter)
    return Call("POST", path, _model(Registered), params=params, headers=BINARY, upload=Path(adapter or ""))


def download(name: str, to: AnyPath, *, version: int | str = LATEST) -> Call[Path]:
    """Write a version's adapter file to `to`, which appears when all of it is there; for its owners."""
    return _to_file(_path("tasks", name, "versions", str(version), "file"), to)


def set_alias(name: str, alias: str, targets: int | Mapping[int, int]) -> Call[TaskInfo]:
    """Point an alias at a version, or at several (a canary): version -> weight."""
    body = {"version": targets} if isinstance(targets, int) else {"weights": dict(targets)}
    return Call("PUT", _path("tasks", name, "aliases", alias), _model(TaskInfo), headers=JSON, content=_json(body))


def roll_back(name: str, alias: str) -> Call[TaskInfo]:
    """Point an alias at what it pointed at before."""
    return Call("POST", _path("tasks", name, "aliases", alias, "rollback"), _model(TaskInfo), repeatable=False)


def delete_alias(name: str, alias: str) -> Call[None]:
    """Remove an alias; its versions stay. `latest` cannot be removed."""
    return Call("DELETE", _path("tasks", name, "aliases", alias), _nothing)


def share(name: str, *, public: bool = False, tenants: Sequence[str] = ()) -> Call[TaskInfo]:
    """Let all tenants, or these, see a task and classify with it; with neither, the task is the owner's alone again."""
    body = {"public": public, "tenants": list(tenants)}
    return Call("PUT", _path("tasks", name, "sharing"), _model(TaskInfo), headers=JSON, content=_json(body))


def delete_task(name: str) -> Call[None]:
    """Unregister a task with all its versions."""
    return Call("DELETE", _path("tasks", name), _nothing)


def delete_version(name: str, version: int) -> Call[None]:
    """Unregister a version; refused (`Conflict`) while an alias points at it."""
    return Call("DELETE", _path("tasks", name, "versions", str(version)), _nothing)


# Classification


def classify(
    name: str,
    images: Pictures,
    *,
    top_k: int = 5,
    version: int | str = LATEST,
    canary_key: str | None = None,
    progress: bool = False,
) -> Many[tuple[str, bytes], Classified, Classified]:
    """Classify images with one task: any number, in calls of a bounded size, several at once.

    Args:
        name: the task; another tenant's shared one as `tenant:task`.
        images: paths, bytes of image files, PIL images, or arrays (H, W, 3) or (H, W) of uint8; taken one by one.
        top_k: labels an image, best first.
        version: a number or an alias. All images are answered by one version: the one that the first call met.
        canary_key: of an alias with several versions, the same key always meets the same one.
        progress: show a bar on stderr.

    Raises:
        InvalidImage: an image that cannot be used; `errors` names it as `images.17`, counted from 0.
    """
    pictures = each(images)

    def call(first: int, items: Sequence[tuple[str, bytes]], met: Classified | None) -> Call[Classified]:
        params: dict[str, str | int] = {"top_k": top_k, "version": version if met is None else met.version}
        path = _path("tasks", name, "classify")
        return Call("POST", path, _model(Classified), params=params, headers=_canary(canary_key), images=items)

    def join(parts: Sequence[Classified]) -> Classified:
        return parts[0].model_copy(update={"predictions": [p for part in parts for p in part.predictions]})

    def items() -> Iterator[tuple[tuple[str, bytes], int]]:
        for i, image in enumerate(pictures):
            data = encode(image, f"images.{i}")
            yield (f"images.{i}", data), len(data)

    return Many(items(), call, join, _count(pictures), progress)


def classify_inputs(
    inputs: Iterable[TaskPicture], *, top_k: int = 5, canary_key: str | None = None, progress: bool = False
) -> Many[dict[str, str], Results, Results]:
    """Classify images of several tasks: any number, in calls of a bounded size, several at once.

    Args:
        inputs: (task, image) or (task, image, version); images as in `classify`.
        top_k: labels an image, best first.
        canary_key: of an alias with several versions, the same key always meets the same one.
        progress: show a bar on stderr.
    """

    def call(first: int, items: Sequence[dict[str, str]], _met: Results | None) -> Call[Results]:
        params, headers, body = {"top_k": top_k}, JSON | _canary(canary_key), _json({"inputs": items})
        return Call("POST", "/v1/classify", _model(Results), params=params, headers=headers, content=body, first=first)

    def join(parts: Sequence[Results]) -> Results:
        return Results(results=[result for part in parts for result in part.results])

    def items() -> Iterator[tuple[dict[str, str], int]]:
        for i, given in enumerate(inputs):
            data = base64.b64encode(encode(given[1], f"inputs.{i}.image")).decode()
            version = given[2] if len(given) == 3 else LATEST
            yield {"task": given[0], "image": data, "version": version}, len(data)

    return Many(items(), call, join, _count(inputs), progress)


# The tenant


def usage(tenant: str | None = None) -> Call[Usage]:
    """Limits and use of the key's own tenant; an admin names one."""
    return Call("GET", "/v1/usage" if tenant is None else _path("tenants", tenant, "usage"), _model(Usage))


def audit(tenant: str | None = None, *, after: str | None = None, count: int = 100) -> Call[AuditPage]:
    """Who changed what, oldest first; for its owners and admins. Without a tenant: the whole hub's, for admins.

    Args:
        after: the `next` of the page before.
        count: most entries.
    """
    path = "/v1/audit" if tenant is None else _path("tenants", tenant, "audit")
    return Call("GET", path, _model(AuditPage), params=_some(after=after, count=count))


def tenant(name: str) -> Call[TenantInfo]:
    """A tenant and its limits; for its owners and admins."""
    return Call("GET", _path("tenants", name), _model(TenantInfo))


def keys(tenant: str) -> Call[KeyList]:
    """What is known of a tenant's keys; for its owners and admins."""
    return Call("GET", _path("tenants", tenant, "keys"), _model(KeyList))


def create_key(
    tenant: str, name: str, *, role: Literal["owner", "caller"] = "caller", expires: datetime | None = None
) -> Call[NewKey]:
    """Make a key of a tenant; for its owners and admins. The reply is the only place that shows it.

    Args:
        name: what it is for; any text.
        role: `caller` classifies; `owner` manages the tenant's tasks and keys too.
        expires: with a time zone; None: never.
    """
    body = _some(name=name, role=role, expires=expires and expires.isoformat())
    return _create(_path("tenants", tenant, "keys"), body, NewKey)


def revoke_key(tenant: str, id: str) -> Call[None]:
    """End a key; for the tenant's owners and admins."""
    return Call("DELETE", _path("tenants", tenant, "keys", id), _nothing)


def export_tenant(tenant: str, to: AnyPath) -> Call[Path]:
    """Write a tenant with its adapters to a tar file, which appears when all of it is there; for owners and admins."""
    return _to_file(_path("tenants", tenant, "export"), to)


# The hub: for admins


def tenants() -> Call[TenantList]:
    """All tenants; for admins, as all that follows."""
    return Call("GET", "/v1/tenants", _model(TenantList))


def create_tenant(name: str, limits: LimitsChange | TenantLimits | None = None) -> Call[TenantInfo]:
    """Make a tenant; limits that are not given are the hub's defaults."""
    return _create("/v1/tenants", _some(tenant=name, limits=limits and _set(limits)), TenantInfo)


def change_limits(tenant: str, limits: LimitsChange | TenantLimits) -> Call[TenantInfo]:
    """Change the limits that are given; the others stay."""
    body = _json({"limits": _set(limits)})
    return Call("PATCH", _path("tenants", tenant), _model(TenantInfo), headers=JSON, content=body)


def delete_tenant(name: str) -> Call[None]:
    """Delete a tenant with its tasks and keys."""
    return Call("DELETE", _path("tenants", name), _nothing)


def admin_keys() -> Call[KeyList]:
    """What is known of the admin keys."""
    return Call("GET", "/v1/admin/keys", _model(KeyList))


def create_admin_key(name: str, *, expires: datetime | None = None) -> Call[NewKey]:
    """Make an admin key. The reply is the only place that shows it.

    Args:
        name: what it is for; any text.
        expires: with a time zone; None: never. One admin key has to be without, before there can be others that end.
    """
    return _create("/v1/admin/keys", _some(name=name, expires=expires and expires.isoformat()), NewKey)


def revoke_admin_key(id: str) -> Call[None]:
    """End an admin key; the last one that never expires stays (`Conflict`)."""
    return Call("DELETE", _path("admin", "keys", id), _nothing)


def import_tenant(tenant: str, file: AnyPath) -> Call[TaskList]:
    """Make all tasks of a tar file that `export_tenant` wrote, or none, in a tenant that is there already."""
    path = _path("tenants", tenant, "import")
    return Call("POST", path, _model(TaskList), headers=TAR, upload=Path(file), repeatable=False)


def status() -> Call[HubStatus]:
    """What the hub does at this moment: workers, busy tasks, active tenants."""
    return Call("GET", "/v1/status", _model(HubStatus))


def gc(older_than_s: int = 3600) -> Call[Collected]:
    """Remove adapter files that no version names and that are older than this."""
    return Call("POST", "/v1/gc", _model(Collected), headers=JSON, content=_json({"older_than_s": older_than_s}))


# Helpers


def _create(path: str, body: Mapping[str, Any], reply: type[Model]) -> Call[Model]:
    return Call("POST", path, _model(reply), headers=JSON, content=_json(body), repeatable=False)


def _to_file(path: str, to: AnyPath) -> Call[Path]:
    return Call("GET", path, lambda _content: Path(to), to=Path(to))


def _model(kind: type[Model]) -> Callable[[bytes], Model]:
    """Reads a reply; what a newer hub adds is passed over."""
    return lambda content: kind.model_validate_json(content, extra="ignore")


def _nothing(_content: bytes) -> None:
    """Reads an empty reply."""


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()


def _set(limits: BaseModel) -> dict[str, Any]:
    return limits.model_dump(exclude_unset=True, exclude_none=True)


def _some(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _path(*names: str) -> str:
    """`/v1/...`; a name stays one step of the path, whatever is in it."""
    for name in names:
        if name in ("", ".", ".."):
            raise _refused("path", f"{name!r} is no name")
    return "/v1/" + "/".join(quote(name, safe="") for name in names)


def _canary(key: str | None) -> dict[str, str]:
    if key is None:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise _refused("canary_key", "a canary key is ASCII text, since it is sent as a header")
    return {"x-canary-key": key}


def _count(items: Iterable[Any]) -> int | None:
    return len(items) if isinstance(items, Sized) else None


def _refused(field: str, message: str) -> InvalidRequest:
    return InvalidRequest.at(field, message)
