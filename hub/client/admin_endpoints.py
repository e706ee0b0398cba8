"""Requests for tenants, keys, the audit log and the whole hub, in the form of `endpoints`."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from ..admin_schemas import (
    AuditPage,
    Collected,
    HubStatus,
    HubTrainingList,
    KeyList,
    LimitsChange,
    NewKey,
    NewToken,
    TenantInfo,
    TenantLimits,
    TenantList,
    Usage,
)
from ..schemas import Health, ServedBackbone, TaskList
from .replies import AnyPath, model, nothing, to_file
from .request_parts import JSON, json_body, route, set_fields, without_none
from .transport import Call, PagedCall

Model = TypeVar("Model", bound=BaseModel)

TAR = {"content-type": "application/x-tar"}


# The tenant


def backbone() -> Call[ServedBackbone]:
    """Return the hub's backbone, and the sizes of adapters that its workers accept. Any key works."""
    return Call("GET", "/v1/backbone", model(ServedBackbone))


def usage(tenant: str | None = None) -> Call[Usage]:
    """Return limits and usage of the key's tenant. An admin key needs the name of a tenant."""
    return Call("GET", "/v1/usage" if tenant is None else route("tenants", tenant, "usage"), model(Usage))


def audit(tenant: str | None = None, *, after: str | None = None, count: int = 100) -> Call[AuditPage]:
    """Return a page of the audit log, oldest entry first. Needs an owner key of the tenant or an admin key.

    Args:
        tenant: name of the tenant; None: the whole hub, which needs an admin key.
        after: `next` of the previous page.
        count: maximum number of entries.
    """
    path = "/v1/audit" if tenant is None else route("tenants", tenant, "audit")
    return Call("GET", path, model(AuditPage), params=without_none(after=after, count=count))


def tenant(name: str) -> Call[TenantInfo]:
    """Return a tenant with its limits. Needs an owner key of the tenant or an admin key."""
    return Call("GET", route("tenants", name), model(TenantInfo))


def keys(tenant: str) -> PagedCall[KeyList]:
    """List the keys of a tenant, without the secrets. Needs an owner key of the tenant or an admin key."""
    return PagedCall(Call("GET", route("tenants", tenant, "keys"), model(KeyList)), "keys")


def create_key(
    tenant: str,
    name: str,
    *,
    role: Literal["owner", "caller"] = "caller",
    expires: datetime | None = None,
    tasks: Sequence[str] | None = None,
    origins: Sequence[str] | None = None,
) -> Call[NewKey]:
    """Create a key of a tenant. Needs an owner key of the tenant or an admin key. Only the reply shows the secret.

    Args:
        name: purpose of the key, as free text.
        role: a `caller` key may only classify; an `owner` key may also manage the tenant's tasks and keys.
        expires: time with a time zone; None: never.
        tasks: the only tasks that a caller key may use; None: all.
        origins: web origins, such as `https://app.example.org`, that a caller key works from; None: any client.
    """
    bounds = {"tasks": tasks and list(tasks), "origins": origins and list(origins)}
    body = without_none(name=name, role=role, expires=expires and expires.isoformat(), **bounds)
    return _create(route("tenants", tenant, "keys"), body, NewKey)


def create_token(task: str, *, expires_s: int = 3600, origins: Sequence[str] | None = None) -> Call[NewToken]:
    """Create a token, which acts for the client's key with one task. Web pages and phones may hold it.

    Args:
        expires_s: seconds until the token expires, at most 3600.
        origins: web origins that the token works from; None: those of the key.

    Raises:
        NotFound: The tenant sees no such task.
    """
    body = without_none(task=task, expires_s=expires_s, origins=origins and list(origins))
    return _create("/v1/tokens", body, NewToken)


def revoke_key(tenant: str, id: str) -> Call[None]:
    """Revoke a key of a tenant. Needs an owner key of the tenant or an admin key."""
    return Call("DELETE", route("tenants", tenant, "keys", id), nothing)


def export_tenant(tenant: str, to: AnyPath, *, datasets: bool = True) -> Call[Path]:
    """Export a tenant with its adapter files to the tar file `to`, which appears only when complete.

    Needs an owner key of the tenant or an admin key.

    Args:
        datasets: whether to export the images of its datasets too.
    """
    return to_file(route("tenants", tenant, "export"), to, _datasets(datasets))


# The hub (needs an admin key)


def tenants() -> PagedCall[TenantList]:
    """List all tenants. Needs an admin key."""
    return PagedCall(Call("GET", "/v1/tenants", model(TenantList)), "tenants")


def create_tenant(name: str, limits: LimitsChange | TenantLimits | None = None) -> Call[TenantInfo]:
    """Create a tenant. Omitted limits have the defaults of the hub. Needs an admin key."""
    return _create("/v1/tenants", without_none(tenant=name, limits=limits and set_fields(limits)), TenantInfo)


def change_limits(tenant: str, limits: LimitsChange | TenantLimits) -> Call[TenantInfo]:
    """Change limits of a tenant. Omitted limits keep their values. Needs an admin key."""
    body = json_body({"limits": set_fields(limits)})
    return Call("PATCH", route("tenants", tenant), model(TenantInfo), headers=JSON, content=body)


def delete_tenant(name: str) -> Call[None]:
    """Delete a tenant with all its tasks and keys. Needs an admin key."""
    return Call("DELETE", route("tenants", name), nothing)


def admin_keys() -> PagedCall[KeyList]:
    """List the admin keys, without the secrets. Needs an admin key."""
    return PagedCall(Call("GET", "/v1/admin/keys", model(KeyList)), "keys")


def create_admin_key(name: str, *, expires: datetime | None = None) -> Call[NewKey]:
    """Create an admin key. Needs an admin key. Only the reply shows the secret.

    Args:
        name: purpose of the key, as free text.
        expires: time with a time zone; None: never.

    Raises:
        Conflict: `expires` is set, and no admin key without an expiry date exists yet.
    """
    return _create("/v1/admin/keys", without_none(name=name, expires=expires and expires.isoformat()), NewKey)


def revoke_admin_key(id: str) -> Call[None]:
    """Revoke an admin key. Needs an admin key.

    Raises:
        Conflict: The key is the last admin key without an expiry date.
    """
    return Call("DELETE", route("admin", "keys", id), nothing)


def import_tenant(tenant: str, file: AnyPath, *, datasets: bool = True) -> Call[TaskList]:
    """Create all tasks of a tar file from `export_tenant` in an existing tenant, or none. Needs an admin key.

    Args:
        datasets: whether to import the images of its datasets too.
    """
    path, params = route("tenants", tenant, "import"), _datasets(datasets)
    return Call("POST", path, model(TaskList), params=params, headers=TAR, upload=Path(file), idempotent=False)


def ready() -> Call[Health]:
    """Check that a worker of the hub has loaded its backbone. Needs no valid key.

    Raises:
        Unavailable: No worker answers.
    """
    return Call("GET", "/readyz", model(Health))


def status() -> Call[HubStatus]:
    """Return the current state of workers, busy tasks and active tenants, and the errors of the last hour.

    Needs an admin key.
    """
    return Call("GET", "/v1/status", model(HubStatus))


def all_trainings() -> Call[HubTrainingList]:
    """List the running, queued and last ended trainings of all tenants. Needs an admin key."""
    return Call("GET", "/v1/admin/trainings", model(HubTrainingList))


def gc(older_than_s: int = 3600) -> Call[Collected]:
    """Remove unused adapter files from the store. Needs an admin key.

    Args:
        older_than_s: keep files that a client has uploaded in the last `older_than_s` seconds.
    """
    return Call("POST", "/v1/gc", model(Collected), headers=JSON, content=json_body({"older_than_s": older_than_s}))


# Helpers


def _create(path: str, body: Mapping[str, Any], reply: type[Model]) -> Call[Model]:
    return Call("POST", path, model(reply), headers=JSON, content=json_body(body), idempotent=False)


def _datasets(carried: bool) -> dict[str, str]:
    """Return the parameters of an export or import. The default has none: an older hub refuses unknown parameters."""
    return {} if carried else {"datasets": "false"}
