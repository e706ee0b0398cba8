"""The rules of a `karst/1` file's tensors, and of their fit to a backbone.

Each function returns every problem that it finds, named by tensor; `file.py` raises.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..backbone import Norm, Site
from ..method import typicality
from ..method.config import KarstConfig
from .errors import Problem, enough
from .metadata import FORMAT

SMALL_BYTES, MAX_JOINED = 64 * 1024, 256  # up to 256 tensors below 64 KiB are checked together
KRONECKER = ("karst_c", "karst_a", "karst_b")
# Axes of each tensor of a layer, as in docs/adapter-file.md.
_AXES = {
    "karst_c": "(N, p, q)",
    "karst_a": "(N, S, d_out/(S p), r)",
    "karst_b": "(N, r, d_in/q)",
    "scale": "(d_out,) or (1,)",
    "shift": "(d_out,) or (1,)",
    "in_scale": "(d_in,) or (1,)",
    "in_shift": "(d_in,) or (1,)",
    "norm_weight": "(d,)",
    "norm_bias": "(d,)",
}
_NDIM = {name: axes.count(",") + 1 if name in KRONECKER else 1 for name, axes in _AXES.items()}
_PAIRS = (("scale", "shift"), ("in_scale", "in_shift"))
NORM = ("norm_weight", "norm_bias")


def check_tensors(
    tensors: dict[str, Tensor], config: KarstConfig | None, labels: tuple[str, ...] | None
) -> list[Problem]:
    """Return the problems of a file's tensors, without regard to a backbone.

    Args:
        tensors: all tensors of the file, by name.
        config: None where the metadata's is invalid; its rules are then left out.
        labels: None where the metadata's are invalid.
    """
    problems = [
        Problem(name, "has a value that is not finite (NaN or infinity); train the adapter again")
        for name in _not_finite(tensors)
    ]
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if enough(problems):
            return problems
        layer, _, part = name.rpartition(".")
        if (layer == "head" and part in ("weight", "bias")) or (layer == "typicality" and part in typicality.NAMES):
            continue
        if layer in ("", "head", "typicality") or part not in _AXES:
            known = ", ".join(
                ["head.weight", "head.bias"]
                + [typicality.PREFIX + part for part in typicality.NAMES]
                + [f"<layer>.{part}" for part in _AXES]
            )
            problems.append(Problem(name, f"is not a tensor of a {FORMAT} file ({known}); remove it"))
        elif tensor.ndim != _NDIM[part] or 0 in tensor.shape:
            problems.append(Problem(name, f"has shape {tuple(tensor.shape)}, expected {_AXES[part]}"))
        else:
            layers.setdefault(layer, {})[part] = tensor
    problems += _check_head(tensors.get("head.weight"), tensors.get("head.bias"), labels)
    problems += _check_typicality(tensors)
    if not problems and config is not None:
        for layer, parts in layers.items():
            if enough(problems):
                break
            problems += _check_layer(layer, parts, config)
    return problems


def all_finite(tensor: Tensor) -> bool:
    """Return whether no number is NaN or infinite; faster than `isfinite`, which makes a copy.

    `aminmax` returns NaN where any number is NaN.
    """
    return not tensor.numel() or all(math.isfinite(number) for number in tensor.aminmax())


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors with NaN or infinity; checks them together first, since most files have none."""
    if all(map(all_finite, _joined(tensors.values()))):
        return []
    return [name for name, tensor in tensors.items() if not all_finite(tensor)]


def _joined(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the same numbers in fewer tensors: small tensors are concatenated, large ones are yielded unchanged."""
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.nbytes > SMALL_BYTES:
            yield tensor
            continue
        portion = small.setdefault(tensor.dtype, [])
        portion.append(tensor.flatten())
        if len(portion) == MAX_JOINED:
            yield torch.cat(small.pop(tensor.dtype))
    yield from map(torch.cat, small.values())


def _check_head(weight: Tensor | None, bias: Tensor | None, labels: tuple[str, ...] | None) -> list[Problem]:
    problems = [
        Problem(f"head.{name}", "is missing; an adapter needs head.weight (K, D) and head.bias (K,)")
        for name, tensor in (("weight", weight), ("bias", bias))
        if tensor is None
    ]
    if labels is None or weight is None or bias is None:
        return problems
    count = len(labels)
    if weight.ndim != 2 or weight.shape[0] != count:
        problems.append(
            Problem("head.weight", f"has shape {tuple(weight.shape)}, expected ({count}, D) for {count} labels")
        )
    if tuple(bias.shape) != (count,):
        problems.append(Problem("head.bias", f"has shape {tuple(bias.shape)}, expected ({count},) for {count} labels"))
    return problems


def _check_typicality(tensors: Mapping[str, Tensor]) -> list[Problem]:
    """Return where the tensors of typicality are incomplete or contradict each other."""
    own = {name: tensors[typicality.PREFIX + name] for name in typicality.NAMES if typicality.PREFIX + name in tensors}
    if not own:
        return []
    missing = [name for name in typicality.NAMES if name not in own]
    if missing:
        message = "is missing, but other typicality tensors are present; store all or none"
        return [Problem(typicality.PREFIX + name, message) for name in missing]
    head, basis, table = tensors.get("head.weight"), own["basis"], own["table"].float()
    rank, columns = tuple(basis.shape) if basis.ndim == 2 else (0, 0)
    width = head.shape[1] if head is not None and head.ndim == 2 else columns
    found = [
        (name, f"has shape {tuple(own[name].shape)}, expected {shape}")
        for name, shape in (("mean", (width,)), ("basis", (rank, width)), ("log_precision", (rank + 1,)))
        if tuple(own[name].shape) != shape
    ]
    if not 1 <= rank <= typicality.MAX_RANK:
        found.append(("basis", f"has {rank} rows, expected 1 to {typicality.MAX_RANK}"))
    if table.ndim != 2 or table.shape[0] != 2 or not 2 <= table.shape[1] <= typicality.MAX_TABLE:
        wanted = f"(2, Q) with Q from 2 to {typicality.MAX_TABLE}"
        found.append(("table", f"has shape {tuple(table.shape)}, expected {wanted}"))
    elif bool((table[0].diff() < 0).any() or (table[1].diff() > 0).any() or (table[1] > 0).any()):
        found.append(("table", "must have rising log distances, and falling log shares of at most 0"))
    return [Problem(typicality.PREFIX + name, message) for name, message in found]


def _check_layer(layer: str, parts: dict[str, Tensor], config: KarstConfig) -> list[Problem]:
    """Return where the tensors of a layer contradict each other or the config."""
    problems = []
    groups = (KRONECKER, *_PAIRS, NORM)
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
        kernels, _, _ = parts["karst_c"].shape
        a_kernels, _, _, rank = parts["karst_a"].shape
        b_kernels, b_rank, _ = parts["karst_b"].shape
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


def check_norm_fits(norm: Norm, parts: Mapping[str, Tensor]) -> list[Problem]:
    """Return the tensors that do not fit a norm layer of the backbone."""
    problems = [
        Problem(f"{norm.name}.{name}", "the layer is a norm layer, which takes norm_weight and norm_bias; remove it")
        for name in parts
        if name not in NORM
    ]
    for name in NORM:
        if name in parts and parts[name].shape[0] != norm.width:
            found = parts[name].shape[0]
            problems.append(Problem(f"{norm.name}.{name}", f"has {found} numbers, expected {norm.width}"))
    return problems


def check_layer_fits(site: Site, parts: Mapping[str, Tensor]) -> list[Problem]:
    """Return the tensors that do not fit a site of the backbone."""
    problems = [
        Problem(f"{site.name}.{name}", "the layer is not a norm layer; remove it") for name in parts if name in NORM
    ]
    if "karst_c" in parts:
        _, p, q = parts["karst_c"].shape
        _, splits, rows, _ = parts["karst_a"].shape
        columns = parts["karst_b"].shape[2]
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
    for pair, size, allowed in zip(_PAIRS, (site.d_out, site.d_in), (site.rescale_out, site.rescale_in), strict=True):
        for name in pair:
            if name in parts and not allowed:
                problems.append(Problem(f"{site.name}.{name}", "KARST does not re-scale this layer; remove it"))
            elif name in parts and parts[name].shape[0] not in (1, size):
                problems.append(
                    Problem(f"{site.name}.{name}", f"has {parts[name].shape[0]} numbers, expected {size} or 1")
                )
    return problems
