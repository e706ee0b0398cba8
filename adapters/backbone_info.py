"""Identity and sizes of a backbone, without its weights. No torch: processes that hold no backbone import this."""

from dataclasses import dataclass
from typing import Any

from .short_repr import short_repr


@dataclass(frozen=True)
class Site:
    """One linear layer that an adapter may change.

    Attributes:
        name: module path, such as `blocks.0.attn.qkv`.
        d_in: number of input channels.
        d_out: number of output channels.
        splits: 3 for a fused qkv, 1 elsewhere.
        rescale_out: whether KARST re-scales the layer's output.
        rescale_in: whether KARST re-scales the layer's input, which is the attention context of `attn.proj`.
        stage: counted from 0 in a backbone with stages (Swin); None in others.
    """

    name: str
    d_in: int
    d_out: int
    splits: int
    rescale_out: bool
    rescale_in: bool
    stage: int | None = None


@dataclass(frozen=True)
class Norm:
    """One LayerNorm that an adapter may tune: its module path, such as `blocks.0.norm1`, and its number of channels."""

    name: str
    width: int


@dataclass(frozen=True)
class BackboneInfo:
    """Identity and sizes of a backbone, without its weights.

    Attributes:
        name: the timm name, or `demo`.
        fingerprint: SHA-256 (hex) over the sorted names, dtypes, shapes and bytes of its weights as loaded,
            before any cast, so a bank in bfloat16 accepts adapters trained in float32.
        data_config: timm's `resolve_model_data_config`: input_size, interpolation, mean, std, crop_pct, crop_mode.
        sites: the layers that KARST can adapt, in the order of the model's modules.
        norms: the norm layers that an adapter can tune, in the order of the model's modules.
        width: D, the number of pooled features.
    """

    name: str
    fingerprint: str
    data_config: dict[str, Any]
    sites: tuple[Site, ...]
    norms: tuple[Norm, ...]
    width: int

    __repr__ = short_repr

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image, in pixels."""
        channels, height, width = self.data_config["input_size"]
        return channels, height, width

    def info(self) -> "BackboneInfo":
        """Return a copy without weights, small enough to send to other processes."""
        return BackboneInfo(self.name, self.fingerprint, self.data_config, self.sites, self.norms, self.width)
