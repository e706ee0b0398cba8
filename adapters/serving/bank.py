"""Many adapters beside one frozen backbone: slots for them, and a forward pass over a batch that mixes them.

Axes: B images, T tokens of an image (rows of a layer's input that belong to it), K classes, D features.

Nothing is merged. Each adapted layer computes its frozen product once for the whole batch; KARST's part is a
batched product over images (`kronecker.add_`, with numbers of its own for every image), added in place. The
numbers come out of the `Stacks` once a pass.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, BackboneError, BackboneInfo, Site, features
from ..format.errors import AdapterError, Problem
from ..format.file import Adapter
from ..format.header import Layout
from ..method import kronecker
from .prepack import quicken
from .slot_memory import Packed, SiteNumbers, Stacks

ROUNDING = 1e-4  # of the largest feature, between two ways to compute the same in float32


class BankFullError(RuntimeError):
    """Every slot is taken: evict one first."""


class Slot(NamedTuple):
    """Where an adapter is in a bank; every `put` is a new generation, so that an old `Slot` is never taken for it."""

    number: int
    generation: int


@dataclass(frozen=True)
class _Resident:
    """What is in a slot, beside the numbers in the stacks."""

    generation: int
    kernels: int
    rank: int
    kronecker: frozenset[str]
    rescaled: frozenset[str]
    norms: frozenset[str]
    head_weight: Tensor  # (K, D)
    head_bias: Tensor  # (K,)


@dataclass(frozen=True)
class _Pass:
    """The batch that is under way: the numbers of each site, and which sites any of its adapters changes.

    A batch of one adapter has its numbers B times, too: a product an image was faster than one over all rows, whose
    long thin matrices leave the cache.
    """

    numbers: dict[str, SiteNumbers]
    kronecker: frozenset[str]
    rescaled: frozenset[str]
    norms: dict[str, tuple[Tensor, Tensor]]  # weight and bias, (B, 1, d), where any adapter has its own


@dataclass(frozen=True)
class BankLimits:
    """What a bank accepts; holds no weights, so that whoever receives adapters can check them far from any bank."""

    backbone: BackboneInfo
    max_rank: int
    max_kernels: int
    factor: int

    def check(self, adapter: Adapter) -> None:
        """Make sure that an adapter can be put into the bank.

        Raises:
            AdapterError: another backbone, more kernels or a larger rank than the bank has room for, or another
                factor.
        """
        adapter.check(self.backbone)
        sites = {site.name: site for site in self.backbone.sites}
        problems = []
        for name, parts in adapter.layers.items():
            if "karst_c" not in parts:
                continue
            kernels, *sides = parts["karst_c"].shape
            rank = parts["karst_a"].shape[3]
            _, *wanted = self.shapes(sites[name])[0]
            if kernels > self.max_kernels:
                problems.append(
                    Problem(f"{name}.karst_c", f"{kernels} kernels, but at most {self.max_kernels} fit here")
                )
            if rank > self.max_rank:
                problems.append(Problem(f"{name}.karst_a", f"rank {rank}, but at most {self.max_rank} fits here"))
            if sides != wanted:
                found, right = (" x ".join(map(str, pair)) for pair in (sides, wanted))
                problems.append(
                    Problem(f"{name}.karst_c", f"C is {found}, but it must be {right} here (factor {self.factor})")
                )
        if problems:
            raise AdapterError(problems)

    def shapes(self, site: Site) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The shapes of the largest C, A and B that a site takes."""
        return kronecker.shapes(
            site.d_in, site.d_out, site.splits, kernels=self.max_kernels, rank=self.max_rank, factor=self.factor
        )


class Bank:
    """Device memory for the adapters of one backbone, in a fixed number of slots.

    Threads may `put`, `evict` and `forward` at once: forward passes run one at a time, a `put` writes only to a
    slot that nobody has yet. A slot must not be evicted while a forward pass uses it.
    """

    def __init__(
        self, backbone: Backbone, slots: int = 64, max_rank: int = 16, max_kernels: int = 8, factor: int = 8
    ) -> None:
        """Allocate the stacks and check that an adapter of zeros changes no bit of what the backbone computes.

        Args:
            backbone: never changed. Layers that a CPU wants in another order are copied, so let go of it.
            slots: how many adapters fit at once.
            max_rank: the largest R of an adapter; smaller ones are padded with zeros.
            max_kernels: the largest N of an adapter; likewise.
            factor: the p = q of its adapters (where it divides the layer's sides).

        Raises:
            ValueError: a size below 1.
            BackboneError: this model computes something else beside a bank, so it cannot be served by one.
        """
        for name, value in (("slots", slots), ("max_rank", max_rank), ("max_kernels", max_kernels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.slots = slots
        self.device, self.dtype = backbone.device, backbone.dtype
        self.limits = BankLimits(backbone.info(), max_rank=max_rank, max_kernels=max_kernels, factor=factor)
        self._fit: WeakKeyDictionary[Layout, tuple[object, ...]] = WeakKeyDictionary()
        self._residents: dict[int, _Resident] = {}
        self._generation = 0
        self._free = list(range(slots - 1, -1, -1))
        self._slots_lock = threading.Lock()
        self._forward_lock = threading.Lock()
        self._pass: _Pass | None = None
        self._model = backbone.clone()
        quicken(self._model, backbone.sites)
        self._stacks = Stacks(backbone, slots, max_rank=max_rank, max_kernels=max_kernels, factor=factor)
        for site in backbone.sites:
            adapted = _AdaptedLinear(self._model.get_submodule(site.name), site, lambda: self._pass)
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
        """How many slots are free."""
        return len(self._free)

    @torch.inference_mode()
    def pack(self, adapter: Adapter) -> Packed:
        """An adapter as `put` takes it without further work: checked, in the bank's order and dtype.

        Raises:
            AdapterError: as `BankLimits.check`.
        """
        about = adapter.fingerprint, *adapter.preprocess["input_size"]  # all that `check` looks at beside the layout
        if self._fit.get(adapter.layout) != about:
            self.limits.check(adapter)
            self._fit[adapter.layout] = about
        return self._stacks.pack(adapter)

    def put(self, adapter: Adapter | Packed) -> Slot:
        """Write an adapter into a free slot, over everything that the slot held.

        Raises:
            AdapterError: as `BankLimits.check`.
            BankFullError: no slot is free.
        """
        packed = adapter if isinstance(adapter, Packed) else self.pack(adapter)
        with self._slots_lock:
            if not self._free:
                raise BankFullError(f"all {self.slots} slots are taken")
            number = self._free.pop()
            self._generation += 1
            slot = Slot(number, self._generation)
        try:
            resident = self._write(slot, packed)
        except BaseException:
            with self._slots_lock:
                self._free.append(number)
            raise
        self._residents[number] = resident  # from here on it can be seen
        return slot

    def evict(self, slot: Slot) -> None:
        """Give a slot back.

        Raises:
            KeyError: what it held is gone already.
        """
        with self._slots_lock:
            if self._resident(slot) is None:
                raise KeyError(slot)
            del self._residents[slot.number]
            self._free.append(slot.number)

    @torch.inference_mode()
    def forward(self, pixels: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
        """One pass of the backbone, every image with its own adapter.

        Args:
            pixels: (B, 3, H, W), normalised.
            slots: B slots, as `put` gave them; image i is classified by the adapter in `slots[i]`.

        Returns:
            B tensors of logits, image i's of shape (K_i,), in the backbone's dtype on its device.

        Raises:
            ValueError: not as many slots as images, or a slot whose adapter is gone.
        """
        if len(slots) != len(pixels):
            raise ValueError(f"{len(pixels)} images need as many slots, got {len(slots)}")
        residents = [r for r in map(self._resident, slots) if r is not None]
        if len(residents) < len(slots):
            gone = sorted({slot.number for slot in slots if self._resident(slot) is None})
            raise ValueError(f"no adapter, or another one, in slot {', '.join(map(str, gone))}")
        if not residents:
            return []
        index = torch.tensor([slot.number for slot in slots], device=self.device)
        norms = frozenset().union(*(r.norms for r in residents))
        with self._forward_lock:
            self._pass = _Pass(
                numbers=self._stacks.gather(
                    index,
                    kernels=max(r.kernels for r in residents),
                    rank=max(r.rank for r in residents),
                ),
                kronecker=frozenset().union(*(r.kronecker for r in residents)),
                rescaled=frozenset().union(*(r.rescaled for r in residents)),
                norms={n: own for n, own in self._stacks.gather_norms(index).items() if n in norms} if norms else {},
            )
            try:
                pooled = features(self._model, pixels.to(device=self.device, dtype=self.dtype))
            finally:
                self._pass = None
        return [
            torch.addmv(resident.head_bias, resident.head_weight, row)
            for resident, row in zip(residents, pooled.unbind(), strict=True)
        ]

    @torch.inference_mode()
    def rehearse(self, pixels: Tensor, kernels: int, rank: int) -> Tensor:
        """The work of a mixed pass with an adapter of zeros for every image; before the first `put` only.

        Args:
            pixels: (B, 3, H, W), normalised, on the device.
            kernels, rank: of the work; as many as there is room for. The rank is even.

        Returns:
            The frozen backbone's pooled features, (B, D).
        """
        if self._generation:
            raise RuntimeError("a slot may hold an adapter by now")
        index = torch.zeros(len(pixels), dtype=torch.int64, device=self.device)
        every = frozenset(site.name for site in self.limits.backbone.sites)
        with self._forward_lock:
            self._pass = _Pass(self._stacks.gather(index, kernels, rank), every, every, norms={})
            try:
                return features(self._model, pixels)
            finally:
                self._pass = None

    @torch.inference_mode()
    def _check_identity(self, backbone: Backbone) -> None:
        """One probe image (KARST.md, "Hooking timm models"); leaves an adapter of zeros in slot 0 for `rehearse`."""
        self._stacks.write(0, self._stacks.pack(None))
        height, width = self.input_size[1:]
        pixels = torch.linspace(-1, 1, 3 * height * width, device=self.device, dtype=self.dtype)
        pixels = pixels.view(1, 3, height, width)
        zeros = self.rehearse(pixels, kernels=1, rank=2)
        frozen = features(backbone.model, pixels)
        near = torch.allclose(zeros, frozen, rtol=0, atol=ROUNDING * float(frozen.abs().max()))
        if not near or not torch.equal(zeros, features(self._model, pixels)):
            raise BackboneError(f"backbone {backbone.name!r} cannot be served from a bank: zeros change its features")

    def _resident(self, slot: Slot) -> _Resident | None:
        """What `put` left in this slot, unless it is gone."""
        found = self._residents.get(slot.number)
        return found if found is not None and found.generation == slot.generation else None

    @torch.inference_mode()
    def _write(self, slot: Slot, packed: Packed) -> _Resident:
        weight, bias = self._stacks.write(slot.number, packed)
        return _Resident(
            generation=slot.generation,
            kernels=packed.kernels,
            rank=packed.rank,
            kronecker=packed.kronecker,
            rescaled=packed.rescaled,
            norms=packed.norms,
            head_weight=weight,
            head_bias=bias,
        )

    def _hook_norm(self, norm: nn.Module, name: str) -> None:
        def tune(layer: Any, args: tuple[Tensor, ...], _y: Tensor) -> Tensor | None:
            current = self._pass
            if current is None or name not in current.norms:
                return None
            weight, bias = current.norms[name]
            return _rescaled(F.layer_norm(args[0], layer.normalized_shape, eps=layer.eps), weight, bias, in_place=True)

        norm.register_forward_hook(tune)


class _AdaptedLinear(nn.Module):
    """A site: its frozen layer, and what KARST adds for every image of the pass that is under way."""

    def __init__(self, frozen: nn.Module, site: Site, current: Callable[[], _Pass | None]) -> None:
        super().__init__()
        self._forward = frozen.forward  # there are no hooks, and these calls are many and short
        self._site = site
        self._current = current

    def forward(self, x: Tensor) -> Tensor:
        """(B.., d_in) -> (B.., d_out)"""
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
    """x * scale + shift with each image's own vectors: x (B.., d), scale and shift (B, 1, d)."""
    rows = x.reshape(len(scale), -1, x.shape[-1])  # (B, T, d)
    return torch.addcmul(shift, rows, scale, out=rows if in_place else None).view(x.shape)
