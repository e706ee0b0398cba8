"""The rules of a `karst/1` file: its header, its metadata, its tensors, and whether they fit a backbone.

Each function returns (or raises with) every problem that it finds, named by tensor or field. `file.py` says when
to call which.
"""

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from .backbone import Norm, Site
from .config import KarstConfig

FORMAT = "karst/1"
MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_HEADER_VALUES = 150_000  # parsed, one takes up to thirty times its text; 10,000 tensors have 110,000
MAX_TENSORS = 10_000
SMALL_BYTES, MOST_JOINED = 64 * 1024, 256  # tensors that are checked together, and how many
DTYPES = ("F32", "F16", "BF16")
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


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an adapter: `where` is a tensor, a metadata field, or `file`."""

    where: str
    message: str


class AdapterError(ValueError):
    """An adapter that cannot be used as it is; `problems` names each tensor or field and what would be right."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(f"{p.where}: {p.message}" for p in self.problems[:5]) + _more(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


def file_error(message: str) -> AdapterError:
    return AdapterError([Problem("file", message)])


def check_header(data: bytes) -> dict[str, str]:
    """The `__metadata__` of a safetensors file, after what its own parser leaves open: sizes, duplicates, dtypes."""
    if len(data) < 8:
        raise file_error(f"not a safetensors file: {len(data)} bytes are too few for its header")
    length = struct.unpack("<Q", data[:8])[0]
    if length > MAX_HEADER_BYTES:
        raise file_error(
            f"not a safetensors file, or its header is too long: it claims {length} bytes, "
            f"at most {MAX_HEADER_BYTES} are allowed"
        )
    if 8 + length > len(data):
        raise file_error(f"truncated: the header claims {length} bytes, the file has {len(data) - 8} after its length")
    if sum(data.count(mark, 8, 8 + length) for mark in (b",", b"[", b"{")) > MAX_HEADER_VALUES:
        raise file_error(f"its header has more than {MAX_HEADER_VALUES} values")
    try:
        header = _loads(data[8 : 8 + length].decode())
    except (ValueError, RecursionError) as error:
        raise file_error(f"not a safetensors file: its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise file_error("not a safetensors file: its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise file_error(f"{len(header)} tensors, but at most {MAX_TENSORS} are allowed")
    problems = []
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtype not in DTYPES:
            problems.append(Problem(name, f"dtype {dtype} is not one of {', '.join(DTYPES)}"))
    if problems:
        raise AdapterError(problems)
    ends = [e["data_offsets"][1] for e in header.values() if _has_offsets(e)]
    if ends and 8 + length + max(ends) > len(data):
        raise file_error(f"truncated: its tensors need {8 + length + max(ends)} bytes, but the file has {len(data)}")
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterError([Problem("__metadata__", "must be an object of strings")])
    return metadata


def _loads(text: str) -> Any:
    """JSON that can be sent on as JSON: no key twice, no NaN, no number beyond a float, no half of a surrogate pair.

    Raises:
        ValueError, RecursionError: anything else.
    """
    value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_finite, parse_float=_finite)
    if "\\u" in text:  # UTF-8 alone has no half of a pair
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a JSON number that fits a float")
    return number


def _has_offsets(entry: dict[str, Any]) -> bool:
    offsets = entry.get("data_offsets")
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} stands twice")
    return out


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
            fields[name] = parse(_loads(metadata[name]))
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


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of tensors with a NaN or an infinity; many at once first, since nearly all files have none."""
    if all(map(_is_finite, _joined(tensors.values()))):
        return []
    return [name for name, tensor in tensors.items() if not _is_finite(tensor)]


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


def _is_finite(tensor: Tensor) -> bool:
    """Without a copy, as `isfinite` makes them: the least and the largest number are NaN where any number is."""
    return not tensor.numel() or all(math.isfinite(number) for number in tensor.aminmax())


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


def _more(problems: Sequence[Problem]) -> str:
    return f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
