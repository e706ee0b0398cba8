"""One adapter <-> one safetensors file, format `karst/1`: read, validate, write, fold into a backbone.

Everything that comes from outside is checked here, in two steps: `Adapter.read` (whatever the file alone can
tell) and `Adapter.check` (whether it fits a backbone). Both collect all problems before they complain.
"""

import copy
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..backbone import Backbone, BackboneInfo
from ..method import kronecker
from ..method.config import KarstConfig
from .errors import AdapterError, Problem, file_error
from .header import Layout, read_header
from .validate import (
    FORMAT,
    KRONECKER,
    OPTIONAL_CONFIG,
    all_finite,
    check_layer_fits,
    check_norm_fits,
    check_tensors,
    parse_metadata,
)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter; immutable, named by its digest.

    Attributes:
        data: the whole file.
        digest: sha256 of `data`, hex.
        config: kernels, rank, factor, gain, re-scaling.
        backbone: the timm name it was trained on; `fingerprint` says which weights.
        labels: K names, in the order of the head's rows.
        preprocess: input_size, interpolation, mean, std, crop_pct, crop_mode, as in timm's data config.
        layout: how its tensors lie in the file.
        metrics: figures that its maker stored, or None.
        created: RFC 3339 time, or None.
        producer: what wrote the file, or None.
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

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    @classmethod
    def read(cls, source: str | Path | bytes, *, max_bytes: int | None = None) -> "Adapter":
        """Read and validate a file or its bytes.

        Raises:
            AdapterError: not there, too large, not safetensors, truncated, or anything in it breaks `karst/1`.
        """
        data = source if isinstance(source, bytes) else _read_bytes(Path(source), max_bytes)
        if max_bytes is not None and len(data) > max_bytes:
            raise file_error(f"{len(data)} bytes, but at most {max_bytes} are allowed")
        header = read_header(data)
        digest = hashlib.sha256(data).hexdigest()
        if header.layout is not None:
            fields, problems = parse_metadata(header.metadata)
            adapter = cls(data=data, digest=digest, layout=header.layout, **fields) if not problems else None
            if adapter and adapter._right() in header.layout.right_with and all_finite(adapter.numbers):
                return adapter
        # Not known to be right: look at every tensor, and collect what is wrong.
        try:
            tensors = dict(sorted(safetensors.torch.load(data).items()))
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise file_error(f"not a valid safetensors file: {error}") from error
        fields, problems = parse_metadata(header.metadata)
        problems += check_tensors(tensors, fields.get("config"), fields.get("labels"))
        if problems:
            raise AdapterError(problems)
        layout = header.learn(tensors, len(data) - header.start)
        adapter = cls(data=data, digest=digest, layout=layout, **fields)
        layout.right_with[:] = [adapter._right()]
        vars(adapter)["tensors"] = tensors
        return adapter

    @classmethod
    def create(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        config: KarstConfig,
        backbone: str,
        fingerprint: str,
        labels: Sequence[str],
        preprocess: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        created: str | None = None,
    ) -> "Adapter":
        """Make an adapter of numbers; the same arguments (with `created`) give the same bytes.

        Raises:
            AdapterError: the result would not be a valid file.
        """
        shape = config.model_dump(mode="json", exclude={"gain"}) | {"gain": config.effective_gain}
        for name in OPTIONAL_CONFIG:  # in the file only where they say something
            if not shape[name]:
                del shape[name]
        metadata = {
            "format": FORMAT,
            "config": _json(shape),
            "backbone": backbone,
            "fingerprint": fingerprint,
            "labels": _json(list(labels)),
            "preprocess": _json(dict(preprocess)),
            "created": created or datetime.now(UTC).isoformat(timespec="seconds"),
            "producer": f"karst-hub {_own_version()}",
        }
        if metrics is not None:
            metadata["metrics"] = _json(dict(metrics))
        return cls.read(_serialise(tensors, metadata))

    def write(self, path: str | Path) -> None:
        """Write the file so that it is there completely or not at all."""
        write_atomically(Path(path), self.data)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """File name of a tensor -> its numbers (F32, F16 or BF16, on the CPU)."""
        return dict(sorted(safetensors.torch.load(self.data).items()))

    @property
    def numbers(self) -> Tensor:
        """All numbers of the file in the order in which they lie there: 1-D, float32."""
        if self.layout.dtype is None:
            return torch.cat([self.tensors[name].flatten().float() for name in self.layout.tensors])
        raw = bytearray(memoryview(self.data)[-self.layout.data_bytes :])  # torch wants bytes that may be written to
        return torch.frombuffer(raw, dtype=self.layout.dtype).float()

    @cached_property
    def layers(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Module path of a layer -> its tensors by their last name (`karst_c`, `scale`, ...); the head is not in it."""
        return by_layer(self.tensors)

    def _right(self) -> object:
        """What of the metadata decides, beside the layout, whether the tensors are right (`check_tensors`)."""
        config = self.config
        return config.kernels, config.rank, config.rescale, config.norms, len(self.labels)

    def check(self, backbone: BackboneInfo) -> None:
        """Make sure that the adapter was made for this backbone and fits it.

        Raises:
            AdapterError: another fingerprint, a layer that the backbone does not have, or sides that differ.
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
        problems = []
        for layer, parts in self.layers.items():
            if layer in sites:
                problems += check_layer_fits(sites[layer], parts)
            elif layer in norms:
                problems += check_norm_fits(norms[layer], parts)
            else:
                problems.append(Problem(layer, f"backbone {backbone.name!r} has no such adaptable layer"))
        width = self.tensors["head.weight"].shape[1]
        if width != backbone.width:
            problems.append(
                Problem("head.weight", f"has {width} columns, but the backbone has {backbone.width} features")
            )
        if list(self.preprocess["input_size"]) != list(backbone.input_size):
            problems.append(
                Problem(
                    "preprocess",
                    f"input_size is {self.preprocess['input_size']}, the backbone takes {list(backbone.input_size)}",
                )
            )
        if problems:
            raise AdapterError(problems)

    def merge(self, backbone: Backbone) -> nn.Module:
        """A plain timm module of its own with this adapter and its head folded in: pixels (B, 3, H, W) -> (B, K).

        W = diag(1 + s1) (W0 + dW) diag(1 + s1_in), b = (1 + s1) (b0 + (W0 + dW) s2_in) + s2 (KARST.md).

        Raises:
            AdapterError: as `check`.
        """
        self.check(backbone)
        model = copy.deepcopy(backbone.model)
        modules = dict(model.named_modules())
        with torch.no_grad():
            for layer, parts in self.layers.items():
                parts = {name: t.to(backbone.device).double() for name, t in parts.items()}
                if "norm_weight" in parts:
                    modules[layer].weight.copy_(parts["norm_weight"])
                    modules[layer].bias.copy_(parts["norm_bias"])
                else:
                    _fold(modules[layer], parts, self.config)
            model.reset_classifier(self.num_classes)
            heads = model.get_classifier()
            # A distilled DeiT averages the answers of two heads; twice the same head is this adapter's.
            for head in heads if isinstance(heads, tuple) else (heads,):
                head.to(device=backbone.device, dtype=backbone.dtype)
                head.weight.copy_(self.tensors["head.weight"])
                head.bias.copy_(self.tensors["head.bias"])
        return model.eval().requires_grad_(False)


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the module path of their layer, and there by their last name; without the head."""
    out: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer != "head":
            out.setdefault(layer, {})[part] = tensor
    return out


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there completely or not at all, and still there after a power cut.

    Raises:
        OSError: no such folder, no permission, disk full; nothing is left behind.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too, survives a power cut
    finally:
        os.close(folder)


def _fold(linear: nn.Linear, parts: dict[str, Tensor], config: KarstConfig) -> None:
    """Everything in float64, and cast once at the end: this is the reference for whatever is faster."""
    weight = linear.weight.double()
    bias = linear.bias.double() if linear.bias is not None else weight.new_zeros(weight.shape[0])
    if "karst_c" in parts:
        c, a, b = (parts[name] for name in KRONECKER)
        weight = weight + kronecker.delta(c, a, b, config.effective_gain)
    if "in_scale" in parts:
        bias = bias + weight @ parts["in_shift"].expand(weight.shape[1])
        weight = weight * parts["in_scale"]
    if "scale" in parts:
        weight = parts["scale"].expand(weight.shape[0])[:, None] * weight
        bias = parts["scale"] * bias + parts["shift"]
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype))
    if linear.bias is not None or bias.any():
        linear.bias = nn.Parameter(bias.to(linear.weight.dtype))


def _read_bytes(path: Path, max_bytes: int | None) -> bytes:
    try:
        size = path.stat().st_size
        if max_bytes is not None and size > max_bytes:
            raise file_error(f"{path}: {size} bytes, but at most {max_bytes} are allowed")
        return path.read_bytes()
    except OSError as error:
        raise file_error(f"{path}: {error.strerror or error}") from error


def _serialise(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """safetensors bytes with a sorted header: its own writer puts metadata in an order that changes from run to run."""
    raw = safetensors.torch.save(dict(tensors), metadata=metadata)
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8, as safetensors does it
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _own_version() -> str:
    try:
        return version("karst-hub")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "unknown"
