"""Hugging Face peft folders: LoKr in, LoKr and LoRA out. peft itself is not needed.

A folder has `adapter_config.json` and `adapter_model.safetensors`. What is said here of peft was read in its source,
release 0.21 (`tuners/lokr/layer.py`): dW = alpha / r * kron(w1, w2), and r, alpha by regular expressions on the
layers' names.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone, Site
from ..format.errors import AdapterError, Problem, file_error
from ..format.file import Adapter
from ..format.validate import KRONECKER, NORM
from ..method import kronecker
from .importing import Layer, Numbers, classifier_name, read_json, read_tensors, take_own_weights

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LOKR = re.compile(r"(?P<layer>.+)\.lokr_(?P<part>w1|w1_a|w1_b|w2|w2_a|w2_b)")
# Options of peft that change what the numbers mean, and that its LoKr has not (or has for convolutions only).
_REFUSED = ("use_rslora", "use_dora")


def read_lokr(folder: Path, backbone: Backbone) -> Numbers:
    """The numbers of a peft LoKr folder, exactly; `decompose_both` and a whole w2 too.

    A fused qkv is one LoKr in peft and three products in `karst/1`: it becomes several kernels (`_split`).

    Raises:
        AdapterError: no such folder or files, another method than LoKr, convolutions, other layers than KARST's,
            or tensors that do not fit; each is named.
    """
    config = _read_config(folder / CONFIG)
    state = {name.removeprefix(_PREFIX): value for name, value in read_tensors(folder / WEIGHTS).items()}
    sites = {site.name: site for site in backbone.sites}
    found: dict[str, dict[str, Tensor]] = {}
    rest, problems = {}, []
    for name, value in state.items():
        match = _LOKR.fullmatch(name)
        if match and match["layer"] in sites:
            found.setdefault(match["layer"], {})[match["part"]] = value.float()
        elif match:
            problems.append(
                Problem(name, f"KARST adapts no layer {match['layer']!r} of backbone {backbone.name!r}; leave it out")
            )
        elif "lokr_" in name:
            problems.append(Problem(name, "cannot be converted: it belongs to a convolution (use_effective_conv2d)"))
        else:
            rest[name] = value
    numbers = Numbers()
    problems += take_own_weights(backbone, rest, numbers)
    for layer, parts in found.items():
        rank, alpha = (_of_layer(config, key, layer) for key in ("r", "alpha"))
        wrong = _problems(sites[layer], parts, rank)
        problems += wrong
        if not wrong:
            numbers.layers[layer] = _layer(sites[layer], parts, alpha / rank)
    if problems:
        raise AdapterError(problems)
    return numbers


def lokr_files(adapter: Adapter, backbone: Backbone) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a peft LoKr folder that computes exactly what the adapter does.

    Raises:
        AdapterError: the adapter is none: several kernels, a fused qkv, re-scaling, norms, or sides of C that peft
            would not choose.
    """
    adapter.check(backbone)
    problems = _not_in_a_delta(adapter, "LoKr")
    layers = _kronecker_layers(adapter)
    if adapter.config.kernels > 1:
        problems.append(
            Problem("config", f"has {adapter.config.kernels} kernels; a LoKr has one (LoRA takes them: --to lora)")
        )
    for name, (_, a, _) in layers.items():
        if a.shape[1] > 1:
            problems.append(
                Problem(f"{name}.karst_a", f"has {a.shape[1]} splits; a LoKr of a fused layer has one (--to lora)")
            )
    if problems:
        raise AdapterError(problems)
    sides = {name: (c.shape[1] * a.shape[2], c.shape[2] * b.shape[2], c) for name, (c, a, b) in layers.items()}
    factor = next(
        (
            factor
            for factor in (adapter.config.factor, -1, *sorted({s for _, _, c in sides.values() for s in c.shape[1:]}))
            if all(
                (_peft_side(d_out, factor), _peft_side(d_in, factor)) == tuple(c.shape[1:])
                for d_out, d_in, c in sides.values()
            )
        ),
        None,
    )
    if factor is None:
        found = ", ".join(sorted({f"{c.shape[1]} x {c.shape[2]}" for _, _, c in sides.values()}))
        raise AdapterError(
            [Problem("config.factor", f"C is {found}; peft has one decompose_factor, and none gives these sides")]
        )
    state = {}
    for name, (c, a, b) in layers.items():
        rank = b.shape[1]
        state[f"{name}.lokr_w1"] = c[0]
        if rank < max(a.shape[2], b.shape[2]) / 2:
            state |= {f"{name}.lokr_w2_a": a[0, 0], f"{name}.lokr_w2_b": b[0]}
        else:  # peft keeps w2 whole from here on
            state[f"{name}.lokr_w2"] = (a[0, 0].double() @ b[0].double()).float()
    ranks = {name: b.shape[1] for name, (_, _, b) in layers.items()}
    gain = adapter.config.effective_gain
    config = _config("LOKR", ranks, {name: gain * rank for name, rank in ranks.items()}, backbone, alpha="alpha")
    config |= {
        "decompose_factor": factor,
        "decompose_both": False,
        "use_effective_conv2d": False,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "init_weights": True,
    }
    return config, _state(adapter, state, backbone)


@dataclass(frozen=True)
class LoraErrors:
    """What a LoRA of an adapter costs: its ranks, and the relative Frobenius error of dW.

    `cut` says whether any layer has less than its exact rank; `overall` is over all layers together, `largest` that
    of the layer that suffers most.
    """

    ranks: dict[str, int]
    cut: bool
    overall: float
    largest: float
    largest_layer: str


def lora_files(
    adapter: Adapter, backbone: Backbone, rank: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], LoraErrors]:
    """The config and the tensors of a peft LoRA folder, and what it costs.

    kron(C, A B) = kron(C, A) kron(I_q, B): exact with rank N q r, or with the layer's smaller side if that is less.

    Args:
        rank: cut every layer to this rank by its singular values (the best that there is); None is exact.

    Raises:
        ValueError: a rank below 1.
        AdapterError: re-scaling (which scales W0 too) or norms, which no LoRA has.
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


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LOKR":
        raise file_error(f"{path}: peft_type is {kind!r}; only a LoKr ('LOKR') is exactly a KARST adapter")
    problems = [
        Problem(f"{CONFIG}: {name}", "is set; a LoKr with it is not converted") for name in _REFUSED if config.get(name)
    ]
    for name in ("r", "alpha"):
        values = [config.get(name), *_pattern(config, name, problems).values()]
        kinds = (int,) if name == "r" else (int, float)
        bad = [v for v in values if type(v) not in kinds or not math.isfinite(v) or (name == "r" and v < 1)]
        if bad:
            wanted = "a whole number of at least 1" if name == "r" else "a number"
            problems.append(Problem(f"{CONFIG}: {name}", f"is {bad[0]!r}; expected {wanted}"))
    if problems:
        raise AdapterError(problems)
    return config


def _pattern(config: Mapping[str, Any], name: str, problems: list[Problem]) -> dict[str, Any]:
    key = {"r": "rank_pattern", "alpha": "alpha_pattern"}[name]
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        problems.append(Problem(f"{CONFIG}: {key}", "must be an object of layer names and numbers"))
        return {}
    for expression in pattern:
        try:
            re.compile(expression)
        except re.error as error:
            problems.append(Problem(f"{CONFIG}: {key}", f"{expression!r} is no regular expression: {error}"))
    return pattern


def _of_layer(config: Mapping[str, Any], name: str, layer: str) -> float:
    """r or alpha of a layer, as peft's `get_pattern_key` finds it: the first expression that ends the name wins."""
    for expression, value in _pattern(config, name, []).items():
        if re.match(rf"(.*\.)?({expression})$", layer):
            return value
    return config[name]


def _problems(site: Site, parts: Mapping[str, Tensor], rank: float) -> list[Problem]:
    """What keeps the parts of one LoKr from being a dW of the site."""
    for side in ("w1", "w2"):
        if set(parts) & {side, f"{side}_a", f"{side}_b"} not in ({side}, {f"{side}_a", f"{side}_b"}):
            return [
                Problem(f"{site.name}.lokr_{side}", f"must be there, or else lokr_{side}_a and lokr_{side}_b; not both")
            ]
    flat = [name for name, tensor in parts.items() if tensor.ndim != 2]
    if flat:
        return [Problem(f"{site.name}.lokr_{flat[0]}", f"has shape {tuple(parts[flat[0]].shape)}, expected a matrix")]
    shapes = []
    for side in ("w1", "w2"):
        if side in parts:
            shapes.append(tuple(parts[side].shape))
            continue
        a, b = parts[f"{side}_a"], parts[f"{side}_b"]
        if a.shape[1] != b.shape[0]:
            return [Problem(f"{site.name}.lokr_{side}_b", f"has {b.shape[0]} rows, lokr_{side}_a {a.shape[1]} columns")]
        if b.shape[0] != rank:  # the gain is alpha / r
            return [Problem(f"{site.name}.lokr_{side}_b", f"has {b.shape[0]} rows, but {CONFIG} says r = {rank}")]
        shapes.append((a.shape[0], b.shape[1]))
    (p, q), (rows, columns) = shapes
    if (p * rows, q * columns) != (site.d_out, site.d_in):
        return [
            Problem(
                f"{site.name}.lokr_w1",
                f"gives a {p * rows} x {q * columns} matrix together with w2, the layer is {site.d_out} x {site.d_in}",
            )
        ]
    return []


def _layer(site: Site, parts: Mapping[str, Tensor], gain: float) -> Layer:
    c = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
    if "w2" in parts:
        w2 = parts["w2"]
        a, b = (torch.eye(len(w2)), w2) if len(w2) <= w2.shape[1] else (w2, torch.eye(w2.shape[1]))
    else:
        a, b = parts["w2_a"], parts["w2_b"]
    return _split(c, a, b, gain, site.splits)


def _split(c: Tensor, a: Tensor, b: Tensor, gain: float, splits: int) -> Layer:
    """One product over all splits, C (P, q), A (a', r), B (r, b), as kernels that stay within a split each.

    The splits' borders may cut through a block of A. Cut A into J parts that no border cuts: rows of dW are then
    P J blocks, block g with row g // J of C and part g % J of A. Split s takes P J / S blocks in a row, and those
    with part j are one kernel: its C has their rows and zeros elsewhere, its A is part j in split s and zeros in the
    others. S J kernels, 3 for a qkv if 3 divides P, else 9.
    """
    if splits == 1:
        return Layer(c[None], a[None, None], b[None], gain)
    part = math.gcd(len(a), len(c) * len(a) // splits)
    parts = a.split(part)
    blocks = len(c) * len(parts) // splits
    cs, rows = [], []
    for s in range(splits):
        block = torch.arange(s * blocks, (s + 1) * blocks)
        for j, own in enumerate(parts):
            cs.append(c[block // len(parts)] * (block % len(parts) == j)[:, None])
            rows.append(torch.stack([own if t == s else torch.zeros_like(own) for t in range(splits)]))
    return Layer(torch.stack(cs), torch.stack(rows), b.expand(len(cs), *b.shape), gain)


def _exact_lora(c: Tensor, a: Tensor, b: Tensor, gain: float, dw: Tensor) -> tuple[Tensor, Tensor]:
    """(d_out, R) and (R, d_in) whose product is dW."""
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
    """Layer -> C, A, B in float32.

    Raises:
        AdapterError: there is none.
    """
    found = {
        name: tuple(parts[part].float() for part in KRONECKER)
        for name, parts in adapter.layers.items()
        if KRONECKER[0] in parts
    }
    if not found:
        raise file_error("the adapter has no layer with a dW; there is nothing that peft could load")
    return found  # type: ignore[return-value]


def _not_in_a_delta(adapter: Adapter, what: str) -> list[Problem]:
    """Tensors of an adapter that no dW holds."""
    reasons = {
        "scale": "re-scales the whole layer, frozen weights included",
        "in_scale": "re-scales the layer's input",
        NORM[0]: "tunes a norm layer",
    }
    problems = []
    for part, reason in reasons.items():
        names = [name for name in adapter.tensors if name.rpartition(".")[2] == part]
        if names:
            others = f" (and so do {len(names) - 1} others)" if len(names) > 1 else ""
            problems.append(
                Problem(names[0], f"{reason}{others}, which a {what} cannot do; `--to timm` or `--to onnx` can")
            )
    return problems


def _peft_side(dim: int, factor: int) -> int:
    """The first of the two numbers in peft's `factorization(dim, factor)`."""
    if factor > 0 and dim % factor == 0:
        return factor
    highest = dim if factor == -1 else factor
    return max(d for d in range(1, math.isqrt(dim) + 1) if dim % d == 0 and d <= highest)


def _config(
    kind: str, ranks: Mapping[str, int], alphas: Mapping[str, float], backbone: Backbone, *, alpha: str
) -> dict[str, Any]:
    """What all methods of peft have in common; r and alpha are those of most layers, patterns name the others."""
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
    return {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in {**own, **classifier}.items()}
