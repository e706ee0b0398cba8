"""A mixed batch equals each image alone through its merged model, whatever else is in the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import AdapterError, Bank, BankFullError, Slot, load_backbone
from adapters.convert.importing import classifier_name
from tests.support.models import local_backbone, random_adapter, random_pixels, small_swin


@pytest.fixture(scope="module")
def adapters(backbone):
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
def references(backbone, adapters):
    return [adapter.merge(backbone) for adapter in adapters]


def test_a_bank_without_adapters_is_the_frozen_backbone(backbone) -> None:
    """A zero adapter changes nothing but the order in which numbers are added up."""
    zero = random_adapter(backbone, kernels=2, rank=4)
    bank = Bank(backbone, slots=2, max_rank=4, max_kernels=2)
    from adapters import KarstConfig, attach, extract
    from adapters.backbone import features

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


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_history_of_put_evict_forward_equals_merged(backbone, adapters, references, data) -> None:
    bank = Bank(backbone, slots=3, max_rank=16, max_kernels=4)
    resident: dict[Slot, int] = {}  # -> which adapter
    for _ in range(data.draw(st.integers(1, 5))):
        if bank.free == 0 or (resident and data.draw(st.booleans())):
            slot = data.draw(st.sampled_from(sorted(resident)))
            bank.evict(slot)
            del resident[slot]
        which = data.draw(st.integers(0, len(adapters) - 1))
        resident[bank.put(adapters[which])] = which

        slots = data.draw(st.lists(st.sampled_from(sorted(resident)), min_size=1, max_size=6))
        pixels = random_pixels(backbone, len(slots), seed=data.draw(st.integers(0, 100)))
        logits = bank.forward(pixels, slots)
        for i, slot in enumerate(slots):
            with torch.inference_mode():
                alone = references[resident[slot]](pixels[i : i + 1])[0]
            torch.testing.assert_close(logits[i], alone, atol=1e-4, rtol=0)


def test_a_reused_slot_holds_nothing_of_its_former_adapter(backbone, adapters, references) -> None:
    bank = Bank(backbone, slots=1, max_rank=16, max_kernels=4)
    pixels = random_pixels(backbone, 1)
    largest, smallest = 3, 0
    bank.evict(bank.put(adapters[largest]))
    slot = bank.put(adapters[smallest])
    with torch.inference_mode():
        torch.testing.assert_close(bank.forward(pixels, [slot])[0], references[smallest](pixels)[0], atol=1e-4, rtol=0)


def test_what_does_not_fit_is_refused_and_takes_no_slot(backbone) -> None:
    bank = Bank(backbone, slots=1, max_rank=4, max_kernels=2)
    with pytest.raises(AdapterError, match=r"blocks.0.attn.qkv.karst_a: rank 5, but at most 4 fits here"):
        bank.put(random_adapter(backbone, rank=5))
    with pytest.raises(AdapterError, match=r"karst_c: 3 kernels, but at most 2 fit here"):
        bank.put(random_adapter(backbone, rank=4, kernels=3))
    with pytest.raises(AdapterError, match=r"C is 4 x 4, but it must be 8 x 8 here \(factor 8\)"):
        bank.put(random_adapter(backbone, rank=4, factor=4))
    torch.manual_seed(1)
    other = load_backbone("demo", pretrained=False)
    with pytest.raises(AdapterError, match=r"fingerprint: the adapter was trained on backbone 'demo'"):
        bank.put(random_adapter(other, rank=4))
    assert bank.free == 1
    bank.put(random_adapter(backbone, rank=4))
    with pytest.raises(BankFullError, match="all 1 slots are taken"):
        bank.put(random_adapter(backbone, rank=4, seed=1))


def test_forward_refuses_what_it_cannot_answer(backbone, adapters) -> None:
    bank = Bank(backbone, slots=2, max_kernels=4)
    slot = bank.put(adapters[0])
    with pytest.raises(ValueError, match="2 images need as many slots, got 1"):
        bank.forward(random_pixels(backbone, 2), [slot])
    bank.evict(slot)
    assert bank.put(adapters[1]).number == slot.number
    with pytest.raises(ValueError, match=f"no adapter, or another one, in slot {slot.number}"):
        bank.forward(random_pixels(backbone, 1), [slot])
    with pytest.raises(KeyError):
        bank.evict(slot)
    assert bank.forward(random_pixels(backbone, 0), []) == []


def test_the_backbone_itself_is_never_touched(backbone, adapters) -> None:
    pixels = random_pixels(backbone, 1)
    with torch.inference_mode():
        before = backbone.model(pixels)
        bank = Bank(backbone, slots=1, max_kernels=4)
        bank.forward(pixels, [bank.put(adapters[1])])
        assert torch.equal(backbone.model(pixels), before)


@pytest.mark.parametrize("ranks", [None, (1, 2, 3, 8)])
def test_windows_of_swin_find_their_image_s_adapter(tmp_path, ranks) -> None:
    """A Swin layer gets window after window; and each stage may have a rank, and so a gain, of its own."""
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


def test_a_distilled_deit_has_two_classifiers_and_one_head(tmp_path) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    deit = local_backbone(tmp_path, "deit_tiny_distilled_patch16_224", **sizes)
    adapter = random_adapter(deit, kernels=2, rank=4)
    bank = Bank(deit, slots=1, max_rank=4, max_kernels=2)
    pixels = random_pixels(deit, 2)
    with torch.inference_mode():
        expected = adapter.merge(deit)(pixels)
    for row, alone in zip(bank.forward(pixels, [bank.put(adapter)] * 2), expected, strict=True):
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=0)
    with pytest.raises(AdapterError, match="has 2 classifiers; an adapter has one head"):
        classifier_name(deit)
