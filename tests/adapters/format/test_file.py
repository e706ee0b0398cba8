"""One adapter, one file: the same bytes out and in, written completely or not at all, checked against a backbone."""

import hashlib
import json
import os
import resource
import struct
from dataclasses import FrozenInstanceError, fields, replace
from datetime import datetime

import pytest
import torch

from adapters import Adapter, AdapterError, KarstConfig
from adapters.data.images import preprocess_of
from tests.support.models import random_adapter, with_metadata

WEIGHT = "blocks.1.mlp.fc2"


def create(backbone, tensors, **changed) -> Adapter:
    arguments = {
        "config": KarstConfig(kernels=2, rank=4),
        "backbone": backbone.name,
        "fingerprint": backbone.fingerprint,
        "labels": ["cat", "dog"],
        "preprocess": preprocess_of(backbone),
        "created": "2025-01-01T00:00:00+00:00",
    }
    return Adapter.create(tensors, **(arguments | changed))


def head(backbone) -> dict[str, torch.Tensor]:
    return {"head.weight": torch.arange(2.0 * backbone.width).view(2, -1), "head.bias": torch.tensor([0.5, -0.5])}


@pytest.fixture(scope="module")
def adapter(backbone) -> Adapter:
    return random_adapter(backbone, kernels=2, rank=4, classes=3)


def test_what_is_written_is_read_back(adapter, tmp_path) -> None:
    path = tmp_path / "task.safetensors"
    adapter.write(path)
    again = Adapter.read(path)
    assert path.read_bytes() == again.data == adapter.data
    assert again.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in adapter.tensors.items())
    for field in fields(Adapter):
        if field.name != "tensors":
            assert getattr(again, field.name) == getattr(adapter, field.name)


def test_a_path_a_text_and_bytes_are_the_same_file(adapter, tmp_path) -> None:
    path = tmp_path / "task.safetensors"
    adapter.write(path)
    assert Adapter.read(path).digest == Adapter.read(str(path)).digest == Adapter.read(adapter.data).digest


def test_the_whole_file_byte_by_byte(backbone) -> None:
    """The format is a contract: what is written today must be what was written yesterday."""
    adapter = create(backbone, head(backbone), metrics={"b": 1, "a": 0.5})
    metadata = {
        "backbone": "demo",
        "config": '{"factor": 8, "gain": 0.25, "kernels": 2, "rank": 4, "rescale": "channel"}',
        "created": "2025-01-01T00:00:00+00:00",
        "fingerprint": backbone.fingerprint,
        "format": "karst/1",
        "labels": '["cat", "dog"]',
        "metrics": '{"a": 0.5, "b": 1}',
        "preprocess": '{"crop_mode": "center", "crop_pct": 1.0, "input_size": [3, 32, 32], '
        '"interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}',
        "producer": adapter.producer,
    }
    header = {
        "__metadata__": metadata,
        "head.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "head.weight": {"dtype": "F32", "shape": [2, 128], "data_offsets": [8, 1032]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    numbers = struct.pack("<258f", 0.5, -0.5, *range(256))
    assert adapter.data == struct.pack("<Q", len(text)) + text + numbers


def test_the_same_arguments_give_the_same_bytes(backbone, adapter) -> None:
    tensors = dict(adapter.tensors)
    backwards = dict(reversed(tensors.items()))
    labels = ["a", "b", "ä"]
    first, second = (create(backbone, t, labels=labels, metrics={"x": 1}) for t in (tensors, backwards))
    assert first.data == second.data


def test_the_digest_is_sha256_of_the_file(backbone, adapter) -> None:
    assert adapter.digest == hashlib.sha256(adapter.data).hexdigest()
    later = create(backbone, head(backbone), created="2026-01-01T00:00:00Z")
    assert create(backbone, head(backbone)).digest != later.digest


def test_fields_are_what_was_given(backbone) -> None:
    adapter = create(backbone, head(backbone), labels=["Käse", "犬"], metrics={"val_accuracy": 0.75})
    assert [f.name for f in fields(Adapter)] == [
        *("data", "digest", "config", "backbone", "fingerprint", "labels", "preprocess", "layout"),
        *("metrics", "created", "producer"),
    ]
    assert adapter.config == KarstConfig(kernels=2, rank=4, gain=0.25)
    assert (adapter.backbone, adapter.fingerprint) == ("demo", backbone.fingerprint)
    assert (adapter.labels, adapter.num_classes) == (("Käse", "犬"), 2)
    assert adapter.preprocess == preprocess_of(backbone)
    assert (adapter.metrics, adapter.created) == ({"val_accuracy": 0.75}, "2025-01-01T00:00:00+00:00")
    assert adapter.producer.startswith("karst-hub ")
    assert adapter.layers == {}
    with pytest.raises(FrozenInstanceError):
        adapter.digest = "another"


def test_a_file_says_when_it_was_made(backbone) -> None:
    created = create(backbone, head(backbone), created=None).created
    assert datetime.fromisoformat(created).utcoffset().total_seconds() == 0


def test_metrics_created_and_producer_are_optional(backbone) -> None:
    data = create(backbone, head(backbone)).data
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for name in ("created", "producer"):
        del header["__metadata__"][name]
    text = json.dumps(header).encode()
    adapter = Adapter.read(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert (adapter.metrics, adapter.created, adapter.producer) == (None, None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept(backbone, dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in head(backbone).items()}
    read = create(backbone, tensors).tensors
    assert all(read[name].dtype == dtype and torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_create_refuses_what_read_would_refuse(backbone) -> None:
    nan = head(backbone) | {"head.bias": torch.tensor([0.0, float("nan")])}
    with pytest.raises(AdapterError, match=r"^head.bias: has a value that is not finite \(NaN or infinity\)$"):
        create(backbone, nan)
    with pytest.raises(AdapterError, match=r"^labels: labels must be unique, but 'a' stand more than once$"):
        create(backbone, head(backbone), labels=["a", "a"])


def test_a_file_over_the_limit_is_refused(adapter, tmp_path) -> None:
    path, size = tmp_path / "task.safetensors", len(adapter.data)
    adapter.write(path)
    assert Adapter.read(path, max_bytes=size).digest == adapter.digest
    with pytest.raises(AdapterError, match=rf"task.safetensors: {size} bytes, but at most {size - 1} are allowed$"):
        Adapter.read(path, max_bytes=size - 1)
    with pytest.raises(AdapterError, match=rf"^file: {size} bytes, but at most {size - 1} are allowed$"):
        Adapter.read(adapter.data, max_bytes=size - 1)


def test_a_file_that_cannot_be_read_is_named(tmp_path) -> None:
    with pytest.raises(AdapterError, match=r"none.safetensors: No such file or directory$"):
        Adapter.read(tmp_path / "none.safetensors")
    with pytest.raises(AdapterError, match=r"^file: .*: Is a directory$"):
        Adapter.read(tmp_path)


def test_write_replaces_a_file_and_leaves_nothing_else(adapter, tmp_path) -> None:
    path = tmp_path / "task.safetensors"
    path.write_bytes(b"an older version")
    adapter.write(path)
    assert os.listdir(tmp_path) == ["task.safetensors"]
    assert path.read_bytes() == adapter.data
    assert path.stat().st_mode & 0o777 == 0o644


def test_write_into_no_folder_leaves_nothing(adapter, tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        adapter.write(tmp_path / "none" / "task.safetensors")
    assert os.listdir(tmp_path) == []


def test_write_over_a_folder_leaves_nothing(adapter, tmp_path) -> None:
    (tmp_path / "task.safetensors").mkdir()
    with pytest.raises(IsADirectoryError):
        adapter.write(tmp_path / "task.safetensors")
    assert os.listdir(tmp_path) == ["task.safetensors"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_write_into_a_read_only_folder_leaves_nothing(adapter, tmp_path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        adapter.write(tmp_path / "task.safetensors")
    assert os.listdir(tmp_path) == []


def test_write_with_no_space_keeps_the_older_file(adapter, tmp_path) -> None:
    path = tmp_path / "task.safetensors"
    path.write_bytes(b"an older version")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            adapter.write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["task.safetensors"]
    assert path.read_bytes() == b"an older version"


def test_a_fitting_adapter_passes_the_check(backbone, adapter) -> None:
    adapter.check(backbone)
    adapter.check(backbone.info())


def test_another_backbone_is_refused(backbone, adapter) -> None:
    other = replace(backbone.info(), name="other", fingerprint="f" * 64)
    with pytest.raises(AdapterError) as refusal:
        adapter.check(other)
    assert str(refusal.value) == (
        f"fingerprint: the adapter was trained on backbone 'demo' with fingerprint {backbone.fingerprint[:12]}..., "
        "but this backbone is 'other' with fingerprint ffffffffffff...; train it on this backbone's weights"
    )


WRONG = {
    "an unknown layer": (
        {"blocks.6.mlp.fc2.scale": (1,), "blocks.6.mlp.fc2.shift": (1,)},
        "blocks.6.mlp.fc2: backbone 'demo' has no such adaptable layer",
    ),
    "a layer that KARST leaves alone": (
        {"norm.scale": (1,), "norm.shift": (1,)},
        "norm: backbone 'demo' has no such adaptable layer",
    ),
    "another width of the head": ({"head.weight": (2, 64)}, "head.weight: has 64 columns, but the backbone has 128"),
    "too few outputs": (
        {f"{WEIGHT}.karst_c": (2, 8, 8), f"{WEIGHT}.karst_a": (2, 1, 15, 4), f"{WEIGHT}.karst_b": (2, 4, 64)},
        f"{WEIGHT}.karst_a: gives 1 x 8 x 15 outputs, the layer has 128",
    ),
    "too many inputs": (
        {f"{WEIGHT}.karst_c": (2, 8, 8), f"{WEIGHT}.karst_a": (2, 1, 16, 4), f"{WEIGHT}.karst_b": (2, 4, 65)},
        f"{WEIGHT}.karst_b: takes 8 x 65 inputs, the layer has 512",
    ),
    "splits of a layer without": (
        {f"{WEIGHT}.karst_c": (2, 8, 8), f"{WEIGHT}.karst_a": (2, 2, 8, 4), f"{WEIGHT}.karst_b": (2, 4, 64)},
        f"{WEIGHT}.karst_a: has 2 splits, expected 1",
    ),
    "a qkv that is not split": (
        {
            "blocks.0.attn.qkv.karst_c": (2, 8, 8),
            "blocks.0.attn.qkv.karst_a": (2, 1, 48, 4),
            "blocks.0.attn.qkv.karst_b": (2, 4, 16),
        },
        "blocks.0.attn.qkv.karst_a: has 1 splits, expected 3",
    ),
    "a scale of another length": (
        {f"{WEIGHT}.scale": (127,), f"{WEIGHT}.shift": (128,)},
        f"{WEIGHT}.scale: has 127 numbers, expected 128 or 1",
    ),
    "a scale where KARST has none": (
        {"blocks.0.mlp.fc1.scale": (1,), "blocks.0.mlp.fc1.shift": (1,)},
        "blocks.0.mlp.fc1.scale: KARST does not re-scale here; blocks.0.mlp.fc1.shift: KARST does not re-scale here",
    ),
    "an input scale where KARST has none": (
        {f"{WEIGHT}.in_scale": (1,), f"{WEIGHT}.in_shift": (1,)},
        f"{WEIGHT}.in_scale: KARST does not re-scale here; {WEIGHT}.in_shift: KARST does not re-scale here",
    ),
}


@pytest.mark.parametrize(("shapes", "message"), WRONG.values(), ids=WRONG.keys())
def test_tensors_that_do_not_fit_are_named(backbone, shapes, message) -> None:
    adapter = create(backbone, head(backbone) | {name: torch.ones(shape) for name, shape in shapes.items()})
    with pytest.raises(AdapterError) as refusal:
        adapter.check(backbone)
    assert str(refusal.value).startswith(message)


def test_another_input_size_is_refused(backbone) -> None:
    adapter = create(backbone, head(backbone), preprocess=preprocess_of(backbone) | {"input_size": [3, 64, 64]})
    with pytest.raises(
        AdapterError, match=r"^preprocess: input_size is \[3, 64, 64\], the backbone takes \[3, 32, 32\]$"
    ):
        adapter.check(backbone)


def test_the_check_collects_all_problems(backbone) -> None:
    scales = {f"{layer}.{part}": torch.ones(1) for layer in ("stem", "blocks.9.mlp.fc2") for part in ("scale", "shift")}
    adapter = create(
        backbone,
        head(backbone) | scales | {"head.weight": torch.ones(2, 1)},
        preprocess=preprocess_of(backbone) | {"input_size": [3, 64, 64]},
    )
    with pytest.raises(AdapterError) as refusal:
        adapter.check(backbone)
    assert [p.where for p in refusal.value.problems] == ["blocks.9.mlp.fc2", "stem", "head.weight", "preprocess"]


@pytest.mark.parametrize("created", ["", "yesterday", "2026-01-01", "2026-01-01T00:00:00"])
def test_a_time_that_is_none_is_refused(backbone, created) -> None:
    with pytest.raises(AdapterError, match="created: must be an RFC 3339 time"):
        Adapter.read(with_metadata(create(backbone, head(backbone)), created=created))
