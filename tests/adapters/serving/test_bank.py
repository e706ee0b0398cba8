"""A mixed batch gives each image the logits of its merged model."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adapters import (
    Adapter,
    AdapterError,
    Backbone,
    Bank,
    BankFullError,
    KarstConfig,
    Slot,
    attach,
    extract,
    load_backbone,
)
from adapters.backbone import features
from adapters.convert.importing import classifier_name
from tests.support.models import local_backbone, random_adapter, random_pixels, small_swin


@pytest.fixture(scope="module")
def adapters(backbone: Backbone) -> list[Adapter]:
    shapes = [
        (1, 1, 2, "none", False),
        (2, 8, 10, "channel", False),
        (3, 5, 7, "scalar", True),
        (4, 16, 3, "channel", False),
        (2, 8, 40, "scalar", True),
        (1, 2, 3, "none", True),
    ]
    return [
        random_adapter(backbone, seed=i, kernels=n, rank=r, classes=k, rescale=rescale, norms=norms)
        for i, (n, r, k, rescale, norms) in enumerate(shapes)
    ]


@pytest.fixture(scope="module")
def references(backbone: Backbone, adapters: list[Adapter]) -> list[nn.Module]:
    return [adapter.merge(backbone) for adapter in adapters]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_slot_takes_memory_once_it_has_an_adapter(backbone: Backbone, adapters: list[Adapter]) -> None:
    """A new bank would otherwise hold all of it, for adapters that may never come."""

    def held_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    Bank(backbone, slots=1)
    before = held_bytes()
    bank = Bank(backbone, slots=1000)  # more than 100 MiB
    bank.put(adapters[1])
    assert held_bytes() - before < 50 * 1024**2


def test_a_bank_gives_the_frozen_features_when_the_adapter_is_untrained(backbone: Backbone) -> None:
    """Only the order of additions may differ."""
    zero = random_adapter(backbone, kernels=2, rank=4)
    bank = Bank(backbone, slots=2, max_rank=4, max_kernels=2)
    fresh = attach(backbone, KarstConfig(kernels=2, rank=4), 5)
    with torch.no_grad():
        fresh.head.weight.copy_(zero.tensors["head.weight"])
    slot = bank.put(extract(fresh, zero.labels))
    pixels = random_pixels(backbone, 2)
    with torch.inference_mode():
        pooled = features(backbone.model, pixels)
        expected = [torch.addmv(fresh.head.bias, fresh.head.weight, row) for row in pooled]
    for row, image in zip(bank.forward(pixels, [slot, slot]), expected, strict=True):
        torch.testing.assert_close(row, image, atol=1e-5, rtol=0)


def test_passes_of_other_threads_run_between_the_blocks_of_frozen_features(backbone: Backbone) -> None:
    bank = Bank(backbone, slots=1, max_rank=8, max_kernels=4)
    slot = bank.put(random_adapter(backbone))
    one, other = random_pixels(backbone, 2, seed=1), random_pixels(backbone, 3, seed=2)
    features_alone, logits_alone = bank.frozen_features(one), bank.forward(other, [slot] * 3)
    found: list[list[torch.Tensor]] = []
    with ThreadPoolExecutor(1) as thread:

        def give_way() -> None:
            found.append(thread.submit(bank.forward, other, [slot] * 3).result(60))

        torch.testing.assert_close(bank.frozen_features(one, give_way), features_alone, atol=0, rtol=0)
    assert len(found) == bank.blocks > 1
    for logits in found:
        torch.testing.assert_close(logits, logits_alone, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def empty_bank(backbone: Backbone) -> Bank:
    return Bank(backbone, slots=3, max_rank=16, max_kernels=4)


@settings(max_examples=settings().max_examples // 5, deadline=None)
@given(data=st.data())
def test_forward_equals_the_merged_models_after_any_history_of_put_and_evict(
    backbone: Backbone,
    adapters: list[Adapter],
    references: list[nn.Module],
    empty_bank: Bank,
    data: st.DataObject,
) -> None:
    resident: list[tuple[Slot, int]] = []  # a slot, and the index of its adapter
    try:
        for _ in range(data.draw(st.integers(1, 5))):
            if len(resident) == empty_bank.slots or (resident and data.draw(st.booleans())):
                slot, _ = resident.pop(data.draw(st.integers(0, len(resident) - 1)))
                empty_bank.evict(slot)
            which = data.draw(st.integers(0, len(adapters) - 1))
            resident.append((empty_bank.put(adapters[which]), which))

            chosen = data.draw(st.lists(st.integers(0, len(resident) - 1), min_size=1, max_size=6))
            batch = [resident[i] for i in chosen]
            pixels = random_pixels(backbone, len(batch), seed=data.draw(st.integers(0, 100)))
            logits = empty_bank.forward(pixels, [slot for slot, _ in batch])
            for i, (_, which) in enumerate(batch):
                with torch.inference_mode():
                    alone = references[which](pixels[i : i + 1])[0]
                torch.testing.assert_close(logits[i], alone, atol=1e-4, rtol=0)
    finally:
        for slot, _ in resident:
            empty_bank.evict(slot)


def test_a_reused_slot_has_no_numbers_of_its_former_adapter(
    backbone: Backbone, adapters: list[Adapter], references: list[nn.Module]
) -> None:
    bank = Bank(backbone, slots=1, max_rank=16, max_kernels=4)
    pixels = random_pixels(backbone, 1)
    largest, smallest = 3, 0
    bank.evict(bank.put(adapters[largest]))
    slot = bank.put(adapters[smallest])
    with torch.inference_mode():
        torch.testing.assert_close(bank.forward(pixels, [slot])[0], references[smallest](pixels)[0], atol=1e-4, rtol=0)


def test_put_takes_no_slot_when_the_adapter_does_not_fit(backbone: Backbone) -> None:
    bank = Bank(backbone, slots=1, max_rank=4, max_kernels=2)
    with pytest.raises(
        AdapterError, match=r"blocks.0.attn.qkv.karst_a: has rank 5, but at most 4 fits; train with a smaller rank"
    ):
        bank.put(random_adapter(backbone, rank=5))
    with pytest.raises(AdapterError, match=r"karst_c: has 3 kernels, but at most 2 fit; train with fewer kernels"):
        bank.put(random_adapter(backbone, rank=4, kernels=3))
    with pytest.raises(AdapterError, match=r"karst_c: has sides 4 x 4, expected 8 x 8; train with factor 8"):
        bank.put(random_adapter(backbone, rank=4, factor=4))
    torch.manual_seed(1)
    other = load_backbone("demo", pretrained=False)
    with pytest.raises(AdapterError, match=r"fingerprint: the adapter was trained on backbone 'demo'"):
        bank.put(random_adapter(other, rank=4))
    assert bank.free == 1
    bank.put(random_adapter(backbone, rank=4))
    with pytest.raises(BankFullError, match="all 1 slots are in use"):
        bank.put(random_adapter(backbone, rank=4, seed=1))


def test_forward_raises_when_slots_are_missing_or_evicted(backbone: Backbone, adapters: list[Adapter]) -> None:
    bank = Bank(backbone, slots=2, max_kernels=4)
    slot = bank.put(adapters[0])
    with pytest.raises(ValueError, match="got 2 images and 1 slots"):
        bank.forward(random_pixels(backbone, 2), [slot])
    bank.evict(slot)
    assert bank.put(adapters[1]).number == slot.number
    with pytest.raises(ValueError, match=f"the adapter in slot {slot.number} was evicted"):
        bank.forward(random_pixels(backbone, 1), [slot])
    with pytest.raises(KeyError):
        bank.evict(slot)
    assert bank.forward(random_pixels(backbone, 0), []) == []


def test_a_bank_does_not_change_the_backbone(backbone: Backbone, adapters: list[Adapter]) -> None:
    pixels = random_pixels(backbone, 1)
    with torch.inference_mode():
        before = backbone.model(pixels)
        bank = Bank(backbone, slots=1, max_kernels=4)
        bank.forward(pixels, [bank.put(adapters[1])])
        assert torch.equal(backbone.model(pixels), before)


@pytest.mark.parametrize("ranks", [None, (1, 2, 3, 8)])
def test_swin_windows_use_the_adapter_of_their_image(tmp_path: Path, ranks: tuple[int, ...] | None) -> None:
    """A Swin layer gets the windows of all images as one batch, and each stage may have its own rank and gain."""
    swin = small_swin(tmp_path)
    made = [
        random_adapter(swin, seed=0, kernels=2, rank=8, stage_ranks=ranks),
        random_adapter(swin, seed=1, kernels=1, rank=4, rescale="scalar"),
        random_adapter(swin, seed=2, kernels=2, rank=8, stage_ranks=ranks, norms=True),
    ]
    bank = Bank(swin, slots=3, max_rank=8, max_kernels=2)
    slots = [bank.put(adapter) for adapter in made]
    order = [2, 0, 1, 2, 1]
    pixels = random_pixels(swin, len(order))
    with torch.inference_mode():
        expected = [made[which].merge(swin)(image[None])[0] for which, image in zip(order, pixels, strict=True)]
    logits = bank.forward(pixels, [slots[which] for which in order])
    for row, alone in zip(logits, expected, strict=True):
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=0)


def test_a_distilled_deit_uses_the_adapter_s_head_for_both_classifiers(tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    deit = local_backbone(tmp_path, "deit_tiny_distilled_patch16_224", **sizes)
    adapter = random_adapter(deit, kernels=2, rank=4)
    bank = Bank(deit, slots=1, max_rank=4, max_kernels=2)
    pixels = random_pixels(deit, 2)
    with torch.inference_mode():
        expected = adapter.merge(deit)(pixels)
    for row, alone in zip(bank.forward(pixels, [bank.put(adapter)] * 2), expected, strict=True):
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=0)
    with pytest.raises(AdapterError, match="has 2 classifiers"):
        classifier_name(deit)
