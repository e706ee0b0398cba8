"""karst-hub's service: many tenants' KARST adapters over one frozen backbone, behind HTTP, on Ray Serve."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client.async_client import AsyncClient
    from .client.client import Client
    from .errors import HubError

__all__ = ["AsyncClient", "Client", "HubError"]

_MODULE_OF = {"AsyncClient": ".client.async_client", "Client": ".client.client", "HubError": ".errors"}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use: Serve's own processes import this package, and do not need the client."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = found  # the next use does not come here
    return found


def __dir__() -> list[str]:
    return __all__
