"""`karst-hub tenants ...`: tenants, keys, limits, usage and audit log, through the admin routes."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..admin_schemas import KeyInfo, LimitsChange, TenantInfo
from ..client.client import Client
from . import tasks as cli_tasks
from .options import DEFAULT_URL, AdminKey, AsJson, TenantKey, Url, Yes
from .output import checked, confirm, day, out, show

Tenant = Annotated[str, typer.Argument(help="name of the tenant")]
RequestsPerSecond = Annotated[float | None, typer.Option(help="requests of any kind per second")]
ImagesPerSecond = Annotated[float | None, typer.Option(help="classified images per second")]
ImagesInFlight = Annotated[int | None, typer.Option(help="images of unfinished requests")]
Tasks = Annotated[int | None, typer.Option(help="number of tasks")]
Versions = Annotated[int | None, typer.Option(help="versions per task")]
StoredBytes = Annotated[int | None, typer.Option(help="bytes of the adapter files of all versions")]
Images = Annotated[int | None, typer.Option(help="images in the datasets of all tasks")]
ImageBytes = Annotated[int | None, typer.Option(help="bytes of the images in the datasets")]
Weight = Annotated[float | None, typer.Option(help="share of a busy worker relative to other tenants")]
WithoutDatasets = Annotated[
    bool, typer.Option("--without-datasets", help="leave out the images of the tenant's datasets")
]
ID_LENGTH = 16  # characters of a key's id
ACTION_LENGTH = len("version.register")  # the longest action

app = typer.Typer(
    help="Manage tenants, keys and limits; show usage and the audit log.", no_args_is_help=True, rich_markup_mode=None
)


def _limits_change(**given: float | None) -> LimitsChange:
    change: LimitsChange = checked(LimitsChange, **{n: value for n, value in given.items() if value is not None})
    return change


@app.command("list")
def list_tenants(key: AdminKey, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List all tenants."""
    with Client(url, key) as client:
        found = client.tenants()
    if as_json:
        return show(found, True)
    table = Table("tenant", "created", "max tasks", "requests/s", "images/s", "weight")
    for info in found.tenants:
        limits = info.limits
        rates = f"{limits.requests_per_second:g}", f"{limits.images_per_second:g}", f"{limits.weight:g}"
        table.add_row(info.tenant, day(info.created), str(limits.tasks), *rates)
    out.print(table)


@app.command()
def create(
    tenant: Tenant,
    key: AdminKey,
    requests_per_second: RequestsPerSecond = None,
    images_per_second: ImagesPerSecond = None,
    images_in_flight: ImagesInFlight = None,
    tasks: Tasks = None,
    versions: Versions = None,
    stored_bytes: StoredBytes = None,
    images: Images = None,
    image_bytes: ImageBytes = None,
    weight: Weight = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Create a tenant and its first owner key. Omitted limits have the defaults of the hub."""
    limits = _limits_change(
        requests_per_second=requests_per_second,
        images_per_second=images_per_second,
        images_in_flight=images_in_flight,
        tasks=tasks,
        versions=versions,
        stored_bytes=stored_bytes,
        images=images,
        image_bytes=image_bytes,
        weight=weight,
    )
    with Client(url, key) as client:
        info = client.create_tenant(tenant, limits)
        created = client.create_key(tenant, "first key", role="owner")
    if as_json:
        return show({"tenant": info.model_dump(mode="json"), "key": created.model_dump(mode="json")}, True)
    out.print(f"{info.tenant}: created. Its owner key, which the hub shows only once:")
    out.print(f"HUB_KEY={created.key}", soft_wrap=True)


@app.command()
def limits(
    tenant: Tenant,
    key: TenantKey,
    requests_per_second: RequestsPerSecond = None,
    images_per_second: ImagesPerSecond = None,
    images_in_flight: ImagesInFlight = None,
    tasks: Tasks = None,
    versions: Versions = None,
    stored_bytes: StoredBytes = None,
    images: Images = None,
    image_bytes: ImageBytes = None,
    weight: Weight = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Change the given limits of a tenant. Without any limit, show the limits."""
    change = _limits_change(
        requests_per_second=requests_per_second,
        images_per_second=images_per_second,
        images_in_flight=images_in_flight,
        tasks=tasks,
        versions=versions,
        stored_bytes=stored_bytes,
        images=images,
        image_bytes=image_bytes,
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
    yes: Yes = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Delete a tenant with all its tasks and keys."""
    if not yes:
        confirm(f"delete tenant {tenant} with all its tasks and keys?", f"tenant {tenant} was not deleted")
    with Client(url, key) as client:
        client.delete_tenant(tenant)
    out.print(f"{tenant}: deleted")


@app.command("usage")
def show_usage(tenant: Tenant, key: TenantKey, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show the limits and the usage of a tenant."""
    with Client(url, key) as client:
        cli_tasks.show_usage(client.usage(tenant), as_json)


@app.command()
def keys(tenant: Tenant, key: TenantKey, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the keys of a tenant, without the secrets."""
    with Client(url, key) as client:
        found = client.keys(tenant)
    _show_keys(found.keys) if not as_json else show(found, True)


@app.command()
def add_key(
    tenant: Tenant,
    name: Annotated[str, typer.Argument(help="purpose of the key")],
    key: TenantKey,
    owner: Annotated[
        bool,
        typer.Option(
            "--owner", help="owner key: may also register and delete; default: a caller key, which may only classify"
        ),
    ] = False,
    days: Annotated[float | None, typer.Option(min=0, help="days until the key expires; default: never")] = None,
    task: Annotated[list[str] | None, typer.Option(help="the only task that the key may use; repeatable")] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="web origin that the key works from, such as https://app.example.org")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Create a key of a tenant. The command shows it only once."""
    expires = datetime.now(UTC) + timedelta(days=days) if days is not None else None
    with Client(url, key) as client:
        created = client.create_key(
            tenant, name, role="owner" if owner else "caller", expires=expires, tasks=task, origins=origin
        )
    if as_json:
        return show(created, True)
    out.print(f"key {created.id} ({created.role}); the hub shows it only once:")
    out.print(f"HUB_KEY={created.key}", soft_wrap=True)


@app.command()
def revoke(
    tenant: Tenant,
    id: Annotated[str, typer.Argument(help="id of the key, from `keys`")],
    key: TenantKey,
    url: Url = DEFAULT_URL,
) -> None:
    """Revoke a key. All gateways refuse it within seconds."""
    with Client(url, key) as client:
        client.revoke_key(tenant, id)
    out.print(f"key {id}: revoked")


@app.command()
def audit(
    key: TenantKey,
    tenant: Annotated[str | None, typer.Argument(help="name of the tenant; default: the whole hub")] = None,
    after: Annotated[str | None, typer.Option(help="show entries after the entry of this id")] = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="maximum number of entries")] = 100,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Show the audit log: time, action, key, address and detail of each change, oldest first."""
    with Client(url, key) as client:
        page = client.audit(tenant, after=after, count=count)
    if as_json:
        return show(page, True)
    # Two lines per row: otherwise 80 columns would truncate the ids, which other commands need whole.
    table = Table(show_lines=True)
    table.add_column("time\n(UTC)", no_wrap=True)
    table.add_column("action\ntenant", overflow="fold", min_width=ACTION_LENGTH)
    table.add_column("name\nkey", overflow="fold", min_width=ID_LENGTH)
    table.add_column("address\ndetail", overflow="fold")
    for entry in page.entries:
        detail = ", ".join(f"{name}={value}" for name, value in entry.detail.items())
        day, time = entry.at[:10], entry.at[11:19]
        texts = f"{entry.action}\n{entry.tenant}", f"{entry.name}\n{entry.key}", f"{entry.address}\n{detail}"
        table.add_row(f"{day}\n{time}", *texts)
    out.print(table)
    if page.next is not None:
        out.print(f"more entries: --after {page.next}")


@app.command()
def export(
    tenant: Tenant,
    file: Annotated[Path, typer.Argument(help="tar file to write")],
    key: TenantKey,
    without_datasets: WithoutDatasets = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Write the tasks, versions, aliases, adapter files and datasets of a tenant to a tar file, without keys."""
    with Client(url, key) as client:
        client.export_tenant(tenant, file, datasets=not without_datasets)
    out.print(f"{file}: {file.stat().st_size} bytes")


@app.command("import")
def import_(
    tenant: Tenant,
    file: Annotated[Path, typer.Argument(help="tar file to read")],
    key: AdminKey,
    without_datasets: WithoutDatasets = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Create all tasks of an exported tenant in a tenant of this hub, or none of them."""
    with Client(url, key) as client:
        imported = client.import_tenant(tenant, file, datasets=not without_datasets)
    out.print(f"{tenant}: {len(imported.tasks)} {'task' if len(imported.tasks) == 1 else 'tasks'}")


def _show_tenant(info: TenantInfo, as_json: bool) -> None:
    show(info if as_json else {"tenant": info.tenant, "created": info.created} | info.limits.model_dump(), as_json)


def _show_keys(found: list[KeyInfo]) -> None:
    table = Table()
    table.add_column("id", min_width=ID_LENGTH)  # `revoke` needs the whole id
    table.add_column("name", overflow="fold")
    for column in ("role", "created", "expires", "last used"):
        table.add_column(column, no_wrap=True)
    for info in sorted(found, key=lambda info: (info.created, info.id)):
        table.add_row(info.id, info.name, info.role, *map(day, (info.created, info.expires, info.last_used)))
    out.print(table)
