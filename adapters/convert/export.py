"""Export of an adapter merged into its backbone, as a timm checkpoint or as ONNX.

Each function loads its own result again and compares its logits with the unmerged adapter's before it returns.
"""

import contextlib
import json
import warnings
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, create_model, features, first_line
from ..format.errors import file_error
from ..format.file import Adapter
from ..format.names import KRONECKER
from ..method import kronecker

# Largest allowed difference between two float32 implementations, relative to the largest logit.
TOLERANCE = 1e-3
_PROBES = 4


def to_timm(adapter: Adapter, backbone: Backbone) -> tuple[bytes, float]:
    """Return a safetensors checkpoint for `timm.create_model(name, num_classes=K, checkpoint_path=...)`.

    Its metadata has the labels, preprocess, coverage, and the digest of the adapter.

    Returns:
        The file, and the largest difference of its logits on probe images, relative to the largest logit.

    Raises:
        AdapterError: the adapter is of another backbone, timm's model lacks a merged weight, or the logits differ by
            more than `TOLERANCE`.
    """
    merged = adapter.merge(backbone)
    state = {name: tensor.contiguous() for name, tensor in merged.state_dict().items()}
    data = safetensors.torch.save(state, metadata={"format": "pt", **_metadata(adapter)})
    model = create_model(backbone.name, num_classes=adapter.num_classes)
    if tuple(model.pretrained_cfg["input_size"]) != backbone.input_size:
        side_px = backbone.input_size[1]
        model = create_model(backbone.name, num_classes=adapter.num_classes, image_size=side_px)
    model.eval()
    try:
        model.load_state_dict(safetensors.torch.load(data), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise file_error(
            f"timm's {backbone.name!r} does not accept the merged weights ({reason}); use --to onnx"
        ) from error
    return data, _compare("the timm checkpoint", model, adapter, backbone)


def to_onnx(adapter: Adapter, backbone: Backbone) -> tuple[bytes, float]:
    """Return one ONNX file: `pixels` (batch, 3, H, W) float32, normalised, to `logits` (batch, K); any batch size.

    Its metadata has the labels, preprocess (with mean and std), coverage, and the digest of the adapter.

    Returns:
        The file, and the largest difference as in `to_timm`, computed with onnxruntime.

    Raises:
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed; the message names the extra to install.
        AdapterError: as `to_timm`, or the model is too large for one ONNX file (2 GB) or cannot be exported.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"ONNX needs {error.name}: pip install 'karst-hub[onnx]'", name=error.name) from error
    merged = adapter.merge(backbone)
    try:
        with contextlib.redirect_stdout(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the exporter, which the caller cannot act on
            program = torch.onnx.export(
                merged,
                (_probes(backbone, 2),),
                input_names=["pixels"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        assert program is not None  # noqa: S101 (None only where a path is given)
        proto: Any = program.model_proto
        for key, value in _metadata(adapter).items():
            proto.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(proto)
        data = proto.SerializeToString()
    except Exception as error:  # torch's exporter, onnx and protobuf each have their own kinds
        raise file_error(
            f"the merged {backbone.name!r} cannot be exported to one ONNX file: {first_line(error)}; use --to timm"
        ) from error
    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds
        raise file_error(
            f"onnxruntime does not load the exported {backbone.name!r}: {first_line(error)}; use --to timm"
        ) from error

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])

    return data, _compare("the ONNX file", run, adapter, backbone)


def unmerged(adapter: Adapter, backbone: Backbone) -> Callable[[Tensor], Tensor]:
    """Return a function from pixels (B, 3, H, W) to logits (B, K), with one unmerged adapter of any factor.

    It is slow and simple, as the reference for merged exports.

    Raises:
        AdapterError: as `Adapter.check`.
    """
    adapter.check(backbone)
    model = backbone.clone()
    modules = dict(model.named_modules())
    for name, parts in adapter.layers.items():
        own = {part: tensor.to(backbone.device, backbone.dtype) for part, tensor in parts.items()}
        _hook(modules[name], own, adapter.config.effective_gain)
    head = {p: adapter.tensors[f"head.{p}"].to(backbone.device, backbone.dtype) for p in ("weight", "bias")}
    return lambda pixels: F.linear(features(model, pixels), head["weight"], head["bias"])


def _hook(module: Any, own: dict[str, Tensor], gain: float) -> None:
    def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * own["in_scale"] + own["in_shift"], *args[1:])

    def after(_module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if "norm_weight" in own:
            return F.layer_norm(args[0], module.normalized_shape, own["norm_weight"], own["norm_bias"], module.eps)
        if "karst_c" in own:
            c, a, b = (own[part] for part in KRONECKER)
            y = y + kronecker.apply(args[0], c, a, b, gain)
        return y * own["scale"] + own["shift"] if "scale" in own else y

    if "in_scale" in own:
        module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _compare(target: str, other: Callable[[Tensor], Tensor], adapter: Adapter, backbone: Backbone) -> float:
    """Return the largest relative difference over two batch sizes.

    Raises:
        AdapterError: the difference exceeds `TOLERANCE`.
    """
    reference, largest = unmerged(adapter, backbone), 0.0
    with torch.inference_mode():
        for count in (1, _PROBES):
            pixels = _probes(backbone, count)
            expected = reference(pixels)
            difference = float((other(pixels) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
            largest = max(largest, difference)
            if not difference <= TOLERANCE:  # true for NaN
                raise file_error(
                    f"{target} was not written: its logits differ from the adapter's by {difference:.1e} of the "
                    f"largest logit, but at most {TOLERANCE:.0e} is allowed; use another target"
                )
    return largest


def _probes(backbone: Backbone, count: int) -> Tensor:
    return torch.randn(count, *backbone.input_size, generator=torch.Generator().manual_seed(count))


def _metadata(adapter: Adapter) -> dict[str, str]:
    found = {
        "labels": json.dumps(list(adapter.labels), ensure_ascii=False),
        "preprocess": json.dumps(adapter.preprocess),
        "backbone": adapter.backbone,
        "adapter": adapter.digest,
    }
    if adapter.coverage is not None:
        found["coverage"] = json.dumps(adapter.coverage)
    return found
