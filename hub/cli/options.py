"""Options that several commands share."""

from typing import Annotated

import typer

DEFAULT_URL = "http://127.0.0.1:8000"


class _EnvironmentVariables(list[str]):
    """Environment variables in order of precedence. Typer prints a plain list in Python syntax."""

    def __str__(self) -> str:
        return " or ".join(self)


_ADMIN_OR_OWNER = _EnvironmentVariables(["HUB_ADMIN_KEY", "HUB_KEY"])
Url = Annotated[str, typer.Option(envvar="HUB_URL", help="URL of the hub")]
Key = Annotated[
    str, typer.Option(envvar="HUB_KEY", help="API key; prefer HUB_KEY, since other users can read command lines")
]
OwnerKey = Annotated[str, typer.Option("--key", envvar="HUB_KEY", help="owner key of the tenant")]
TenantKey = Annotated[
    str,
    typer.Option(
        "--key",
        envvar=_ADMIN_OR_OWNER,
        help="admin key, or an owner key of the tenant",
    ),
]
AdminKey = Annotated[
    str,
    typer.Option(
        "--key",
        envvar=_ADMIN_OR_OWNER,
        help="admin key; the hub refuses the keys of tenants",
    ),
]
UnknownBelow = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="setting of the task: an image with a lower typicality is unknown"),
]
Yes = Annotated[bool, typer.Option("--yes", help="delete without a question")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for scripts")]
