"""The blocks before the first adapted one give the same for the same image every time: they are run once.

`KarstConfig.sites` may leave the first blocks of a vision transformer alone; training then starts each step at the
first block that is adapted. With the paper's settings every block is adapted, and there is nothing to keep.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..method.karst import KarstModel

# What comes after the blocks of timm's vision transformers; anything else that is trained comes before them.
_AFTER = ("norm", "fc_norm", "attn_pool")


def find_prefix(model: KarstModel, pixels: Tensor) -> "Prefix | None":
    """The prefix of a model, if it has a plain sequence of `blocks` of which the first are not adapted.

    Args:
        pixels: (1, 3, H, W), an image to try it with: models whose blocks are no plain sequence are run as a whole.
    """
    if not isinstance(getattr(model.frozen, "blocks", None), nn.Sequential | nn.ModuleList):
        return None
    paths = [path.split(".") for path in model.adapted]
    inside = [int(path[1]) for path in paths if path[0] == "blocks"]
    if not inside or min(inside) == 0 or any(path[0] not in ("blocks", *_AFTER) for path in paths):
        return None
    prefix = Prefix(model, min(inside))
    return prefix if prefix.changes_nothing(pixels) else None


class Prefix:
    """The first `count` blocks of a model, and what is left of the model without them."""

    def __init__(self, model: KarstModel, count: int) -> None:
        self.count = count
        self._model = model
        self._whole = model.frozen.blocks
        self._start = _Start()
        # The skipped blocks keep their places: some models look at a block's number.
        self._rest = nn.Sequential(*(_Skip() for _ in range(count - 1)), self._start, *list(self._whole)[count:])

    def changes_nothing(self, pixels: Tensor) -> bool:
        """Does the model say the same of an image without its first blocks?"""
        try:
            tokens = self.run(pixels)
            with torch.no_grad(), self.skipped():
                short = self._model(self.blank(tokens))
        except Exception:  # blocks that take or give something else than one tensor
            return False
        with torch.no_grad():
            return torch.allclose(short, self._model(pixels), rtol=0, atol=1e-3 * float(short.abs().max()))

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


class _Skip(nn.Module):
    """In the place of a block whose answer is not needed."""

    def forward(self, x: Tensor, *_args: Any, **_more: Any) -> Tensor:
        return x


class _Start(nn.Module):
    """In the place of the last of the first blocks: whatever comes in, the kept tokens go on."""

    tokens: Tensor

    def forward(self, _x: Tensor, *_args: Any, **_more: Any) -> Tensor:
        return self.tokens
