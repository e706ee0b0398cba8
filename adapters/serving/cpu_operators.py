"""Private operators of torch for linear layers on a CPU; no other module calls one.

torch.compile emits these operators, so they are fast, and no promise covers them. Each function that makes packed
weights has a check beside it. A bank uses plain `F.linear` where a check fails: torch may move an operator or change
its meaning, and a CPU may lack an instruction. A version of torch that is not in `CHECKED` also gets `F.linear`.
`tests/adapters/serving/test_cpu_operators.py` fails when an operator moves.
"""

from functools import cache

import torch
from torch import Tensor

CHECKED = ("2.14",)  # major and minor versions of torch


def version_is_checked(version: str = torch.__version__) -> bool:
    """Return whether the operators were checked with this version of torch."""
    return ".".join(version.split(".")[:2]) in CHECKED


def has_onednn() -> bool:
    """Return whether torch can multiply by weights in oneDNN's blocked layout."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return _has_all(torch.ops.mkldnn, names)


def onednn_pack(weight: Tensor) -> Tensor:
    """Return a float32 or bfloat16 weight (d_out, d_in) in oneDNN's layout, an opaque tensor of the same size."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def onednn_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Map (..., d_in) to (..., d_out), in the dtype of `x`."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return y


@cache
def has_int8() -> bool:
    """Return whether this CPU multiplies int8 exactly (VNNI or AMX), and torch has oneDNN's operator for it.

    Without VNNI, oneDNN adds pairs of products in 16 bits, which saturate.
    """
    names = ("qlinear_prepack", "qlinear_pointwise")
    return _has_all(torch.ops.onednn, names) and has_vnni()


def _has_all(namespace: object, names: tuple[str, ...]) -> bool:
    """Return whether this torch was checked, has oneDNN, and has these operators."""
    found = all(hasattr(namespace, name) for name in names)
    return version_is_checked() and torch.backends.mkldnn.is_available() and found


def has_vnni() -> bool:
    """Return whether the CPU has AVX512-VNNI or AVX-VNNI."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(supported is not None and supported())


def has_fast_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported is not None and supported())


def int8_pack(weight: Tensor) -> Tensor:
    """Return an int8 weight (d_out, d_in) in oneDNN's layout, an opaque tensor of the same size."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


def int8_linear(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return x @ weight.T * scales in float32 (n, d_out).

    Args:
        x: (n, d_in) uint8. With int8, a CPU without AMX takes oneDNN's reference code, 1,000 times slower.
        packed: what `int8_pack` returned.
        scales: (d_out,) float32, of the weight's rows.
        zeros: (d_out,) int64 zeros, the weight's zero points.
    """
    y: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        x, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y
