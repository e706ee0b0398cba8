"""The rules of a `karst/1` file's tensors, and of their fit to a backbone.

Each function returns every problem that it finds, named by tensor; `file.py` raises.
"""

from collections.abc import Mapping

import numpy as np

from ..backbone_info import Norm, Site
from ..method.config import KarstConfig
from .errors import Problem, enough
from .metadata import FORMAT
from .names import (
    AXES,
    KRONECKER,
    MAX_TYPICALITY_RANK,
    MAX_TYPICALITY_TABLE,
    NDIM,
    NORM,
    PAIRS,
    TYPICALITY,
    TYPICALITY_PREFIX,
)
from .raw_tensors import RawTensor

Shapes = Mapping[str, tuple[int, ...]]


def check_tensors(
    tensors: Mapping[str, RawTensor], config: KarstConfig | None, labels: tuple[str, ...] | None
) -> list[Problem]:
    """Return the problems of a file's tensors, without regard to a backbone.

    Args:
        tensors: all tensors of the file, by name.
        config: None where the metadata's is invalid; its rules are then left out.
        labels: None where the metadata's are invalid.
    """
    problems = [
        Problem(name, "has a value that is not finite (NaN or infinity); train the adapter again")
        for name, tensor in tensors.items()
        if not tensor.is_finite
    ]
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if enough(problems):
            return problems
        layer, _, part = name.rpartition(".")
        if (layer == "head" and part in ("weight", "bias")) or (layer == "typicality" and part in TYPICALITY):
            continue
        if layer in ("", "head", "typicality") or part not in AXES:
            known = ", ".join(
                ["head.weight", "head.bias"]
                + [TYPICALITY_PREFIX + part for part in TYPICALITY]
                + [f"<layer>.{part}" for part in AXES]
            )
            problems.append(Problem(name, f"is not a tensor of a {FORMAT} file ({known}); remove it"))
        elif tensor.ndim != NDIM[part] or 0 in tensor.shape:
            problems.append(Problem(name, f"has shape {tensor.shape}, expected {AXES[part]}"))
        else:
            layers.setdefault(layer, {})[part] = tensor.shape
    problems += _check_head(tensors.get("head.weight"), tensors.get("head.bias"), labels)
    problems += _check_typicality(tensors)
    if not problems and config is not None:
        for layer, parts in layers.items():
            if enough(problems):
                break
            problems += _check_layer(layer, parts, config)
    return problems


def _check_head(weight: RawTensor | None, bias: RawTensor | None, labels: tuple[str, ...] | None) -> list[Problem]:
    problems = [
        Problem(f"head.{name}", "is missing; an adapter needs head.weight (K, D) and head.bias (K,)")
        for name, tensor in (("weight", weight), ("bias", bias))
        if tensor is None
    ]
    if labels is None or weight is None or bias is None:
        return problems
    count = len(labels)
    if weight.ndim != 2 or weight.shape[0] != count:
        problems.append(Problem("head.weight", f"has shape {weight.shape}, expected ({count}, D) for {count} labels"))
    if bias.shape != (count,):
        problems.append(Problem("head.bias", f"has shape {bias.shape}, expected ({count},) for {count} labels"))
    return problems


def _check_typicality(tensors: Mapping[str, RawTensor]) -> list[Problem]:
    """Return where the tensors of typicality are incomplete or contradict each other."""
    own = {name: tensors[TYPICALITY_PREFIX + name] for name in TYPICALITY if TYPICALITY_PREFIX + name in tensors}
    if not own:
        return []
    missing = [name for name in TYPICALITY if name not in own]
    if missing:
        message = "is missing, but other typicality tensors are present; store all or none"
        return [Problem(TYPICALITY_PREFIX + name, message) for name in missing]
    head, basis, table = tensors.get("head.weight"), own["basis"], own["table"].floats()
    rank, columns = basis.shape if basis.ndim == 2 else (0, 0)
    width = head.shape[1] if head is not None and head.ndim == 2 else columns
    found = [
        (name, f"has shape {own[name].shape}, expected {shape}")
        for name, shape in (("mean", (width,)), ("basis", (rank, width)), ("log_precision", (rank + 1,)))
        if own[name].shape != shape
    ]
    if not 1 <= rank <= MAX_TYPICALITY_RANK:
        found.append(("basis", f"has {rank} rows, expected 1 to {MAX_TYPICALITY_RANK}"))
    if table.ndim != 2 or table.shape[0] != 2 or not 2 <= table.shape[1] <= MAX_TYPICALITY_TABLE:
        wanted = f"(2, Q) with Q from 2 to {MAX_TYPICALITY_TABLE}"
        found.append(("table", f"has shape {table.shape}, expected {wanted}"))
    elif bool((np.diff(table[0]) < 0).any() or (np.diff(table[1]) > 0).any() or (table[1] > 0).any()):
        found.append(("table", "must have rising log distances, and falling log shares of at most 0"))
    return [Problem(TYPICALITY_PREFIX + name, message) for name, message in found]


def _check_layer(layer: str, parts: Shapes, config: KarstConfig) -> list[Problem]:
    """Return where the tensors of a layer contradict each other or the config."""
    problems = []
    groups = (KRONECKER, *PAIRS, NORM)
    for group in groups:
        present = [name for name in group if name in parts]
        if present and len(present) < len(group):
            missing = ", ".join(f"{layer}.{name}" for name in group if name not in parts)
            problems.append(Problem(missing, f"is missing, but {layer}.{present[0]} is present; store all or none"))
    if problems:
        return problems
    if config.rescale == "none" and ("scale" in parts or "in_scale" in parts):
        problems.append(Problem(layer, "has re-scaling tensors, but config.rescale is none; remove them"))
    if "norm_weight" in parts and not config.norms:
        problems.append(Problem(layer, "has norm_weight and norm_bias, but config.norms is not true; set it"))
    if "karst_c" in parts:
        kernels, _, _ = parts["karst_c"]
        a_kernels, _, _, rank = parts["karst_a"]
        b_kernels, b_rank, _ = parts["karst_b"]
        if {kernels, a_kernels, b_kernels} != {config.kernels}:
            found = f"{kernels}, {a_kernels}, {b_kernels}"
            problems.append(
                Problem(
                    f"{layer}.karst_*", f"have {found} kernels (C, A, B), expected config.kernels = {config.kernels}"
                )
            )
        if rank != b_rank or rank > config.rank:
            problems.append(
                Problem(
                    f"{layer}.karst_*",
                    f"have ranks {rank} (A) and {b_rank} (B), expected equal ranks up to config.rank = {config.rank}",
                )
            )
    return problems


def check_norm_fits(norm: Norm, parts: Shapes) -> list[Problem]:
    """Return the tensors that do not fit a norm layer of the backbone."""
    problems = [
        Problem(f"{norm.name}.{name}", "the layer is a norm layer, which takes norm_weight and norm_bias; remove it")
        for name in parts
        if name not in NORM
    ]
    for name in NORM:
        if name in parts and parts[name][0] != norm.width:
            found = parts[name][0]
            problems.append(Problem(f"{norm.name}.{name}", f"has {found} numbers, expected {norm.width}"))
    return problems


def check_layer_fits(site: Site, parts: Shapes) -> list[Problem]:
    """Return the tensors that do not fit a site of the backbone."""
    problems = [
        Problem(f"{site.name}.{name}", "the layer is not a norm layer; remove it") for name in parts if name in NORM
    ]
    if "karst_c" in parts:
        _, p, q = parts["karst_c"]
        _, splits, rows, _ = parts["karst_a"]
        columns = parts["karst_b"][2]
        if splits != site.splits:
            problems.append(Problem(f"{site.name}.karst_a", f"has {splits} splits, expected {site.splits}"))
        elif splits * p * rows != site.d_out:
            problems.append(
                Problem(
                    f"{site.name}.karst_a",
                    f"gives {splits} x {p} x {rows} outputs with karst_c, but the layer has {site.d_out}",
                )
            )
        if q * columns != site.d_in:
            problems.append(
                Problem(
                    f"{site.name}.karst_b",
                    f"takes {q} x {columns} inputs with karst_c, but the layer has {site.d_in}",
                )
            )
    for pair, size, allowed in zip(PAIRS, (site.d_out, site.d_in), (site.rescale_out, site.rescale_in), strict=True):
        for name in pair:
            if name in parts and not allowed:
                problems.append(Problem(f"{site.name}.{name}", "KARST does not re-scale this layer; remove it"))
            elif name in parts and parts[name][0] not in (1, size):
                problems.append(Problem(f"{site.name}.{name}", f"has {parts[name][0]} numbers, expected {size} or 1"))
    return problems
