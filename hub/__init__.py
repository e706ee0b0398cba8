"""karst-hub's service: many tenants' KARST adapters over one frozen backbone, behind HTTP, on Ray Serve."""

from .client import Client
from .errors import HubError

__all__ = ["Client", "HubError"]
