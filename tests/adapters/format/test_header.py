"""Files whose tensors lie as those of a file before are known again, and judged no differently."""

import json
import struct

import pytest
import torch

from adapters import Adapter, AdapterError, Bank
from adapters.format import header
from adapters.format.header import MOST_LAYOUTS, _layouts
from adapters.serving.slot_memory import MOST_PLANS
from tests.support.models import random_adapter, random_pixels


def with_metadata(adapter: Adapter, **changed: str) -> bytes:
    """The same file but for some of its metadata."""
    length = struct.unpack("<Q", adapter.data[:8])[0]
    found = json.loads(adapter.data[8 : 8 + length])
    found["__metadata__"] |= changed
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + adapter.data[8 + length :]


def with_dtype(adapter: Adapter, *dtypes: torch.dtype) -> Adapter:
    """The same numbers, as near as these dtypes have them, which the tensors take by turns."""
    tensors = {name: t.to(dtypes[i % len(dtypes)]) for i, (name, t) in enumerate(adapter.tensors.items())}
    return Adapter.create(
        tensors,
        config=adapter.config,
        backbone=adapter.backbone,
        fingerprint=adapter.fingerprint,
        labels=adapter.labels,
        preprocess=adapter.preprocess,
    )


@pytest.fixture(scope="module")
def adapters(backbone):
    return [random_adapter(backbone, seed=seed, kernels=2, rank=4, norms=seed == 3) for seed in range(4)]


def test_adapters_of_one_shape_share_a_layout(adapters) -> None:
    _layouts.clear()
    first, second, third, fourth = (Adapter.read(adapter.data) for adapter in adapters)
    assert first.layout is second.layout is third.layout
    assert fourth.layout is not first.layout
    assert "tensors" not in vars(second)  # only the first was looked at tensor by tensor
    assert list(first.layout.tensors) == list(first.tensors)
    for adapter, again in zip(adapters, (first, second, third, fourth), strict=True):
        assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in adapter.tensors.items())


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float16], [torch.bfloat16], [torch.float16, torch.float32]])
def test_numbers_are_those_of_the_tensors(adapters, dtypes) -> None:
    made = with_dtype(adapters[0], *dtypes)
    again = Adapter.read(made.data)
    assert again.layout is made.layout
    expected = torch.cat([made.tensors[name].flatten().float() for name in made.layout.tensors])
    assert torch.equal(again.numbers, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": '{"kernels":3,"rank":4,"factor":8,"gain":0.25,"rescale":"channel"}'}, r".*kernels, config says 3"),
        ({"config": '{"kernels":2,"rank":2,"factor":8,"gain":0.25,"rescale":"channel"}'}, r".*config says 2"),
        ({"config": '{"kernels":2,"rank":4,"factor":8,"gain":0.25,"rescale":"none"}'}, r".*has re-scaling tensors"),
        ({"labels": '["a","b"]'}, r"head.weight: has shape \(5, 128\), expected \(2, D\)"),
        ({"fingerprint": "x"}, "fingerprint: must be a sha256"),
        ({"preprocess": "{}"}, "preprocess: must be a JSON object"),
        ({"format": "karst/2"}, "format: is 'karst/2'"),
    ],
)
def test_other_metadata_is_checked_against_the_tensors(adapters, changed, message) -> None:
    Adapter.read(adapters[0].data)
    with pytest.raises(AdapterError, match=f"^{message}"):
        Adapter.read(with_metadata(adapters[0], **changed))
    again = Adapter.read(with_metadata(adapters[0], backbone="another"))  # what was right before still is
    assert again.backbone == "another"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_number_that_is_not_finite_is_found_and_named(adapters, dtype, number) -> None:
    good = with_dtype(adapters[0], dtype)
    start = len(good.data) - good.layout.data_bytes
    name, *_ = good.layout.tensors
    wrong = torch.tensor([number], dtype=dtype).view(torch.uint8).numpy().tobytes()
    with pytest.raises(AdapterError, match=f"^{name}: has a value that is not finite"):
        Adapter.read(good.data[:start] + wrong + good.data[start + len(wrong) :])


@pytest.mark.parametrize("end", [b"\0", None])
def test_a_file_of_another_length_is_refused(adapters, end) -> None:
    Adapter.read(adapters[0].data)
    with pytest.raises(AdapterError, match=r"^file: (truncated|not a valid safetensors file)"):
        Adapter.read(adapters[0].data[:-1] if end is None else adapters[0].data + end)


@torch.inference_mode()
def test_a_bank_packs_all_of_a_layout_by_one_plan_and_each_with_its_own_gain(backbone, adapters) -> None:
    bank = Bank(backbone, slots=4, max_rank=4, max_kernels=2)
    gains = "0.25", "0.5", "1.7"
    config = '{{"kernels":2,"rank":4,"factor":8,"gain":{},"rescale":"channel"}}'
    files = [with_metadata(a, config=config.format(g)) for a, g in zip(adapters, gains, strict=False)]
    made = [Adapter.read(file) for file in files]
    slots = [bank.put(adapter) for adapter in made]
    assert len(bank._stacks._plans) == 1
    pixels = random_pixels(backbone, len(slots))
    for adapter, image, logits in zip(made, pixels, bank.forward(pixels, slots), strict=True):
        torch.testing.assert_close(logits, adapter.merge(backbone)(image[None])[0], atol=1e-4, rtol=0)


def test_what_is_remembered_is_bounded(backbone) -> None:
    bank = Bank(backbone, slots=1, max_rank=2, max_kernels=1)
    for classes in range(2, 4 + MOST_LAYOUTS):
        bank.pack(random_adapter(backbone, kernels=1, rank=1, classes=classes))
    assert len(_layouts) == MOST_LAYOUTS
    assert len(bank._stacks._plans) == MOST_PLANS


def test_a_bank_checks_each_backbone_and_size_anew(backbone, adapters) -> None:
    bank = Bank(backbone, slots=1, max_rank=4, max_kernels=2)
    bank.pack(Adapter.read(adapters[0].data))
    with pytest.raises(AdapterError, match=r"^fingerprint: the adapter was trained on"):
        bank.pack(Adapter.read(with_metadata(adapters[0], fingerprint="0" * 64)))
    other = json.dumps(adapters[0].preprocess | {"input_size": [3, 64, 64]})
    with pytest.raises(AdapterError, match=r"^preprocess: input_size is \[3, 64, 64\]"):
        bank.pack(Adapter.read(with_metadata(adapters[0], preprocess=other)))


def test_a_layout_too_long_to_keep_is_read_all_the_same(adapters, monkeypatch) -> None:
    _layouts.clear()
    monkeypatch.setattr(header, "LONGEST_LAYOUT", 10)
    first, second = (Adapter.read(adapters[0].data) for _ in range(2))
    assert not _layouts
    assert first.layout is not second.layout
