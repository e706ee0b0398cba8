"""Methods of the accuracy benchmark: one model per method on the same frozen backbone, with the same new head.

KARST is `adapters.attach`. LoRA and LoKr are those of Hugging Face's peft on the same sites. Their ranks give the
number of parameters nearest to KARST's default (N = 2, r = 8, re-scaling per channel). Bias tuning trains every bias,
and full fine-tuning trains all parameters. The linear probe has no model here (`benchmarks.accuracy`). This module
does not train.
"""

import copy
from itertools import product
from types import MappingProxyType
from typing import Any

from peft import LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from adapters import Backbone, KarstConfig, Site, attach
from adapters.backbone import features
from adapters.method.karst import new_head

LINEAR = "linear probe"
KARST = "KARST"
# The settings in which each KARST variant differs from the default; also the ablation.
CONFIGS = MappingProxyType(
    {
        KARST: KarstConfig(kernels=2, rank=8, rescale="channel"),
        "KARST N=1": KarstConfig(kernels=1),
        "KARST N=4": KarstConfig(kernels=4),
        "KARST N=8": KarstConfig(kernels=8),
        "KARST r=2": KarstConfig(rank=2),
        "KARST r=4": KarstConfig(rank=4),
        "KARST scalar": KarstConfig(rescale="scalar"),
        "KARST none": KarstConfig(rescale="none"),
    }
)
MAIN = (LINEAR, KARST, "LoRA", "LoKr", "bias", "full")
ABLATION = tuple(name for name in CONFIGS if name != KARST)
METHODS = MAIN + ABLATION
# Rates and gains of the search; all KARST variants use KARST's. The gain multiplies dW. In the official KARST code it
# is 1 / r = 1/8 by default; in peft alpha / r is 1. With AdamW a gain acts as a separate learning rate of dW, so the
# search tries each of the three with both.
GAINS = MappingProxyType({KARST: (0.125, 1.0), "LoRA": (0.125, 1.0), "LoKr": (0.125, 1.0)})
LEARNING_RATES = MappingProxyType(
    dict.fromkeys((KARST, "LoRA", "LoKr", "bias"), (1e-3, 3e-3, 1e-2, 3e-2)) | {"full": (1e-4, 3e-4, 1e-3, 3e-3)}
)


class Adapted(nn.Module):
    """A timm model with trained parts, and a linear head."""

    def __init__(self, body: Any, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.body = head, body

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, K) logits."""
        return self.head(features(self.body, pixels))


def build(method: str, backbone: Backbone, classes: int, gain: float | None = None) -> nn.Module:
    """Return a method's model before training: logits of a new head on the frozen backbone's features.

    Args:
        gain: factor of dW. None selects the method's default, and is the only value for methods without a dW.

    Raises:
        ValueError: `method` is not one of `METHODS`, or is the linear probe.
    """
    if method in CONFIGS:
        return attach(backbone, CONFIGS[method].model_copy(update={"gain": gain}), classes)
    bodies = {
        "LoRA": lambda: lora(backbone, gain=gain or 1.0),
        "LoKr": lambda: lokr(backbone, gain=gain or 1.0),
        "bias": lambda: bias_tuned(backbone),
        "full": lambda: unfrozen(backbone),
    }
    if method not in bodies:
        raise ValueError(f"method {method!r} has no model to build; one of {', '.join((*CONFIGS, *bodies))} has")
    head = new_head(
        backbone, classes
    )  # The head comes first, as in a KarstModel: otherwise one seed gives different heads.
    return Adapted(bodies[method](), head)


def trainable(model: nn.Module) -> int:
    """Return the number of trained parameters without the head, which is the same for every method."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head."))


def search_name(method: str) -> str:
    """Return the method whose learning rate a method uses."""
    return KARST if method in CONFIGS else method


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
        decompose_factor=CONFIGS[KARST].factor,
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


def karst_count(backbone: Backbone, config: KarstConfig = CONFIGS[KARST]) -> int:
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
    factor = CONFIGS[KARST].factor
    (p, a), (q, b) = factorization(site.d_out, factor), factorization(site.d_in, factor)
    return p * q + (a * b if rank >= max(a, b) / 2 else rank * (a + b))


def _kind(site: Site) -> str:
    return site.name.rpartition(".")[2]
