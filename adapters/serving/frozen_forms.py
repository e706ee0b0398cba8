"""The forms in which a CPU can compute a frozen linear layer, and the choice of the fastest by measuring.

A form is a module that replaces an `nn.Linear`:

- `linear`: the layer itself, on the library that torch was built with
- `onednn`: weights in oneDNN's own blocked layout; the same numbers except for rounding
- `int8`: weights in int8 with a scale per output channel, activations in 8 bits with a scale per token (`int8`)

Which one is fastest depends on the processor, the layer's shape, the rows and the threads, so a worker measures. The
hidden activation of an MLP is computed in place.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..backbone import Backbone, BackboneError, Site, watch
from ..short_repr import short_repr
from . import cpu_operators
from .int8.linear import Int8Linear
from .int8.probes import probe_images

Form = Literal["linear", "onednn", "int8"]

_MLP = ["fc1", "act", "drop1", "norm", "fc2", "drop2"]  # timm's Mlp, where only `act` reads the output of `fc1`
ROUNDS = 15  # in which every form of a kind runs once; of five, other load could slow all runs of one form
BUDGET_S = 1.5  # of all measurements; a kind gets its share
MIN_GAIN = 1.02  # a form replaces `linear` only if it is this many times as fast: the rest is noise
MIN_INT8_GAIN = 1.4  # int8 replaces the other forms only if it is this many times as fast, since it can change labels


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
    backbone: Backbone, images: int, *, int8: bool = False, clock: Callable[[], float] | None = None
) -> FrozenForms:
    """Time the forms of each kind of frozen layer on this machine, and take the fastest.

    Call it with the thread count that the passes will have. The forms of a kind take turns, and the fastest run of
    each counts: other load on the machine can only make a run slower.

    Args:
        images: of one pass; the layers get as many rows as a pass has.
        int8: int8 is one of the forms.
        clock: seconds; None takes the CPU time of this thread where torch has one thread, otherwise the wall time. The
            CPU time leaves out the time in which other processes have the core.
    """
    if clock is None:
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
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
        chosen[kind] = _choice(best)
        measured[kind] = {name: round(1000 * best[name], 3) for name in names}
    return FrozenForms(chosen, measured)


def build(linear: nn.Linear, form: Form) -> nn.Module:
    """Return a frozen layer in a form of `forms_of`. Other forms than `linear` hold their own weights without autograd.

    The weights of `int8` are only good enough to measure its time.
    """
    if form == "onednn":
        return _OneDnnLinear(linear)
    return Int8Linear(linear) if form == "int8" else linear


def prepack_layers(model: nn.Module, backbone: Backbone, forms: FrozenForms, alone: Collection[str] = ()) -> None:
    """Replace the sites of a model, and the activations between them, by faster ones that share no weight.

    The weights are then in memory once, as soon as the caller drops the original model. The result has no autograd
    and cannot be moved to another device or dtype.

    Args:
        model: a clone of the backbone's; its modules are replaced, its weights are not changed.
        backbone: whose sites the forward pass calls, instead of only reading their weight.
        forms: of each kind of site.
        alone: layers that compute the class token alone (`class_token_layers`), whose errors reach the features
            undamped. Where their kind has the form `int8`, they stay `linear`, which takes hardly any time; in the
            other int8 layers the class token gets 16 bits.
    """
    layers = {site.name: model.get_submodule(site.name) for site in backbone.sites}
    linears = {name: layer for name, layer in layers.items() if type(layer) is nn.Linear}
    chosen = {site.name: forms.chosen[kind_of(site)] for site in backbone.sites}
    rounded = {name: linears[name] for name in linears if chosen[name] == "int8" and name not in alone}
    int8 = _int8_layers(model, rounded, backbone.input_size, class_token=bool(alone))
    for name, linear in linears.items():
        exact: Form = "linear" if chosen[name] == "int8" else chosen[name]
        model.set_submodule(name, int8[name] if name in int8 else build(linear, exact))
    for site in backbone.sites:
        parent_name, _, name = site.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        on_cpu = backbone.device.type == "cpu" and backbone.dtype == torch.float32
        in_mlp = on_cpu and name == "fc1" and [child for child, _ in parent.named_children()] == _MLP
        if in_mlp and type(parent.act) is nn.GELU:
            parent.act = _InPlaceGELU(parent.act.approximate)


def _int8_layers(
    model: nn.Module, linears: Mapping[str, nn.Linear], input_size: tuple[int, int, int], *, class_token: bool
) -> dict[str, Int8Linear]:
    """Return layers of a model in int8, with weights rounded for the inputs that they get from probe images."""
    layers: dict[str, Int8Linear] = {}

    def make(name: str, linear: nn.Linear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: layers.__setitem__(
            name, Int8Linear(linear, args[0].flatten(0, -2), class_token=class_token)
        )

    if linears:
        watch(model, probe_images(input_size), [(linear, make(name, linear)) for name, linear in linears.items()])
    return layers


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


def _choice(seconds: Mapping[Form, float]) -> Form:
    """Return the form to use, from the seconds of each."""
    exact = min((form for form in seconds if form != "int8"), key=seconds.__getitem__)
    if seconds["linear"] < MIN_GAIN * seconds[exact]:
        exact = "linear"
    return "int8" if seconds[exact] >= MIN_INT8_GAIN * seconds.get("int8", float("inf")) else exact


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

    pixels = torch.zeros(1, *backbone.input_size, device=backbone.device, dtype=backbone.dtype)
    watch(backbone.model, pixels, [(layer, note(kind)) for kind, layer in _layers(backbone)])
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


class _InPlaceGELU(nn.Module):
    """GELU that overwrites its input."""

    def __init__(self, approximate: str) -> None:
        super().__init__()
        self._approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten.gelu_.default(x, approximate=self._approximate)
        return y
