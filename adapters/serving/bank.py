"""Many adapters beside one frozen backbone: slots, and a forward pass over a batch of mixed adapters.

Axes: B images, T tokens of an image (rows of a layer's input that belong to it), K classes, D features.

No adapter is merged. Each adapted layer computes its frozen product once for the whole batch. KARST's part is a
batched product over rows (`kronecker.add_`, with separate numbers for each row), added in place. The numbers are
gathered from the `SlotMemory` once per batch. An image with several adapters has one row up to the first block that
they change (`row_plan`).
"""

import threading
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from ..backbone import Backbone, BackboneError, features
from ..format.file import Adapter
from ..format.layouts import LayoutCache
from .adapted_layers import AdaptedLinear, Batch, CurrentPass, hook_block, hook_norm
from .answers import ImageScores, ImageTasks, Resident, Scores, Slot, answers
from .blocks import Blocks, class_token_layers, find_blocks, leave_out_other_tokens
from .frozen_forms import FrozenForms, prepack_layers, unmeasured_forms
from .heads import Heads
from .limits import BankLimits
from .row_plan import RowPlan, plan_rows
from .slot_memory import Packed, PackingPlan, SlotMemory
from .typicality import DeviceTypicality

# Of the largest feature, between two implementations of the same model.
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
INT8_ROUNDING = 0.5  # a model that a bank cannot serve differs by more than its largest feature


class BankFullError(RuntimeError):
    """All slots of a bank are in use; evict an adapter first."""


class Bank:
    """Device memory for the adapters of one backbone, in a fixed number of slots.

    Threads may call `put`, `evict` and `forward` at once: each forward pass has numbers of its own, and `put` writes
    only to a free slot. The caller must not evict a slot during a forward pass that uses it.

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
        self._residents: dict[int, Resident] = {}
        self._generation = 0
        self._free = list(range(slots - 1, -1, -1))
        self._slots_lock = threading.Lock()
        self._pass = CurrentPass()
        self._model = backbone.clone()
        self.forms = unmeasured_forms(backbone) if forms is None else forms
        pixels = torch.linspace(-1, 1, prod(self.input_size), device=self.device, dtype=self.dtype)
        pixels = pixels.view(1, *self.input_size)
        alone = class_token_layers(self._model, pixels, self._near)
        prepack_layers(self._model, backbone, self.forms, alone=alone)
        self._memory = SlotMemory(backbone, slots, max_rank=max_rank, max_kernels=max_kernels, factor=factor)
        for site in backbone.sites:
            adapted = AdaptedLinear(self._model.get_submodule(site.name), site, self._pass)
            self._model.set_submodule(site.name, adapted)
        modules = dict(self._model.named_modules())
        for norm in backbone.norms:
            hook_norm(modules[norm.name], norm.name, self._pass)
        leave_out_other_tokens(self._model, alone)
        self._check_identity(backbone, pixels)

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
        found = self.score_images(pixels, [ImageTasks((slot,)) for slot in slots], typicality=typicality)
        return [image.scores[0] for image in found]

    @torch.inference_mode()
    def score_images(
        self, pixels: Tensor, tasks: Sequence[ImageTasks], *, typicality: bool = True
    ) -> list[ImageScores]:
        """Run the backbone once, each image with any number of adapters.

        The heads of an image share one row of the pass. Its adapters in slots share that row up to their first adapted
        blocks (see `row_plan`); `passes` returns the work.

        Args:
            pixels: (B, 3, H, W), normalised.
            tasks: the adapters of each image, at least one.
            typicality: False leaves it out of the answers of slots.

        Raises:
            ValueError: the numbers of images and of their tasks differ, an image has no task, or a slot's adapter was
                evicted.
        """
        if len(tasks) != len(pixels):
            raise ValueError(f"got {len(pixels)} images and the tasks of {len(tasks)}; pass the tasks of each image")
        if not all(image.slots or image.heads for image in tasks):
            raise ValueError("an image has no task; leave it out")
        residents = [[self._current(slot) for slot in image.slots] for image in tasks]
        if not residents:
            return []
        plan = self._plan_rows([[r.first_block for r in own] for own in residents], [bool(t.heads) for t in tasks])
        own = [residents[image][i] for image, i in plan.adapters]
        index = torch.tensor([tasks[image].slots[i].number for image, i in plan.adapters], device=self.device)
        pooled = self._pooled(pixels, plan, own, index)

        return answers(tasks, residents, plan, pooled, typicality=typicality)

    def _pooled(self, pixels: Tensor, plan: RowPlan, own: Sequence[Resident], index: Tensor) -> Tensor:
        """Return the pooled features of all rows at the end of a pass, (B, D).

        Args:
            own: adapters of the plan's rows that have one.
            index: their slots.
        """
        if plan.start != [*range(len(pixels))]:
            pixels = pixels[plan.start]
        batch = None
        if own:  # else all are heads on the frozen features
            norms = frozenset().union(*(r.norms for r in own))
            batch = Batch(
                numbers=self._memory.gather(index, max(r.kernels for r in own), max(r.rank for r in own)),
                kronecker=frozenset().union(*(r.kronecker for r in own)),
                rescaled=frozenset().union(*(r.rescaled for r in own)),
                norms={n: own for n, own in self._memory.gather_norms(index).items() if n in norms} if norms else {},
                adapters=len(own),
                rows=len(plan.start),
                own=plan.own,
                splits=plan.splits,
            )
        return self._features(pixels.to(device=self.device, dtype=self.dtype), batch)

    def _features(self, pixels: Tensor, batch: Batch | None, give_way: Callable[[], None] | None = None) -> Tensor:
        with self._pass.of(batch, give_way):
            return features(self._model, pixels)

    @property
    def blocks(self) -> int:
        """Number of blocks before which rows can split; 0 where the backbone's rows cannot."""
        return len(self._blocks.names)

    def passes(self, first_blocks: Sequence[int], *, heads: bool = False) -> float:
        """Return the work of one image with several adapters, in frozen passes of one image.

        Args:
            first_blocks: `first_block` of each adapter.
            heads: whether heads on the frozen features classify the image too.
        """
        return self._plan_rows([first_blocks], [heads]).passes(len(self._blocks.names))

    def first_block(self, adapter: Packed) -> int:
        """Return the first block that an adapter changes, from which on it needs a row for itself.

        -1: something before block 0, or the backbone's rows cannot split; then it shares nothing. The number of blocks:
        it is only a head.
        """
        return self._blocks.first(adapter.kronecker, adapter.rescaled, adapter.norms)

    def heads(self, adapters: Sequence[Packed]) -> Heads:
        """Stack adapters that are only heads, for `score_images`. They need no slots.

        Raises:
            ValueError: no adapter, or one that changes the backbone's features.
        """
        return Heads(adapters, self.limits.backbone.width, self.device)

    def _plan_rows(self, first_blocks: Sequence[Sequence[int]], heads: Sequence[bool]) -> RowPlan:
        return plan_rows(first_blocks, heads, len(self._blocks.names))

    @torch.inference_mode()
    def frozen_features(self, pixels: Tensor, give_way: Callable[[], None] | None = None) -> Tensor:
        """Return the frozen backbone's pooled features (B, D) of normalised pixels (B, 3, H, W).

        Args:
            give_way: called before each block of the backbone. A call that waits leaves the cores to passes of other
                threads.
        """
        return self._features(pixels.to(device=self.device, dtype=self.dtype), None, give_way)

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
        return self._features(
            pixels, self._zeros(kernels, rank, plan_rows([[-1]] * len(pixels), [False] * len(pixels), 0))
        )

    def _zeros(self, kernels: int, rank: int, plan: RowPlan) -> Batch:
        """Return a batch whose adapters are all the one of zeros in slot 0."""
        count = len(plan.adapters)
        index = torch.zeros(count, dtype=torch.int64, device=self.device)
        every = frozenset(site.name for site in self.limits.backbone.sites)
        numbers = self._memory.gather(index, kernels, rank)
        return Batch(numbers, every, every, {}, count, len(plan.start), plan.own, plan.splits)

    @torch.inference_mode()
    def _check_identity(self, backbone: Backbone, pixels: Tensor) -> None:
        """Compare features (docs/method.md); slot 0 then holds zeros for `warm_up`."""
        self._memory.write(0, self._memory.pack_zeros())
        zeros = self.warm_up(pixels, kernels=1, rank=2)
        frozen = features(backbone.model, pixels)
        if not self._near(zeros, frozen) or not torch.equal(zeros, features(self._model, pixels)):
            raise BackboneError(
                f"a bank cannot serve backbone {backbone.name!r}: an adapter of zeros changes its features; "
                "use another timm model (docs/backbones.md)"
            )
        self._blocks = self._found_blocks(pixels, zeros)

    def _found_blocks(self, pixels: Tensor, frozen: Tensor) -> Blocks:
        """Return the blocks before which rows can split; none if the features of split rows are other ones."""
        info = self.limits.backbone
        places = [*(site.name for site in info.sites), *(norm.name for norm in info.norms)]
        blocks = find_blocks(self._model, places, pixels)
        count = len(blocks.names)
        modules = dict(self._model.named_modules())
        for number, name in enumerate(blocks.names):
            hook_block(modules[name], number, self._pass)
        plan = plan_rows([[count // 2, count - 1, count // 2]], [True], count)
        try:
            split = self._features(pixels, self._zeros(1, 2, plan))
        except Exception:  # blocks that take something other than rows of images
            return Blocks()
        near = split.shape == (4, frozen.shape[1]) and self._near(split, frozen.expand_as(split))
        return blocks if near else Blocks()

    def _near(self, features: Tensor, frozen: Tensor) -> bool:
        """Return whether features equal the frozen backbone's, except for the rounding of the layers' forms."""
        share = INT8_ROUNDING if "int8" in self.forms.chosen.values() else ROUNDING[self.dtype]
        return torch.allclose(features, frozen, rtol=0, atol=share * float(frozen.abs().max()))

    def _current(self, slot: Slot) -> Resident:
        """Return the adapter in a slot.

        Raises:
            ValueError: it was evicted.
        """
        found = self._resident(slot)
        if found is None:
            raise ValueError(f"the adapter in slot {slot.number} was evicted; put it again")
        return found

    def _resident(self, slot: Slot) -> Resident | None:
        """Return the adapter that `put` wrote for this handle, or None after its eviction."""
        found = self._residents.get(slot.number)
        return found if found is not None and found.generation == slot.generation else None

    @torch.inference_mode()
    def _write(self, slot: Slot, packed: Packed) -> Resident:
        weight, bias = self._memory.write(slot.number, packed)
        return Resident(
            generation=slot.generation,
            kernels=packed.kernels,
            rank=packed.rank,
            kronecker=packed.kronecker,
            rescaled=packed.rescaled,
            norms=packed.norms,
            first_block=self.first_block(packed),
            head_weight=weight,
            head_bias=bias,
            typicality=DeviceTypicality(packed.typicality, self.device) if packed.typicality else None,
        )
