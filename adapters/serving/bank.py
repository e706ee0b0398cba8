"""Many adapters beside one frozen backbone: slots, and a forward pass over a batch of mixed adapters.

Axes: B images, T tokens of an image (rows of a layer's input that belong to it), K classes, D features.

No adapter is merged. Each adapted layer computes its frozen product once for the whole batch. KARST's part is a
batched product over images (`kronecker.add_`, with separate numbers for each image), added in place. The numbers are
gathered from the `SlotMemory` once per batch.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, BackboneError, Site, features
from ..format.file import Adapter
from ..format.layouts import LayoutCache
from ..method import kronecker
from ..short_repr import short_repr
from .frozen_forms import FrozenForms, unmeasured_forms
from .limits import BankLimits
from .prepack import prepack_layers
from .slot_memory import Packed, PackingPlan, SiteNumbers, SlotMemory
from .typicality import DeviceTypicality, typicality_of

# Of the largest feature, between two implementations of the same model.
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
INT8_ROUNDING = 0.5  # a model that a bank cannot serve differs by more than its largest feature


class BankFullError(RuntimeError):
    """All slots of a bank are in use; evict an adapter first."""


class Slot(NamedTuple):
    """Handle of an adapter in a bank; each `put` has a new generation, so a stale handle never matches."""

    number: int
    generation: int


@dataclass(frozen=True)
class _Resident:
    """The parts of an adapter in a slot that are not in the slot memory."""

    generation: int
    kernels: int
    rank: int
    kronecker: frozenset[str]
    rescaled: frozenset[str]
    norms: frozenset[str]
    head_weight: Tensor  # (K, D)
    head_bias: Tensor  # (K,)
    typicality: DeviceTypicality | None

    __repr__ = short_repr


class Scores(NamedTuple):
    """Logits of one image, and its typicality."""

    logits: Tensor  # (K,), in the backbone's dtype
    typicality: float | None  # in [0, 1]; None where the adapter has no typicality


@dataclass(frozen=True)
class _Batch:
    """Numbers of the batch in the current forward pass, and the sites that any of its adapters changes.

    A batch with one adapter repeats its numbers B times: one product per image is faster than one product over all
    rows, whose long thin matrices do not fit the processor's cache.
    """

    numbers: dict[str, SiteNumbers]
    kronecker: frozenset[str]
    rescaled: frozenset[str]
    norms: dict[str, tuple[Tensor, Tensor]]  # weight and bias, (B, 1, d), where any adapter tunes the norm

    __repr__ = short_repr


class Bank:
    """Device memory for the adapters of one backbone, in a fixed number of slots.

    Threads may call `put`, `evict` and `forward` at once: forward passes run one at a time, and `put` writes only to
    a free slot. The caller must not evict a slot during a forward pass that uses it.

    Attributes:
        slots: number of slots.
        device: of the backbone and of all slots.
        dtype: of the backbone and of all slots.
        limits: sizes that the bank accepts.
        layouts: pass it to `Adapter.read`, so that files with a known layout load and pack faster.
        forms: how each kind of frozen layer is computed.
    """

    def __init__(
        self,
        backbone: Backbone,
        slots: int = 64,
        max_rank: int = 16,
        max_kernels: int = 8,
        factor: int = 8,
        *,
        layouts: LayoutCache | None = None,
        forms: FrozenForms | None = None,
    ) -> None:
        """Allocate all slots, and check that an adapter of zeros leaves the backbone's features bit-identical.

        Args:
            backbone: not changed. A CPU bank holds its own copy of most weights, so drop this object to save memory.
            slots: number of adapters that fit at once.
            max_rank: the largest R of an adapter; smaller ones are padded with zeros.
            max_kernels: the largest N of an adapter; smaller ones are padded with zeros.
            factor: p = q of all adapters, where it divides the layer's sides.
            layouts: cache of layouts that other code shares; None makes a new one.
            forms: how the frozen layers are computed (`measure_forms`); None takes oneDNN's layout where possible.

        Raises:
            ValueError: a size is below 1.
            BackboneError: the model computes other features in a bank, so a bank cannot serve it.
        """
        for name, value in (("slots", slots), ("max_rank", max_rank), ("max_kernels", max_kernels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.slots = slots
        self.device, self.dtype = backbone.device, backbone.dtype
        self.limits = BankLimits(backbone.info(), max_rank=max_rank, max_kernels=max_kernels, factor=factor)
        self.layouts = LayoutCache() if layouts is None else layouts
        self._plan_key = object()  # of this bank's plans in the cache; `self` would keep the bank in memory
        self._residents: dict[int, _Resident] = {}
        self._generation = 0
        self._free = list(range(slots - 1, -1, -1))
        self._slots_lock = threading.Lock()
        self._forward_lock = threading.Lock()
        self._batch: _Batch | None = None
        self._model = backbone.clone()
        self.forms = unmeasured_forms(backbone) if forms is None else forms
        prepack_layers(self._model, backbone.sites, self.forms)
        self._memory = SlotMemory(backbone, slots, max_rank=max_rank, max_kernels=max_kernels, factor=factor)
        for site in backbone.sites:
            adapted = _AdaptedLinear(self._model.get_submodule(site.name), site, lambda: self._batch)
            self._model.set_submodule(site.name, adapted)
        modules = dict(self._model.named_modules())
        for norm in backbone.norms:
            self._hook_norm(modules[norm.name], norm.name)
        self._check_identity(backbone)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image, in pixels."""
        return self.limits.backbone.input_size

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    @torch.inference_mode()
    def pack(self, adapter: Adapter) -> Packed:
        """Check an adapter, and return it in the bank's order and dtype, ready for `put`.

        Raises:
            AdapterError: as `BankLimits.check`.
        """
        return self._memory.pack(adapter, self._plan(adapter))

    def _plan(self, adapter: Adapter) -> PackingPlan:
        """Check the adapter and make its packing plan, or take both from the cache.

        Raises:
            AdapterError: as `BankLimits.check`.
        """
        # All values that `BankLimits.check` reads, besides the layout.
        checked = adapter.fingerprint, *adapter.preprocess["input_size"]
        known: tuple[object, PackingPlan] | None = self.layouts.result(adapter.layout, self._plan_key)
        if known is not None and known[0] == checked:
            return known[1]
        self.limits.check(adapter)
        plan = self._memory.plan(adapter.layout)
        self.layouts.add_result(adapter.layout, self._plan_key, (checked, plan), plan.source.nbytes)
        return plan

    def put(self, adapter: Adapter | Packed) -> Slot:
        """Write an adapter into a free slot, which it overwrites completely.

        Raises:
            AdapterError: as `BankLimits.check`.
            BankFullError: no slot is free.
        """
        packed = adapter if isinstance(adapter, Packed) else self.pack(adapter)
        with self._slots_lock:
            if not self._free:
                raise BankFullError(f"all {self.slots} slots are in use; evict an adapter first")
            number = self._free.pop()
            self._generation += 1
            slot = Slot(number, self._generation)
        try:
            resident = self._write(slot, packed)
        except BaseException:
            with self._slots_lock:
                self._free.append(number)
            raise
        self._residents[number] = resident  # only now can `forward` use it
        return slot

    def evict(self, slot: Slot) -> None:
        """Free a slot.

        Raises:
            KeyError: the adapter was evicted before.
        """
        with self._slots_lock:
            if self._resident(slot) is None:
                raise KeyError(slot)
            del self._residents[slot.number]
            self._free.append(slot.number)

    @torch.inference_mode()
    def forward(self, pixels: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
        """Return the logits of `score`, image i's of shape (K_i,); raises what `score` raises."""
        return [scores.logits for scores in self.score(pixels, slots, typicality=False)]

    @torch.inference_mode()
    def score(self, pixels: Tensor, slots: Sequence[Slot], *, typicality: bool = True) -> list[Scores]:
        """Run the backbone once, each image with its own adapter.

        Args:
            pixels: (B, 3, H, W), normalised.
            slots: B slots that `put` returned; the adapter in `slots[i]` classifies image i.
            typicality: False leaves it out.

        Raises:
            ValueError: the numbers of slots and images differ, or a slot's adapter was evicted.
        """
        if len(slots) != len(pixels):
            raise ValueError(f"got {len(pixels)} images and {len(slots)} slots; pass one slot per image")
        residents = [r for r in map(self._resident, slots) if r is not None]
        if len(residents) < len(slots):
            stale = sorted({slot.number for slot in slots if self._resident(slot) is None})
            raise ValueError(f"the adapter in slot {', '.join(map(str, stale))} was evicted; put it again")
        if not residents:
            return []
        index = torch.tensor([slot.number for slot in slots], device=self.device)
        norms = frozenset().union(*(r.norms for r in residents))
        kronecker_sites = frozenset().union(*(r.kronecker for r in residents))
        rescaled = frozenset().union(*(r.rescaled for r in residents))
        with self._forward_lock:
            if kronecker_sites or rescaled or norms:  # else all are heads on the frozen features
                self._batch = _Batch(
                    numbers=self._memory.gather(
                        index, kernels=max(r.kernels for r in residents), rank=max(r.rank for r in residents)
                    ),
                    kronecker=kronecker_sites,
                    rescaled=rescaled,
                    norms={n: own for n, own in self._memory.gather_norms(index).items() if n in norms}
                    if norms
                    else {},
                )
            try:
                pooled = features(self._model, pixels.to(device=self.device, dtype=self.dtype))
            finally:
                self._batch = None
        logits = [
            torch.addmv(resident.head_bias, resident.head_weight, row)
            for resident, row in zip(residents, pooled.unbind(), strict=True)
        ]
        shares = typicality_of([r.typicality for r in residents], pooled) if typicality else [None] * len(logits)
        return [Scores(row, share) for row, share in zip(logits, shares, strict=True)]

    @torch.inference_mode()
    def frozen_features(self, pixels: Tensor) -> Tensor:
        """Return the frozen backbone's pooled features (B, D) of normalised pixels (B, 3, H, W)."""
        with self._forward_lock:
            return features(self._model, pixels.to(device=self.device, dtype=self.dtype))

    @torch.inference_mode()
    def warm_up(self, pixels: Tensor, kernels: int, rank: int) -> Tensor:
        """Compute a mixed batch with an adapter of zeros for each image, to measure or warm up a worker.

        Args:
            pixels: (B, 3, H, W), normalised, on the device.
            kernels: at most the bank's `max_kernels`.
            rank: an even number, at most the bank's `max_rank`.

        Returns:
            The frozen backbone's pooled features, (B, D).

        Raises:
            RuntimeError: an adapter was put before, so slot 0 may not be zeros.
        """
        if self._generation:
            raise RuntimeError("warm_up needs an unused bank, but an adapter was put already; call it before `put`")
        index = torch.zeros(len(pixels), dtype=torch.int64, device=self.device)
        every = frozenset(site.name for site in self.limits.backbone.sites)
        with self._forward_lock:
            self._batch = _Batch(self._memory.gather(index, kernels, rank), every, every, norms={})
            try:
                return features(self._model, pixels)
            finally:
                self._batch = None

    @torch.inference_mode()
    def _check_identity(self, backbone: Backbone) -> None:
        """Compare a probe image's features (docs/method.md); slot 0 then holds an adapter of zeros for `warm_up`."""
        self._memory.write(0, self._memory.pack_zeros())
        height, width = self.input_size[1:]
        pixels = torch.linspace(-1, 1, 3 * height * width, device=self.device, dtype=self.dtype)
        pixels = pixels.view(1, 3, height, width)
        zeros = self.warm_up(pixels, kernels=1, rank=2)
        frozen = features(backbone.model, pixels)
        rounding = INT8_ROUNDING if "int8" in self.forms.chosen.values() else ROUNDING[self.dtype]
        near = torch.allclose(zeros, frozen, rtol=0, atol=rounding * float(frozen.abs().max()))
        if not near or not torch.equal(zeros, features(self._model, pixels)):
            raise BackboneError(
                f"a bank cannot serve backbone {backbone.name!r}: an adapter of zeros changes its features; "
                "use another timm model (docs/backbones.md)"
            )

    def _resident(self, slot: Slot) -> _Resident | None:
        """Return the adapter that `put` wrote for this handle, or None after its eviction."""
        found = self._residents.get(slot.number)
        return found if found is not None and found.generation == slot.generation else None

    @torch.inference_mode()
    def _write(self, slot: Slot, packed: Packed) -> _Resident:
        weight, bias = self._memory.write(slot.number, packed)
        return _Resident(
            generation=slot.generation,
            kernels=packed.kernels,
            rank=packed.rank,
            kronecker=packed.kronecker,
            rescaled=packed.rescaled,
            norms=packed.norms,
            head_weight=weight,
            head_bias=bias,
            typicality=DeviceTypicality(packed.typicality, self.device) if packed.typicality else None,
        )

    def _hook_norm(self, norm: nn.Module, name: str) -> None:
        def tune(layer: Any, args: tuple[Tensor, ...], _y: Tensor) -> Tensor | None:
            current = self._batch
            if current is None or name not in current.norms:
                return None
            weight, bias = current.norms[name]
            y = F.layer_norm(args[0], layer.normalized_shape, eps=layer.eps)
            return _rescaled(y, weight, bias, in_place=True)

        norm.register_forward_hook(tune)


class _AdaptedLinear(nn.Module):
    """A site: its frozen layer, plus KARST's part for each image of the current batch."""

    def __init__(self, frozen: nn.Module, site: Site, current: Callable[[], _Batch | None]) -> None:
        super().__init__()
        self._forward: Callable[[Tensor], Tensor] = (
            frozen.forward
        )  # skips `nn.Module.__call__`: there are no hooks, and the calls are many and short
        self._site = site
        self._current = current

    def forward(self, x: Tensor) -> Tensor:
        """Map (B.., d_in) to (B.., d_out)."""
        current, site = self._current(), self._site
        if current is None:
            return self._forward(x)
        own = current.numbers[site.name]
        rescaled = site.name in current.rescaled
        if rescaled and site.rescale_in:
            x = _rescaled(x, own.in_scale, own.in_shift)
        y = self._forward(x)
        if site.name in current.kronecker:
            kronecker.add_(y, x, own.c, own.a, own.b, site.splits)
        if rescaled and site.rescale_out:
            y = _rescaled(y, own.scale, own.shift, in_place=True)
        return y


def _rescaled(x: Tensor, scale: Tensor, shift: Tensor, *, in_place: bool = False) -> Tensor:
    """Return x * scale + shift with separate vectors per image: x (B.., d), scale and shift (B, 1, d)."""
    rows = x.reshape(len(scale), -1, x.shape[-1])  # (B, T, d)
    y: Tensor = torch.addcmul(shift, rows, scale, out=rows if in_place else None)
    return y.view(x.shape)
