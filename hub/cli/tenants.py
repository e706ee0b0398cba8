"""`karst-hub tenants ...`: tenants, keys, limits, use and audit; the same as the admin routes."""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..client.client import Client
from ..schemas import KeyInfo, LimitsChange, TenantInfo
from .output import AsJson, out, show, usage


class _Either(list[str]):
    """Environment variables, the first of them first; typer writes a list into its message as Python does."""

    def __str__(self) -> str:
        return " or ".join(self)


Url = Annotated[str, typer.Option(envvar="HUB_URL", help="the hub's address")]
AdminKey = Annotated[
    str,
    typer.Option(
        "--key", envvar=_Either(["HUB_ADMIN_KEY", "HUB_KEY"]), help="an admin key, or a key of the tenant's owner"
    ),
]
Tenant = Annotated[str, typer.Argument(help="name of the tenant")]
DEFAULT_URL = "http://127.0.0.1:8000"
ID_LENGTH = 16  # of a key's id
ACTION_LENGTH = len("version.register")  # the longest

app = typer.Typer(help="Tenants, their keys, limits, use and audit.", no_args_is_help=True, rich_markup_mode=None)


def _limits(**given: float | None) -> LimitsChange:
    try:
        return LimitsChange(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        usage(str(error).splitlines()[-2].strip())


@app.command("list")
def list_tenants(key: AdminKey, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List all tenants."""
    with Client(url, key) as client:
        found = client.tenants()
    if as_json:
        return show(found, True)
    table = Table("tenant", "created", "tasks at most", "requests/s", "images/s", "weight")
    for info in found.tenants:
        most = info.limits
        rates = f"{most.requests_per_second:g}", f"{most.images_per_second:g}", f"{most.weight:g}"
        table.add_row(info.tenant, _day(info.created), str(most.tasks), *rates)
    out.print(table)


@app.command()
def create(
    tenant: Tenant,
    key: AdminKey,
    requests_per_second: float | None = None,
    images_per_second: float | None = None,
    images_in_flight: int | None = None,
    tasks: int | None = None,
    versions: int | None = None,
    stored_bytes: int | None = None,
    weight: float | None = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Make a tenant, and an owner's key for it; limits that are not given are the hub's defaults."""
    limits = _limits(
        requests_per_second=requests_per_second,
        images_per_second=images_per_second,
        images_in_flight=images_in_flight,
        tasks=tasks,
        versions=versions,
        stored_bytes=stored_bytes,
        weight=weight,
    )
    with Client(url, key) as client:
        info = client.create_tenant(tenant, limits)
        made = client.create_key(tenant, "first key", role="owner")
    if as_json:
        return show({"tenant": info.model_dump(mode="json"), "key": made.model_dump(mode="json")}, True)
    out.print(f"{info.tenant}: made. Its owner's key, which is shown only now:")
    out.print(f"HUB_KEY={made.key}", soft_wrap=True)


@app.command()
def limits(
    tenant: Tenant,
    key: AdminKey,
    requests_per_second: float | None = None,
    images_per_second: float | None = None,
    images_in_flight: int | None = None,
    tasks: int | None = None,
    versions: int | None = None,
    stored_bytes: int | None = None,
    weight: float | None = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Change limits of a tenant, those that are given; with none, show them."""
    change = _limits(
        requests_per_second=requests_per_second,
        images_per_second=images_per_second,
        images_in_flight=images_in_flight,
        tasks=tasks,
        versions=versions,
        stored_bytes=stored_bytes,
        weight=weight,
    )
    with Client(url, key) as client:
        _show_tenant(
            client.change_limits(tenant, change) if change.model_fields_set else client.tenant(tenant), as_json
        )


@app.command()
def delete(
    tenant: Tenant,
    key: AdminKey,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Delete a tenant with its tasks and keys."""
    if not yes:
        try:
            typer.confirm(f"delete tenant {tenant} with all its tasks and keys?", abort=True)
        except typer.Abort:
            if sys.stdin.isatty():
                raise
            out.print()  # ends the line of the question
            usage(f"{tenant} is not deleted, since nobody said yes: give --yes where there is no terminal")
    with Client(url, key) as client:
        client.delete_tenant(tenant)
    out.print(f"{tenant}: deleted")


@app.command("usage")
def show_usage(tenant: Tenant, key: AdminKey, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """A tenant's limits and use."""
    with Client(url, key) as client:
        found = client.usage(tenant)
    if as_json:
        return show(found, True)
    most, used = found.limits.model_dump(), found.used.model_dump()
    table = Table("limit", "most", "now")
    for name, value in most.items():
        table.add_row(name, f"{value:g}" if isinstance(value, float) else str(value), str(used.get(name, "")))
    out.print(table)
    out.print(", ".join(f"{name}: {n}" for name, n in found.counted.model_dump().items()))


@app.command()
def keys(tenant: Tenant, key: AdminKey, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List a tenant's keys: what is known of them, never the keys."""
    with Client(url, key) as client:
        found = client.keys(tenant)
    _show_keys(found.keys) if not as_json else show(found, True)


@app.command()
def add_key(
    tenant: Tenant,
    name: Annotated[str, typer.Argument(help="what the key is for")],
    key: AdminKey,
    owner: Annotated[bool, typer.Option("--owner", help="may register and delete too; else it classifies")] = False,
    days: Annotated[float | None, typer.Option(min=0, help="it ends after so many days; else never")] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Make a key of a tenant; it is shown once."""
    expires = datetime.now(UTC) + timedelta(days=days) if days is not None else None
    with Client(url, key) as client:
        made = client.create_key(tenant, name, role="owner" if owner else "caller", expires=expires)
    if as_json:
        return show(made, True)
    out.print(f"key {made.id} ({made.role}); it is shown only now:")
    out.print(f"HUB_KEY={made.key}", soft_wrap=True)


@app.command()
def revoke(
    tenant: Tenant,
    id: Annotated[str, typer.Argument(help="the key's id, as `keys` lists it")],
    key: AdminKey,
    url: Url = DEFAULT_URL,
) -> None:
    """End a key, everywhere, within seconds."""
    with Client(url, key) as client:
        client.revoke_key(tenant, id)
    out.print(f"key {id}: revoked")


@app.command()
def audit(
    key: AdminKey,
    tenant: Annotated[str | None, typer.Argument(help="name of the tenant; without it the whole hub")] = None,
    after: Annotated[str | None, typer.Option(help="id of the last entry that is known")] = None,
    count: Annotated[int, typer.Option(min=1, max=1000)] = 100,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Who changed what, when and from where, oldest first."""
    with Client(url, key) as client:
        page = client.audit(tenant, after=after, count=count)
    if as_json:
        return show(page, True)
    # Two lines a row: 80 columns have no room for all of it side by side, and an id is of use only whole.
    table = Table(show_lines=True)
    table.add_column("when\n(UTC)", no_wrap=True)
    table.add_column("what\ntenant", overflow="fold", min_width=ACTION_LENGTH)
    table.add_column("who\nkey", overflow="fold", min_width=ID_LENGTH)
    table.add_column("from\ndetail", overflow="fold")
    for entry in page.entries:
        detail = ", ".join(f"{name}={value}" for name, value in entry.detail.items())
        day, time = entry.at[:10], entry.at[11:19]
        texts = f"{entry.action}\n{entry.tenant}", f"{entry.name}\n{entry.key}", f"{entry.address}\n{detail}"
        table.add_row(f"{day}\n{time}", *texts)
    out.print(table)
    if page.next is not None:
        out.print(f"more: --after {page.next}")


@app.command()
def export(
    tenant: Tenant, file: Annotated[Path, typer.Argument(help="tar to write")], key: AdminKey, url: Url = DEFAULT_URL
) -> None:
    """Write a tenant's tasks, versions, aliases and adapter files to a tar; keys are not in it."""
    with Client(url, key) as client:
        client.export_tenant(tenant, file)
    out.print(f"{file}: {file.stat().st_size} bytes")


@app.command("import")
def import_(
    tenant: Tenant, file: Annotated[Path, typer.Argument(help="tar to read")], key: AdminKey, url: Url = DEFAULT_URL
) -> None:
    """Make the tasks of an exported tenant in a tenant of this hub; all of them or none."""
    with Client(url, key) as client:
        made = client.import_tenant(tenant, file)
    out.print(f"{tenant}: {len(made.tasks)} {'task' if len(made.tasks) == 1 else 'tasks'}")


def _show_tenant(info: TenantInfo, as_json: bool) -> None:
    show(info if as_json else {"tenant": info.tenant, "created": info.created} | info.limits.model_dump(), as_json)


def _show_keys(found: list[KeyInfo]) -> None:
    table = Table()
    table.add_column("id", min_width=ID_LENGTH)  # `revoke` needs all of it
    table.add_column("name", overflow="fold")
    for column in ("role", "created", "expires", "last used"):
        table.add_column(column, no_wrap=True)
    for info in found:
        table.add_row(info.id, info.name, info.role, *map(_day, (info.created, info.expires, info.last_used)))
    out.print(table)


def _day(at: str | None) -> str:
    """Of a time (RFC 3339, UTC), short enough for a table; `--json` has the second."""
    return at[:10] if at is not None else "-"
