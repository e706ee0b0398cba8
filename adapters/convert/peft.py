"""Import of LoKr from Hugging Face peft folders, without peft itself.

A folder has `adapter_config.json` and `adapter_model.safetensors` or `.bin`. The rules follow the source of peft 0.21
(`tuners/lokr/layer.py`): dW = alpha / r * kron(w1, w2), with r and alpha by regular expressions on the layers' names.
peft before 0.14 stored alpha and did not use it: dW = kron(w1, w2).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone, Site
from ..format.errors import AdapterError, Problem, file_error
from .importing import ImportedTensors, KroneckerLayer, not_finite_problems, read_json, read_tensors, take_model_weights

CONFIG = "adapter_config.json"
WEIGHTS, PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_LOKR = re.compile(r"(?P<layer>.+)\.lokr_(?P<part>w1|w1_a|w1_b|w2|w2_a|w2_b)")
# Options of peft that change the meaning of the numbers and that no linear LoKr has.
_REFUSED = ("use_rslora", "use_dora")
# The fields of the folders that this project exported before it wrote `rank_dropout_scale`.
_OWN_FIELDS = {
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "alpha", "target_modules"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "decompose_factor", "decompose_both"),
    *("use_effective_conv2d", "rank_dropout", "module_dropout", "init_weights"),
}


def read_lokr(folder: Path, backbone: Backbone) -> ImportedTensors:
    """Return the tensors of a peft LoKr folder without approximation, including `decompose_both` and a whole w2.

    A fused qkv is one LoKr in peft and three products in `karst/1`, so it becomes several kernels (`_split`).

    Raises:
        AdapterError: a file is missing, the method is not LoKr, a layer is a convolution or not adapted by KARST, or a
            tensor does not fit.
    """
    config = _read_config(folder / CONFIG)
    pickled = not (folder / WEIGHTS).is_file() and (folder / PICKLED_WEIGHTS).is_file()
    state = read_tensors(folder / (PICKLED_WEIGHTS if pickled else WEIGHTS))
    state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    sites = {site.name: site for site in backbone.sites}
    found: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Any] = {}
    problems = not_finite_problems(state)
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
    scaled = _is_scaled(config)
    for layer, parts in found.items():
        rank, alpha = (_of_layer(config, key, layer) for key in ("r", "alpha"))
        wrong = _problems(sites[layer], parts, rank)
        if scaled is None and alpha != rank and not wrong:
            wrong = [_unknown_scale(layer, rank, alpha)]
        problems += wrong
        if not wrong:
            imported.layers[layer] = _layer(sites[layer], parts, alpha / rank if scaled is not False else 1.0)
    if problems:
        raise AdapterError(problems)
    if scaled is False:
        imported.notes.append("peft before 0.14 wrote the folder: dW is not multiplied by alpha / r, as in that peft")
    return imported


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


def _is_scaled(config: Mapping[str, Any]) -> bool | None:
    """Return whether dW is multiplied by alpha / r: not before peft 0.14; None if the config does not show it.

    peft 0.14 corrected the scale and added `rank_dropout_scale` in the same change (its pull request 2180). peft itself
    always writes `auto_mapping`.
    """
    if "rank_dropout_scale" in config or "peft_version" in config or set(config) == _OWN_FIELDS:
        return True
    return False if "auto_mapping" in config else None


def _unknown_scale(layer: str, rank: float, alpha: float) -> Problem:
    return Problem(
        f"{CONFIG}: alpha",
        f"is {alpha:g} for {layer} with r = {rank:g}, and the config does not say which peft wrote it; add "
        '"rank_dropout_scale": false if dW has the factor alpha / r (peft 0.14 and later), or set alpha to r if not',
    )


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
