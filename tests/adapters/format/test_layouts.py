"""Files with a known layout load without checks of each tensor, and get the same verdict."""

import json
import struct

import pytest
import torch

from adapters import Adapter, AdapterError, Backbone, Bank, LayoutCache
from tests.support.models import random_adapter, random_pixels

CONFIG = '{{"kernels":{kernels},"rank":{rank},"factor":8,"gain":{gain},"rescale":"{rescale}"}}'


def config(kernels: int = 2, rank: int = 4, gain: float = 0.25, rescale: str = "channel") -> str:
    return CONFIG.format(kernels=kernels, rank=rank, gain=gain, rescale=rescale)


def with_metadata(adapter: Adapter, **changed: str) -> bytes:
    """Return the file with other metadata, in the compact JSON of safetensors, which alone shares a layout."""
    length = struct.unpack("<Q", adapter.data[:8])[0]
    header = json.loads(adapter.data[8 : 8 + length])
    header["__metadata__"] |= changed
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + adapter.data[8 + length :]


def with_dtypes(adapter: Adapter, *dtypes: torch.dtype) -> Adapter:
    """Return the same numbers, rounded; the tensors take the dtypes in turn."""
    tensors = {name: t.to(dtypes[i % len(dtypes)]) for i, (name, t) in enumerate(adapter.tensors.items())}
    return Adapter.create(
        tensors,
        config=adapter.config,
        backbone=adapter.backbone,
        fingerprint=adapter.fingerprint,
        labels=adapter.labels,
        preprocess=adapter.preprocess,
    )


@pytest.fixture
def layouts() -> LayoutCache:
    return LayoutCache()


@pytest.fixture(scope="module")
def adapters(backbone: Backbone) -> list[Adapter]:
    return [random_adapter(backbone, seed=seed, kernels=2, rank=4, norms=seed == 3) for seed in range(4)]


def test_adapters_share_a_layout_when_their_shapes_are_equal(adapters: list[Adapter], layouts: LayoutCache) -> None:
    first, second, third, fourth = (Adapter.read(adapter.data, layouts=layouts) for adapter in adapters)
    assert first.layout is second.layout is third.layout
    assert fourth.layout is not first.layout
    assert len(layouts) == 2
    assert list(first.layout.tensors) == list(first.tensors)
    for adapter, again in zip(adapters, (first, second, third, fourth), strict=True):
        assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in adapter.tensors.items())


def test_adapters_share_no_layout_when_they_are_read_without_a_cache(adapters: list[Adapter]) -> None:
    first, second = (Adapter.read(adapters[0].data) for _ in range(2))
    assert first.layout is not second.layout


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float16], [torch.bfloat16], [torch.float16, torch.float32]])
def test_numbers_equal_the_tensors_when_the_layout_is_known(
    adapters: list[Adapter], layouts: LayoutCache, dtypes: list[torch.dtype]
) -> None:
    data = with_dtypes(adapters[0], *dtypes).data
    first, again = (Adapter.read(data, layouts=layouts) for _ in range(2))
    assert again.layout is first.layout
    expected = torch.cat([first.tensors[name].flatten().float() for name in first.layout.tensors])
    assert torch.equal(again.numbers, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": config(kernels=3)}, r".*kernels \(C, A, B\), expected config.kernels = 3"),
        ({"config": config(rank=2)}, r".*up to config.rank = 2"),
        ({"config": config(rescale="none")}, r".*has re-scaling tensors"),
        ({"labels": '["a","b"]'}, r"head.weight: has shape \(5, 128\), expected \(2, D\)"),
        ({"fingerprint": "x"}, "fingerprint: is 'x', expected a SHA-256"),
        ({"preprocess": "{}"}, "preprocess: has wrong keys"),
        ({"format": "karst/2"}, "format: is 'karst/2'"),
    ],
)
def test_metadata_is_checked_against_the_tensors_when_the_layout_is_known(
    adapters: list[Adapter], layouts: LayoutCache, changed: dict[str, str], message: str
) -> None:
    Adapter.read(adapters[0].data, layouts=layouts)
    with pytest.raises(AdapterError, match=f"^{message}"):
        Adapter.read(with_metadata(adapters[0], **changed), layouts=layouts)
    again = Adapter.read(with_metadata(adapters[0], backbone="another"), layouts=layouts)
    assert again.backbone == "another"
    assert len(layouts) == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_non_finite_number_is_refused_by_tensor_when_the_layout_is_known(
    adapters: list[Adapter], layouts: LayoutCache, dtype: torch.dtype, number: float
) -> None:
    good = Adapter.read(with_dtypes(adapters[0], dtype).data, layouts=layouts)
    start = len(good.data) - good.layout.data_bytes
    name, *_ = good.layout.tensors
    wrong = torch.tensor([number], dtype=dtype).view(torch.uint8).numpy().tobytes()
    with pytest.raises(AdapterError, match=f"^{name}: has a value that is not finite"):
        Adapter.read(good.data[:start] + wrong + good.data[start + len(wrong) :], layouts=layouts)


@pytest.mark.parametrize("end", [b"\0", None])
def test_a_file_of_another_length_is_refused_when_the_layout_is_known(
    adapters: list[Adapter], layouts: LayoutCache, end: bytes | None
) -> None:
    data = adapters[0].data
    Adapter.read(data, layouts=layouts)
    with pytest.raises(AdapterError, match=r"^file: (truncated|not a valid safetensors file)"):
        Adapter.read(data[:-1] if end is None else data + end, layouts=layouts)


@torch.inference_mode()
def test_a_bank_packs_each_adapter_with_its_own_gain_when_they_share_a_layout(
    backbone: Backbone, adapters: list[Adapter], layouts: LayoutCache
) -> None:
    bank = Bank(backbone, slots=4, max_rank=4, max_kernels=2, layouts=layouts)
    made, sizes = [], []
    for adapter, gain in zip(adapters, (0.25, 0.5, 1.7), strict=False):
        made.append(Adapter.read(with_metadata(adapter, config=config(gain=gain)), layouts=layouts))
        bank.pack(made[-1])
        sizes.append(layouts.result_bytes)
    assert sizes[0] > 0
    assert sizes[0] == sizes[1] == sizes[2]  # one packing plan
    slots = [bank.put(adapter) for adapter in made]
    pixels = random_pixels(backbone, len(slots))
    for adapter, image, logits in zip(made, pixels, bank.forward(pixels, slots), strict=True):
        torch.testing.assert_close(logits, adapter.merge(backbone)(image[None])[0], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_banks_keep_separate_plans_when_they_share_a_cache(
    backbone: Backbone, adapters: list[Adapter], layouts: LayoutCache
) -> None:
    torch.manual_seed(7)
    other = random_adapter(backbone, seed=9, kernels=2, rank=4, sites=("blocks.0.*",))
    banks = [Bank(backbone, slots=1, max_rank=rank, max_kernels=4, layouts=layouts) for rank in (4, 8)]
    pixels = random_pixels(backbone, 1)
    for adapter in (adapters[0], other):
        again = Adapter.read(adapter.data, layouts=layouts)
        expected = adapter.merge(backbone)(pixels)[0]
        for bank in banks:
            slot = bank.put(again)
            torch.testing.assert_close(bank.forward(pixels, [slot])[0], expected, atol=1e-4, rtol=0)
            bank.evict(slot)
    with pytest.raises(AdapterError, match="at most 2 fit"):
        Bank(backbone, slots=1, max_kernels=2, layouts=layouts).pack(
            Adapter.read(random_adapter(backbone, kernels=3, rank=4).data, layouts=layouts)
        )


def test_the_cache_evicts_the_least_recently_used_when_it_is_full(backbone: Backbone) -> None:
    files = [random_adapter(backbone, kernels=1, rank=1, classes=classes).data for classes in range(2, 6)]
    one = LayoutCache()
    bank = Bank(backbone, slots=1, max_rank=2, max_kernels=1, layouts=one)
    bank.pack(Adapter.read(files[3], layouts=one))
    layouts = LayoutCache(max_layouts=2, max_result_bytes=2 * one.result_bytes)
    bank = Bank(backbone, slots=1, max_rank=2, max_kernels=1, layouts=layouts)
    first, *others = (Adapter.read(file, layouts=layouts) for file in files[:2])
    assert Adapter.read(files[0], layouts=layouts).layout is first.layout
    third = Adapter.read(files[2], layouts=layouts)
    assert len(layouts) == 2
    assert Adapter.read(files[0], layouts=layouts).layout is first.layout
    assert Adapter.read(files[1], layouts=layouts).layout is not others[0].layout
    for adapter in (first, *others, third):
        bank.pack(adapter)
    assert one.result_bytes < layouts.result_bytes <= 2 * one.result_bytes


def test_a_bank_checks_the_adapter_when_only_its_metadata_differs(
    backbone: Backbone, adapters: list[Adapter], layouts: LayoutCache
) -> None:
    bank = Bank(backbone, slots=1, max_rank=4, max_kernels=2, layouts=layouts)
    bank.pack(Adapter.read(adapters[0].data, layouts=layouts))
    with pytest.raises(AdapterError, match=r"^fingerprint: the adapter was trained on"):
        bank.pack(Adapter.read(with_metadata(adapters[0], fingerprint="0" * 64), layouts=layouts))
    other = json.dumps(adapters[0].preprocess | {"input_size": [3, 64, 64]})
    with pytest.raises(AdapterError, match=r"^preprocess: input_size is \[3, 64, 64\]"):
        bank.pack(Adapter.read(with_metadata(adapters[0], preprocess=other), layouts=layouts))


def test_a_layout_is_not_kept_when_its_text_or_its_result_is_too_long(
    backbone: Backbone, adapters: list[Adapter]
) -> None:
    layouts = LayoutCache(max_text_chars=10, max_result_bytes=10)
    first, second = (Adapter.read(adapters[0].data, layouts=layouts) for _ in range(2))
    assert len(layouts) == 0
    assert first.layout is not second.layout
    Bank(backbone, slots=1, max_rank=4, max_kernels=2, layouts=layouts).pack(first)
    assert layouts.result_bytes == 0
