"""karst-hub's service: many tenants' KARST adapters over one frozen backbone, behind HTTP, on Ray Serve."""

from .client.async_client import AsyncClient
from .client.client import Client
from .errors import HubError

__all__ = ["AsyncClient", "Client", "HubError"]
