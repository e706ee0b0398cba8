"""Import of LoKr and export of LoKr and LoRA in Hugging Face peft folders, without peft itself.

A folder has `adapter_config.json` and `adapter_model.safetensors`. The rules follow the source of peft 0.21
(`tuners/lokr/layer.py`): dW = alpha / r * kron(w1, w2), with r and alpha by regular expressions on the layers' names.
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
from .importing import ImportedTensors, KroneckerLayer, classifier_name, read_json, read_tensors, take_model_weights

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LOKR = re.compile(r"(?P<layer>.+)\.lokr_(?P<part>w1|w1_a|w1_b|w2|w2_a|w2_b)")
# Options of peft that change the meaning of the numbers and that no linear LoKr has.
_REFUSED = ("use_rslora", "use_dora")


def read_lokr(folder: Path, backbone: Backbone) -> ImportedTensors:
    """Return the tensors of a peft LoKr folder without approximation, including `decompose_both` and a whole w2.

    A fused qkv is one LoKr in peft and three products in `karst/1`, so it becomes several kernels (`_split`).

    Raises:
        AdapterError: a file is missing, the method is not LoKr, a layer is a convolution or not adapted by KARST, or a
            tensor does not fit.
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
                Problem(
                    name, f"KARST adapts no layer {match['layer']!r} of backbone {backbone.name!r}; train without it"
                )
            )
        elif "lokr_" in name:
            problems.append(
                Problem(
                    name,
                    "belongs to a convolution (use_effective_conv2d), which KARST does not adapt; train without it",
                )
            )
        else:
            rest[name] = value
    imported = ImportedTensors()
    problems += take_model_weights(backbone, rest, imported)
    for layer, parts in found.items():
        rank, alpha = (_of_layer(config, key, layer) for key in ("r", "alpha"))
        wrong = _problems(sites[layer], parts, rank)
        problems += wrong
        if not wrong:
            imported.layers[layer] = _layer(sites[layer], parts, alpha / rank)
    if problems:
        raise AdapterError(problems)
    return imported


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


def _read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LOKR":
        raise file_error(
            f"{path}: peft_type is {kind!r}; expected 'LOKR', the one method that is exactly a KARST adapter"
        )
    problems = [
        Problem(f"{CONFIG}: {name}", "is set, which no linear LoKr supports; unset it and train again")
        for name in _REFUSED
        if config.get(name)
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
        problems.append(Problem(f"{CONFIG}: {key}", "must be a JSON object of layer names and numbers"))
        return {}
    for expression in pattern:
        try:
            re.compile(expression)
        except re.error as error:
            problems.append(
                Problem(f"{CONFIG}: {key}", f"{expression!r} is not a regular expression ({error}); correct it")
            )
    return pattern


def _of_layer(config: Mapping[str, Any], name: str, layer: str) -> float:
    """Return r or alpha of a layer, like peft's `get_pattern_key`: the first expression that ends the name wins."""
    for expression, value in _pattern(config, name, []).items():
        if re.match(rf"(.*\.)?({expression})$", layer):
            return float(value)
    return float(config[name])


def _problems(site: Site, parts: Mapping[str, Tensor], rank: float) -> list[Problem]:
    """Return the first problem of a LoKr's tensors for the site."""
    for side in ("w1", "w2"):
        if set(parts) & {side, f"{side}_a", f"{side}_b"} not in ({side}, {f"{side}_a", f"{side}_b"}):
            return [
                Problem(
                    f"{site.name}.lokr_{side}",
                    f"is missing or duplicate; store lokr_{side}, or lokr_{side}_a and lokr_{side}_b",
                )
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
            return [
                Problem(
                    f"{site.name}.lokr_{side}_b", f"has {b.shape[0]} rows, but lokr_{side}_a has {a.shape[1]} columns"
                )
            ]
        if b.shape[0] != rank:  # the gain is alpha / r
            return [Problem(f"{site.name}.lokr_{side}_b", f"has {b.shape[0]} rows, but {CONFIG} says r = {rank}")]
        shapes.append((a.shape[0], b.shape[1]))
    (p, q), (rows, columns) = shapes
    if (p * rows, q * columns) != (site.d_out, site.d_in):
        return [
            Problem(
                f"{site.name}.lokr_w1",
                f"gives a {p * rows} x {q * columns} matrix with w2, but the layer is {site.d_out} x {site.d_in}",
            )
        ]
    return []


def _layer(site: Site, parts: Mapping[str, Tensor], gain: float) -> KroneckerLayer:
    c = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
    if "w2" in parts:
        w2 = parts["w2"]
        a, b = (torch.eye(len(w2)), w2) if len(w2) <= w2.shape[1] else (w2, torch.eye(w2.shape[1]))
    else:
        a, b = parts["w2_a"], parts["w2_b"]
    return _split(c, a, b, gain, site.splits)


def _split(c: Tensor, a: Tensor, b: Tensor, gain: float, splits: int) -> KroneckerLayer:
    """Return one product over all splits, C (P, q), A (a', r), B (r, b), as kernels within one split each.

    The splits' borders may cut through a block of A. So A is cut into J parts that no border cuts. The rows of dW are
    then P J blocks: block g has row g // J of C and part g % J of A. Split s has P J / S consecutive blocks, and its
    blocks with part j are one kernel. The kernel's C has their rows and zeros elsewhere; its A is part j in split s
    and zeros in the others. That makes S J kernels: 3 for a qkv if 3 divides P, else 9.
    """
    if splits == 1:
        return KroneckerLayer(c[None], a[None, None], b[None], gain)
    part = math.gcd(len(a), len(c) * len(a) // splits)
    parts = a.split(part)
    blocks = len(c) * len(parts) // splits
    cs, rows = [], []
    for s in range(splits):
        block = torch.arange(s * blocks, (s + 1) * blocks)
        for j, own in enumerate(parts):
            cs.append(c[block // len(parts)] * (block % len(parts) == j)[:, None])
            rows.append(torch.stack([own if t == s else torch.zeros_like(own) for t in range(splits)]))
    return KroneckerLayer(torch.stack(cs), torch.stack(rows), b.expand(len(cs), *b.shape), gain)


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
    return {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in {**own, **classifier}.items()}
