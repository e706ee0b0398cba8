"""KARST adapters for frozen timm backbones: train them, read and write their files, serve many in one batch.

The library needs torch, timm and safetensors, and no server. Training (`fit`, `Recipe`, `Watch`) needs more packages:
`pip install 'karst-hub[train]'`.
"""

from typing import TYPE_CHECKING, Any

from .backbone import Backbone, BackboneError, BackboneInfo, Site, load_backbone
from .data.errors import DataError, ImageError, ImageTooLargeError
from .format.errors import AdapterError, Problem
from .format.file import Adapter
from .format.layouts import LayoutCache
from .method.config import ConfigError, KarstConfig
from .method.karst import KarstModel, attach, extract
from .serving.answers import ImageScores, ImageTasks, Scores, Slot
from .serving.bank import Bank, BankFullError
from .serving.heads import Heads, HeadScores
from .serving.limits import BankLimits
from .serving.slot_memory import Packed

if TYPE_CHECKING:
    from .paper.recipe import Recipe
    from .training.fit import fit
    from .training.progress import Watch
    from .training.trained import Trained

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
    "HeadScores",
    "Heads",
    "ImageError",
    "ImageScores",
    "ImageTasks",
    "ImageTooLargeError",
    "KarstConfig",
    "KarstModel",
    "LayoutCache",
    "Packed",
    "Problem",
    "Recipe",
    "Scores",
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
    """Import the training names on first use, since a process that only serves lacks their packages."""
    if name not in ("Recipe", "Trained", "Watch", "fit"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .training import fit as fitting

    return getattr(fitting, name)
