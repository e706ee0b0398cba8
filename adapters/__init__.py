"""KARST adapters for frozen timm backbones: train, read and write, and serve many at once.

A library of its own: torch, timm and safetensors, no server. Training (`fit`, `Recipe`, `Watch`) needs more
packages: `pip install 'karst-hub[train]'`.
"""

from typing import TYPE_CHECKING, Any

from .backbone import Backbone, BackboneError, BackboneInfo, Site, load_backbone
from .bank import Bank, BankFullError, BankLimits, Slot
from .config import ConfigError, KarstConfig
from .data import DataError, ImageError, ImageTooLargeError
from .file import Adapter
from .karst import KarstModel, attach, extract
from .problems import AdapterError, Problem
from .stacks import Packed

if TYPE_CHECKING:
    from .fitting import Trained, Watch, fit
    from .train import Recipe

__all__ = [
    "Adapter",
    "AdapterError",
    "Backbone",
    "BackboneError",
    "BackboneInfo",
    "Bank",
    "BankFullError",
    "BankLimits",
    "ConfigError",
    "DataError",
    "ImageError",
    "ImageTooLargeError",
    "KarstConfig",
    "KarstModel",
    "Packed",
    "Problem",
    "Recipe",
    "Site",
    "Slot",
    "Trained",
    "Watch",
    "attach",
    "extract",
    "fit",
    "load_backbone",
]


def __getattr__(name: str) -> Any:
    """Training's names, on first use: whoever only serves needs none of its packages."""
    if name not in ("Recipe", "Trained", "Watch", "fit"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import fitting

    return getattr(fitting, name)
