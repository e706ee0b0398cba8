"""The rules of a `karst/1` file: metadata, tensors, and their fit to a backbone.

Each function returns every problem that it finds, named by tensor or field; `file.py` raises.
"""

import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
OPTIONAL_CONFIG = ("norms", "sites", "stage_ranks")  # a file leaves them out at their defaults
NORM = ("norm_weight", "norm_bias")
_REQUIRED = ("format", "config", "backbone", "fingerprint", "labels", "preprocess")
PREPROCESS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
_CROP_MODES = ("center", "squash", "border")
MIN_STD, MAX_STD = 1e-4, 1e4  # within the range of float16, so that normalised pixels stay finite
MAX_SIDE_PX = 4096
MAX_DEPTH = 32  # of metrics; other JSON parsers refuse more than about 128 levels
MIN_CROP_PCT, MAX_CROP_PCT = 0.5, 2  # images are enlarged by 1 / crop_pct before the crop, which costs memory
_REMEDY = "; convert it with `karst-hub convert`, or save it again with `Adapter.write`"
_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxlevel = 80, 2


def parse_metadata(metadata: Mapping[str, str]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the valid fields of an `Adapter`, and the problems of the others.

    Raises:
        AdapterError: the file has another format, so all other checks would fail too.
    """
    if "format" not in metadata:
        raise AdapterError(
            [Problem("format", f"is missing from the metadata, so this is not a {FORMAT} file{_REMEDY}")]
        )
    if metadata["format"] != FORMAT:
        raise AdapterError([Problem("format", f"is {_shown(metadata['format'])}, expected {FORMAT!r}{_REMEDY}")])
    missing = [name for name in _REQUIRED if name not in metadata]
    if missing:
        return {}, [Problem(name, "is missing from the metadata; add it (docs/adapter-file.md)") for name in missing]
    fields: dict[str, Any] = {
        "backbone": metadata["backbone"],
        "fingerprint": metadata["fingerprint"],
        "metrics": None,
        "created": metadata.get("created"),
        "producer": metadata.get("producer"),
    }
    problems = []
    if not re.fullmatch("[0-9a-f]{64}", metadata["fingerprint"]):
        found = _shown(metadata["fingerprint"])
        problems.append(Problem("fingerprint", f"is {found}, expected a SHA-256 digest of 64 lower-case hex digits"))
    if "created" in metadata and not _is_time(metadata["created"]):
        found = _shown(metadata["created"])
        problems.append(Problem("created", f"is {found}, expected an RFC 3339 time such as 2026-01-31T12:00:00Z"))
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
            value = load_json(metadata[name])
        except (ValueError, RecursionError) as error:
            problems.append(Problem(name, f"is not valid JSON ({error})"))
            continue
        try:
            fields[name] = parse(value)
        except ValueError as error:
            problems.append(Problem(name, _first_validation_message(error)))
        except RecursionError:
            problems.append(Problem(name, "is nested too deep; store flat values"))
    return fields, problems


def _parse_config(value: Any) -> KarstConfig:
    required = set(KarstConfig.model_fields) - set(OPTIONAL_CONFIG)
    _check_keys(value, required, OPTIONAL_CONFIG)
    if value["gain"] is None:
        raise ValueError("gain is null, expected a positive number")
    arguments = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
    return KarstConfig.model_validate(arguments, strict=True)


def _parse_labels(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"is {_shown(value)}, expected a JSON list of at least one non-empty string")
    if len(set(value)) != len(value):
        twice = [label for label, n in Counter(value).items() if n > 1]
        raise ValueError(f"must be unique, but {', '.join(map(_shown, twice[:5]))} appear more than once")
    return tuple(value)


def _parse_preprocess(value: Any) -> dict[str, Any]:
    _check_keys(value, set(PREPROCESS))
    size = value["input_size"]
    if not (isinstance(size, list) and len(size) == 3 and all(type(n) is int and 0 < n <= MAX_SIDE_PX for n in size)):
        raise ValueError(
            f"input_size is {_shown(size)}, expected [channels, height, width], each from 1 to {MAX_SIDE_PX}"
        )
    if size[0] != 3:
        raise ValueError(f"input_size has {size[0]} channels, expected 3")
    for name in ("mean", "std"):
        if not (isinstance(value[name], list) and len(value[name]) == 3 and all(map(_is_number, value[name]))):
            raise ValueError(f"{name} is {_shown(value[name])}, expected three numbers")
    if not all(0 <= v <= 1 for v in value["mean"]):
        raise ValueError(f"mean is {_shown(value['mean'])}, expected values from 0 to 1, the range of the pixels")
    if not all(MIN_STD <= v <= MAX_STD for v in value["std"]):
        raise ValueError(f"std is {_shown(value['std'])}, expected values from {MIN_STD:g} to {MAX_STD:g}")
    if not (_is_number(value["crop_pct"]) and MIN_CROP_PCT <= value["crop_pct"] <= MAX_CROP_PCT):
        found = _shown(value["crop_pct"])
        raise ValueError(f"crop_pct is {found}, expected a number from {MIN_CROP_PCT} to {MAX_CROP_PCT}")
    for name, allowed in (("interpolation", _INTERPOLATIONS), ("crop_mode", _CROP_MODES)):
        if value[name] not in allowed:
            raise ValueError(f"{name} is {_shown(value[name])}, expected one of {', '.join(allowed)}")
    return dict(value)


def _parse_metrics(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"is {_shown(value)}, expected a JSON object")
    if (depth := _depth(value)) > MAX_DEPTH:
        raise ValueError(f"has {depth} levels of nesting, but at most {MAX_DEPTH} are allowed")
    return value


def _check_keys(value: Any, required: set[str], optional: Sequence[str] = ()) -> None:
    """Raise ValueError unless the value is an object with the required keys and no unknown one."""
    if not isinstance(value, dict):
        raise ValueError(f"is {_shown(value)}, expected a JSON object with {', '.join(sorted(required))}")
    missing = sorted(required - set(value))
    unknown = [_shown(key) for key in sorted(set(value) - required - set(optional))[:5]]
    if missing or unknown:
        found = [f"{kind} {', '.join(keys)}" for kind, keys in (("missing", missing), ("unknown", unknown)) if keys]
        expected = ", ".join(sorted(required)) + (f", and optionally {', '.join(optional)}" if optional else "")
        raise ValueError(f"has wrong keys ({'; '.join(found)}), expected {expected}")


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
        layer, _, part = name.rpartition(".")
        if layer == "head" and part in ("weight", "bias"):
            continue
        if layer in ("", "head") or part not in _AXES:
            known = ", ".join(f"<layer>.{part}" for part in _AXES)
            problems.append(
                Problem(name, f"is not a tensor of a {FORMAT} file (head.weight, head.bias, {known}); remove it")
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


def _first_validation_message(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))} is {_shown(first['input'])}: {first['msg']}"
    return str(error)


def _shown(value: Any) -> str:
    """Return a wrong value for an error, cut at every level so that no file can make the message long."""
    return _REPR.repr(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
