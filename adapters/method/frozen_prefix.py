"""Cached outputs of the frozen blocks that precede the first adapted block.

`KarstConfig.sites` may exclude the first blocks of a vision transformer. Their outputs for an image never change, so
they are computed once, and each training step starts at the first adapted block. With the paper's settings every block
is adapted, and nothing is cached.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .karst import KarstModel

MAX_PREFIX_BYTES = 4 * 1024**3  # limit on cached outputs of a frozen prefix, in memory

# Modules that follow the blocks in timm's vision transformers. Any other adapted module precedes them.
_MODULES_AFTER_BLOCKS = ("norm", "fc_norm", "attn_pool")


def find_prefix(model: KarstModel, pixels: Tensor) -> "FrozenPrefix | None":
    """Return the frozen prefix of a model, or None if its first block is adapted or its blocks cannot be skipped.

    Args:
        pixels: (1, 3, H, W) normalised, an image to verify that the shortened model computes the same.
    """
    if not isinstance(getattr(model.frozen, "blocks", None), nn.Sequential | nn.ModuleList):
        return None
    paths = [path.split(".") for path in model.adapted]
    adapted_blocks = [int(path[1]) for path in paths if path[0] == "blocks"]
    if not adapted_blocks or min(adapted_blocks) == 0:
        return None
    if any(path[0] not in ("blocks", *_MODULES_AFTER_BLOCKS) for path in paths):
        return None
    prefix = FrozenPrefix(model, min(adapted_blocks))
    return prefix if prefix.is_equivalent(pixels) else None


class FrozenPrefix:
    """The first `count` blocks of a model, and the model without them."""

    def __init__(self, model: KarstModel, count: int) -> None:
        self.count = count
        self._model = model
        self._all_blocks = model.frozen.blocks
        self._start = _CachedTokens()
        # Skipped blocks are replaced, not removed: some models look up a block's index.
        self._remaining = nn.Sequential(
            *(_Identity() for _ in range(count - 1)), self._start, *list(self._all_blocks)[count:]
        )

    def is_equivalent(self, pixels: Tensor) -> bool:
        """Return whether the model computes the same logits without its prefix, within 1e-3 of the largest logit."""
        try:
            tokens = self.run(pixels)
            with torch.no_grad(), self.skipped():
                short = self._model(self.placeholder_pixels(tokens))
        except Exception:  # blocks that take or return something other than one tensor
            return False
        with torch.no_grad():
            return torch.allclose(short, self._model(pixels), rtol=0, atol=1e-3 * float(short.abs().max()))

    def run(self, pixels: Tensor) -> Tensor:
        """Return the input of the first adapted block: (B, 3, H, W) normalised pixels -> (B, T, D) tokens."""
        inputs: list[Tensor] = []
        hook = self._all_blocks[self.count].register_forward_pre_hook(lambda _block, args: inputs.append(args[0]))
        try:
            with torch.no_grad():
                self._model.eval()(pixels)
        finally:
            hook.remove()
        return inputs[0]

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Make the model start from the tokens given to `placeholder_pixels`, inside the `with` block."""
        self._model.frozen.blocks = self._remaining
        try:
            yield
        finally:
            self._model.frozen.blocks = self._all_blocks

    def placeholder_pixels(self, tokens: Tensor) -> Tensor:
        """Set the tokens (B, T, D) and return pixels (B, 3, H, W) to call the model with.

        The patch embedding still runs on the placeholder; its output is discarded.
        """
        self._start.tokens = tokens
        return tokens.new_zeros(()).expand(len(tokens), *self._model.backbone.input_size)


class _Identity(nn.Module):
    """A replacement for a skipped block."""

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return x


class _CachedTokens(nn.Module):
    """A replacement for the last skipped block. It returns the cached tokens and ignores its input."""

    tokens: Tensor

    def forward(self, _x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return self.tokens
