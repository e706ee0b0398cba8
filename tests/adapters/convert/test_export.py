"""Merged export: timm and onnxruntime load the files and compute the logits of the bank."""

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import safetensors
import timm
import torch
from typer.testing import CliRunner

import adapters
from adapters import Adapter, AdapterError, Backbone, Bank, load_backbone
from adapters.backbone import create_model
from adapters.convert import export
from adapters.convert.convert import convert
from hub.cli.main import app
from tests.support.models import random_adapter, random_pixels

LABELS = ["Katze", "собака", 'cat, "big"']


@pytest.fixture(scope="module")
def adapter(backbone: Backbone) -> Adapter:
    """Return an adapter with every optional part: kernels, re-scaling of channels, norms."""
    return random_adapter(backbone, classes=3, labels=LABELS, kernels=2, rank=4, rescale="channel", norms=True)


def served(backbone: Backbone, adapter: Adapter, pixels: torch.Tensor) -> torch.Tensor:
    bank = Bank(backbone, slots=1)
    return torch.stack(bank.forward(pixels, [bank.put(adapter)] * len(pixels)))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_unmerged_equals_the_bank(backbone: Backbone, adapter: Adapter) -> None:
    pixels = random_pixels(backbone, 3)
    with torch.inference_mode():
        assert_close(export.unmerged(adapter, backbone)(pixels), served(backbone, adapter, pixels))


def test_timm_loads_the_exported_checkpoint(backbone: Backbone, adapter: Adapter, tmp_path: Path) -> None:
    adapter.write(tmp_path / "in.safetensors")
    report = convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "timm", backbone)
    assert report["largest_relative_difference"] < 1e-4
    model = create_model("demo", num_classes=3)
    timm.models.load_checkpoint(model, str(tmp_path / "out.safetensors"), strict=True)
    pixels = random_pixels(backbone, 3)
    with torch.inference_mode():
        assert_close(model.eval()(pixels), served(backbone, adapter, pixels))
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["labels"]) == LABELS
    assert json.loads(metadata["preprocess"]) == adapter.preprocess
    assert metadata["adapter"] == adapter.digest


def test_timm_create_model_loads_the_checkpoint_by_path(tmp_path: Path) -> None:
    """The documented call; the demo backbone is not in timm's registry."""
    backbone = load_backbone("test_vit", pretrained=False)
    adapter = random_adapter(backbone, classes=4)
    adapter.write(tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "timm", backbone)
    model = timm.create_model("test_vit", num_classes=4, checkpoint_path=str(tmp_path / "out.safetensors")).eval()
    pixels = random_pixels(backbone, 2)
    with torch.inference_mode():
        assert_close(model(pixels), served(backbone, adapter, pixels))


def test_onnxruntime_runs_the_exported_file_with_any_batch_size(
    backbone: Backbone, adapter: Adapter, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter.write(tmp_path / "in.safetensors")
    report = convert(tmp_path / "in.safetensors", tmp_path / "out.onnx", "onnx", backbone)
    assert report["largest_relative_difference"] < 1e-4
    assert capfd.readouterr().out == ""  # otherwise `--json` would not be valid JSON
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.safetensors",
        "out.onnx",
    }  # one file, without a data file beside it

    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        pixels = random_pixels(backbone, count)
        assert_close(
            torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0]), served(backbone, adapter, pixels)
        )
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labels"]) == LABELS
    assert json.loads(metadata["preprocess"]) == adapter.preprocess
    onnx.checker.check_model(str(tmp_path / "out.onnx"))


@pytest.mark.parametrize("to", ["timm", "onnx"])
def test_convert_writes_no_file_when_the_merged_logits_differ(
    backbone: Backbone, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """With one wrong merged weight, an existing output stays."""
    merge = Adapter.merge

    def off(self: Adapter, onto: Backbone) -> Any:
        model: Any = merge(self, onto)
        model.blocks[3].mlp.fc1.weight[0] += 1
        return model

    monkeypatch.setattr(Adapter, "merge", off)
    adapter.write(tmp_path / "in.safetensors")
    out = tmp_path / {"timm": "out.safetensors", "onnx": "out.onnx"}[to]
    out.write_text("mine")
    with pytest.raises(AdapterError, match="was not written: its logits differ"):
        convert(tmp_path / "in.safetensors", out, to, backbone)
    assert out.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors", out.name}


def test_convert_refuses_an_adapter_of_another_backbone(adapter: Adapter, tmp_path: Path) -> None:
    torch.manual_seed(9)
    other = load_backbone("demo", pretrained=False)
    adapter.write(tmp_path / "in.safetensors")
    with pytest.raises(AdapterError, match="fingerprint"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.onnx", "onnx", other)


def test_convert_names_the_package_to_install_when_onnx_is_missing(
    backbone: Backbone, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    adapter.write(tmp_path / "in.safetensors")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'karst-hub\[onnx\]'"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.onnx", "onnx", backbone)


def test_the_convert_command_writes_a_file_and_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Path(adapters.__file__).parent / "demo" / "digits.safetensors"
    out = tmp_path / "digits-timm.safetensors"
    run = ["convert", str(demo), "--backbone", "demo", "--out"]
    done = CliRunner().invoke(app, [*run, str(out), "--to", "timm", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["labels"] == 10
    assert out.stat().st_size == json.loads(done.stdout)["bytes"]

    assert CliRunner().invoke(app, [*run, str(out), "--to", "zip"]).exit_code == 2
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = CliRunner().invoke(app, [*run, str(tmp_path / "digits.onnx"), "--to", "onnx"])
    assert (done.exit_code, done.stderr) == (1, "error: ONNX needs onnxruntime: pip install 'karst-hub[onnx]'\n")
