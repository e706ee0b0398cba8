"""`short_repr`: one line for a dataclass that holds tensors, bytes or long lists.

The generated `__repr__` prints all of them: hundreds of kilobytes at the end of a notebook's cell.
"""

import sys
from collections.abc import Collection, Mapping, Set
from dataclasses import fields, is_dataclass
from typing import Any

MAX_CHARACTERS = 60  # of one value
MAX_ITEMS = 4  # of a list, a set or a mapping


def short_repr(self: Any) -> str:
    """Return the class and its fields, with sizes instead of large values. For use as `__repr__` of a dataclass."""
    shown = (f"{field.name}={_short(getattr(self, field.name))}" for field in fields(self) if field.repr)
    return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: object) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if _is_model(value) or is_dataclass(value):
        return f"<{type(value).__name__}>"
    if isinstance(value, Mapping | Set | tuple | list) and not _fits(value):
        return f"<{len(value):,} items>"
    text = repr(value)
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}...'" if isinstance(value, str) else f"<{type(value).__name__}>"


def _is_model(value: object) -> bool:
    torch = sys.modules.get("torch")  # not imported here: a process that only decodes images starts faster without it
    return torch is not None and isinstance(value, torch.nn.Module)


def _fits(values: Collection[Any]) -> bool:
    """Return whether a collection is short, and holds nothing but plain short values."""
    items = [*values.items()] if isinstance(values, Mapping) else [*values]
    plain = (str, int, float, bool, type(None))
    flat = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
    return len(items) <= MAX_ITEMS and all(isinstance(x, plain) for x in flat) and len(repr(values)) <= MAX_CHARACTERS
