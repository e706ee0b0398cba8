"""Export of LoKr and LoRA in Hugging Face peft folders, without peft itself.

The rules follow the source of peft 0.21 (`tuners/lokr/layer.py`), like `peft.py`, which imports such folders.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone
from ..format.errors import AdapterError, Problem, file_error
from ..format.file import Adapter
from ..format.names import KRONECKER, NORM
from ..method import kronecker
from .importing import classifier_name
from .peft import PREFIX


def lokr_files(adapter: Adapter, backbone: Backbone) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of a peft LoKr folder that equals the adapter exactly.

    Raises:
        AdapterError: no LoKr equals the adapter: it has several kernels, a fused qkv, re-scaling, norms, or sides of C
            that peft cannot choose.
    """
    adapter.check(backbone)
    problems = _not_in_a_delta(adapter, "LoKr")
    layers = _kronecker_layers(adapter)
    if adapter.config.kernels > 1:
        problems.append(Problem("config", f"has {adapter.config.kernels} kernels, but a LoKr has one; use --to lora"))
    for name, (_, a, _) in layers.items():
        if a.shape[1] > 1:
            problems.append(Problem(f"{name}.karst_a", f"has {a.shape[1]} splits, but a LoKr has one; use --to lora"))
    if problems:
        raise AdapterError(problems)
    sides = {name: (c.shape[1] * a.shape[2], c.shape[2] * b.shape[2], c) for name, (c, a, b) in layers.items()}
    factor = next(
        (
            factor
            for factor in (adapter.config.factor, -1, *sorted({s for _, _, c in sides.values() for s in c.shape[1:]}))
            if all(
                (peft_side(d_out, factor), peft_side(d_in, factor)) == tuple(c.shape[1:])
                for d_out, d_in, c in sides.values()
            )
        ),
        None,
    )
    if factor is None:
        found = ", ".join(sorted({f"{c.shape[1]} x {c.shape[2]}" for _, _, c in sides.values()}))
        raise AdapterError(
            [
                Problem(
                    "config.factor",
                    f"gives C sides of {found}, which no single decompose_factor of peft gives; use --to lora",
                )
            ]
        )
    state = {}
    for name, (c, a, b) in layers.items():
        rank = b.shape[1]
        state[f"{name}.lokr_w1"] = c[0]
        if rank < max(a.shape[2], b.shape[2]) / 2:
            state |= {f"{name}.lokr_w2_a": a[0, 0], f"{name}.lokr_w2_b": b[0]}
        else:  # peft stores w2 whole for such ranks
            state[f"{name}.lokr_w2"] = (a[0, 0].double() @ b[0].double()).float()
    ranks = {name: b.shape[1] for name, (_, _, b) in layers.items()}
    gain = adapter.config.effective_gain
    config = _config("LOKR", ranks, {name: gain * rank for name, rank in ranks.items()}, backbone, alpha="alpha")
    config |= {
        "decompose_factor": factor,
        "decompose_both": False,
        "use_effective_conv2d": False,
        "rank_dropout": 0.0,
        "rank_dropout_scale": False,  # peft before 0.14 does not scale dW, and refuses a config with this field
        "module_dropout": 0.0,
        "init_weights": True,
    }
    return config, _state(adapter, state, backbone)


@dataclass(frozen=True)
class LoraErrors:
    """Ranks and relative Frobenius errors of dW of a LoRA.

    Attributes:
        ranks: rank of each layer.
        cut: whether any layer has less than its exact rank.
        overall: error over all layers together.
        largest: largest error of one layer.
        largest_layer: name of that layer.
    """

    ranks: dict[str, int]
    cut: bool
    overall: float
    largest: float
    largest_layer: str


def lora_files(
    adapter: Adapter, backbone: Backbone, rank: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], LoraErrors]:
    """Return the config and the tensors of a peft LoRA folder, and its errors.

    kron(C, A B) = kron(C, A) kron(I_q, B), so rank N q r is exact, as is the layer's smaller side.

    Args:
        rank: each layer is cut to this rank by its singular values, which is the closest; None is exact.

    Raises:
        ValueError: the rank is below 1.
        AdapterError: the adapter has re-scaling or norms, which no LoRA has.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    adapter.check(backbone)
    problems = _not_in_a_delta(adapter, "LoRA")
    if problems:
        raise AdapterError(problems)
    gain = adapter.config.effective_gain
    state: dict[str, Tensor] = {}
    ranks, errors, squares, cut = {}, {}, [0.0, 0.0], False
    for name, (c, a, b) in _kronecker_layers(adapter).items():
        c, a, b = c.double(), a.double(), b.double()
        dw = kronecker.delta(c, a, b, gain)
        up, down = _exact_lora(c, a, b, gain, dw)
        if rank is not None and rank < len(down):
            cut = True
            u, s, v = torch.linalg.svd(dw, full_matrices=False)
            roots = s[:rank].sqrt()
            up, down = u[:, :rank] * roots, roots[:, None] * v[:rank]
        up, down = up.float(), down.float()
        state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        lost, whole = (float(t.norm()) for t in (dw - up.double() @ down.double(), dw))
        ranks[name], errors[name] = len(down), lost / whole if whole else 0.0
        squares[0] += lost**2
        squares[1] += whole**2
    config = _config("LORA", ranks, {name: float(r) for name, r in ranks.items()}, backbone, alpha="lora_alpha")
    config |= {"bias": "none", "fan_in_fan_out": False, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}
    worst = max(errors, key=lambda name: errors[name])
    overall = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
    return config, _state(adapter, state, backbone), LoraErrors(ranks, cut, overall, errors[worst], worst)


def _exact_lora(c: Tensor, a: Tensor, b: Tensor, gain: float, dw: Tensor) -> tuple[Tensor, Tensor]:
    """Return (d_out, R) and (R, d_in) whose product is dW."""
    kernels, _, q = c.shape
    splits, rank = a.shape[1], b.shape[1]
    d_out, d_in = dw.shape
    if kernels * q * rank >= min(d_out, d_in):
        eye = torch.eye(min(d_out, d_in), dtype=dw.dtype)
        return (dw, eye) if d_in <= d_out else (eye, dw)
    up = [torch.cat([torch.kron(gain * c[i], a[i, s]) for s in range(splits)]) for i in range(kernels)]
    down = [torch.kron(torch.eye(q, dtype=b.dtype), b[i]) for i in range(kernels)]
    return torch.cat(up, dim=1), torch.cat(down)


def _kronecker_layers(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return C, A, B in float32 by layer.

    Raises:
        AdapterError: no layer has a dW.
    """
    found = {
        name: tuple(parts[part].float() for part in KRONECKER)
        for name, parts in adapter.layers.items()
        if KRONECKER[0] in parts
    }
    if not found:
        raise file_error("has no layer with a dW, so peft could load nothing; use --to timm or --to onnx")
    return found  # type: ignore[return-value]


def _not_in_a_delta(adapter: Adapter, method: str) -> list[Problem]:
    """Return the tensors of an adapter that are not part of any dW."""
    reasons = {
        "scale": "re-scales the whole layer, frozen weights included",
        "in_scale": "re-scales the layer's input",
        NORM[0]: "tunes a norm layer",
    }
    problems = []
    for part, reason in reasons.items():
        names = [name for name in adapter.tensors if name.rpartition(".")[2] == part]
        if names:
            others = f" (like {len(names) - 1} other tensors)" if len(names) > 1 else ""
            problems.append(
                Problem(names[0], f"{reason}{others}, which a {method} cannot do; use --to timm or --to onnx")
            )
    return problems


def peft_side(dim: int, factor: int) -> int:
    """Return the first number of peft's `factorization(dim, factor)`."""
    if factor > 0 and dim % factor == 0:
        return factor
    highest = dim if factor == -1 else factor
    return max(d for d in range(1, math.isqrt(dim) + 1) if dim % d == 0 and d <= highest)


def _config(
    kind: str, ranks: Mapping[str, int], alphas: Mapping[str, float], backbone: Backbone, *, alpha: str
) -> dict[str, Any]:
    """Return the config fields of all peft methods; r and alpha are the most frequent, patterns name the others."""
    most = max(ranks.values(), key=list(ranks.values()).count)
    usual = next(alphas[name] for name, rank in ranks.items() if rank == most)
    return {
        "peft_type": kind,
        "task_type": None,
        "base_model_name_or_path": backbone.name,
        "inference_mode": True,
        "r": most,
        alpha: usual,
        "target_modules": list(ranks),
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most},
        "alpha_pattern": {f"^{re.escape(name)}": alphas[name] for name, rank in ranks.items() if rank != most},
        "modules_to_save": [classifier_name(backbone)],
    }


def _state(adapter: Adapter, own: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    head = classifier_name(backbone)
    classifier = {f"{head}.{part}": adapter.tensors[f"head.{part}"].float() for part in ("weight", "bias")}
    return {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in {**own, **classifier}.items()}
