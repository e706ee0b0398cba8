"""Images with several adapters: one row for heads, one shared row up to the first adapted block of the others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import Adapter, Backbone, Bank, ImageTasks, KarstConfig
from adapters.backbone import features
from adapters.serving.row_plan import plan_rows
from tests.support.models import calibrated_adapter, local_backbone, random_adapter, random_pixels, small_swin

BLOCKS = 6  # of the demo backbone


@pytest.fixture(scope="module")
def adapters(backbone: Backbone) -> list[Adapter]:
    """Adapters of every kind of first block: -1 (a norm before the blocks has none here), 0, 1, .., and heads."""
    last = BLOCKS - 1
    return [
        random_adapter(backbone, seed=0, kernels=2, rank=8),
        random_adapter(backbone, seed=1, kernels=1, rank=3, sites=("blocks.1.*",)),
        random_adapter(backbone, seed=2, kernels=3, rank=4, sites=(f"blocks.{last}.*",), classes=9),
        random_adapter(backbone, seed=3, kernels=2, rank=2, sites=(f"blocks.{last}.mlp.fc2",), rescale="scalar"),
        random_adapter(backbone, seed=4, kernels=1, rank=2, sites=("blocks.2.norm2", "norm"), norms=True),
        random_adapter(backbone, seed=5, kernels=0, rescale="none", classes=3),
        calibrated_adapter(backbone),
        random_adapter(backbone, seed=6, kernels=0, norms=True, sites=("blocks.2.*",)),
    ]


@pytest.fixture(scope="module")
def bank(backbone: Backbone) -> Bank:
    return Bank(backbone, slots=8, max_rank=16, max_kernels=4)


def merged(adapter: Adapter, backbone: Backbone, pixels: torch.Tensor) -> torch.Tensor:
    """Return the logits of the adapter's merged model for one image."""
    with torch.inference_mode():
        found: torch.Tensor = adapter.merge(backbone)(pixels[None])[0]
    return found


@settings(max_examples=settings().max_examples // 5, deadline=None)
@given(data=st.data())
def test_each_adapter_of_an_image_gives_the_logits_of_its_merged_model(
    backbone: Backbone, adapters: list[Adapter], bank: Bank, data: st.DataObject
) -> None:
    slots = [bank.put(adapter) for adapter in adapters]
    try:
        places = st.lists(st.integers(0, len(adapters) - 1), max_size=5)
        images = data.draw(st.lists(st.tuples(places, st.booleans()), min_size=1, max_size=4))
        images = [(own, heads or not own) for own, heads in images]
        heads = bank.heads([bank.pack(adapters[5]), bank.pack(adapters[6])])
        pixels = random_pixels(backbone, len(images), seed=data.draw(st.integers(0, 100)))
        tasks = [ImageTasks([slots[i] for i in own], heads if with_heads else None) for own, with_heads in images]
        found = bank.score_images(pixels, tasks)
        for image, scores, (own, with_heads) in zip(pixels, found, images, strict=True):
            for i, score in zip(own, scores.scores, strict=True):
                torch.testing.assert_close(score.logits, merged(adapters[i], backbone, image), atol=1e-4, rtol=0)
            assert (scores.heads is not None) == with_heads
            if scores.heads is not None:
                expected = torch.cat([merged(adapters[i], backbone, image) for i in (5, 6)])
                torch.testing.assert_close(scores.heads.logits, expected, atol=1e-4, rtol=0)
    finally:
        for slot in slots:
            bank.evict(slot)


def test_a_head_gives_probabilities_and_typicality_of_its_slot(
    backbone: Backbone, adapters: list[Adapter], bank: Bank
) -> None:
    chosen = [adapters[6], adapters[5], calibrated_adapter(backbone, seed=3, classes=2)]
    heads = bank.heads([bank.pack(adapter) for adapter in chosen])
    assert heads.classes == [5, 3, 2]
    slots = [bank.put(adapter) for adapter in chosen]
    try:
        for seed in range(8):
            pixels = random_pixels(backbone, 1, seed) * (1 if seed else 0)
            (found,) = bank.score_images(pixels, [ImageTasks(heads=heads)])
            alone = bank.score(pixels.expand(3, -1, -1, -1), slots)
            assert found.heads is not None
            probabilities = heads.probabilities(found.heads.logits)
            for part, one in zip(np.split(probabilities, [5, 8]), alone, strict=True):
                np.testing.assert_allclose(part, one.logits.softmax(0).numpy(), atol=1e-6)
            shares = found.heads.typicality
            assert np.isnan(shares[1])
            assert alone[1].typicality is None
            assert shares[[0, 2]] == pytest.approx([alone[0].typicality, alone[2].typicality], rel=1e-3, abs=1e-9)
    finally:
        for slot in slots:
            bank.evict(slot)


def test_heads_are_refused_when_an_adapter_changes_the_features(bank: Bank, adapters: list[Adapter]) -> None:
    with pytest.raises(ValueError, match="adapter 1 changes the backbone's features"):
        bank.heads([bank.pack(adapters[5]), bank.pack(adapters[0])])
    with pytest.raises(ValueError, match="got no adapter"):
        bank.heads([])


def test_probabilities_are_not_finite_only_for_the_head_that_overflows(backbone: Backbone, bank: Bank) -> None:
    right = random_adapter(backbone, kernels=0, rescale="none", classes=2)
    wrong = random_adapter(backbone, seed=1, kernels=0, rescale="none", classes=3)
    heads = bank.heads([bank.pack(right), bank.pack(wrong)])
    found = heads.probabilities(torch.tensor([0.5, 1.0, torch.inf, 0.0, 1.0]))
    assert np.isfinite(found[:2]).all()
    assert not np.isfinite(found[2:]).all()


def test_an_image_without_a_task_or_with_an_evicted_one_is_refused(
    backbone: Backbone, bank: Bank, adapters: list[Adapter]
) -> None:
    pixels = random_pixels(backbone, 1)
    slot = bank.put(adapters[1])
    bank.evict(slot)
    with pytest.raises(ValueError, match="an image has no task"):
        bank.score_images(pixels, [ImageTasks()])
    with pytest.raises(ValueError, match="got 1 images and the tasks of 2"):
        bank.score_images(pixels, [ImageTasks((slot,)), ImageTasks((slot,))])
    with pytest.raises(ValueError, match="was evicted; put it again"):
        bank.score_images(pixels, [ImageTasks((slot,))])


def test_an_adapter_that_is_only_a_head_takes_only_its_head_in_host_memory(
    backbone: Backbone, bank: Bank, adapters: list[Adapter]
) -> None:
    packed = bank.pack(adapters[5])
    assert packed.is_head
    assert packed.size_bytes == 4 * 3 * (backbone.width + 1)
    assert not bank.pack(adapters[7]).is_head


def test_the_first_block_is_that_of_the_first_changed_layer(bank: Bank, adapters: list[Adapter]) -> None:
    assert [bank.first_block(bank.pack(adapter)) for adapter in adapters] == [0, 1, 5, 5, 2, BLOCKS, BLOCKS, 2]


def test_passes_count_the_shared_row_once(bank: Bank) -> None:
    assert bank.passes([BLOCKS]) == bank.passes([BLOCKS] * 9, heads=True) == bank.passes([0]) == bank.passes([3]) == 1
    assert bank.passes([0] * 5) == 5
    assert bank.passes([0] * 5, heads=True) == 6
    assert bank.passes([4] * 10) == (4 * 1 + 2 * 10) / BLOCKS
    assert bank.passes([5, 4], heads=True) == (4 * 1 + 1 * 2 + 1 * 3) / BLOCKS
    assert bank.passes([-1, -1]) == 2


@settings(max_examples=settings().max_examples, deadline=None)
@given(
    images=st.lists(
        st.tuples(st.lists(st.integers(-1, BLOCKS), max_size=5), st.booleans()).filter(lambda i: bool(i[0] or i[1])),
        min_size=1,
        max_size=4,
    )
)
def test_a_plan_leads_each_row_from_its_image_past_its_first_block(images: list[tuple[list[int], bool]]) -> None:
    """Followed step by step, a row is its image's, is shared below its first block, and its adapter's from there on."""
    firsts, heads = [own for own, _ in images], [with_heads for _, with_heads in images]
    plan = plan_rows(firsts, heads, BLOCKS)
    rows: list[tuple[int, int | None]] = [(image, None) for image in plan.start]  # image; since when an adapter's own
    rows = [(image, -1 if i < plan.own else None) for i, (image, _) in enumerate(rows)]
    for block in range(BLOCKS):
        if block in plan.splits:
            split = plan.splits[block]
            rows = [
                (rows[old][0], rows[old][1] if rows[old][1] is not None or i >= split.own else block)
                for i, old in enumerate(split.rows)
            ]
    assert len(rows) == len(plan.adapters) + len(plan.shared)
    for row, (image, position) in zip(rows, plan.adapters, strict=False):
        alone = len(firsts[image]) == 1 and not heads[image]
        assert row == (image, -1 if alone else firsts[image][position])
    assert rows[len(plan.adapters) :] == [(image, None) for image in plan.shared]
    assert sorted(plan.adapters) == [
        (image, i) for image, own in enumerate(firsts) for i, first in enumerate(own) if first < BLOCKS
    ]
    needs = [with_heads or BLOCKS in own for own, with_heads in images]
    assert plan.shared == [image for image, needed in enumerate(needs) if needed]


@pytest.mark.parametrize(
    "architecture",
    ["swin", "vit_small_patch14_dinov2", "eva02_tiny_patch14_224", "beit_base_patch16_224", "deit3_small_patch16_224"],
)
def test_rows_split_in_every_kind_of_backbone(tmp_path: Path, architecture: str) -> None:
    if architecture == "swin":
        backbone = small_swin(tmp_path)
        late: tuple[str, ...] = ("layers.2.blocks.1.*", "layers.3.*")
    else:
        patch = 14 if "14" in architecture else 16
        # timm's initial layer scales are so small that a block would change nothing.
        backbone = local_backbone(tmp_path, architecture, depth=3, img_size=2 * patch, init_values=1.0)
        late = ("blocks.2.*",)
    bank = Bank(backbone, slots=3, max_rank=4, max_kernels=2)
    adapters = [
        random_adapter(backbone, seed=0, kernels=1, rank=2, sites=late),
        random_adapter(backbone, seed=1, kernels=2, rank=4, sites=late, norms=True),
        random_adapter(backbone, seed=2, kernels=1, rank=2),
    ]
    slots = [bank.put(adapter) for adapter in adapters]
    head = random_adapter(backbone, seed=9, kernels=0, rescale="none")
    heads = bank.heads([bank.pack(head)])
    pixels = random_pixels(backbone, 2)
    first, second = bank.score_images(pixels, [ImageTasks(slots, heads), ImageTasks(slots[:2])])
    assert bank.passes([bank.first_block(bank.pack(adapter)) for adapter in adapters[:2]]) < 1.7
    for image, scores in ((pixels[0], first.scores), (pixels[1], second.scores)):
        for adapter, score in zip(adapters, scores, strict=False):
            torch.testing.assert_close(score.logits, merged(adapter, backbone, image), atol=2e-4, rtol=0)
    assert first.heads is not None
    torch.testing.assert_close(first.heads.logits, merged(head, backbone, pixels[0]), atol=2e-4, rtol=0)


def test_adapters_share_nothing_when_the_rows_of_a_backbone_cannot_split(
    backbone: Backbone, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapters.serving import adapted_layers

    monkeypatch.setattr(adapted_layers.Batch, "split", lambda _batch, x, _block: x.flip(0))
    bank = Bank(backbone, slots=2, max_rank=16, max_kernels=4)
    monkeypatch.undo()
    late = [adapters[2], adapters[3]]
    assert bank.passes([bank.first_block(bank.pack(adapter)) for adapter in late]) == 2
    pixels = random_pixels(backbone, 1)
    (found,) = bank.score_images(pixels, [ImageTasks([bank.put(adapter) for adapter in late])])
    for adapter, score in zip(late, found.scores, strict=True):
        torch.testing.assert_close(score.logits, merged(adapter, backbone, pixels[0]), atol=1e-4, rtol=0)


def test_heads_in_slots_leave_the_frozen_features_untouched(backbone: Backbone, adapters: list[Adapter]) -> None:
    """An adapter of each image beside heads in slots: rows are reordered, and each image keeps its answer."""
    bank = Bank(backbone, slots=8, max_rank=16, max_kernels=4)
    order = [5, 0, 6, 2]
    pixels = random_pixels(backbone, len(order))
    found = bank.forward(pixels, [bank.put(adapters[i]) for i in order])
    for image, i, logits in zip(pixels, order, found, strict=True):
        torch.testing.assert_close(logits, merged(adapters[i], backbone, image), atol=1e-4, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(bank.frozen_features(pixels), features(backbone.model, pixels), atol=1e-4, rtol=0)


def test_a_config_without_kernels_norms_and_rescaling_is_only_a_head() -> None:
    assert KarstConfig(kernels=0, rescale="none").is_head
    for changed in ({"kernels": 1}, {"rescale": "scalar"}, {"norms": True}):
        assert not KarstConfig(**{"kernels": 0, "rescale": "none"} | changed).is_head
