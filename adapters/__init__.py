"""KARST adapters for frozen timm backbones: train, read and write, and serve many at once.

A library of its own: torch, timm and safetensors, no server.
"""

from .backbone import Backbone, BackboneError, BackboneInfo, Site, load_backbone
from .bank import Bank, BankFullError, BankLimits
from .config import KarstConfig
from .data import DataError, ImageError, ImageTooLargeError
from .file import Adapter
from .karst import KarstModel, attach, extract
from .validate import AdapterError, Problem

__all__ = [
    "Adapter",
    "AdapterError",
    "Backbone",
    "BackboneError",
    "BackboneInfo",
    "Bank",
    "BankFullError",
    "BankLimits",
    "DataError",
    "ImageError",
    "ImageTooLargeError",
    "KarstConfig",
    "KarstModel",
    "Problem",
    "Site",
    "attach",
    "extract",
    "load_backbone",
]
