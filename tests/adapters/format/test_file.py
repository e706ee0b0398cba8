"""An adapter file: byte-exact round trips, atomic writes, checks against a backbone."""

import hashlib
import json
import os
import pickle
import resource
import struct
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters import Adapter, AdapterError, Backbone, BankLimits, KarstConfig
from adapters.data.images import preprocess_of
from adapters.format.errors import MAX_PROBLEMS
from adapters.format.names import TYPICALITY
from tests.support.adapter_files import pack
from tests.support.models import random_adapter, with_metadata

WEIGHT = "blocks.1.mlp.fc2"


def create(backbone: Backbone, tensors: Mapping[str, torch.Tensor], **changed: Any) -> Adapter:
    arguments: dict[str, Any] = {
        "config": KarstConfig(kernels=2, rank=4),
        "backbone": backbone.name,
        "fingerprint": backbone.fingerprint,
        "labels": ["cat", "dog"],
        "preprocess": preprocess_of(backbone),
        "created": "2025-01-01T00:00:00+00:00",
    }
    return Adapter.create(tensors, **(arguments | changed))


def head(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {"head.weight": torch.arange(2.0 * backbone.width).view(2, -1), "head.bias": torch.tensor([0.5, -0.5])}


@pytest.fixture(scope="module")
def adapter(backbone: Backbone) -> Adapter:
    return random_adapter(backbone, kernels=2, rank=4, classes=3)


def test_read_returns_the_same_adapter_when_it_was_written(adapter: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    adapter.write(path)
    again = Adapter.read(path)
    assert path.read_bytes() == again.data == adapter.data
    assert again.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in adapter.tensors.items())
    for field in fields(Adapter):
        if field.name != "layout":  # compared by identity
            assert getattr(again, field.name) == getattr(adapter, field.name)
    ours, theirs = again.layout, adapter.layout
    assert list(ours.tensors.items()) == list(theirs.tensors.items())
    assert (ours.dtype, ours.data_bytes) == (theirs.dtype, theirs.data_bytes)


def test_read_returns_the_same_adapter_when_the_source_is_a_path_a_string_or_bytes(
    adapter: Adapter, tmp_path: Path
) -> None:
    path = tmp_path / "task.safetensors"
    adapter.write(path)
    assert Adapter.read(path).digest == Adapter.read(str(path)).digest == Adapter.read(adapter.data).digest


def test_create_writes_the_documented_bytes(backbone: Backbone) -> None:
    """The file format is a contract, so every byte is written out here."""
    adapter = create(backbone, head(backbone), metrics={"b": 1, "a": 0.5})
    metadata = {
        "backbone": "demo",
        "config": '{"factor": 8, "gain": 0.25, "kernels": 2, "rank": 4, "rescale": "channel"}',
        "created": "2025-01-01T00:00:00+00:00",
        "fingerprint": backbone.fingerprint,
        "format": "karst/1",
        "labels": '["cat", "dog"]',
        "metrics": '{"a": 0.5, "b": 1}',
        "preprocess": '{"background": [255, 255, 255], "crop_mode": "center", "crop_pct": 1.0, '
        '"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}',
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


def test_create_returns_equal_bytes_when_the_arguments_are_equal(backbone: Backbone, adapter: Adapter) -> None:
    tensors = dict(adapter.tensors)
    backwards = dict(reversed(tensors.items()))
    labels = ["a", "b", "ä"]
    first, second = (create(backbone, t, labels=labels, metrics={"x": 1}) for t in (tensors, backwards))
    assert first.data == second.data


def test_the_digest_is_the_sha256_of_the_file(backbone: Backbone, adapter: Adapter) -> None:
    assert adapter.digest == hashlib.sha256(adapter.data).hexdigest()
    later = create(backbone, head(backbone), created="2026-01-01T00:00:00Z")
    assert create(backbone, head(backbone)).digest != later.digest


def test_create_keeps_its_arguments(backbone: Backbone) -> None:
    adapter = create(backbone, head(backbone), labels=["Käse", "犬"], metrics={"val_accuracy": 0.75})
    assert [f.name for f in fields(Adapter)] == [
        *("data", "digest", "config", "backbone", "fingerprint", "labels", "preprocess", "layout"),
        *("metrics", "created", "producer", "coverage"),
    ]
    assert adapter.config == KarstConfig(kernels=2, rank=4, gain=0.25)
    assert (adapter.backbone, adapter.fingerprint) == ("demo", backbone.fingerprint)
    assert (adapter.labels, adapter.num_classes) == (("Käse", "犬"), 2)
    assert adapter.preprocess == preprocess_of(backbone)
    assert (adapter.metrics, adapter.created) == ({"val_accuracy": 0.75}, "2025-01-01T00:00:00+00:00")
    assert adapter.producer is not None
    assert adapter.producer.startswith("karst-hub ")
    assert adapter.layers == {}
    with pytest.raises(FrozenInstanceError):
        adapter.digest = "another"  # type: ignore[misc]  # the assignment is the test


def test_create_stores_the_current_time_when_none_is_given(backbone: Backbone) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    created = create(backbone, head(backbone), created=None).created
    assert created is not None
    assert before <= datetime.fromisoformat(created) <= datetime.now(UTC)


def test_read_accepts_a_file_when_its_optional_metadata_is_absent(backbone: Backbone) -> None:
    data = create(backbone, head(backbone)).data
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for name in ("created", "producer"):
        del header["__metadata__"][name]
    text = json.dumps(header).encode()
    adapter = Adapter.read(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert (adapter.metrics, adapter.created, adapter.producer) == (None, None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_create_keeps_the_dtype(backbone: Backbone, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in head(backbone).items()}
    read = create(backbone, tensors).tensors
    assert all(read[name].dtype == dtype and torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_create_raises_when_the_file_would_be_invalid(backbone: Backbone) -> None:
    nan = head(backbone) | {"head.bias": torch.tensor([0.0, float("nan")])}
    with pytest.raises(
        AdapterError, match=r"^head.bias: has a value that is not finite \(NaN or infinity\); train the adapter again$"
    ):
        create(backbone, nan)
    with pytest.raises(AdapterError, match=r"^labels: must be unique, but 'a' appear more than once$"):
        create(backbone, head(backbone), labels=["a", "a"])


def test_read_refuses_a_file_when_it_exceeds_max_bytes(adapter: Adapter, tmp_path: Path) -> None:
    path, size = tmp_path / "task.safetensors", len(adapter.data)
    adapter.write(path)
    assert Adapter.read(path, max_bytes=size).digest == adapter.digest
    with pytest.raises(AdapterError, match=rf"task.safetensors: has {size} bytes, but at most {size - 1} are allowed$"):
        Adapter.read(path, max_bytes=size - 1)
    with pytest.raises(AdapterError, match=rf"^file: has {size} bytes, but at most {size - 1} are allowed$"):
        Adapter.read(adapter.data, max_bytes=size - 1)


def test_read_names_the_path_when_it_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"none.safetensors: No such file or directory$"):
        Adapter.read(tmp_path / "none.safetensors")
    with pytest.raises(AdapterError, match=r"^file: .*: Is a directory$"):
        Adapter.read(tmp_path)


def test_write_replaces_a_file_and_leaves_no_other_file(adapter: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    path.write_bytes(b"an older version")
    adapter.write(path)
    assert os.listdir(tmp_path) == ["task.safetensors"]
    assert path.read_bytes() == adapter.data
    assert path.stat().st_mode & 0o777 == 0o644


def test_write_leaves_no_file_when_the_folder_does_not_exist(adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        adapter.write(tmp_path / "none" / "task.safetensors")
    assert os.listdir(tmp_path) == []


def test_write_leaves_no_file_when_the_path_is_a_folder(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "task.safetensors").mkdir()
    with pytest.raises(IsADirectoryError):
        adapter.write(tmp_path / "task.safetensors")
    assert os.listdir(tmp_path) == ["task.safetensors"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write into a read-only folder")
def test_write_leaves_no_file_when_the_folder_is_read_only(adapter: Adapter, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        adapter.write(tmp_path / "task.safetensors")
    assert os.listdir(tmp_path) == []


def test_write_keeps_the_older_file_when_the_disk_is_full(adapter: Adapter, tmp_path: Path) -> None:
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


def test_check_accepts_an_adapter_of_the_backbone(backbone: Backbone, adapter: Adapter) -> None:
    adapter.check(backbone)
    adapter.check(backbone.info())


def test_check_refuses_an_adapter_of_another_backbone(backbone: Backbone, adapter: Adapter) -> None:
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
    "a layer that KARST does not adapt": (
        {"norm.scale": (1,), "norm.shift": (1,)},
        "norm: backbone 'demo' has no such adaptable layer",
    ),
    "another width of the head": ({"head.weight": (2, 64)}, "head.weight: has 64 columns, but the backbone has 128"),
    "too few outputs": (
        {f"{WEIGHT}.karst_c": (2, 8, 8), f"{WEIGHT}.karst_a": (2, 1, 15, 4), f"{WEIGHT}.karst_b": (2, 4, 64)},
        f"{WEIGHT}.karst_a: gives 1 x 8 x 15 outputs with karst_c, but the layer has 128",
    ),
    "too many inputs": (
        {f"{WEIGHT}.karst_c": (2, 8, 8), f"{WEIGHT}.karst_a": (2, 1, 16, 4), f"{WEIGHT}.karst_b": (2, 4, 65)},
        f"{WEIGHT}.karst_b: takes 8 x 65 inputs with karst_c, but the layer has 512",
    ),
    "splits of a layer that is not fused": (
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
    "a scale at a site without re-scaling": (
        {"blocks.0.mlp.fc1.scale": (1,), "blocks.0.mlp.fc1.shift": (1,)},
        "blocks.0.mlp.fc1.scale: KARST does not re-scale this layer; remove it; blocks.0.mlp.fc1.shift: KARST",
    ),
    "an input scale at a site without one": (
        {f"{WEIGHT}.in_scale": (1,), f"{WEIGHT}.in_shift": (1,)},
        f"{WEIGHT}.in_scale: KARST does not re-scale this layer; remove it; {WEIGHT}.in_shift: KARST",
    ),
}


@pytest.mark.parametrize(("shapes", "message"), WRONG.values(), ids=WRONG.keys())
def test_check_names_the_tensor_when_it_does_not_fit(
    backbone: Backbone, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    adapter = create(backbone, head(backbone) | {name: torch.ones(shape) for name, shape in shapes.items()})
    with pytest.raises(AdapterError) as refusal:
        adapter.check(backbone)
    assert str(refusal.value).startswith(message)


def test_check_refuses_another_input_size(backbone: Backbone) -> None:
    adapter = create(backbone, head(backbone), preprocess=preprocess_of(backbone) | {"input_size": [3, 64, 64]})
    with pytest.raises(
        AdapterError,
        match=r"^preprocess: input_size is \[3, 64, 64\], but the backbone takes \[3, 32, 32\]; train with that size$",
    ):
        adapter.check(backbone)


def test_check_collects_all_problems(backbone: Backbone) -> None:
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
def test_read_refuses_an_invalid_time(backbone: Backbone, created: str) -> None:
    with pytest.raises(AdapterError, match=r"created: is .*, expected an RFC 3339 time"):
        Adapter.read(with_metadata(create(backbone, head(backbone)), created=created))


def test_read_says_what_to_do_when_the_file_is_a_pickle(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"w": torch.ones(1)}, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(AdapterError, match=r"but a pickle or zip such as PyTorch's .pth, .* `karst-hub convert`"):
            Adapter.read(tmp_path / "model.pth")


def files_with_tensors(count: int) -> list[bytes]:
    """Return files with this many tensors: as safetensors writes it, and with an escape in each tensor's entry."""
    data = pack({f"blocks.{i}.attn.qkv.scale": np.ones(1, np.float32) for i in range(count)})
    escaped = data[8:].replace(b'"data_offsets"', b'"data_offset\\u0073"')
    header_bytes = len(escaped) - 4 * count
    return [data, struct.pack("<Q", header_bytes) + escaped]


@pytest.mark.parametrize("form", [0, 1])
def test_read_refuses_a_file_by_its_header_when_it_has_too_many_tensors(form: int) -> None:
    with pytest.raises(AdapterError, match=r"^file: has 21 tensors, but at most 20 are allowed"):
        Adapter.read(files_with_tensors(21)[form], max_tensors=20)
    with pytest.raises(AdapterError, match=r"head\.weight"):
        Adapter.read(files_with_tensors(20)[form], max_tensors=20)


def test_bank_s_limit_is_that_of_a_file_with_all_tensors_of_every_layer(backbone: Backbone) -> None:
    limits = BankLimits(backbone.info(), max_rank=8, max_kernels=4, factor=4)
    largest = random_adapter(backbone, norms=True)
    parts = [len(parts) for parts in largest.layers.values()]
    assert sum(parts) + 2 <= limits.max_tensors <= sum(parts) + 2 + len(TYPICALITY)


def test_error_has_the_first_fifty_problems_when_a_file_has_more() -> None:
    with pytest.raises(AdapterError) as error:
        Adapter.read(pack({f"wrong.{i}": np.ones(1, np.float32) for i in range(200)}))
    problems = error.value.problems
    assert len(problems) == MAX_PROBLEMS
    assert problems[-1].message == "has more problems; the check ended here"
    assert str(error.value).endswith("; and 45 more")
    assert pickle.loads(pickle.dumps(error.value)).problems == problems
