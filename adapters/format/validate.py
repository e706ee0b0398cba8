"""The rules of a `karst/1` file: its metadata, its tensors, and whether they fit a backbone.

Each function returns (or raises with) every problem that it finds, named by tensor or field. `file.py` says when
to call which.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..backbone import Norm, Site
from ..method.config import KarstConfig
from .errors import AdapterError, Problem
from .header import load_json

FORMAT = "karst/1"
SMALL_BYTES, MOST_JOINED = 64 * 1024, 256  # tensors that are checked together, and how many
KRONECKER = ("karst_c", "karst_a", "karst_b")
# Axes of each tensor of a layer, as in DESIGN's table.
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
OPTIONAL_CONFIG = ("norms", "sites", "stage_ranks")  # in a file only where they are not the default
NORM = ("norm_weight", "norm_bias")
_REQUIRED = ("format", "config", "backbone", "fingerprint", "labels", "preprocess")
PREPROCESS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
_CROP_MODES = ("center", "squash", "border")
MIN_STD, MAX_STD = 1e-4, 1e4  # well within every dtype
MAX_DEPTH = 32  # of metrics: JSON readers and writers have limits of their own, the lowest about 128
MIN_CROP_PCT = 0.5  # images are enlarged by 1 / crop_pct before they are cropped: not without end


def parse_metadata(metadata: dict[str, str]) -> tuple[dict[str, Any], list[Problem]]:
    """Metadata strings -> the fields of an Adapter, as far as they are valid, and what is wrong with the others.

    Raises:
        AdapterError: a file of another format, in which everything would be wrong.
    """
    if "format" not in metadata:
        message = f"missing from the metadata: a safetensors file, but no {FORMAT} adapter"
        raise AdapterError([Problem("format", message)])
    if metadata["format"] != FORMAT:
        raise AdapterError([Problem("format", f"is {metadata['format']!r}; this reader knows {FORMAT!r}")])
    missing = [name for name in _REQUIRED if name not in metadata]
    if missing:
        return {}, [Problem(name, f"missing from the metadata of a {FORMAT} file") for name in missing]
    fields: dict[str, Any] = {
        "backbone": metadata["backbone"],
        "fingerprint": metadata["fingerprint"],
        "metrics": None,
        "created": metadata.get("created"),
        "producer": metadata.get("producer"),
    }
    problems = []
    if not re.fullmatch("[0-9a-f]{64}", metadata["fingerprint"]):
        problems.append(Problem("fingerprint", "must be a sha256 in 64 lower-case hex digits"))
    if "created" in metadata and not _is_time(metadata["created"]):
        problems.append(Problem("created", "must be an RFC 3339 time, such as 2026-01-31T12:00:00Z"))
    parsers = {
        "config": _parse_config,
        "labels": _parse_labels,
        "preprocess": _parse_preprocess,
        "metrics": _parse_metrics,
    }
    for name, parse in parsers.items():
        if name not in metadata:
            continue
        try:
            fields[name] = parse(load_json(metadata[name]))
        except (ValueError, RecursionError) as error:
            problems.append(Problem(name, _first_validation_message(error)))
    return fields, problems


def _parse_config(value: Any) -> KarstConfig:
    wanted = set(KarstConfig.model_fields) - set(OPTIONAL_CONFIG)
    if not isinstance(value, dict) or set(value) - set(OPTIONAL_CONFIG) != wanted or value["gain"] is None:
        raise ValueError(
            f"must be a JSON object with exactly {', '.join(sorted(wanted))}, gain a number, "
            f"and perhaps {', '.join(OPTIONAL_CONFIG)}"
        )
    value = {
        name: tuple(item) if isinstance(item, list) else item for name, item in value.items()
    }  # JSON has no tuples
    return KarstConfig.model_validate(value, strict=True)


def _parse_labels(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        raise ValueError("must be a JSON list of at least one non-empty string")
    if len(set(value)) != len(value):
        twice = [label for label, n in Counter(value).items() if n > 1]
        raise ValueError(f"labels must be unique, but {', '.join(map(repr, twice[:5]))} stand more than once")
    return tuple(value)


def _parse_preprocess(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(PREPROCESS):
        raise ValueError(f"must be a JSON object with exactly {', '.join(PREPROCESS)}")
    size = value["input_size"]
    if not (isinstance(size, list) and len(size) == 3 and all(type(n) is int and 0 < n <= 4096 for n in size)):
        raise ValueError("input_size must be [channels, height, width] in pixels, each at most 4096")
    if size[0] != 3:
        raise ValueError(f"input_size must have 3 channels, not {size[0]}")
    for name in ("mean", "std"):
        if not (isinstance(value[name], list) and len(value[name]) == 3 and all(map(_is_number, value[name]))):
            raise ValueError(f"{name} must be three numbers")
    if not all(0 <= v <= 1 for v in value["mean"]):
        raise ValueError("mean must be from 0 to 1, as pixels are")
    if not all(MIN_STD <= v <= MAX_STD for v in value["std"]):
        raise ValueError(f"std must be at least {MIN_STD} and at most {MAX_STD}")
    if not (_is_number(value["crop_pct"]) and MIN_CROP_PCT <= value["crop_pct"] <= 2):
        raise ValueError(f"crop_pct must be at least {MIN_CROP_PCT} and at most 2")
    for name, allowed in (("interpolation", _INTERPOLATIONS), ("crop_mode", _CROP_MODES)):
        if value[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value[name]!r}")
    return value


def _parse_metrics(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    if _depth(value) > MAX_DEPTH:
        raise ValueError(f"must be nested at most {MAX_DEPTH} deep")
    return value


def _is_time(text: str) -> bool:
    try:
        return "T" in text.upper() and datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


def check_tensors(
    tensors: dict[str, Tensor], config: KarstConfig | None, labels: tuple[str, ...] | None
) -> list[Problem]:
    problems = [Problem(n, "has a value that is not finite (NaN or infinity)") for n in _not_finite(tensors)]
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer == "head" and part in ("weight", "bias"):
            continue
        if layer in ("", "head") or part not in _AXES:
            known = ", ".join(f"<layer>.{part}" for part in _AXES)
            problems.append(
                Problem(name, f"is no tensor of a {FORMAT} file; it has head.weight, head.bias and {known}")
            )
        elif tensor.ndim != _NDIM[part] or 0 in tensor.shape:
            problems.append(Problem(name, f"has shape {tuple(tensor.shape)}, expected {_AXES[part]}"))
        else:
            layers.setdefault(layer, {})[part] = tensor
    problems += _check_head(tensors.get("head.weight"), tensors.get("head.bias"), labels)
    if not problems and config is not None:
        for layer, parts in layers.items():
            problems += _check_layer(layer, parts, config)
    return problems


def all_finite(tensor: Tensor) -> bool:
    """Without a copy, as `isfinite` makes them: the least and the largest number are NaN where any number is."""
    return not tensor.numel() or all(math.isfinite(number) for number in tensor.aminmax())


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of tensors with a NaN or an infinity; many at once first, since nearly all files have none."""
    if all(map(all_finite, _joined(tensors.values()))):
        return []
    return [name for name, tensor in tensors.items() if not all_finite(tensor)]


def _joined(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same numbers in fewer tensors: small ones are copied together, large ones stay as they are."""
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.nbytes > SMALL_BYTES:
            yield tensor
            continue
        portion = small.setdefault(tensor.dtype, [])
        portion.append(tensor.flatten())
        if len(portion) == MOST_JOINED:
            yield torch.cat(small.pop(tensor.dtype))
    yield from map(torch.cat, small.values())


def _check_head(weight: Tensor | None, bias: Tensor | None, labels: tuple[str, ...] | None) -> list[Problem]:
    problems = [Problem(f"head.{n}", "is missing") for n, t in (("weight", weight), ("bias", bias)) if t is None]
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


def _check_layer(layer: str, parts: dict[str, Tensor], config: KarstConfig) -> list[Problem]:
    """What the tensors of a layer and the config must have in common."""
    problems = []
    groups = (KRONECKER, *_PAIRS, NORM)
    for group in groups:
        present = [name for name in group if name in parts]
        if present and len(present) < len(group):
            gone = ", ".join(f"{layer}.{name}" for name in group if name not in parts)
            problems.append(Problem(gone, f"is missing, while {layer}.{present[0]} is there"))
    if problems:
        return problems
    if config.rescale == "none" and ("scale" in parts or "in_scale" in parts):
        problems.append(Problem(layer, "has re-scaling tensors, but config says rescale = none"))
    if "norm_weight" in parts and not config.norms:
        problems.append(Problem(layer, "has the numbers of a norm layer, but config does not say norms = true"))
    if "karst_c" in parts:
        kernels, _, _ = parts["karst_c"].shape
        a_kernels, _, _, rank = parts["karst_a"].shape
        b_kernels, b_rank, _ = parts["karst_b"].shape
        if {kernels, a_kernels, b_kernels} != {config.kernels}:
            found = f"{kernels}, {a_kernels}, {b_kernels}"
            problems.append(Problem(f"{layer}.karst_*", f"have {found} kernels, config says {config.kernels}"))
        if rank != b_rank or rank > config.rank:
            problems.append(
                Problem(f"{layer}.karst_*", f"have ranks {rank} (A) and {b_rank} (B), config says {config.rank}")
            )
    return problems


def check_norm_fits(norm: Norm, parts: Mapping[str, Tensor]) -> list[Problem]:
    problems = [Problem(f"{norm.name}.{name}", "this is a norm layer") for name in parts if name not in NORM]
    for name in NORM:
        if name in parts and parts[name].shape[0] != norm.width:
            found = parts[name].shape[0]
            problems.append(Problem(f"{norm.name}.{name}", f"has {found} numbers, the norm layer has {norm.width}"))
    return problems


def check_layer_fits(site: Site, parts: Mapping[str, Tensor]) -> list[Problem]:
    problems = [Problem(f"{site.name}.{name}", "this is no norm layer") for name in parts if name in NORM]
    if "karst_c" in parts:
        _, p, q = parts["karst_c"].shape
        _, splits, rows, _ = parts["karst_a"].shape
        columns = parts["karst_b"].shape[2]
        if splits != site.splits:
            problems.append(Problem(f"{site.name}.karst_a", f"has {splits} splits, expected {site.splits}"))
        elif splits * p * rows != site.d_out:
            problems.append(
                Problem(f"{site.name}.karst_a", f"gives {splits} x {p} x {rows} outputs, the layer has {site.d_out}")
            )
        if q * columns != site.d_in:
            problems.append(Problem(f"{site.name}.karst_b", f"takes {q} x {columns} inputs, the layer has {site.d_in}"))
    for pair, size, allowed in zip(_PAIRS, (site.d_out, site.d_in), (site.rescale_out, site.rescale_in), strict=True):
        for name in pair:
            if name in parts and not allowed:
                problems.append(Problem(f"{site.name}.{name}", "KARST does not re-scale here"))
            elif name in parts and parts[name].shape[0] not in (1, size):
                problems.append(
                    Problem(f"{site.name}.{name}", f"has {parts[name].shape[0]} numbers, expected {size} or 1")
                )
    return problems


def _first_validation_message(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
