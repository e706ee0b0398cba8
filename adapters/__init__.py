"""KARST adapters for frozen timm backbones: train them, read and write their files, serve many in one batch.

The library needs torch, timm and safetensors, and no server. Training (`fit`, `Recipe`, `Watch`) needs more packages:
`pip install 'karst-hub[train]'`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import Backbone, BackboneError, load_backbone
    from .backbone_info import BackboneInfo, Site
    from .data.errors import DataError, ImageError, ImageTooLargeError
    from .format.errors import AdapterError, Problem
    from .format.file import Adapter
    from .format.layouts import LayoutCache
    from .method.config import ConfigError, KarstConfig
    from .method.karst import KarstModel, attach, extract
    from .paper.recipe import Recipe
    from .serving.answers import ImageScores, ImageTasks, Scores, Slot
    from .serving.bank import Bank, BankFullError
    from .serving.heads import Heads, HeadScores
    from .serving.limits import BankLimits
    from .serving.slot_memory import Packed
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


_MODULES = {
    ".backbone": ("Backbone", "BackboneError", "load_backbone"),
    ".backbone_info": ("BackboneInfo", "Site"),
    ".data.errors": ("DataError", "ImageError", "ImageTooLargeError"),
    ".format.errors": ("AdapterError", "Problem"),
    ".format.file": ("Adapter",),
    ".format.layouts": ("LayoutCache",),
    ".method.config": ("ConfigError", "KarstConfig"),
    ".method.karst": ("KarstModel", "attach", "extract"),
    ".paper.recipe": ("Recipe",),
    ".serving.answers": ("ImageScores", "ImageTasks", "Scores", "Slot"),
    ".serving.bank": ("Bank", "BankFullError"),
    ".serving.heads": ("HeadScores", "Heads"),
    ".serving.limits": ("BankLimits",),
    ".serving.slot_memory": ("Packed",),
    ".training.fit": ("fit",),
    ".training.progress": ("Watch",),
    ".training.trained": ("Trained",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use.

    torch and timm take seconds and hundreds of megabytes, and a process that only checks adapters needs neither.
    A process that only serves lacks the packages of training.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = found  # the next use does not come here
    return found
