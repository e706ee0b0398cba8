"""The blocks before the first adapted one give the same for the same image every time: they are run once.

`KarstConfig.sites` may leave the first blocks of a vision transformer alone; training then starts each step at the
first block that is adapted. With the paper's settings every block is adapted, and there is nothing to keep.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .karst import KarstModel

# What comes after the blocks of timm's vision transformers; anything else that is trained comes before them.
_AFTER = ("norm", "fc_norm", "attn_pool")


def find_prefix(model: KarstModel) -> "Prefix | None":
    """The prefix of a model, if it has a plain sequence of `blocks` of which the first are not adapted."""
    if not isinstance(getattr(model.frozen, "blocks", None), nn.Sequential | nn.ModuleList):
        return None
    paths = [path.split(".") for path in model.adapted]
    inside = [int(path[1]) for path in paths if path[0] == "blocks"]
    if not inside or min(inside) == 0 or any(path[0] not in ("blocks", *_AFTER) for path in paths):
        return None
    return Prefix(model, min(inside))


class Prefix:
    """The first `count` blocks of a model, and what is left of the model without them."""

    def __init__(self, model: KarstModel, count: int) -> None:
        self.count = count
        self._model = model
        self._whole = model.frozen.blocks
        self._start = _Start()
        self._rest = nn.Sequential(self._start, *list(self._whole)[count:])

    def run(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> what the first adapted block is given, (B, T, D)."""
        given: list[Tensor] = []
        hook = self._whole[self.count].register_forward_pre_hook(lambda _block, args: given.append(args[0]))
        try:
            with torch.no_grad():
                self._model.eval()(pixels)
        finally:
            hook.remove()
        return given[0]

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Inside, the model goes on from the tokens given to `blank`."""
        self._model.frozen.blocks = self._rest
        try:
            yield
        finally:
            self._model.frozen.blocks = self._whole

    def blank(self, tokens: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to call the model with for these tokens; the patch embedding runs on them in vain."""
        self._start.tokens = tokens
        return tokens.new_zeros(()).expand(len(tokens), *self._model.backbone.input_size)


class _Start(nn.Module):
    """In the place of the first blocks: whatever comes in, the kept tokens go on."""

    tokens: Tensor

    def forward(self, _x: Tensor, *_args: Any, **_more: Any) -> Tensor:
        return self.tokens
