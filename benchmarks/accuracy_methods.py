"""Methods of the accuracy benchmark: one model per method on the same frozen backbone, and its parameter groups.

KARST is `adapters.attach`. LoRA and LoKr are those of Hugging Face's peft on the same sites. Their ranks give the
number of parameters nearest to KARST's default (N = 2, r = 8, re-scaling per channel). Bias tuning trains every bias,
and full fine-tuning trains all parameters. Methods without training (`HEADS`) have no model here. This module does not
train.
"""

import copy
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any, Literal

import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from adapters import Backbone, KarstConfig, Site, attach
from adapters.backbone import features
from adapters.method.karst import KarstLayer, new_head
from adapters.training.instant import InstantHead

DEFAULT = KarstConfig(kernels=2, rank=8, rescale="channel")
INSTANT, PROBE, NEIGHBOURS = HEADS = ("instant", "linear probe", "kNN")
KARST, PAPER = "KARST", "KARST (paper)"


@dataclass(frozen=True)
class Method:
    """One way to train an adapter.

    Attributes:
        kind: the model.
        rates: learning rates of the search; every method has two.
        config: of KARST.
        head: start of the head. A random head has the learning rate of the adapter.
        head_scale: factor of the instant head at the start.
        b_rate: learning rate of KARST's B, relative to the others.
        start_scale: factor of KARST's initial C and A.
        decay: weight decay; None is a tenth of the learning rate.
        orthogonal: whether the kernels' C start orthogonal to each other.
        drop_path: rate of stochastic depth.
    """

    kind: Literal["KARST", "LoRA", "LoKr", "bias", "full"]
    rates: tuple[float, float] = (1e-3, 4e-3)
    config: KarstConfig = DEFAULT
    head: Literal["instant", "random"] = "instant"
    head_scale: float = 1.0
    b_rate: float = 1.0
    start_scale: float = 1.0
    decay: float | None = 1e-4
    orthogonal: bool = False
    drop_path: float = 0.0


def _gain(value: float, kernels: int = 2) -> KarstConfig:
    return DEFAULT.model_copy(update={"gain": value, "kernels": kernels})


TRAINED = MappingProxyType(
    {
        KARST: Method("KARST", config=_gain(0.5)),
        "LoRA": Method("LoRA"),
        "LoKr": Method("LoKr"),
        PAPER: Method("KARST", config=_gain(1 / 8), head="random", decay=None, drop_path=0.1),
        "bias": Method("bias"),
        "full": Method("full", rates=(3e-5, 1e-4)),
    }
)
ADAPTERS, OTHERS = (KARST, "LoKr", "LoRA"), (PAPER, "bias", "full")
# Each differs from KARST in one thing, or from another one of these.
VARIANTS = MappingProxyType(
    {
        "gain 1": Method("KARST", config=_gain(1.0)),
        "head starts x 0.3": Method("KARST", config=_gain(0.5), head_scale=0.3),
        "N = 1, gain 1": Method("KARST", config=_gain(1.0, 1)),
        "N = 8, gain 1/8": Method("KARST", config=_gain(1 / 8, 8)),
        "N = 8, gain 1/sqrt(8)": Method("KARST", config=_gain(8**-0.5, 8)),
        "no re-scaling": Method("KARST", config=_gain(0.5).model_copy(update={"rescale": "none"})),
        "rate of B x 4": Method("KARST", config=_gain(0.5), b_rate=4.0),
        "random head": Method("KARST", config=_gain(0.5), head="random"),
        "orthogonal kernels": Method("KARST", config=_gain(0.5), orthogonal=True),
        "C and A start x 2": Method("KARST", config=_gain(0.5), start_scale=2.0),
        "gain 2": Method("KARST", config=_gain(2.0)),
        "weight decay 0.1": Method("KARST", config=_gain(0.5), decay=0.1),
    }
)
METHODS = MappingProxyType({**TRAINED, **VARIANTS})


class Adapted(nn.Module):
    """A timm model with trained parts, and a linear head."""

    def __init__(self, body: Any, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.body = head, body

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, K) logits."""
        return self.head(features(self.body, pixels))


def build(method: Method, backbone: Backbone, classes: int, head: InstantHead | None = None) -> nn.Module:
    """Return a method's model before training.

    Args:
        head: start of the classifier; None: a random one.
    """
    bodies = {
        "LoRA": lambda: lora(backbone),
        "LoKr": lambda: lokr(backbone),
        "bias": lambda: bias_tuned(backbone),
        "full": lambda: unfrozen(backbone),
    }
    model: Any
    if method.kind == "KARST":
        model = attach(backbone, method.config, classes, drop_path=method.drop_path)
        _start(method, model)
    else:
        first = new_head(backbone, classes)  # before the body: otherwise one seed gives different heads
        model = Adapted(bodies[method.kind](), first)
    if head is not None and method.head == "instant":
        with torch.no_grad():
            model.head.weight.copy_(head.weight * method.head_scale)
            model.head.bias.copy_(head.bias * method.head_scale)
    return model


@torch.no_grad()
def _start(method: Method, model: nn.Module) -> None:
    """Change the initial values of KARST's factors as the method says."""
    for layer in model.modules():
        if not isinstance(layer, KarstLayer):
            continue
        if method.orthogonal:
            kernels, p, q = layer.c.shape
            size = layer.c.square().mean().sqrt()
            rows = torch.linalg.qr(layer.c.reshape(kernels, p * q).T)[0].T
            layer.c.copy_((rows * size * (p * q) ** 0.5).reshape(kernels, p, q))
        layer.c.mul_(method.start_scale)
        layer.a.mul_(method.start_scale)


def parameter_groups(method: Method, model: nn.Module, rate: float, head_rate: float) -> list[dict[str, Any]]:
    """Return the optimiser's groups; the rate of B is relative to `rate`.

    Args:
        head_rate: relative to the root mean square of the head's weights; only for a head that starts as the instant
            head.
    """
    decay = rate / 10 if method.decay is None else method.decay
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = rate
        if name.startswith("head.") and method.head == "instant":
            own = head_rate * float(model.get_parameter("head.weight").detach().square().mean().sqrt())
        elif method.kind == "KARST" and name.endswith(".b"):
            own = rate * method.b_rate
        groups.setdefault(own, []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for lr, params in groups.items()]


def trainable(model: nn.Module) -> int:
    """Return the number of trained parameters without the head, which is the same for every method."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head."))


def lora(backbone: Backbone, budget: int | None = None, gain: float = 1.0) -> Any:
    """Add peft's LoRA to KARST's sites, inside the timm model.

    Args:
        budget: target number of trained parameters; None takes that of KARST's default.
        gain: alpha / rank; peft's default ratio is 1.
    """
    ranks = lora_ranks(backbone.sites, budget or karst_count(backbone))
    alphas = {name: gain * rank for name, rank in ranks.items()}
    config = LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=alphas)
    return get_peft_model(backbone.clone(), config).base_model.model


def lokr(backbone: Backbone, budget: int | None = None, gain: float = 1.0) -> Any:
    """Add peft's LoKr to KARST's sites, factor 8, initialized as in LyCORIS and KARST, inside the timm model.

    Args:
        budget: target number of trained parameters; None takes that of KARST's default.
        gain: alpha / rank.
    """
    rank = lokr_rank(backbone.sites, budget or karst_count(backbone))
    config = LoKrConfig(
        r=rank,
        alpha=gain * rank,  # type: ignore[arg-type]  # peft only divides it by the rank
        decompose_factor=DEFAULT.factor,
        init_weights="lycoris",
        target_modules=[site.name for site in backbone.sites],
    )
    return get_peft_model(backbone.clone(), config).base_model.model


def bias_tuned(backbone: Backbone) -> Any:
    """Train every bias, also of the norm layers (BitFit, Ben Zaken et al., ACL 2022)."""
    model = backbone.clone()
    for module in model.modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            module.bias = nn.Parameter(
                bias.detach().clone()
            )  # A copy, because the clone shares the backbone's parameters.
    return model


def unfrozen(backbone: Backbone) -> Any:
    """Return a copy of the whole backbone, to be trained."""
    return copy.deepcopy(backbone.model).requires_grad_(True)


def karst_count(backbone: Backbone, config: KarstConfig = DEFAULT) -> int:
    """Return the number of KARST's trained parameters without the head."""
    return trainable(attach(backbone, config, 1))


def lora_ranks(sites: tuple[Site, ...], budget: int) -> dict[str, int]:
    """Return a rank per site, such that the total number of parameters is nearest to `budget`.

    One rank for all sites is a coarse step, so each kind of site (qkv, proj, fc1, fc2) may have one more.
    """
    kinds = sorted({_kind(site) for site in sites})
    rank_one = {kind: sum(site.d_in + site.d_out for site in sites if _kind(site) == kind) for kind in kinds}
    low = max(budget // sum(rank_one.values()), 1)
    choices = [dict(zip(kinds, ranks, strict=True)) for ranks in product((low, low + 1), repeat=len(kinds))]
    best = min(choices, key=lambda ranks: abs(sum(rank_one[k] * r for k, r in ranks.items()) - budget))
    return {site.name: best[_kind(site)] for site in sites}


def lokr_rank(sites: tuple[Site, ...], budget: int) -> int:
    """Return the rank whose number of parameters is nearest to `budget`, or the lowest of several.

    From half of a factor's side on, peft keeps that factor whole, and more rank adds no parameters.
    """
    return min(range(1, 129), key=lambda rank: abs(sum(_lokr_numbers(site, rank) for site in sites) - budget))


def _lokr_numbers(site: Site, rank: int) -> int:
    """Return the number of parameters that peft adds to one linear layer (`LoKrLayer.update_layer`)."""
    factor = DEFAULT.factor
    (p, a), (q, b) = factorization(site.d_out, factor), factorization(site.d_in, factor)
    return p * q + (a * b if rank >= max(a, b) / 2 else rank * (a + b))


def _kind(site: Site) -> str:
    return site.name.rpartition(".")[2]
