"""One adapter in one safetensors file of format `karst/1`: read, validate, write, merge into a backbone.

Validation has two steps: `Adapter.read` checks the file alone, `Adapter.check` checks it against a backbone. Both
collect all problems before they raise, and neither imports torch: a gateway without it checks adapters.
"""

import hashlib
import json
import struct
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import safetensors
from numpy.typing import NDArray

from ..backbone_info import BackboneInfo
from ..method.config import KarstConfig
from ..short_repr import short_repr
from .atomic_write import write_atomically
from .errors import AdapterError, Problem, enough, file_error
from .header import MAX_TENSORS, parse_header, read_header
from .layouts import Layout, LayoutCache
from .metadata import FORMAT, OPTIONAL_CONFIG, parse_metadata
from .names import TYPICALITY, TYPICALITY_PREFIX
from .raw_tensors import are_finite, bits_of, read_raw
from .validate import check_layer_fits, check_norm_fits, check_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..backbone import Backbone

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated, immutable adapter, identified by its digest.

    Attributes:
        data: the whole file.
        digest: SHA-256 of `data`, 64 hex digits.
        config: kernels, rank, factor, gain, re-scaling.
        backbone: timm name of the backbone that it was trained on.
        fingerprint: SHA-256 of that backbone's weights, 64 hex digits.
        labels: K class names, in the order of the head's rows.
        preprocess: input_size, interpolation, mean, std, crop_pct, crop_mode, as in timm's data config.
        layout: names, shapes and order of the tensors in `data`.
        metrics: figures that the producer stored, or None.
        created: RFC 3339 time, or None.
        producer: program that wrote the file, or None.
        coverage: pairs (coverage, threshold): the labels at or above the threshold are the set that covers that share
            of images; None where the file has none.
    """

    data: bytes
    digest: str
    config: KarstConfig
    backbone: str
    fingerprint: str
    labels: tuple[str, ...]
    preprocess: dict[str, Any]
    layout: Layout
    metrics: dict[str, Any] | None
    created: str | None
    producer: str | None
    coverage: tuple[tuple[float, float], ...] | None = None

    __repr__ = short_repr

    @property
    def num_classes(self) -> int:
        """Number of labels, K."""
        return len(self.labels)

    @classmethod
    def read(
        cls,
        source: str | Path | bytes,
        *,
        max_bytes: int | None = None,
        max_tensors: int = MAX_TENSORS,
        layouts: LayoutCache | None = None,
    ) -> "Adapter":
        """Read and validate a file or its bytes.

        Args:
            max_bytes: size limit of the file; None is no limit.
            max_tensors: limit of the number of tensors.
            layouts: cache of valid layouts; a file with a known layout loads without checks of each tensor.

        Raises:
            AdapterError: the file does not exist, is too large, truncated, or breaks a rule of `karst/1`.
        """
        data = source if isinstance(source, bytes) else _read_bytes(Path(source), max_bytes)
        if max_bytes is not None and len(data) > max_bytes:
            raise file_error(f"has {len(data)} bytes, but at most {max_bytes} are allowed")
        raw = read_header(data, max_tensors)
        digest = hashlib.sha256(data).hexdigest()
        known = layouts.find(raw.tensors_text) if layouts is not None and raw.tensors_text is not None else None
        if known is not None and raw.metadata is not None and len(data) == raw.data_start + known.data_bytes:
            fields, problems = parse_metadata(raw.metadata)
            if not problems and _valid_with(fields) == known.valid_with:
                adapter = cls(data=data, digest=digest, layout=known, **fields)
                if adapter._is_finite():
                    return adapter
        # Unknown layout or invalid file: check every tensor, and collect all problems.
        header = parse_header(raw, len(data), max_tensors)
        try:
            tensors = read_raw(data)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise file_error(f"not a valid safetensors file: {error}") from error
        fields, problems = parse_metadata(header.metadata)
        problems += check_tensors(tensors, fields.get("config"), fields.get("labels"))
        if problems:
            raise AdapterError(problems)
        dtypes = {tensor.dtype for tensor in tensors.values()}
        layout = Layout(
            tensors={name: tensors[name].shape for name in header.names},
            dtype=dtypes.pop() if len(dtypes) == 1 else None,
            data_bytes=len(data) - raw.data_start,
            valid_with=_valid_with(fields),
        )
        if layouts is not None and raw.tensors_text is not None:
            layouts.add(raw.tensors_text, layout)
        return cls(data=data, digest=digest, layout=layout, **fields)

    @classmethod
    def create(
        cls,
        tensors: "Mapping[str, Tensor]",
        *,
        config: KarstConfig,
        backbone: str,
        fingerprint: str,
        labels: Sequence[str],
        preprocess: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        created: str | None = None,
        coverage: Sequence[tuple[float, float]] | None = None,
    ) -> "Adapter":
        """Return an adapter with these tensors; equal arguments, `created` included, give equal bytes.

        Args:
            tensors: name -> numbers, as docs/adapter-file.md lists them; float32, float16 or bfloat16, on the CPU.
            labels: K unique names, in the order of the head's rows.
            preprocess: the six fields of timm's data config that callers' images need.
            metrics: JSON-able figures to store.
            created: RFC 3339 time; None is now.
            coverage: pairs (coverage, threshold) for label sets, or None.

        Raises:
            AdapterError: the result would not be a valid file.
        """
        values = config.model_dump(mode="json", exclude={"gain"}) | {"gain": config.effective_gain}
        for name in OPTIONAL_CONFIG:  # left out at their defaults, so that older readers accept the file
            if not values[name]:
                del values[name]
        metadata = {
            "format": FORMAT,
            "config": _json(values),
            "backbone": backbone,
            "fingerprint": fingerprint,
            "labels": _json(list(labels)),
            "preprocess": _json(dict(preprocess)),
            "created": created or datetime.now(UTC).isoformat(timespec="seconds"),
            "producer": f"karst-hub {_own_version()}",
        }
        if metrics is not None:
            metadata["metrics"] = _json(dict(metrics))
        if coverage is not None:
            metadata["coverage"] = _json([list(pair) for pair in coverage])
        return cls.read(_serialise(tensors, metadata))

    def write(self, path: str | Path) -> None:
        """Write the file atomically.

        Raises:
            OSError: as `write_atomically`.
        """
        write_atomically(Path(path), self.data)

    @cached_property
    def tensors(self) -> "Mapping[str, Tensor]":
        """Tensors by their name in the file, sorted; float32, float16 or bfloat16, on the CPU."""
        import safetensors.torch

        return dict(sorted(safetensors.torch.load(self.data).items()))

    @property
    def numbers(self) -> "Tensor":
        """All numbers in the order of their bytes: 1-D, float32."""
        import torch

        if self.layout.dtype is None:
            return torch.cat([self.tensors[name].flatten().float() for name in self.layout.tensors])
        raw = bytearray(memoryview(self.data)[-self.layout.data_bytes :])  # torch warns about read-only buffers
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[self.layout.dtype]
        return torch.frombuffer(raw, dtype=dtype).float()

    @cached_property
    def layers(self) -> "Mapping[str, Mapping[str, Tensor]]":
        """Tensors of the layers by module path, then by last name (`karst_c`, ...)."""
        return by_layer(self.tensors)

    @property
    def layer_shapes(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Shapes of the tensors of the layers by module path, then by last name (`karst_c`, ...)."""
        return by_layer(dict(sorted(self.layout.tensors.items())))

    @property
    def has_typicality(self) -> bool:
        """Whether answers have a typicality."""
        return TYPICALITY_PREFIX + TYPICALITY[0] in self.layout.tensors

    def head(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the classifier: weight (K, D) and bias (K,)."""
        tensors = read_raw(self.data)
        return tensors["head.weight"].floats(), tensors["head.bias"].floats()

    def check(self, backbone: BackboneInfo) -> None:
        """Check that the adapter was trained on this backbone and that every tensor fits it.

        Raises:
            AdapterError: the fingerprint differs, the backbone lacks a layer, or a size differs.
        """
        if self.fingerprint != backbone.fingerprint:
            raise AdapterError(
                [
                    Problem(
                        "fingerprint",
                        f"the adapter was trained on backbone {self.backbone!r} with fingerprint "
                        f"{self.fingerprint[:12]}..., but this backbone is {backbone.name!r} with fingerprint "
                        f"{backbone.fingerprint[:12]}...; train it on this backbone's weights",
                    )
                ]
            )
        sites = {site.name: site for site in backbone.sites}
        norms = {norm.name: norm for norm in backbone.norms}
        problems: list[Problem] = []
        for layer, parts in self.layer_shapes.items():
            if enough(problems):
                break
            if layer in sites:
                problems += check_layer_fits(sites[layer], parts)
            elif layer in norms:
                problems += check_norm_fits(norms[layer], parts)
            else:
                problems.append(
                    Problem(layer, f"backbone {backbone.name!r} has no such adaptable layer; remove its tensors")
                )
        width = self.layout.tensors["head.weight"][1]
        if width != backbone.width:
            problems.append(
                Problem(
                    "head.weight",
                    f"has {width} columns, but the backbone has {backbone.width} features; train the head again",
                )
            )
        if list(self.preprocess["input_size"]) != list(backbone.input_size):
            problems.append(
                Problem(
                    "preprocess",
                    f"input_size is {self.preprocess['input_size']}, but the backbone takes "
                    f"{list(backbone.input_size)}; train with that size",
                )
            )
        if problems:
            raise AdapterError(problems)

    def merge(self, backbone: "Backbone") -> "nn.Module":
        """Return a new timm module with this adapter and its head merged in: pixels (B, 3, H, W) -> logits (B, K).

        W = diag(1 + s1) (W0 + dW) diag(1 + s1_in), b = (1 + s1) (b0 + (W0 + dW) s2_in) + s2; see docs/method.md.

        Raises:
            AdapterError: as `check`.
        """
        from .merge import merge

        return merge(self, backbone)

    def _is_finite(self) -> bool:
        """Return whether no number is NaN or infinite."""
        if self.layout.dtype is None:
            return all(tensor.is_finite for tensor in read_raw(self.data).values())
        return are_finite(bits_of(self.data, self.layout.data_bytes, self.layout.dtype), self.layout.dtype)


def by_layer(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Return tensors, or their shapes, by the module path of their layer, then by their last name.

    Without head and typicality.
    """
    out: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer not in ("head", "typicality"):
            out.setdefault(layer, {})[part] = tensor
    return out


def _valid_with(fields: Mapping[str, Any]) -> Hashable:
    """Return the metadata values that `check_tensors` depends on, besides the layout."""
    config = fields["config"]
    return config.kernels, config.rank, config.rescale, config.norms, len(fields["labels"])


def _read_bytes(path: Path, max_bytes: int | None) -> bytes:
    try:
        size = path.stat().st_size
        if max_bytes is not None and size > max_bytes:
            raise file_error(f"{path}: has {size} bytes, but at most {max_bytes} are allowed")
        return path.read_bytes()
    except OSError as error:
        raise file_error(f"{path}: {error.strerror or error}") from error


def _serialise(tensors: "Mapping[str, Tensor]", metadata: dict[str, str]) -> bytes:
    """Return safetensors bytes with sorted metadata: the library's own order changes from run to run."""
    import safetensors.torch

    raw = safetensors.torch.save(dict(tensors), metadata=metadata)
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the tensors to 8 bytes
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _own_version() -> str:
    try:
        return version("karst-hub")
    except PackageNotFoundError:  # a source tree that is not installed
        return "unknown"
