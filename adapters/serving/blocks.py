"""The blocks of a backbone, before which rows of a batch can split, and the block that each site belongs to."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..backbone import watch

_BLOCK = re.compile(r"((layers|stages)\.\d+\.)?blocks\.\d+")


@dataclass(frozen=True)
class Blocks:
    """Blocks in the order of the forward pass.

    Attributes:
        names: module paths; empty for a backbone whose rows cannot split.
        of: block in which a site or norm layer runs, by name; -1 before block 0. A layer after the last block counts
            to the last one.
    """

    names: tuple[str, ...] = ()
    of: Mapping[str, int] = field(default_factory=dict)

    def first(self, *layers: Iterable[str]) -> int:
        """Return the first block with any of these layers; -1 before block 0, the number of blocks without layers."""
        return min((self.of.get(name, -1) for names in layers for name in names), default=len(self.names))


def find_blocks(model: Any, layers: Iterable[str], pixels: Tensor) -> Blocks:
    """Return the blocks of a timm model, found in a forward pass.

    Args:
        layers: sites and norm layers that adapters may change.
        pixels: (1, 3, H, W), normalised.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    started: list[str] = []
    of: dict[str, int] = {}

    def start(name: str, _module: nn.Module, _args: object) -> None:
        started.append(name)

    def run(name: str, _module: nn.Module, _args: object) -> None:
        of.setdefault(name, len(started) - 1)

    names = [name for name in modules if _BLOCK.fullmatch(name)]
    hooks = [(modules[name], partial(start, name)) for name in names]
    hooks += [(modules[name], partial(run, name)) for name in layers]
    watch(model, pixels, hooks)
    return Blocks(tuple(started), of) if len(set(started)) == len(started) else Blocks()
