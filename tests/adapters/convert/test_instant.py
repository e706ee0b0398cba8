"""Conversion of an instant adapter: a head without kernels, with typicality and thresholds of label sets."""

import json
from pathlib import Path

import onnxruntime
import pytest
import safetensors
import timm
import torch

from adapters import Adapter, AdapterError, Backbone, KarstConfig, attach, extract, load_backbone
from adapters.backbone import create_model, features
from adapters.convert.convert import convert
from adapters.method.typicality import fit_typicality
from tests.support.models import random_adapter, random_pixels

LABELS = ["a", "b", "c"]
COVERAGE = [(0.9, 0.25), (0.95, 0.1)]


def instant(backbone: Backbone, file: Path, *, kernels: int = 0, rescale: str = "none") -> Adapter:
    """Write a random head with typicality and coverage."""
    torch.manual_seed(4)
    with torch.inference_mode():
        pooled = features(backbone.model, random_pixels(backbone, 24)).float()
    model = attach(backbone, KarstConfig.model_validate({"kernels": kernels, "rescale": rescale}), 3)
    adapter = extract(model, LABELS, typicality=fit_typicality(pooled), coverage=COVERAGE)
    adapter.write(file)
    return adapter


@pytest.mark.parametrize("to", ["timm", "onnx"])
def test_head_becomes_a_merged_model_with_its_coverage(backbone: Backbone, tmp_path: Path, to: str) -> None:
    adapter = instant(backbone, tmp_path / "in.safetensors")
    out = tmp_path / {"timm": "out.safetensors", "onnx": "out.onnx"}[to]
    report = convert(tmp_path / "in.safetensors", out, to, backbone)
    assert report["left_out"] == sorted(name for name in adapter.tensors if name.startswith("typicality."))
    pixels = random_pixels(backbone, 3)
    if to == "timm":
        model = create_model("demo", num_classes=3)
        timm.models.load_checkpoint(model, str(out), strict=True)
        with torch.inference_mode():
            found = model.eval()(pixels)
        with safetensors.safe_open(out, "pt") as opened:
            metadata = opened.metadata()
    else:
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
        metadata = session.get_modelmeta().custom_metadata_map
    with torch.inference_mode():
        torch.testing.assert_close(found, adapter.merge(backbone)(pixels), rtol=1e-3, atol=1e-4)
    assert json.loads(metadata["coverage"]) == [list(pair) for pair in COVERAGE]


@pytest.mark.parametrize("to", ["lokr", "lora"])
def test_head_without_kernels_is_refused_by_peft_targets(backbone: Backbone, tmp_path: Path, to: str) -> None:
    instant(backbone, tmp_path / "in.safetensors")
    with pytest.raises(AdapterError, match="has no layer with a dW"):
        convert(tmp_path / "in.safetensors", tmp_path / "out", to, backbone)
    assert not (tmp_path / "out").exists()


def test_lora_names_the_parts_that_it_leaves_out(backbone: Backbone, tmp_path: Path) -> None:
    adapter = instant(backbone, tmp_path / "in.safetensors", kernels=1)
    report = convert(tmp_path / "in.safetensors", tmp_path / "out", "lora", backbone)
    own = sorted(name for name in adapter.tensors if name.startswith("typicality."))
    assert report["left_out"] == [*own, "coverage"]


def test_adapter_without_such_parts_has_no_list_of_them(backbone: Backbone, tmp_path: Path) -> None:
    random_adapter(backbone, classes=3).write(tmp_path / "in.safetensors")
    assert "left_out" not in convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "timm", backbone)


def test_timm_checkpoint_has_the_image_size_of_the_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = load_backbone("vit_tiny_patch16_224", pretrained=False, image_size=64)
    adapter = random_adapter(backbone, classes=3)
    adapter.write(tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "timm", backbone)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64)
    timm.models.load_checkpoint(model, str(tmp_path / "out.safetensors"), strict=True)
    pixels = random_pixels(backbone, 2)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(pixels), adapter.merge(backbone)(pixels))
