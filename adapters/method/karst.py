"""The trainable form: KARST layers around a frozen backbone.

`attach` makes the model, a training loop trains it, `extract` returns the trained numbers as an `Adapter`. The model
shares the backbone's frozen weights and does not change them.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Site, features
from ..data.images import preprocess_of
from ..format.file import Adapter
from . import kronecker
from .config import ConfigError, KarstConfig
from .typicality import Typicality


class KarstModel(nn.Module):
    """A frozen backbone with KARST on its sites and a new linear head; `attach` makes it.

    Only trained numbers are registered: `parameters()` and `state_dict()` hold no frozen weight.
    """

    frozen: Any  # the cloned timm module

    def __init__(self, backbone: Backbone, config: KarstConfig, num_classes: int, drop_path: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.head = new_head(backbone, num_classes)
        self.layers = nn.ModuleDict()
        frozen = backbone.clone(drop_path=drop_path)
        modules = dict(frozen.named_modules())
        for site in config.select(backbone.sites) if config.kernels else ():
            layer = KarstLayer(site, config).to(backbone.device)
            layer.replace(modules[site.name])
            self.layers[_key(site.name)] = layer
        self.norms = nn.ModuleDict()
        for norm in config.select(backbone.norms) if config.norms else ():
            tuned = KarstNorm(modules[norm.name])
            tuned.replace(modules[norm.name])
            self.norms[_key(norm.name)] = tuned
        if config.kernels and not self.adapted:
            patterns = ", ".join(config.sites or ())
            raise ConfigError(
                f"sites is {patterns}, which matches no layer; layers are named like {backbone.sites[0].name}"
            )
        # A plain attribute: a submodule would add the frozen weights to parameters() and state_dict().
        self.__dict__["frozen"] = frozen

    def forward(self, pixels: Tensor) -> Tensor:
        """Map normalised pixels (B, 3, H, W) to logits (B, K)."""
        logits: Tensor = self.head(features(self.frozen, pixels).to(self.head.weight.dtype))
        return logits

    @property
    def adapted(self) -> tuple[str, ...]:
        """Module paths of the trained layers and norms."""
        return tuple(key.replace("/", ".") for key in (*self.layers, *self.norms))

    def train(self, mode: bool = True) -> "KarstModel":
        """Set training mode; in the frozen model it affects only the stochastic depth of adapted blocks."""
        super().train(mode)
        for path, module in self.frozen.named_modules():
            if type(module).__name__ == "DropPath":
                block = path.rpartition(".")[0] + "."
                module.train(mode and any(name.startswith(block) for name in self.adapted))
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained numbers by their names in a `karst/1` file; a scale is 1 + s1."""
        out = {"head.weight": self.head.weight, "head.bias": self.head.bias}
        for key, layer in (*self.layers.items(), *self.norms.items()):
            assert isinstance(layer, KarstLayer | KarstNorm)  # noqa: S101 (for the type checker)
            out |= {f"{key.replace('/', '.')}.{name}": tensor for name, tensor in layer.tensors().items()}
        return {name: tensor.detach() for name, tensor in out.items()}


class KarstLayer(nn.Module):
    """The trainable numbers of one adapted layer: y = (1 + s1) * ((W0 + dW) x + b0) + s2."""

    def __init__(self, site: Site, config: KarstConfig) -> None:
        super().__init__()
        self.gain = config.gain_at(site.stage)
        self.file_gain = config.effective_gain
        sizes = kronecker.shapes(
            site.d_in,
            site.d_out,
            site.splits,
            kernels=config.kernels,
            rank=config.rank_at(site.stage),
            factor=config.factor,
        )
        self.c, self.a, self.b = (nn.Parameter(torch.empty(size)) for size in sizes)
        # One matrix at a time: the initialiser computes its fan-in from a single matrix.
        for matrix in (*self.c.unbind(), *self.a.flatten(0, 1).unbind()):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        nn.init.zeros_(self.b)
        self.rescales_out = config.rescale != "none" and site.rescale_out
        self.rescales_in = config.rescale != "none" and site.rescale_in
        if self.rescales_out:
            self.s1, self.s2 = (_zeros(site.d_out if config.rescale == "channel" else 1) for _ in range(2))
        if self.rescales_in:
            self.in_s1, self.in_s2 = (_zeros(site.d_in if config.rescale == "channel" else 1) for _ in range(2))

    def replace(self, linear: nn.Linear) -> None:
        """Make a linear layer of a cloned backbone return the adapted output."""
        # A partial of a method instead of a closure: otherwise a deep copy of the model would share its numbers.
        linear.forward = partial(self._adapted, linear)  # type: ignore[method-assign]

    def tensors(self) -> dict[str, Tensor]:
        """Return names and numbers as in a `karst/1` file, whose single gain belongs to the largest rank."""
        out: dict[str, Tensor] = {
            "karst_c": self.c * (self.gain / self.file_gain),
            "karst_a": self.a,
            "karst_b": self.b,
        }
        if self.rescales_out:
            out |= {"scale": 1 + self.s1, "shift": self.s2}
        if self.rescales_in:
            out |= {"in_scale": 1 + self.in_s1, "in_shift": self.in_s2}
        return out

    def _adapted(self, linear: nn.Linear, x: Tensor) -> Tensor:
        if self.rescales_in:
            x = _rescaled(x, self.in_s1, self.in_s2)
        y = kronecker.linear(x, linear.weight, linear.bias, self.c, self.a, self.b, self.gain)
        return _rescaled(y, self.s1, self.s2) if self.rescales_out else y


class KarstNorm(nn.Module):
    """The trainable weight and bias of one norm layer, initialised with the frozen ones."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(t.detach().float().clone()) for t in (norm.weight, norm.bias))

    def replace(self, norm: nn.LayerNorm) -> None:
        """Make a norm layer of a cloned backbone use these numbers."""
        norm.weight, norm.bias = self.weight, self.bias

    def tensors(self) -> dict[str, Tensor]:
        """Return names and numbers as in a `karst/1` file."""
        return {"norm_weight": self.weight, "norm_bias": self.bias}


def new_head(backbone: Backbone, num_classes: int) -> nn.Linear:
    """Return an untrained linear head: small random weights, zero bias."""
    head = nn.Linear(backbone.width, num_classes, device=backbone.device)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def attach(backbone: Backbone, config: KarstConfig, num_classes: int, *, drop_path: float = 0.0) -> KarstModel:
    """Return a model to train: the frozen backbone with KARST on its sites and a new head for `num_classes`.

    Its initial features equal the frozen backbone's, since B, s1 and s2 are zero.

    Args:
        drop_path: rate of stochastic depth in training; 0.1 in the paper's recipe.

    Raises:
        ValueError: `num_classes` is below 1.
        ConfigError: `config.stage_ranks` has no rank for a stage of the backbone, or `config.sites` matches no layer.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return KarstModel(backbone, config, num_classes, drop_path)


def extract(
    model: KarstModel,
    labels: Sequence[str],
    *,
    preprocess: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    typicality: Typicality | None = None,
    coverage: Sequence[tuple[float, float]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """Return the trained numbers of a model as an adapter.

    Args:
        labels: K unique names, in the order of the head's rows.
        preprocess: timm data config for callers' images; None takes the backbone's own.
        metrics: JSON-able figures to store, such as the accuracy.
        typicality: of the adapted features; None stores none.
        coverage: pairs (coverage, threshold) for label sets; None stores none.
        dtype: of the tensors in the file: float32, float16 or bfloat16.

    Raises:
        AdapterError: labels or numbers are invalid, such as duplicate labels or NaN.
    """
    tensors = model.tensors() | (typicality.tensors if typicality is not None else {})
    return Adapter.create(
        {name: tensor.to(dtype).cpu().contiguous() for name, tensor in tensors.items()},
        config=model.config,
        backbone=model.backbone.name,
        fingerprint=model.backbone.fingerprint,
        labels=labels,
        preprocess=preprocess if preprocess is not None else preprocess_of(model.backbone),
        metrics=metrics,
        coverage=coverage,
    )


def _key(path: str) -> str:
    """Return a module path as a valid name of a torch submodule, which must not contain dots."""
    return path.replace(".", "/")


def _zeros(size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size))


def _rescaled(x: Tensor, s1: Tensor, s2: Tensor) -> Tensor:
    return torch.addcmul(s2.to(x.dtype), x, (1 + s1).to(x.dtype))
