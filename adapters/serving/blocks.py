"""The blocks of a backbone: where rows of a batch can split, the block of each site, and tokens that no layer reads.

Axes: B images, T tokens of an image, d channels, D features.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
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


def class_token_layers(model: Any, pixels: Tensor, near: Callable[[Tensor, Tensor], bool]) -> list[str]:
    """Return the layers at the end of the last block that only need the class token; none if the features need others.

    After the last softmax no token reads another one. A ViT that pools by the class token, the first one, then reads
    only this one: with twelve blocks it would spend 6 % of the pass on the others.

    Args:
        model: its linear layers are `nn.Linear`.
        pixels: (1, 3, H, W), normalised, for the probe.
        near: whether two features (1, D) are equal except for rounding.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    last = next((name for name in reversed(modules) if _BLOCK.fullmatch(name)), None)
    after = [f"{last}.attn.proj", f"{last}.norm2", "norm"]  # they compute each token by itself, as does the MLP
    if not modules.keys() >= set(after):
        return []
    pooled = watch(model, pixels, [])
    probes = (
        watch(model, pixels, [(modules[name], hook) for name in after]) for hook in (_only_first_known, _first_token)
    )
    try:
        alone = all(near(found, pooled) for found in probes)  # NaN if another token counts
    except Exception:  # layers that need the number of tokens
        return []
    mlp = [name for name in modules if name.startswith(f"{last}.mlp.") and isinstance(modules[name], nn.Linear)]
    return [*after[:2], *mlp, after[2]] if alone else []


def leave_out_other_tokens(model: Any, layers: Iterable[str]) -> None:
    """Make a model compute `class_token_layers` for the class token alone.

    Only the first token of the last block's result is then right.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name in layers:
        modules[name].register_forward_pre_hook(_first_token)


def _only_first_known(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Set all tokens (B, T, d) but the first one to NaN."""
    x = args[0].clone()
    x[:, 1:] = torch.nan
    return x, *args[1:]


def _first_token(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace the tokens (B, T, d) by the first one, (B, 1, d)."""
    return args[0][:, :1].contiguous(), *args[1:]
