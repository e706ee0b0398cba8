"""The forms in which a CPU can compute a frozen linear layer, and the choice of the fastest by measuring.

A form is a module that replaces an `nn.Linear`:

- `linear`: the layer itself, on the library that torch was built with
- `onednn`: weights in oneDNN's own blocked layout; the same numbers except for rounding
- `int8`: weights in int8 with a scale per output channel, activations in int8 with a scale per token

Which one is fastest depends on the processor, the layer's shape, the rows and the threads, so a worker measures.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..backbone import Backbone, BackboneError, Site, features
from ..short_repr import short_repr
from . import cpu_operators

Form = Literal["linear", "onednn", "int8"]

ROUNDS = 5  # in which every form of a kind runs once
BUDGET_S = 1.5  # of all measurements; a kind gets its share
MIN_GAIN = 1.02  # a form replaces `linear` only if it is this many times as fast: the rest is noise
INT8_MAX = 127
CHUNK_NUMBERS = (
    256 * 1024
)  # activations that are quantised at once: their temporary tensors fit a core's second-level cache


class Kind(NamedTuple):
    """Frozen layers of one role and shape, such as (`fc1`, 768, 3072). They share a form."""

    role: str
    d_in: int
    d_out: int

    def __str__(self) -> str:
        """Return for example `fc1 768x3072`."""
        return f"{self.role} {self.d_in}x{self.d_out}"


@dataclass(frozen=True)
class FrozenForms:
    """The form of each kind of frozen layer.

    Attributes:
        chosen: kind -> form.
        ms: kind -> form -> fastest measured milliseconds of one layer. Empty if nothing was measured.
    """

    chosen: Mapping[Kind, Form]
    ms: Mapping[Kind, Mapping[Form, float]]

    __repr__ = short_repr

    def describe(self) -> list[str]:
        """Return one line per kind, such as `fc1 768x3072: onednn (linear 12.10 ms, onednn 11.02 ms)`."""
        return [
            f"{kind}: {form}" + (f" ({', '.join(f'{name} {ms:.2f} ms' for name, ms in self.ms[kind].items())})")
            if kind in self.ms
            else f"{kind}: {form}"
            for kind, form in self.chosen.items()
        ]


def kind_of(site: Site) -> Kind:
    """Return the kind of a site."""
    return Kind(site.name.rpartition(".")[2], site.d_in, site.d_out)


def can_int8(backbone: Backbone) -> bool:
    """Return whether this machine can run the backbone in int8: float32 weights on a CPU with VNNI."""
    return backbone.device.type == "cpu" and backbone.dtype == torch.float32 and cpu_operators.has_int8()


def check_int8(backbone: Backbone) -> None:
    """
    Raises:
        BackboneError: this machine cannot run the backbone in int8.
    """
    if not can_int8(backbone):
        raise BackboneError("int8 needs a CPU with VNNI, and this one has none; use float32 or bfloat16")


def forms_of(weight: Tensor, *, int8: bool) -> list[Form]:
    """Return the forms that a frozen weight (d_out, d_in) can have on this machine; the first one is `linear`."""
    found: list[Form] = ["linear"]
    if weight.device.type != "cpu":
        return found
    bfloat16 = weight.dtype == torch.bfloat16 and cpu_operators.has_fast_bfloat16()
    if cpu_operators.has_onednn() and (weight.dtype == torch.float32 or bfloat16):
        found.append("onednn")
    if int8 and weight.dtype == torch.float32 and cpu_operators.has_int8():
        found.append("int8")
    return found


def unmeasured_forms(backbone: Backbone, *, int8: bool = False) -> FrozenForms:
    """Return the last form that each kind can have: oneDNN where possible, or int8 if `int8` is true."""
    return FrozenForms({kind: forms_of(layer.weight, int8=int8)[-1] for kind, layer in _layers(backbone)}, {})


@torch.inference_mode()
def measure_forms(
    backbone: Backbone, images: int, *, int8: bool = False, clock: Callable[[], float] = time.perf_counter
) -> FrozenForms:
    """Time the forms of each kind of frozen layer on this machine, and take the fastest.

    Call it with the thread count that the passes will have. The forms of a kind take turns, and the fastest run of
    each counts: other load on the machine can only make a run slower.

    Args:
        images: of one pass; the layers get as many rows as a pass has.
        int8: int8 is one of the forms.
        clock: seconds.
    """
    layers = list(_layers(backbone))
    shapes = _input_shapes(backbone)
    chosen: dict[Kind, Form] = {}
    measured: dict[Kind, dict[Form, float]] = {}
    for kind, layer in layers:
        names = forms_of(layer.weight, int8=int8)
        if len(names) == 1:
            chosen[kind] = names[0]
            continue
        x = torch.randn(
            images * shapes[kind][0], *shapes[kind][1:], dtype=layer.weight.dtype, device=layer.weight.device
        )
        modules = {name: build(layer, name) for name in names}
        best = _fastest_runs(modules, x, BUDGET_S / len(layers), clock)
        winner = min(names, key=best.__getitem__)
        chosen[kind] = winner if best["linear"] >= MIN_GAIN * best[winner] else "linear"
        measured[kind] = {name: round(1000 * best[name], 3) for name in names}
    return FrozenForms(chosen, measured)


def build(linear: nn.Linear, form: Form) -> nn.Module:
    """Return a frozen layer in a form. Forms other than `linear` hold their own weights, and have no autograd."""
    if form == "onednn":
        return _OneDnnLinear(linear)
    return _Int8Linear(linear) if form == "int8" else linear


def _fastest_runs(
    modules: dict[Form, nn.Module], x: Tensor, budget_s: float, clock: Callable[[], float]
) -> dict[Form, float]:
    """Return the seconds of each module's fastest run, over rounds in alternating order within the budget."""
    best = dict.fromkeys(modules, float("inf"))
    started_s = clock()
    for i in range(1 + ROUNDS):
        for name, module in reversed(modules.items()) if i % 2 else modules.items():
            before_s = clock()
            module(x)
            taken_s = clock() - before_s
            if i:  # the first round also prepares oneDNN's kernels
                best[name] = min(best[name], taken_s)
        if i and clock() - started_s > budget_s:
            break
    return best


def _layers(backbone: Backbone) -> Iterator[tuple[Kind, nn.Linear]]:
    """Yield the first layer of each kind."""
    seen: set[Kind] = set()
    for site in backbone.sites:
        kind = kind_of(site)
        if kind not in seen:
            seen.add(kind)
            yield kind, backbone.model.get_submodule(site.name)


def _input_shapes(backbone: Backbone) -> dict[Kind, tuple[int, ...]]:
    """Return the shape of the input of the first layer of each kind, for one image."""
    shapes: dict[Kind, tuple[int, ...]] = {}

    def note(kind: Kind) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: shapes.__setitem__(kind, tuple(args[0].shape))

    hooks = [layer.register_forward_pre_hook(note(kind)) for kind, layer in _layers(backbone)]
    try:
        features(backbone.model, torch.zeros(1, *backbone.input_size, device=backbone.device, dtype=backbone.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


class _OneDnnLinear(nn.Module):
    """A frozen linear layer on oneDNN's inner product, with the operator that torch.compile emits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # Plain attributes: the packed weight is opaque, so it can be neither a parameter nor a buffer.
        self._weight = cpu_operators.onednn_pack(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        return cpu_operators.onednn_linear(x, self._weight, self._bias)


class _Int8Linear(nn.Module):
    """A frozen linear layer with int8 weights and int8 activations; sums are exact, scales and bias float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, self._scales = quantise_weight(linear.weight.detach())
        self._weight = cpu_operators.int8_pack(weight)
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        self._bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        rows, scales = quantise_rows(x.reshape(-1, x.shape[-1]))
        y = cpu_operators.int8_linear(rows, self._weight, self._scales, self._zeros)
        torch.addcmul(self._bias, y, scales, out=y)
        return y.view(*x.shape[:-1], y.shape[-1])


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a float32 weight (d_out, d_in) as int8, and the scales (d_out,) of its rows."""
    scales = (weight.abs().amax(1) / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scales.unsqueeze(1)).round().to(torch.int8), scales


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 rows (n, d) as int8, and their scales (n, 1).

    Works on a few rows at a time, because temporary tensors of all rows cost more than the arithmetic.
    """
    rows = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(len(x), 1)
    step = max(1, CHUNK_NUMBERS // x.shape[1])
    for part, out, scale in zip(x.split(step), rows.split(step), scales.split(step), strict=True):
        largest = torch.maximum(part.amax(1, keepdim=True), part.amin(1, keepdim=True).neg_())
        torch.mul(largest, 1 / INT8_MAX, out=scale).clamp_min_(1e-30)  # a row of zeros would divide by zero
        out.copy_(torch.mul(part, scale.reciprocal()).round_())
    return rows, scales
