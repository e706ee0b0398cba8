"""The rules of a `karst/1` file's metadata.

`parse_metadata` returns every problem that it finds, named by field; `file.py` raises.
"""

import itertools
import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from ..method.config import KarstConfig
from .errors import AdapterError, Problem
from .header import load_json

FORMAT = "karst/1"
OPTIONAL_CONFIG = ("norms", "sites", "stage_ranks")  # a file leaves them out at their defaults
_REQUIRED = ("format", "config", "backbone", "fingerprint", "labels", "preprocess")
PREPROCESS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
OPTIONAL_PREPROCESS = ("background",)
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
_CROP_MODES = ("center", "squash", "border")
MIN_STD, MAX_STD = 1e-4, 1e4  # within the range of float16, so that normalised pixels stay finite
MAX_SIDE_PX = 4096
MAX_COVERAGES = 200
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
        "coverage": None,
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
        "coverage": _parse_coverage,
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
    _check_keys(value, set(PREPROCESS), OPTIONAL_PREPROCESS)
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
    if "background" in value:
        colour = value["background"]
        three = isinstance(colour, list) and len(colour) == 3
        if not (three and all(type(n) is int and 0 <= n <= 255 for n in colour)):
            raise ValueError(f"background is {_shown(colour)}, expected three integers from 0 to 255")
    return dict(value)


def _parse_metrics(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"is {_shown(value)}, expected a JSON object")
    if (depth := _depth(value)) > MAX_DEPTH:
        raise ValueError(f"has {depth} levels of nesting, but at most {MAX_DEPTH} are allowed")
    return value


def _parse_coverage(value: Any) -> tuple[tuple[float, float], ...]:
    pairs = isinstance(value, list) and 0 < len(value) <= MAX_COVERAGES
    if not pairs or not all(isinstance(v, list) and len(v) == 2 and all(map(_is_number, v)) for v in value):
        raise ValueError(f"is {_shown(value)}, expected 1 to {MAX_COVERAGES} pairs [coverage, threshold]")
    found = tuple((float(coverage), float(threshold)) for coverage, threshold in value)
    coverages, thresholds = zip(*found, strict=True)
    if not all(0 < c < 1 for c in coverages) or not all(a < b for a, b in itertools.pairwise(coverages)):
        raise ValueError("coverages must rise, each between 0 and 1")
    if not all(0 <= t <= 1 for t in thresholds) or not all(a >= b for a, b in itertools.pairwise(thresholds)):
        raise ValueError("thresholds must not rise, each from 0 to 1")
    return found


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
