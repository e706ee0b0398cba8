"""The frozen backbone: a timm model, its fingerprint, and the sites that KARST adapts.

A loaded backbone never changes. Code that adapts it uses `Backbone.clone()`, which has its own modules and shares
every weight.
"""

import copy
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backbone_info import BackboneInfo as BackboneInfo
from .backbone_info import Norm as Norm
from .backbone_info import Site as Site
from .checkpoints import load_weights
from .short_repr import short_repr
from .timm_import import DropPath, resolve_model_data_config
from .timm_models import DEMO_NAME as DEMO_NAME
from .timm_models import BackboneError as BackboneError
from .timm_models import create_model as create_model
from .timm_models import first_line as first_line

DEMO_CHECKPOINT = Path(__file__).parent / "demo" / "backbone.safetensors"

# The last two parts of a layer's module path -> the re-scaling of that site (docs/method.md).
_ROLES = {
    "attn.qkv": {"rescale_out": False, "rescale_in": False},
    "attn.proj": {"rescale_out": True, "rescale_in": True},
    "mlp.fc1": {"rescale_out": False, "rescale_in": False},
    "mlp.fc2": {"rescale_out": True, "rescale_in": False},
    # EVA-02 has separate layers where other models have a fused one; each gets one product.
    "attn.q_proj": {"rescale_out": False, "rescale_in": False},
    "attn.k_proj": {"rescale_out": False, "rescale_in": False},
    "attn.v_proj": {"rescale_out": False, "rescale_in": False},
    "mlp.fc1_g": {"rescale_out": False, "rescale_in": False},
    "mlp.fc1_x": {"rescale_out": False, "rescale_in": False},
}
_STAGE = re.compile(r"(?:^|\.)(?:layers|stages)\.(\d+)\.")


@dataclass(frozen=True)
class Backbone(BackboneInfo):
    """A frozen timm model in eval mode, built with `num_classes=0`; its weights must not change."""

    model: Any  # nn.Module; timm's forward_features and forward_head are not in nn.Module's type

    __repr__ = short_repr

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._first_parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self._first_parameter.dtype

    @property
    def _first_parameter(self) -> Tensor:
        parameter: Tensor = next(self.model.parameters())
        return parameter

    def clone(self, drop_path: float = 0.0) -> Any:
        """Return new modules over the same weight storage, for hooks and (in training) stochastic depth.

        Args:
            drop_path: rate at the last block; it rises linearly from 0 at the first block, as in timm.
        """
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        model = copy.deepcopy(self.model, memo=shared)
        if drop_path:
            _set_drop_path(model, drop_path)
        return model


def load_backbone(
    name: str,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    pretrained: bool = True,
    image_size: int | None = None,
) -> Backbone:
    """Load a timm model, frozen, without its classifier.

    Args:
        name: `demo`, or a name for `timm.create_model`, including `hf-hub:...` and `local-dir:...`.
        checkpoint: a local `.safetensors`, `.pth`, `.pth.tar`, `.ckpt`, `.bin` (read with weights only) or Google
            `.npz` file. One of another image or patch size is resampled, with a warning in the log. None takes the
            demo's own weights, or timm's pretrained ones, which need a network or a cache.
        device: of the weights.
        dtype: of the weights, cast after the fingerprint; None keeps the loaded dtype.
        pretrained: False leaves a model without checkpoint at its random weights (benchmarks and tests).
        image_size: side of the input images in pixels; None takes the model's own. Another size resamples the
            position embedding, so the fingerprint differs.

    Raises:
        BackboneError: the name is unknown, the model does not take the image size, weights are missing or do not fit,
            or KARST cannot reach the model's linear layers.
    """
    if name == DEMO_NAME and checkpoint is None and pretrained:
        checkpoint = DEMO_CHECKPOINT
    model = create_model(name, pretrained=pretrained and checkpoint is None, image_size=image_size)
    if checkpoint is not None:
        load_weights(model, Path(checkpoint), resized=image_size is not None)
    model.eval().requires_grad_(False)
    _call_every_qkv(model)
    sites = find_sites(model)
    if not sites:
        raise BackboneError(
            f"backbone {name!r} has none of the layers that KARST adapts ({', '.join(sorted(_ROLES))}); "
            "use a vision transformer or a Swin transformer of timm"
        )
    data_config = resolve_model_data_config(model)
    found = fingerprint(model)
    model.to(device=device, dtype=dtype)
    norms = _probe(name, model, sites, tuple(data_config["input_size"]))
    return Backbone(name, found, data_config, sites, norms, int(model.num_features), model)


def features(model: Any, pixels: Tensor) -> Tensor:
    """Map normalised pixels (B, 3, H, W) to the pooled features before the classifier, (B, D)."""
    pooled: Tensor = model.forward_head(model.forward_features(pixels), pre_logits=True)
    return pooled


def watch(model: Any, pixels: Tensor, hooks: Iterable[tuple[nn.Module, Callable[[nn.Module, Any], Any]]]) -> Tensor:
    """Run a forward pass over normalised pixels (B, 3, H, W), and return the pooled features, (B, D).

    Args:
        hooks: each is called before its module runs. A value that it returns replaces the arguments of the module.
    """
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        with torch.inference_mode():
            return features(model, pixels)
    finally:
        for handle in handles:
            handle.remove()


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 (hex) over the sorted names, dtypes, shapes and bytes of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{str(data.dtype).removeprefix('torch.')}\0{tuple(data.shape)}\0".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Return the linear layers of a model that KARST adapts, recognised by their module path."""
    sites = []
    for name, module in model.named_modules():
        role = ".".join(name.split(".")[-2:])
        if (
            isinstance(module, nn.Linear) and role in _ROLES and "rel_pos" not in name
        ):  # that MLP's rows are positions, not tokens
            splits = 3 if role == "attn.qkv" and module.out_features % 3 == 0 else 1
            stage = _STAGE.search(name)
            sites.append(
                Site(
                    name,
                    module.in_features,
                    module.out_features,
                    splits,
                    **_ROLES[role],
                    stage=int(stage[1]) if stage else None,
                )
            )
    return tuple(sites)


def _call_every_qkv(model: nn.Module) -> None:
    """Make BEiT, EVA and Swin v2 with separate q and v biases call `qkv.forward`, which they bypass by default."""
    for module in model.modules():
        if getattr(module, "qkv_bias_separate", None) is False:
            setattr(module, "qkv_bias_separate", True)  # noqa: B010 (not in nn.Module's type)


def _probe(name: str, model: Any, sites: tuple[Site, ...], input_size: tuple[int, ...]) -> tuple[Norm, ...]:
    """Run one image alone and in a batch of two, and check that a bank can adapt each site (docs/method.md).

    Raises:
        BackboneError: the model bypasses a site, or a site gets the rows of several images interleaved.

    Returns:
        The norm layers that an adapter can tune.
    """
    modules = dict(model.named_modules())
    norms = [
        Norm(path, module.normalized_shape[0])
        for path, module in modules.items()
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and module.bias is not None
    ]
    weight = next(model.parameters())
    noise = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    watched = [modules[path] for path in [site.name for site in sites] + [norm.name for norm in norms]]
    alone, beside = (_inputs(model, watched, pixels) for pixels in (noise[:1], noise))

    unreached = [site.name for site in sites if len(alone[modules[site.name]]) != 1]
    if unreached:
        raise BackboneError(
            f"backbone {name!r} cannot be adapted: its forward pass does not call these layers exactly once: "
            + ", ".join(unreached)
        )
    interleaved = [
        site.name for site in sites if not _first_of_two(alone[modules[site.name]], beside[modules[site.name]])
    ]
    if interleaved:
        raise BackboneError(
            f"backbone {name!r} cannot be adapted: these layers get the rows of several images interleaved: "
            + ", ".join(interleaved)
        )
    return tuple(
        norm
        for norm in norms
        if alone[modules[norm.name]]
        and alone[modules[norm.name]][0].shape[-1] == norm.width  # otherwise the channels are on another axis
        and _first_of_two(alone[modules[norm.name]], beside[modules[norm.name]])
    )


def _inputs(model: Any, watched: list[nn.Module], pixels: Tensor) -> dict[nn.Module, list[Tensor]]:
    """Return the inputs of each watched module, one per call, in a forward pass over pixels (B, 3, H, W)."""
    given: dict[nn.Module, list[Tensor]] = {module: [] for module in watched}
    watch(model, pixels, [(module, lambda m, args: given[m].append(args[0])) for module in watched])
    return given


def _first_of_two(alone: list[Tensor], beside: list[Tensor]) -> bool:
    """Return whether the first half of the rows equals the rows of the image alone, except for rounding."""
    for own, both in zip(alone, beside, strict=True):
        if both.numel() != 2 * own.numel():
            return False
        first, whole = both.reshape(2, -1)[0].float(), own.reshape(-1).float()
        if not torch.allclose(first, whole, rtol=0, atol=0.02 * float(whole.abs().max())):
            return False
    return True


def _set_drop_path(model: nn.Module, rate: float) -> None:
    blocks = [m for m in model.modules() if hasattr(m, "drop_path1") and hasattr(m, "drop_path2")]
    for i, block in enumerate(blocks):
        block_rate = rate * i / max(len(blocks) - 1, 1)
        if block_rate:
            block.drop_path1, block.drop_path2 = DropPath(block_rate), DropPath(block_rate)
